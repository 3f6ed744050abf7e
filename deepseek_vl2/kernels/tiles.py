"""Tiles through the vision tower and the projector, recorded and replayed for each number of tiles.

A tile costs the device some two milliseconds, so their number is not rounded up. Of few tiles the device is done sooner
than the host has launched the tower's operations. The modules are the model's own.

Shape suffixes: V tiles, S side of a tile in pixels, L tokens of a tile, H width of the language model.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..models.modeling_deepseek_vl_v2 import DeepseekVLV2ForCausalLM
from . import graphs
from .graphs import Pass, Passes, why_not_bypassed

logger = logging.getLogger(__name__)

# Beyond this many tiles the device takes longer than the host needs to launch: one image has at most ten.
MAX_TILES = 10
MAX_PASSES = 4
KNOWN = ("torch.nn.", "timm.", "deepseek_vl2.")


@dataclass
class Tiles:
    """What a pass reads, [V, 3, S, S], and what it writes, [V, L, H], made at its first use."""

    pixels: torch.Tensor
    embeddings: torch.Tensor | None = None


def encode_into(model: Any, given: Tiles) -> None:
    """Write the embeddings of tiles."""
    embeddings = model.projector(model.vision(given.pixels))
    if given.embeddings is None:
        with torch.inference_mode(False):  # later calls outside of inference mode write it too
            given.embeddings = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
    given.embeddings.copy_(embeddings)


def parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return the weights that tiles run through."""
    return [*model.vision.parameters(), *model.projector.parameters()]


class Encoder:
    """The passes of one model; recordings hold the addresses of its weights."""

    def __init__(self, model: Any) -> None:
        self.addresses = addresses(model)
        device = parameters(model)[0].device
        self.record = graphs.recorder_for(device)
        self.ended = torch.cuda.Event() if device.type == "cuda" else None
        self.passes = Passes(MAX_PASSES)
        self.model = weakref.ref(model)
        self.broken: str | None = None
        self.lock = threading.Lock()

    def new_pass(self, tiles_V3SS: torch.Tensor) -> Pass:
        """Return the pass over that many tiles."""
        with torch.inference_mode(False):
            given, model = Tiles(torch.empty_like(tiles_V3SS, memory_format=torch.contiguous_format)), self.model
        return Pass(given, lambda: encode_into(model(), given))

    def encode(self, tiles_V3SS: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, [V, L, H], of tiles."""
        if self.ended is not None:  # a call on another stream may still read or write the buffers
            self.ended.wait()
        one = self.passes.get((tuple(tiles_V3SS.shape), graphs.modes()), lambda: self.new_pass(tiles_V3SS))
        one.buffers.pixels.copy_(tiles_V3SS)
        self.broken = one(self.record)
        embeddings: torch.Tensor = one.buffers.embeddings.clone()
        if self.ended is not None:
            self.ended.record()
        return embeddings


ENCODERS: WeakKeyDictionary[Any, Encoder] = WeakKeyDictionary()


def addresses(model: Any) -> tuple[int, ...]:
    """Return where the weights lie."""
    return tuple(parameter.data_ptr() for parameter in parameters(model))


def encoder_of(model: Any) -> Encoder:
    """Return the model's encoder; a new one when its weights have moved."""
    encoder = ENCODERS.get(model)
    if encoder is None or encoder.addresses != addresses(model):
        encoder = ENCODERS[model] = Encoder(model)
    return encoder


def release(model: Any) -> None:
    """Free what was recorded for a model."""
    ENCODERS.pop(model, None)


def why_not_tiles(model: Any, tiles_V3SS: torch.Tensor) -> str | None:
    """Return why tiles go through the modules as they are."""
    if type(model) is not DeepseekVLV2ForCausalLM or model.training:
        return "another model, or training"
    if torch.is_grad_enabled() or torch.is_autocast_enabled(tiles_V3SS.device.type) or torch.compiler.is_compiling():
        return "gradients, autocast or compilation are on"
    if not 1 <= len(tiles_V3SS) <= MAX_TILES:
        return f"no tiles, or more than {MAX_TILES}"
    weights = parameters(model)
    if {type(weight) for weight in weights} != {torch.nn.Parameter}:
        return "some weights are quantized or distributed tensors"
    if {(weight.device, weight.dtype) for weight in weights} != {(tiles_V3SS.device, tiles_V3SS.dtype)}:
        return "the weights are of several dtypes or on several devices"
    for module in (*model.vision.modules(), *model.projector.modules()):
        if not type(module).__module__.startswith(KNOWN):
            return f"a {type(module).__name__} is of another package"
        if module.training or (reason := why_not_bypassed(module)) is not None:
            return f"a {type(module).__name__} is in training mode" if module.training else reason
        if getattr(type(module), "backend", None) is not None and module.backend != "sdpa":
            return f"attention is {module.backend!r}"
    return None


def encode_tiles(model: Any, tiles_V3SS: torch.Tensor) -> torch.Tensor | None:
    """Return the embeddings, [V, L, H], of tiles by a recorded pass; ``None`` where it is not for them."""
    reason = why_not_tiles(model, tiles_V3SS)
    if reason is not None:
        logger.debug("Tiles without a recorded pass: %s.", reason)
        return None
    encoder = encoder_of(model)
    if encoder.broken is not None or not encoder.lock.acquire(blocking=False):
        return None  # it cannot be recorded, or another thread is at it
    try:
        return encoder.encode(tiles_V3SS)
    finally:
        encoder.lock.release()
