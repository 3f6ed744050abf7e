"""Plain multi-head attention of one new token a row, over a cache of keys and values.

Shape suffixes: B rows, N attention heads, M key/value heads, D head size, S tokens of the pool, C tokens of a row, W
splits of the keys. The caches are pools of tokens, [S, M, D]; row b's tokens are contiguous, from starts[b] to
starts[b] + positions[b], its new one last.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import check_pools, check_rows, grid_wait, launch_dependents, live_splits, load_cos_sin, power_of_two
from .decode_mla import MAX_SPLITS


def kv_block(rows: int) -> int:
    """Return how many keys a program reads at a time.

    One row has few programs, so each keeps many loads under way; with several rows programs of a single warp do that.
    """
    return 64 if rows == 1 else 16


def num_kv_splits(rows: int, heads: int, multiprocessors: int) -> int:
    """Return the number of KV splits of each row.

    Two programs on each multiprocessor keep it busy with a single row's cache; those for several rows are of one warp,
    so more are wanted.
    """
    programs = multiprocessors * (2 if rows == 1 else 18)
    return min(power_of_two(triton.cdiv(programs, rows * heads)), MAX_SPLITS)


def rotate_halves_plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [..., D] whose pairs stand half of it apart."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend_plain(
    query_BND: torch.Tensor,
    keys_BMCD: torch.Tensor,
    values_BMCD: torch.Tensor,
    positions_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return [B, N, D]: attention over the tokens up to each row's position."""
    grouped = query_BND.unflatten(1, (keys_BMCD.shape[1], -1))
    scores = torch.einsum("bmgd,bmcd->bmgc", grouped, keys_BMCD).float() * scaling
    beyond = torch.arange(keys_BMCD.shape[2], device=scores.device) > positions_B[:, None]
    weights = scores.masked_fill(beyond[:, None, None], float("-inf")).softmax(dim=-1).to(query_BND.dtype)
    held = values_BMCD.masked_fill(beyond[:, None, :, None], 0)
    return torch.einsum("bmgc,bmcd->bmgd", weights, held).flatten(1, 2)


