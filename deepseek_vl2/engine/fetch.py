"""Numbers on their way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .request import Answer
from .sampler import Sampled


class Fetch:
    """A copy of a small tensor that was begun, and that nobody has waited for yet.

    Args:
        tensor: what is copied; it may be overwritten from the next operation on its stream on.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self.held = tensor.clone()
            return
        with torch.cuda.device(tensor.device):
            self.held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.held.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.current_stream().record_event()

    def wait(self) -> list[Any]:
        """Wait for the numbers and return them."""
        if self.event is not None:
            self.event.synchronize()
        return self.held.tolist()


@dataclass
class Pending:
    """Tokens on their way to the host, and whose they are."""

    answers: list[Answer]
    sampled: Sampled
    logged: list[int]
    tokens: Fetch
    logprobs: Fetch | None
