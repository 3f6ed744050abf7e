"""Which rows of a small batch each expert has, written by the router for the experts' GEMMs.

The field calls it aligning tokens to blocks. Each row enters itself in its experts' lists as soon as they are chosen,
so that no pass sorts them; the order of a list is of no account, since no row's product depends on its neighbours.

Shape suffixes: B rows, E routed experts, K experts of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .weights import QuantWeight, Weight

# Rows of an expert that are multiplied at once. Packed weights take the fewest that tensor cores do: their time is what
# each thread unpacks, and registers let more programs run. Plain ones would be read again by a second tile.
PACKED_TILE, PLAIN_TILE = 8, 16


@dataclass(frozen=True)
class ExpertTokens:
    """The routed tokens of each expert, in tiles: the first of every expert, and then all further ones.

    Fields:
        counts: int32 [E + 1], rows of each expert, and last the number of further tiles; 0 before `router.route`.
        tokens: int32 [E, B], of each expert ``row * K + slot`` of its rows; behind its count undefined.
        further: int32 [`max_further`], ``expert * tiles of B rows + tile``; behind their number undefined.
        top_k: K.
        tile: rows of a tile.
    """

    counts: torch.Tensor
    tokens: torch.Tensor
    further: torch.Tensor
    top_k: int
    tile: int

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens.shape[1]


def tile_rows(weight: Weight | None) -> int:
    """Return the rows of a tile of some experts."""
    return PACKED_TILE if isinstance(weight, QuantWeight) else PLAIN_TILE


def max_further(rows: int, top_k: int, tile: int) -> int:
    """Return how many tiles beyond the first ones of their experts there can be.

    An expert with n of them has n full ones and a row more; the more an expert has, the fewer rows each takes.
    """
    most = (rows - 1) // tile  # of an expert that all rows have
    return rows * top_k * most // (most * tile + 1)


def align_plain(topk_ids_BK: torch.Tensor, num_experts: int, tile: int) -> ExpertTokens:
    """Return the experts' rows; an id of -1 stands for no expert."""
    rows, top_k = topk_ids_BK.shape
    tiles = triton.cdiv(rows, tile)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32)
    tokens = torch.zeros(num_experts, rows, dtype=torch.int32)
    further: list[int] = []
    for token, expert in enumerate(topk_ids_BK.flatten().tolist()):
        if expert < 0:
            continue
        place = int(counts[expert])
        if place and place % tile == 0:
            further.append(expert * tiles + place // tile)
        tokens[expert, place] = token
        counts[expert] += 1
    counts[-1] = len(further)
    listed = torch.tensor(further + [0] * (max_further(rows, top_k, tile) - len(further)), dtype=torch.int32)
    device = topk_ids_BK.device
    return ExpertTokens(counts.to(device), tokens.to(device), listed.to(device), top_k, tile)


@triton.jit
def enter_row(
    ids: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    counts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    further_ptr: tl.tensor,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Enter a row in the lists of its experts, [TOP_K_PAD]; an id of -1 stands for none."""
    slot = tl.arange(0, TOP_K_PAD)
    held = (slot < TOP_K) & (ids >= 0)
    place = tl.atomic_add(counts_ptr + ids, 1, mask=held, sem="relaxed")
    tl.store(tokens_ptr + ids * rows + place, row * TOP_K + slot, mask=held)
    opens = held & (place > 0) & (place % TILE == 0)
    number = tl.atomic_add(counts_ptr + E + 0 * slot, 1, mask=opens, sem="relaxed")
    tl.store(further_ptr + number, ids * ((rows + TILE - 1) // TILE) + place // TILE, mask=opens)


@triton.jit
def find_tokens(
    tile: tl.tensor,
    rows: tl.tensor,
    counts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    further_ptr: tl.tensor,
    E: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Return a tile's expert, how many rows it has (0 or less: none), and its routed tokens, [TILE]."""
    expert = tile
    first = 0
    listed = True
    if tile >= E:
        listed = tile - E < tl.load(counts_ptr + E)
        code = tl.load(further_ptr + tile - E, mask=listed, other=0)
        tiles = (rows + TILE - 1) // TILE
        expert = code // tiles
        first = code % tiles * TILE
    count = tl.where(listed, tl.load(counts_ptr + expert) - first, 0)
    place = tl.arange(0, TILE)
    tokens = tl.load(tokens_ptr + expert * rows + first + place, mask=place < count, other=0)
    return expert, count, tokens
