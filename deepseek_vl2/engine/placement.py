"""Whether and how a model is fast: decided once, when an engine is made for it."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.cpu.threads import one_thread
from .kv_cache import KVCache
from .runner import ModuleRunner, Runner
from .support import unsupported_reason

logger = logging.getLogger(__name__)

# Numbers of a language model.
SMALL = 100_000_000


@dataclass(frozen=True)
class Placement:
    """How a model runs.

    Fields:
        runner: what runs it.
        device: where tokens are chosen: that of the output head.
        devices: all devices of its layers.
        reason: why it runs by its modules, and not by kernels; ``None`` where it does not.
        small: its steps on a CPU are so short that threads would wait for one another most of the time.
    """

    runner: Runner
    device: torch.device
    devices: tuple[torch.device, ...]
    reason: str | None = None

    small: bool = False

    def context(self) -> AbstractContextManager[Any]:
        """Return what the engine's steps run in: the device of the tokens, or on a CPU the threads that are of use."""
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return one_thread() if self.small and self.device.type == "cpu" else nullcontext()


def place(language: Any, kv_cache: KVCache, max_batch: int) -> Placement:
    """Choose what runs a model, and try it; where kernels fail to compile, or compute wrongly, its own modules do."""
    devices = tuple(dict.fromkeys(shape.device for shape in kv_cache.shapes))
    weight = getattr(language.get_output_embeddings(), "weight", None)
    device = weight.device if isinstance(weight, torch.Tensor) and weight.device.type != "meta" else devices[-1]
    reason = unsupported_reason(language)
    if reason is None:
        try:
            return Placement(_triton_runner(language, kv_cache, max_batch), device, devices)
        except torch.OutOfMemoryError:
            raise
        # Whatever a compiler, its tools or a driver may raise: the modules still work, and the reason is shown.
        except Exception as error:
            reason = f"the kernels failed to start: {type(error).__name__}: {error}"
            logger.warning("The model runs by its own modules: %s", reason)
    logger.debug("The model runs by its own modules: %s.", reason)
    small = sum(parameter.numel() for parameter in language.parameters()) < SMALL
    return Placement(ModuleRunner(language, kv_cache, max_batch), device, devices, reason, small)


def _triton_runner(language: Any, kv_cache: KVCache, max_batch: int) -> Runner:
    from .self_check import check_packed
    from .triton_runner import TritonRunner
    from .weights import read_weights

    weights = read_weights(language)
    runner = TritonRunner(language, weights, kv_cache, max_batch)
    runner.warm_up()
    check_packed(weights)
    return runner
