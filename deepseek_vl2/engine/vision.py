"""Tiles through the vision tower and the projector, captured and replayed for some numbers of tiles.

A tile costs the device over a millisecond, so their number is not rounded up; cuDNN plans its attention anew for each
number that it has not met, which takes the host 100 ms. So a number that is not captured is cut into some that are. The
modules are the model's own, but for sums and norms in the tower, which are by a kernel where
`vision_kernels.unsupported_reason` has nothing against it.

Shape suffixes: V tiles, S side of a tile in pixels, L tokens of a tile, H width of the language model.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..models.image_merge import real_grids, select_tiles
from ..models.modeling_deepseek_vl_v2 import DeepseekVLV2ForCausalLM
from . import cuda_graphs, vision_kernels
from .attached import attached
from .cuda_graphs import CapturedGraph, GraphCache
from .fingerprint import ModuleFingerprint
from .support import unsupported_bypass

logger = logging.getLogger(__name__)

# Up to so many tiles have a graph for each number, and a full pass has one. A graph's memory grows with its number of
# tiles, and is held.
MAX_TILES = 16
FULL_PASS = 32
MAX_GRAPHS = 20
KNOWN = ("torch.nn.", "timm.", "deepseek_vl2.")


@dataclass
class VisionBuffers:
    """What a graph reads, [V, 3, S, S], and what it writes, [V, L, H], made at its first use."""

    pixels: torch.Tensor
    embeddings: torch.Tensor | None = None


def features_of(vision: Any, pixels_V3SS: torch.Tensor) -> torch.Tensor:
    """Return the tower's features of tiles, by kernels where they are for them."""
    failed = attached(vision).values
    reason = failed.get("reason") or vision_kernels.unsupported_reason(vision, pixels_V3SS)
    if reason is None:
        try:
            return vision_kernels.encode(vision, pixels_V3SS)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or its tools may raise: the modules still work
            failed["reason"] = f"{type(error).__name__}: {error}"
            logger.warning("Tiles go through the vision tower's own modules from now on: %s", failed["reason"])
    else:
        logger.debug("Tiles go through the vision tower's own modules: %s.", reason)
    features: torch.Tensor = vision(pixels_V3SS)
    return features


def encode_into(model: Any, given: VisionBuffers) -> None:
    """Write the embeddings of tiles."""
    embeddings = model.projector(features_of(model.vision, given.pixels))
    if given.embeddings is None:
        with torch.inference_mode(False):  # later calls outside of inference mode write it too
            given.embeddings = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
    given.embeddings.copy_(embeddings)


def parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return the weights that tiles run through."""
    return [*model.vision.parameters(), *model.projector.parameters()]


class Encoder:
    """The captured graphs of one model. They are of use as long as its tower and its projector stay as they are."""

    def __init__(self, model: Any) -> None:
        self.parts = (model.vision, model.projector)
        self.fingerprints = [ModuleFingerprint(part) for part in self.parts]
        device = parameters(model)[0].device
        self.capture = cuda_graphs.capture_for(device)
        self.ended = torch.cuda.Event() if device.type == "cuda" else None
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graphs = GraphCache(MAX_GRAPHS)
        # Graphs share what they read and write: only one of them runs at a time.
        self.pixels: torch.Tensor | None = None
        self.embeddings: torch.Tensor | None = None
        self.model = weakref.ref(model)
        self.broken: str | None = None
        self.lock = threading.Lock()

    def is_for(self, model: Any) -> bool:
        """Whether the model runs tiles through what it did when the encoder was made."""
        same = model.vision is self.parts[0] and model.projector is self.parts[1]
        return same and all(fingerprint.matches() for fingerprint in self.fingerprints)

    def new_graph(self, tiles_V3SS: torch.Tensor) -> CapturedGraph:
        """Return the captured graph of that many tiles."""
        count, model = len(tiles_V3SS), self.model
        with torch.inference_mode(False):
            held = self.pixels
            if held is None or len(held) < count or held.shape[1:] != tiles_V3SS.shape[1:]:
                self.pixels = held = torch.empty_like(tiles_V3SS, memory_format=torch.contiguous_format)
                self.embeddings = None  # made at the first use, of as many tiles
            given = VisionBuffers(held[:count], None if self.embeddings is None else self.embeddings[:count])
        return CapturedGraph(given, lambda: encode_into(model(), given))

    def is_captured(self, tiles_V3SS: torch.Tensor) -> bool:
        """Whether the graph of that many tiles only needs to be replayed."""
        one = self.graphs.held.get((tuple(tiles_V3SS.shape), cuda_graphs.modes()))
        return one is not None and one.replay is not None

    def begin(self, tiles_V3SS: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Encode tiles on a stream of the encoder's own; returns what makes the caller's stream wait, and the result.

        What the caller's stream does meanwhile, copies that the host waits for among it, does not wait for the tower.
        """
        if self.side is None:
            embeddings = self.encode(tiles_V3SS)
            return lambda: embeddings
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            embeddings = self.encode(tiles_V3SS)
            done = self.side.record_event()
        tiles_V3SS.record_stream(self.side)

        def result() -> torch.Tensor:
            done.wait()
            embeddings.record_stream(torch.cuda.current_stream())
            return embeddings

        return result

    def encode(self, tiles_V3SS: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, [V, L, H], of tiles."""
        if self.ended is not None:  # a call on another stream may still read or write the buffers
            self.ended.wait()
        one = self.graphs.get((tuple(tiles_V3SS.shape), cuda_graphs.modes()), lambda: self.new_graph(tiles_V3SS))
        one.buffers.pixels.copy_(tiles_V3SS)
        self.broken = one(self.capture)
        if self.pixels is not None and self.embeddings is None and len(self.pixels) == len(tiles_V3SS):
            self.embeddings = one.buffers.embeddings
        embeddings: torch.Tensor = one.buffers.embeddings.clone()
        if self.ended is not None:
            self.ended.record()
        return embeddings


def unsupported_call(model: Any, tiles_V3SS: torch.Tensor) -> str | None:
    """Return why these tiles, or the settings they come under, cannot use a captured graph."""
    if type(model) is not DeepseekVLV2ForCausalLM or model.training:
        return "another model, or training"
    if torch.is_grad_enabled() or torch.is_autocast_enabled(tiles_V3SS.device.type) or torch.compiler.is_compiling():
        return "gradients, autocast or compilation are on"
    if len(tiles_V3SS) == 0:
        return "there are no tiles"
    weight = next(model.projector.parameters(), model.image_newline)
    if (weight.device, weight.dtype) != (tiles_V3SS.device, tiles_V3SS.dtype):
        return "the weights are of another dtype than the tiles, or on another device"
    return unsupported_bypass(model.vision) or unsupported_bypass(model.projector)  # and hooks of all modules


def unsupported_modules(model: Any) -> str | None:
    """Return why the tower and the projector must run as they are."""
    weights = parameters(model)
    if {type(weight) for weight in weights} != {torch.nn.Parameter}:
        return "some weights are quantized or distributed tensors"
    if len({(weight.device, weight.dtype) for weight in weights}) != 1:
        return "the weights are of several dtypes or on several devices"
    for module in (*model.vision.modules(), *model.projector.modules()):
        if not type(module).__module__.startswith(KNOWN):
            return f"a {type(module).__name__} is of another package"
        if module.training or (reason := unsupported_bypass(module)) is not None:
            return f"a {type(module).__name__} is in training mode" if module.training else reason
        if getattr(type(module), "backend", None) is not None and module.backend != "sdpa":
            return f"attention is {module.backend!r}"
    return None


def unsupported_tiles(model: Any, tiles_V3SS: torch.Tensor) -> str | None:
    """Return why tiles go through the modules as they are."""
    return unsupported_call(model, tiles_V3SS) or unsupported_modules(model)


def encoder_of(model: Any) -> Encoder | None:
    """Return the model's encoder, a new one when anything of it has changed; ``None``: its modules are not for one."""
    held = attached(model)
    with held.lock:
        encoder: Encoder | None = held.values.get("encoder")
        if encoder is not None and encoder.is_for(model):
            return encoder
        held.values.pop("encoder", None)
        if (reason := unsupported_modules(model)) is not None:
            logger.debug("Tiles without a captured graph: %s.", reason)
            return None
        attached(model.vision)  # before the fingerprints are taken
        held.values["encoder"] = encoder = Encoder(model)
        return encoder


def cut(tiles: int) -> list[int]:
    """Return numbers of tiles that have a graph each, and together are as many as given."""
    sizes = [FULL_PASS] * (tiles // FULL_PASS)
    rest = tiles % FULL_PASS
    return [*sizes, *((MAX_TILES, rest - MAX_TILES) if rest > MAX_TILES else (rest,) if rest else ())]


def encode_tiles(model: Any, tiles_V3SS: torch.Tensor) -> torch.Tensor | None:
    """Return the embeddings, [V, L, H], of tiles; ``None`` where they must go through the model's own call.

    They replay captured graphs, unless another thread is at it.
    """
    if (reason := unsupported_call(model, tiles_V3SS)) is not None:
        logger.debug("Tiles go through the model's own modules: %s.", reason)
        return None
    encoder = encoder_of(model)
    if encoder is None:
        return None
    if encoder.broken is not None or not encoder.lock.acquire(blocking=False):
        embeddings: torch.Tensor = model.projector(features_of(model.vision, tiles_V3SS))
        return embeddings
    try:
        parts = [encoder.encode(part) for part in tiles_V3SS.split(cut(len(tiles_V3SS)))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    finally:
        encoder.lock.release()


@torch.inference_mode()
def warm_up(model: Any) -> None:
    """Capture all graphs of tiles, which takes seconds."""
    weight, side = model.vision.patch_embed.proj.weight, model.config.vision_config.image_size
    # The most first: they make the buffers that all share.
    for count in (FULL_PASS, *range(MAX_TILES, 0, -1)):
        tiles = weight.new_zeros(count, 3, side, side)
        for _ in range(2):  # launched, and then captured
            encode_tiles(model, tiles)


def begin(model: Any, images: torch.Tensor, crops: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """Begin to encode the images of a batch; returns what waits for the embeddings of its tiles, [V, L, H].

    ``None`` where they are not captured yet, or cannot use a graph. Whether ids, mask and images agree is checked
    by those who use the result.

    Args:
        images: [B, tiles, 3, S, S], on the device of the model's vision tower.
        crops: tiles across and down for each image, [B, images, 2].
    """
    if type(model) is not DeepseekVLV2ForCausalLM or images.dim() != 5 or crops.dim() != 3:
        return None
    weight = model.vision.patch_embed.proj.weight
    encoder: Encoder | None = attached(model).values.get("encoder")
    if images.device != weight.device or len(images) != len(crops) or encoder is None:
        return None
    grids = real_grids(crops.tolist())
    if not 0 < max(sum(grid.views for grid in row) for row in grids) <= images.shape[1]:
        return None
    tiles_V3SS = select_tiles(images, grids).to(weight.dtype)
    if len(tiles_V3SS) > MAX_TILES or unsupported_call(model, tiles_V3SS) is not None:
        return None
    encoder = encoder_of(model)
    if encoder is None or encoder.broken is not None or not encoder.lock.acquire(blocking=False):
        return None
    try:
        return encoder.begin(tiles_V3SS) if encoder.is_captured(tiles_V3SS) else None
    finally:
        encoder.lock.release()
