"""The rows of a decoding step: which answers are being written, and where each stands, on the device.

A row keeps its place as long as it goes on, and those at work stand at the front: a captured step reads the tensors as
they are. The host uploads them anew only when answers join or leave, or an extent moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..models.cache import Segment
from .request import Answer


class Rows:
    """Tensors of the rows at work.

    Args:
        capacity: most rows.
        device: where they are.

    Attributes:
        tokens: the ids to read next, [capacity], int64.
        positions: where those stand, int32.
        starts: index in the pool of each row's token 0, int64.
        advance: what a step adds to positions: 1, and 0 for the padding of a captured step, int32.
        live: how many rows are at work, int32 [1].
        answers: whose rows they are, in order.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):  # captured steps write them, in any mode
            self.tokens = torch.zeros(capacity, dtype=torch.long, device=device)
            self.positions = torch.zeros(capacity, dtype=torch.int32, device=device)
            self.starts = torch.zeros(capacity, dtype=torch.long, device=device)
            self.advance = torch.zeros(capacity, dtype=torch.int32, device=device)
            self.live = torch.zeros(1, dtype=torch.int32, device=device)
        self.answers: list[Answer] = []
        self._starts: list[int] = []
        self._joining: list[tuple[list[Answer], torch.Tensor]] = []

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
        count = len(answers)
        numbers = torch.tensor([[places[id(a)] for a in answers], [a.cached for a in answers], starts])
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        index, positions, new_starts = numbers.to(self.device, non_blocking=True)
        self.tokens[:count] = torch.cat(sources)[index]
        # Rows behind the last are padding of a captured step: they read and write the pool's scratch tokens.
        self.positions.zero_()
        self.starts.zero_()
        self.advance.zero_()
        self.advance[:count] = 1
        self.positions[:count] = positions
        self.starts[:count] = new_starts
        self.live.fill_(count)
        self.answers, self._starts, self._joining = list(answers), starts, []
        return True

    def segments(self) -> list[Segment]:
        """Return the rows' next tokens as segments of a pass."""
        return [Segment(start, answer.cached, 1) for start, answer in zip(self._starts, self.answers, strict=True)]
