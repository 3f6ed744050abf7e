"""Products of a single row with packed weights (GEMV), bound by taking the numbers apart; see `packed_words`.

Shape suffixes: H hidden size, K experts of the row (elsewhere: inputs), I intermediate size of a routed expert, S that
of the shared experts, W words that a program reads at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, grid_wait, launch_dependents, power_of_two
from .decode_experts import silu_mul
from .packed_words import SMALL, add_words, load_columns, load_words, zeros_of
from .weights import INT4, Weight, numbers_of, row_scale, scale_of

# Words of which each thread of a program has one, of 32 threads: a row's sum then needs no other warp.
WARP = 32


# ---------------------------------------------------------------- linear layers


@triton.jit
def packed_gemv_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    third_ptr: tl.tensor,
    first_scale_ptr: tl.tensor,
    second_scale_ptr: tl.tensor,
    third_scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    max_ptr: tl.tensor,
    argmax_ptr: tl.tensor,
    eps: tl.tensor,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROUNDED: tl.constexpr,
    ARGMAX: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    COLUMNS: tl.constexpr = WORDS * (8 if KIND == INT4 else 4)
    program = tl.program_id(0)
    blocks1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    blocks2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N
    in_second = program >= blocks1
    in_third = program >= blocks1 + blocks2
    words_ptr = first_ptr
    scale_ptr = first_scale_ptr
    if in_third:
        words_ptr = third_ptr
        scale_ptr = third_scale_ptr
    elif in_second:
        words_ptr = second_ptr
        scale_ptr = second_scale_ptr
    block = program - tl.where(in_third, blocks1 + blocks2, tl.where(in_second, blocks1, 0))
    size = tl.where(in_third, N3, tl.where(in_second, N2, N1))
    shift = tl.where(in_third, N1 + N2, tl.where(in_second, N1, 0))
    first = block * BLOCK_N
    # All loads of the weight are on their way before the row is waited for.
    words, scales = load_words(words_ptr, scale_ptr, first, size, K, BLOCK_N, WORDS, KIND, GROUP, ROW_BLOCK)
    grid_wait(PDL)
    totals = zeros_of(BLOCK_N, WORDS)
    squares = tl.zeros([COLUMNS], tl.float32)
    for part in tl.static_range((K + COLUMNS - 1) // COLUMNS):
        x = load_columns(x_ptr, part * COLUMNS, K, COLUMNS)
        if NORMED:
            squares += x * x
            x *= load_columns(norm_ptr, part * COLUMNS, K, COLUMNS)
        totals = add_words(totals, words, scales, x, part, BLOCK_N, KIND, GROUP)
    inverse = 1.0
    if NORMED:
        inverse = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    best = float("-inf")
    winner = 2147483647
    for index in tl.static_range(BLOCK_N):
        row = first + index
        out = tl.sum(totals[index], axis=0) * row_scale(scale_ptr, row, size, KIND, GROUP) * (inverse / SMALL)
        if ROUNDED:
            out = out.to(x_ptr.dtype.element_ty).to(tl.float32)
        if RESIDUAL:
            out += tl.load(residual_ptr + shift + row, mask=row < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + shift + row, out.to(out_ptr.dtype.element_ty), mask=row < size)
        if ARGMAX:
            better = (out > best) & (row < size)
            best = tl.where(better, out, best)
            winner = tl.where(better, row, winner)
    if ARGMAX:
        tl.store(max_ptr + program, best)
        tl.store(argmax_ptr + program, winner)


# ---------------------------------------------------------------- experts


@triton.jit
def packed_gate_up_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    shared_gate_ptr: tl.tensor,
    shared_up_ptr: tl.tensor,
    gate_up_scale_ptr: tl.tensor,
    shared_gate_scale_ptr: tl.tensor,
    shared_up_scale_ptr: tl.tensor,
    intermediate_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    PER: tl.constexpr = 8 if KIND == INT4 else 4
    COLUMNS: tl.constexpr = WORDS * PER
    SCALES: tl.constexpr = 1 if GROUP == 0 else (H + GROUP - 1) // GROUP
    program = tl.program_id(0)
    shared_blocks: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    gate_ptr = shared_gate_ptr
    up_ptr = shared_up_ptr
    gate_scale_ptr = shared_gate_scale_ptr
    up_scale_ptr = shared_up_scale_ptr
    routed = program >= shared_blocks
    block = program
    shift = TOP_K * I
    size = tl.where(routed, I, S)
    if TOP_K > 0:
        if routed:
            grid_wait(PDL)
            slot = (program - shared_blocks) // blocks
            block = (program - shared_blocks) % blocks
            shift = slot * I
            expert = tl.load(ids_ptr + slot).to(tl.int64)
            gate_ptr = gate_up_ptr + expert * (2 * I * (H // PER))
            up_ptr = gate_ptr + I * (H // PER)
            gate_scale_ptr = gate_up_scale_ptr + expert * (2 * I // ROW_BLOCK * SCALES)
            up_scale_ptr = gate_scale_ptr + I // ROW_BLOCK * SCALES
    first = block * BLOCK_N
    # The shared experts come first, and their weights are on the way before the row and the choice are waited for.
    gates, gate_scales = load_words(gate_ptr, gate_scale_ptr, first, size, H, BLOCK_N, WORDS, KIND, GROUP, ROW_BLOCK)
    ups, up_scales = load_words(up_ptr, up_scale_ptr, first, size, H, BLOCK_N, WORDS, KIND, GROUP, ROW_BLOCK)
    grid_wait(PDL)
    launch_dependents(PDL)  # not before: the next kernel reads what the one before this has written
    gate = zeros_of(BLOCK_N, WORDS)
    up = zeros_of(BLOCK_N, WORDS)
    squares = tl.zeros([COLUMNS], tl.float32)
    for part in tl.static_range((H + COLUMNS - 1) // COLUMNS):
        x = load_columns(x_ptr, part * COLUMNS, H, COLUMNS)
        squares += x * x
        x *= load_columns(norm_ptr, part * COLUMNS, H, COLUMNS)
        gate = add_words(gate, gates, gate_scales, x, part, BLOCK_N, KIND, GROUP)
        up = add_words(up, ups, up_scales, x, part, BLOCK_N, KIND, GROUP)
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / H + eps) / SMALL
    for index in tl.static_range(BLOCK_N):
        row = first + index
        gate_factor = row_scale(gate_scale_ptr, row, size, KIND, GROUP) * inverse
        up_factor = row_scale(up_scale_ptr, row, size, KIND, GROUP) * inverse
        out = silu_mul(tl.sum(gate[index], axis=0) * gate_factor, tl.sum(up[index], axis=0) * up_factor)
        tl.store(intermediate_ptr + shift + row, out.to(intermediate_ptr.dtype.element_ty), mask=row < size)


@triton.jit
def _add_down(
    totals: tl.tuple,
    words: tl.tuple,
    scales: tl.tuple,
    factor: tl.tensor,
    inner_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    first: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
) -> Any:
    """Return sums of ROWS rows with those of an expert added, times its weight; all are SMALL times what they are."""
    COLUMNS: tl.constexpr = WORDS * (8 if KIND == INT4 else 4)
    sums = zeros_of(ROWS, WORDS)
    for part in tl.static_range((K + COLUMNS - 1) // COLUMNS):
        x = load_columns(inner_ptr, part * COLUMNS, K, COLUMNS)
        sums = add_words(sums, words, scales, x, part, ROWS, KIND, GROUP)
    added = ()
    for index in tl.static_range(ROWS):
        rest = row_scale(scale_ptr, first + index, H, KIND, GROUP)
        added += (totals[index] + sums[index] * (rest * factor),)  # type: ignore[assignment]
    return added


@triton.jit
def packed_down_kernel(
    intermediate_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    down_ptr: tl.tensor,
    shared_down_ptr: tl.tensor,
    down_scale_ptr: tl.tensor,
    shared_down_scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    PER: tl.constexpr = 8 if KIND == INT4 else 4
    SCALES: tl.constexpr = 1 if GROUP == 0 else (I + GROUP - 1) // GROUP
    first = tl.program_id(0) * BLOCK_N
    totals = zeros_of(BLOCK_N, WORDS)
    # All weights are on the way before the wait. The choice is older than the kernel before, which has waited itself.
    if S > 0:
        words, scales = load_words(
            shared_down_ptr, shared_down_scale_ptr, first, H, S, BLOCK_N, WORDS, KIND, GROUP, ROW_BLOCK
        )
    matrices = ()
    factors = ()
    scale_ptrs = ()
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + slot, cache_modifier=".cg").to(tl.int64)
        matrix = down_ptr + expert * (H * (I // PER))
        scale_ptr = down_scale_ptr + expert * ((H + ROW_BLOCK - 1) // ROW_BLOCK * SCALES)
        matrices += (load_words(matrix, scale_ptr, first, H, I, BLOCK_N, WORDS, KIND, GROUP, ROW_BLOCK),)  # type: ignore[assignment]
        factors += (tl.load(weights_ptr + slot, cache_modifier=".cg"),)  # type: ignore[assignment]
        scale_ptrs += (scale_ptr,)  # type: ignore[assignment]
    grid_wait(PDL)
    if S > 0:
        totals = _add_down(
            totals, words, scales, 1.0, intermediate_ptr + TOP_K * I, shared_down_scale_ptr, first, H, S, BLOCK_N,
            WORDS, KIND, GROUP,
        )  # fmt: skip
    for slot in tl.static_range(TOP_K):
        totals = _add_down(
            totals, matrices[slot][0], matrices[slot][1], factors[slot], intermediate_ptr + slot * I, scale_ptrs[slot],
            first, H, I, BLOCK_N, WORDS, KIND, GROUP,
        )  # fmt: skip
    for index in tl.static_range(BLOCK_N):
        row = first + index
        residual = tl.load(residual_ptr + row, mask=row < H, other=0.0).to(tl.float32)
        out = tl.sum(totals[index], axis=0) / SMALL + residual
        tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < H)


# ---------------------------------------------------------------- launches


def words_and_scales(weights: Sequence[Weight]) -> Sequence[Any]:
    """Return weights' numbers as words of 32 bits, and behind them their scales, as the kernels take them.

    Raises:
        ValueError: a row is not made of whole words.
    """
    words = []
    for weight in weights:
        numbers = numbers_of(weight)
        if numbers.dtype != torch.int32 and numbers.shape[-1] % 4:
            raise ValueError(f"The kernels read rows of whole words, of four columns; got {numbers.shape[-1]} columns.")
        words.append(numbers.view(torch.int32))
    return [*words, *map(scale_of, weights)]


def word_blocks(columns: int, rows: int, warps: int, fmt: dict[str, int]) -> dict[str, int]:
    """Return rows of a program, the words that it reads of each at a time, its warps, and the weights' format."""
    widest = power_of_two(triton.cdiv(columns, 8 if fmt["KIND"] == INT4.value else 4), WARP)
    if INTERPRETED.value:  # programs run one after the other
        rows, words = 8, widest
    else:
        words = min(WARP * warps, widest)
    return {"BLOCK_N": rows, "WORDS": words, "num_warps": warps, **fmt}


def has_scales_of_bytes(fmt: dict[str, int]) -> bool:
    """Whether numbers are of eight bits, and some columns share a scale."""
    return fmt["KIND"] > INT4.value and fmt["GROUP"] > 0


def gemv_blocks(columns: int, fmt: dict[str, int]) -> dict[str, int]:
    """Return the blocks of `packed_gemv_kernel`; measured on an H200 (benchmarks/gpu_tune.py), as are the others.

    Bytes with scales for some columns alone have half the rows: registers would spill.
    """
    if has_scales_of_bytes(fmt):
        return word_blocks(columns, 2, 1, fmt)
    return word_blocks(columns, 2 if fmt["KIND"] == INT4.value else 4, 2, fmt)


def gate_up_blocks(columns: int, fmt: dict[str, int]) -> dict[str, int]:
    """Return the blocks of `packed_gate_up_kernel`."""
    return word_blocks(columns, 4 if fmt["KIND"] == INT4.value else 2, 2, fmt)


def down_blocks(columns: int, fmt: dict[str, int]) -> dict[str, int]:
    """Return the blocks of `packed_down_kernel`."""
    return word_blocks(columns, 2 if fmt["KIND"] == INT4.value or has_scales_of_bytes(fmt) else 4, 2, fmt)
