"""Whether and how a model is fast: decided once, when an engine is made for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .kv_cache import KVCache
from .runner import ModuleRunner, Runner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """How a model runs.

    Fields:
        runner: what runs it.
        device: where its rows' tokens are.
        logits_device: where its logits are.
        reason: why it runs by its modules, and not by kernels; ``None`` where it does not.
    """

    runner: Runner
    device: torch.device
    logits_device: torch.device
    reason: str | None = None

    @contextmanager
    def context(self) -> Iterator[None]:
        """Make the model's device and the engine's stream the current ones of this thread."""
        yield


def place(language: Any, kv_cache: KVCache, max_batch: int) -> Placement:
    """Choose what runs a model."""
    head = language.get_output_embeddings()
    weight = getattr(head, "weight", None)
    device = weight.device if isinstance(weight, torch.Tensor) and weight.device.type != "meta" else language.device
    return Placement(ModuleRunner(language, kv_cache, max_batch), language.device, device, "modules")
