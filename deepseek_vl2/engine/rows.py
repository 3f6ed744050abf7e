"""The rows of a decoding step: which answers are being written, and where each stands, on the device.

A row keeps its place as long as it goes on, and those at work stand at the front: a captured step reads the tensors as
they are. The host uploads them anew only when answers join or leave, or an extent moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..models.cache import Segment
from .request import Answer


@dataclass
class RowTensors:
    """Where rows stand, on one device.

    Fields:
        tokens: the ids to read next, [B], int64.
        positions: where those stand, int32.
        starts: index in the pool of each row's token 0, int64.
        advance: what a step adds to positions: 1, and 0 for the padding of a captured step, int32.
        live: how many rows are at work, int32 [1].
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    advance: torch.Tensor
    live: torch.Tensor

    def first(self, rows: int) -> RowTensors:
        """Return the first rows, in the same memory."""
        return RowTensors(self.tokens[:rows], self.positions[:rows], self.starts[:rows], self.advance[:rows], self.live)


def new_rows(capacity: int, device: torch.device) -> RowTensors:
    """Return rows of which none is at work: they read and write the pool's scratch tokens."""
    with torch.inference_mode(False):  # captured steps write them, in any mode
        return RowTensors(
            tokens=torch.zeros(capacity, dtype=torch.long, device=device),
            positions=torch.zeros(capacity, dtype=torch.int32, device=device),
            starts=torch.zeros(capacity, dtype=torch.long, device=device),
            advance=torch.zeros(capacity, dtype=torch.int32, device=device),
            live=torch.zeros(1, dtype=torch.int32, device=device),
        )


class Rows:
    """The rows at work.

    Args:
        capacity: most rows.
        device: where tokens are chosen.
        devices: others where rows are read.

    Attributes:
        answers: whose rows they are, in order.
    """

    def __init__(self, capacity: int, device: torch.device, devices: Sequence[torch.device] = ()) -> None:
        self.device = device
        self.tensors = {each: new_rows(capacity, each) for each in dict.fromkeys((device, *devices))}
        self.answers: list[Answer] = []
        self._starts: list[int] = []
        self._joining: list[tuple[list[Answer], torch.Tensor]] = []

    @property
    def tokens(self) -> torch.Tensor:
        """The ids to read next, [capacity]."""
        return self.tensors[self.device].tokens

    @property
    def positions(self) -> torch.Tensor:
        """Where they stand, [capacity]."""
        return self.tensors[self.device].positions

    def on(self, device: torch.device) -> RowTensors:
        """Return the rows on a device."""
        return self.tensors[device]

    def join(self, answers: list[Answer], tokens_N: torch.Tensor) -> None:
        """Note answers whose prompts are cached, and their first tokens, [N], to be read at the next step."""
        self._joining.append((answers, tokens_N))

    def arrange(self, answers: Sequence[Answer]) -> bool:
        """Lay the rows out for these answers, each of which has a row or joins; returns whether anything changed."""
        starts = [answer.extent.start for answer in answers if answer.extent is not None]
        if not self._joining and starts == self._starts and list(answers) == self.answers:
            return False
        places = {id(answer): row for row, answer in enumerate(self.answers)}
        sources = [self.tokens[: len(self.answers)]]
        held = len(self.answers)
        for joining, tokens in self._joining:
            places.update((id(answer), held + k) for k, answer in enumerate(joining))
            sources.append(tokens.to(self.device))
            held += len(joining)
        index = [places[id(answer)] for answer in answers]
        tokens = torch.cat(sources)[upload([index], self.device)[0]]
        self._place(tokens, [answer.cached for answer in answers], starts)
        self.answers, self._starts, self._joining = list(answers), starts, []
        return True

    def set(self, tokens: Sequence[int], positions: Sequence[int], starts: Sequence[int]) -> None:
        """Lay out rows that are nobody's."""
        self._place(upload([list(tokens)], self.device)[0], positions, starts)

    def _place(self, tokens: torch.Tensor, positions: Sequence[int], starts: Sequence[int]) -> None:
        count, capacity = len(starts), len(self.tokens)
        self.tokens[:count] = tokens
        # Rows behind the last are padding: they stay at the first of the pool's scratch tokens.
        rest = [0] * (capacity - count)
        numbers = [[*positions, *rest], [*starts, *rest], [*[1] * count, *rest], [count, *[0] * (capacity - 1)]]
        for device, rows in self.tensors.items():
            uploaded = upload(numbers, device)
            rows.positions.copy_(uploaded[0])
            rows.starts.copy_(uploaded[1])
            rows.advance.copy_(uploaded[2])
            rows.live.copy_(uploaded[3, :1])

    def segments(self) -> list[Segment]:
        """Return the rows' next tokens as segments of a pass."""
        return [Segment(start, answer.cached, 1) for start, answer in zip(self._starts, self.answers, strict=True)]


def upload(numbers: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Return numbers of the host on a device, int64, without waiting for it."""
    return to_device(torch.tensor(numbers, dtype=torch.long), device)


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device, without waiting for it."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def launching_on(device: torch.device) -> Any:
    """Return a context in which kernels launch on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