@triton.jit
def _rotate_and_write_kernel(
    projected_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    row = tl.program_id(0)
    head = tl.program_id(1)
    position = tl.load(positions_ptr + row)
    slot = tl.load(starts_ptr + row) + position
    cos, sin = load_cos_sin(cos_ptr, sin_ptr, position, D, HALF_PAD)
    grid_wait(PDL)
    half: tl.constexpr = D // 2
    i = tl.arange(0, HALF_PAD)
    held = i < half
    source = projected_ptr + (row * (N + 2 * M) + head) * D
    first = tl.load(source + i, mask=held, other=0.0).to(tl.float32)
    second = tl.load(source + half + i, mask=held, other=0.0).to(tl.float32)
    target = query_ptr + (row * N + head) * D
    if head >= N + M:
        target = values_ptr + (slot * M + head - N - M) * D
    elif head >= N:
        target = keys_ptr + (slot * M + head - N) * D
    if head < N + M:
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    dtype = query_ptr.dtype.element_ty
    tl.store(target + i, first.to(dtype), mask=held)
    tl.store(target + half + i, second.to(dtype), mask=held)


def rotate_and_write(
    projected_BX: torch.Tensor,
    cos_CD: torch.Tensor,
    sin_CD: torch.Tensor,
    positions_B: torch.Tensor,
    starts_B: torch.Tensor,
    query_BND: torch.Tensor,
    keys_SMD: torch.Tensor,
    values_SMD: torch.Tensor,
    **options: Any,
) -> None:
    """Rotate queries and keys, and write keys and values into the pools at each row's start + position.

    Args:
        projected_BX: queries, keys and values side by side, (N + 2M) * D numbers.
        cos_CD: table of cosines for all positions.
        sin_CD: of sines.
        positions_B: int32.
        starts_B: index in the pools of each row's token 0, int64.
        query_BND: written.
        keys_SMD: the pool, written at start + position.
        values_SMD: likewise. All tensors are contiguous.
        options: of the launch, see `common.pdl_options`.
    """
    check_rows(projected_BX, cos_CD, sin_CD)
    check_pools(keys_SMD, values_SMD)
    rows, heads, size = query_BND.shape
    key_heads = keys_SMD.shape[1]
    _rotate_and_write_kernel[(rows, heads + 2 * key_heads)](
        projected_BX,
        cos_CD,
        sin_CD,
        positions_B,
        starts_B,
        query_BND,
        keys_SMD,
        values_SMD,
        N=heads,
        M=key_heads,
        D=size,
        HALF_PAD=power_of_two(size // 2, 8),
        num_warps=1,
        **options,
    )


@triton.jit
def _load_keys(
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    c: tl.tensor,
    end: tl.tensor,
    M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
) -> tl.tensor:
    d = tl.arange(0, D_PAD)
    offsets = c[:, None] * (M * D) + d[None, :]
    mask = (c < end)[:, None] & (d < D)[None, :]
    key = tl.load(keys_ptr + offsets, mask=mask, other=0.0)
    value = tl.load(values_ptr + offsets, mask=mask, other=0.0)
    return key, value


@triton.jit
def _attend_keys(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    held: tl.tensor,
    scaling: tl.tensor,
    total: tl.tensor,
    highest: tl.tensor,
    weight: tl.tensor,
) -> tl.tensor:
    """Return a softmax's running sum, highest score and weight, with some more keys."""
    scores = tl.sum(key.to(tl.float32) * query[None, :], axis=1) * (scaling * 1.4426950408889634)
    scores = tl.where(held, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=0))
    shrink = tl.exp2(highest - new_highest)
    power = tl.exp2(scores - new_highest)
    weight = weight * shrink + tl.sum(power, axis=0)
    return total * shrink + tl.sum(value.to(tl.float32) * power[:, None], axis=0), new_highest, weight


@triton.jit
def _attend_split_kernel(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scaling: tl.tensor,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions_ptr + row)  # which only a step's last kernel changes
    keys_each, live = live_splits(position, BLOCK_C, SPLITS)
    first = split * keys_each
    last = tl.minimum(first + keys_each, position + 1)
    d = tl.arange(0, D_PAD)
    base = (tl.load(starts_ptr + row) * M + head // (N // M)) * D
    if AHEAD:  # the first keys but the new one are on their way before the wait: earlier steps wrote them
        c = first + tl.arange(0, BLOCK_C)
        key, value = _load_keys(keys_ptr + base, values_ptr + base, c, tl.minimum(last, position), M, D, D_PAD)
    grid_wait(PDL)
    if split < live:
        query = tl.load(query_ptr + (row * N + head) * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = tl.zeros([D_PAD], tl.float32)
        highest = float("-inf")
        weight = 0.0
        if AHEAD:
            new = (c == position)[:, None]
            newest = base + position.to(tl.int64) * (M * D) + d
            key = tl.where(new, tl.load(keys_ptr + newest, mask=d < D, other=0.0)[None, :], key)
            value = tl.where(new, tl.load(values_ptr + newest, mask=d < D, other=0.0)[None, :], value)
            total, highest, weight = _attend_keys(query, key, value, c < last, scaling, total, highest, weight)
            first += BLOCK_C
        for start in range(first, last, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            key, value = _load_keys(keys_ptr + base, values_ptr + base, c, last, M, D, D_PAD)
            total, highest, weight = _attend_keys(query, key, value, c < last, scaling, total, highest, weight)
        place = (row * SPLITS + split) * N + head
        tl.store(partial_ptr + place * D + d, total / weight, mask=d < D)
        tl.store(lse_ptr + place, highest + tl.log2(weight))


def attend_splits(
    query_BND: torch.Tensor,
    keys_SMD: torch.Tensor,
    values_SMD: torch.Tensor,
    positions_B: torch.Tensor,
    starts_B: torch.Tensor,
    scaling: float,
    partial_BWND: torch.Tensor,
    lse_BWN: torch.Tensor,
    **options: Any,
) -> None:
    """Split-KV attention, as in `decode_mla.attend_splits`, whose `reduce_splits` reduces the splits here too."""
    check_rows(query_BND)
    check_pools(keys_SMD, values_SMD)
    rows, heads, size = query_BND.shape
    splits = partial_BWND.shape[1]
    _attend_split_kernel[(rows, heads, splits)](
        query_BND,
        keys_SMD,
        values_SMD,
        positions_B,
        starts_B,
        partial_BWND,
        lse_BWN,
        scaling,
        N=heads,
        M=keys_SMD.shape[1],
        D=size,
        D_PAD=power_of_two(size, 16),
        SPLITS=splits,
        BLOCK_C=kv_block(rows),
        AHEAD=rows == 1,
        num_warps=4 if rows == 1 else 1,
        **options,
    )
