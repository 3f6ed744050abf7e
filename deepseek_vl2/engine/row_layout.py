"""Which rows of a pass its segments take, and over which of them each attends.

Attention sees windows whose lengths are multiples of `STEP` tokens, which reach into the rows behind: cuDNN plans it
anew for each length that it has not met, which takes the host milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from ..models.cache import Segment
from ..ops.triton.common import power_of_two
from .rows import to_device

# Lengths that attention sees, and the rows of a pass, are multiples of this: the libraries that choose kernels by the
# number of rows, and load them then, have met it before.
STEP = 128
# What short prompts that attend together see is a smaller power of two, but not below this one: of more, nearly all
# would be rows of others.
SHORTEST = 16
# Rows that a pass may take for one of its prompts' own so that they attend in one call, of 45 us each for 1,434 tokens.
MOST_PADDED = 1.03


def padded_length(tokens: int, most: int | None = None) -> int:
    """Return the length that a prompt is padded to: a multiple of `STEP`, or ``most``."""
    padded = -(-tokens // STEP) * STEP
    return padded if most is None else min(padded, most)


@dataclass
class RowLayout:
    """Which rows of a pass its segments take.

    Fields:
        lengths: new tokens of each segment.
        starts: the first row of each.
        rows: of the pass; those that no segment takes are padding.
        part: see `prefill.PackedTokens`, as is ``windows``.
    """

    lengths: Sequence[int]
    starts: Sequence[int]
    rows: int
    part: int = 0
    windows: Sequence[int] | None = None

    @property
    def ends(self) -> list[int]:
        """The last row of each segment."""
        return [start + length - 1 for start, length in zip(self.starts, self.lengths, strict=True)]

    @property
    def padded(self) -> bool:
        """Whether there is padding."""
        return self.rows > sum(self.lengths)

    @property
    def last(self) -> list[int]:
        """See `prefill.PackedTokens`."""
        if not self.part:
            return [self.ends[-1]]
        return [*self.ends, *[-1] * (-(-self.rows // self.part) - len(self.starts))]

    @property
    def gaps(self) -> bool:
        """Whether there is padding between segments, too."""
        return self.starts[-1] + self.lengths[-1] > sum(self.lengths)

    def number(self, firsts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return numbers that count up from one for each segment, for each of some lines of these, [lines, tokens]."""
        lengths = torch.tensor(self.lengths)
        shifts = torch.tensor(firsts) - (lengths.cumsum(0) - lengths)
        return shifts.repeat_interleave(lengths, dim=1) + torch.arange(int(lengths.sum()))

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """Return rows that lie one behind the other, as long as all segments, in their places; padding is 0."""
        if not self.padded:
            return packed
        if not self.gaps:
            return F.pad(packed, (0, 0, 0, self.rows - len(packed)))
        out = packed.new_zeros(self.rows, packed.shape[1])
        return out.index_copy_(0, to_device(self.number([self.starts])[0], packed.device), packed)


def arrange_rows(segments: Sequence[Segment]) -> RowLayout:
    """Return the rows of a pass.

    Whole prompts are parts of one length if they are of about one. If they are not, the last one alone has padding
    behind it, and no window reaches farther than its own: each is less than a step longer than its segment. Segments
    behind cached tokens attend by masks of their own, without padding.
    """
    lengths = [segment.new for segment in segments]
    starts = [0, *accumulate(lengths)]
    tokens = starts.pop()
    if any(segment.past for segment in segments):
        return RowLayout(lengths, starts, tokens)
    windows = [padded_length(length) for length in lengths]
    part = max(lengths)
    if len(lengths) * part > MOST_PADDED * tokens:
        return RowLayout(lengths, starts, padded_length(starts[-1] + windows[-1]), 0, windows)
    part = part if len(lengths) > 1 else windows[0]  # one prompt has its padding in its own part
    starts = [part * index for index in range(len(lengths))]
    window = min(padded_length(part), power_of_two(part, SHORTEST))
    return RowLayout(lengths, starts, padded_length(starts[-1] + window), part, [window] * len(lengths))
