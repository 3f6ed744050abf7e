"""Routed and shared experts of a small batch (GEMM with 2 to 64 rows), without gathering their weights.

Every program streams its part of a weight where it lies, for a tile of an expert's rows, which the router has listed
(`decode_align`); the shared experts run in the same launch.

Shape suffixes: B rows, H hidden size, E routed experts, K experts of a row, I intermediate size of a routed expert, S
that of the shared experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import TRITON, check_rows, dot, grid_wait, launch_dependents, power_of_two
from .decode_align import ExpertTokens, find_tokens, tile_rows
from .decode_experts import ExpertWeights, silu_mul
from .weights import (
    INT4,
    PLAIN,
    format_of,
    load_tile,
    numbers_of,
    of_one_format,
    row_scale,
    scale_of,
    tile_columns,
)

# What keeps tiles of packed weights with single warps, whose threads hold neighbouring bytes: Triton 3.8 multiplies
# those of eight rows by groups of four warps where it can, and 3.6 does not. (3.7 was not tried.)
SINGLE_WARPS = {"BLOCK_N": 32, "num_warps": 2} if TRITON > (3, 6) else {}


@triton.jit
def _gate_up_tile(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    gate_scale_ptr: tl.tensor,
    up_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    block: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    count: tl.tensor,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> None:
    """Write a block of SIZE outputs of ``count`` of the TILE rows given, each in the place of its routed token."""
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SCALES: tl.constexpr = 1 if GROUP == 0 else (H + GROUP - 1) // GROUP
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = x_ptr.dtype.element_ty
    present = tl.arange(0, TILE) < count
    gate = tl.zeros([BLOCK_N, TILE], tl.float32)
    up = tl.zeros([BLOCK_N, TILE], tl.float32)
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        h = start + tl.arange(0, BLOCK_K)
        if KIND == PLAIN:
            offsets = n[:, None] * H + h[None, :]
            mask = (n < SIZE)[:, None] & (h < H)[None, :]
            gate_weight = tl.load(gate_ptr + offsets, mask=mask, other=0.0)
            up_weight = tl.load(up_ptr + offsets, mask=mask, other=0.0)
        else:
            gate_weight = load_tile(
                gate_ptr, gate_scale_ptr, n, SIZE, start, H // PER, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype,
                BY_WORD=True,
            )  # fmt: skip
            up_weight = load_tile(
                up_ptr, up_scale_ptr, n, SIZE, start, H // PER, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype,
                BY_WORD=True,
            )  # fmt: skip
        x = tl.load(x_ptr + row[None, :] * H + h[:, None], mask=present[None, :] & (h < H)[:, None], other=0.0)
        gate = dot(gate_weight, x, gate)
        up = dot(up_weight, x, up)
    if KIND != PLAIN and GROUP == 0:
        gate *= row_scale(gate_scale_ptr, n, SIZE, KIND, GROUP)[:, None]
        up *= row_scale(up_scale_ptr, n, SIZE, KIND, GROUP)[:, None]
    out = silu_mul(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32))
    held = present[None, :] & (n < SIZE)[:, None]
    tl.store(out_ptr + token[None, :] * SIZE + n[:, None], out.to(out_ptr.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["rows"])
def _gate_up_gemm_kernel(
    x_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    further_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    shared_gate_ptr: tl.tensor,
    shared_up_ptr: tl.tensor,
    gate_up_scale_ptr: tl.tensor,
    shared_gate_scale_ptr: tl.tensor,
    shared_up_scale_ptr: tl.tensor,
    routed_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PDL_LAUNCH: tl.constexpr = False,
) -> None:
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SCALES: tl.constexpr = 1 if GROUP == 0 else (H + GROUP - 1) // GROUP
    shared_blocks: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    # The shared experts first, all tiles of rows of a block of weights beside one another.
    shared_tiles = (rows + TILE - 1) // TILE
    program = tl.program_id(0)
    number = program - shared_blocks * shared_tiles
    if S > 0 and number < 0:
        first = program % shared_tiles * TILE
        row = first + tl.arange(0, TILE)
        _gate_up_tile(
            x_ptr, shared_gate_ptr, shared_up_ptr, shared_gate_scale_ptr, shared_up_scale_ptr, shared_ptr,
            program // shared_tiles, row, row, rows - first, H, S, TILE, BLOCK_N, BLOCK_K, STAGES, KIND, GROUP,
            ROW_BLOCK,
        )  # fmt: skip
    elif E > 0:
        expert, count, token = find_tokens(number // blocks, rows, counts_ptr, tokens_ptr, further_ptr, E, TILE)
        if count > 0:
            gate_ptr = gate_up_ptr + expert.to(tl.int64) * (2 * I * (H // PER))
            gate_scale_ptr = gate_up_scale_ptr + expert.to(tl.int64) * (2 * I // ROW_BLOCK * SCALES)
            _gate_up_tile(
                x_ptr, gate_ptr, gate_ptr + I * (H // PER), gate_scale_ptr, gate_scale_ptr + I // ROW_BLOCK * SCALES,
                routed_ptr, number % blocks, token // TOP_K, token, count, H, I, TILE, BLOCK_N, BLOCK_K, STAGES,
                KIND, GROUP, ROW_BLOCK,
            )  # fmt: skip
    launch_dependents(PDL_LAUNCH)  # not before: programs of the next kernel would take the place of these


@triton.jit
def _down_tile(
    in_ptr: tl.tensor,
    matrix: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    block: tl.tensor,
    token: tl.tensor,
    count: tl.tensor,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> None:
    """Write a block of H outputs of ``count`` of the TILE routed tokens given, of SIZE inputs each."""
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SCALES: tl.constexpr = 1 if GROUP == 0 else (SIZE + GROUP - 1) // GROUP
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    present = tl.arange(0, TILE) < count
    total = tl.zeros([BLOCK_N, TILE], tl.float32)
    for start in tl.range(0, SIZE, BLOCK_K, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK_K)
        if KIND == PLAIN:
            mask = (n < H)[:, None] & (i < SIZE)[None, :]
            weight = tl.load(matrix + n[:, None] * SIZE + i[None, :], mask=mask, other=0.0)
        else:
            dtype = in_ptr.dtype.element_ty
            weight = load_tile(
                matrix, scale_ptr, n, H, start, SIZE // PER, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype,
                BY_WORD=True,
            )  # fmt: skip
        x_mask = present[None, :] & (i < SIZE)[:, None]
        x = tl.load(in_ptr + token[None, :] * SIZE + i[:, None], mask=x_mask, other=0.0)
        total = dot(weight, x, total)
    if KIND != PLAIN and GROUP == 0:
        total *= row_scale(scale_ptr, n, H, KIND, GROUP)[:, None]
    places = out_ptr + token[None, :] * H + n[:, None]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=present[None, :] & (n < H)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _down_gemm_kernel(
    routed_intermediate_ptr: tl.tensor,
    shared_intermediate_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    further_ptr: tl.tensor,
    down_ptr: tl.tensor,
    shared_down_ptr: tl.tensor,
    down_scale_ptr: tl.tensor,
    shared_down_scale_ptr: tl.tensor,
    routed_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SCALES: tl.constexpr = 1 if GROUP == 0 else (I + GROUP - 1) // GROUP
    blocks: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    shared_blocks: tl.constexpr = blocks if S > 0 else 0
    shared_tiles = (rows + TILE - 1) // TILE
    program = tl.program_id(0)
    number = program - shared_blocks * shared_tiles
    grid_wait(PDL)
    if S > 0 and number < 0:
        first = program % shared_tiles * TILE
        _down_tile(
            shared_intermediate_ptr, shared_down_ptr, shared_down_scale_ptr, shared_ptr, program // shared_tiles,
            first + tl.arange(0, TILE), rows - first, H, S, TILE, BLOCK_N, BLOCK_K, STAGES, KIND, GROUP,
            ROW_BLOCK,
        )  # fmt: skip
    elif E > 0:
        expert, count, token = find_tokens(number // blocks, rows, counts_ptr, tokens_ptr, further_ptr, E, TILE)
        if count > 0:
            matrix = down_ptr + expert.to(tl.int64) * (H * (I // PER))
            scale_ptr = down_scale_ptr + expert.to(tl.int64) * ((H + ROW_BLOCK - 1) // ROW_BLOCK * SCALES)
            _down_tile(
                routed_intermediate_ptr, matrix, scale_ptr, routed_ptr, number % blocks, token, count, H, I, TILE,
                BLOCK_N, BLOCK_K, STAGES, KIND, GROUP, ROW_BLOCK,
            )  # fmt: skip


def routed_tiles(tokens: ExpertTokens | None) -> int:
    """Return how many tiles of routed tokens there can be."""
    return 0 if tokens is None else len(tokens.tokens) + len(tokens.further)


def lists_of(tokens: ExpertTokens | None, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the lists that the kernels read; in the place of those of no experts, never read, another tensor."""
    return (other,) * 3 if tokens is None else (tokens.counts, tokens.tokens, tokens.further)


def is_narrow(rows: int, hidden: int) -> bool:
    """Whether the GEMMs are of tiny's width or less, where other blocks were faster (gpu_tune.py)."""
    return rows <= 16 and hidden <= 1280


def gate_up_gemm(
    x_BH: torch.Tensor,
    weights: ExpertWeights,
    routed_BKI: torch.Tensor | None,
    shared_BS: torch.Tensor | None,
    tokens: ExpertTokens | None = None,
    **blocks: Any,
) -> None:
    """Write `gate_up_plain` of contiguous, normed rows; rows of no list have no expert."""
    check_rows(x_BH)
    weights.check()
    parts = weights.gates_and_ups()
    if not of_one_format(parts):
        gate_up_gemm(x_BH, weights.routed_alone, routed_BKI, None, tokens, **blocks)
        gate_up_gemm(x_BH, weights.shared_alone, None, shared_BS, **blocks)
        return
    (rows, hidden), fmt = x_BH.shape, format_of(parts[0])
    narrow = is_narrow(rows, hidden)
    sizes = {"BLOCK_N": 64, "BLOCK_K": tile_columns(hidden, 64), "STAGES": 3 if narrow else 4, "num_warps": 4}
    if fmt["KIND"]:
        sizes["STAGES"] = 3
        sizes |= {"BLOCK_K": tile_columns(hidden, 256 if fmt["KIND"] == INT4.value else 128), **SINGLE_WARPS}
    sizes |= blocks
    sizes["BLOCK_N"] = min(
        sizes["BLOCK_N"], power_of_two(max(weights.intermediate_size, weights.shared_intermediate_size), 16)
    )
    tile = tile_rows(parts[0]) if tokens is None else tokens.tile
    programs = triton.cdiv(rows, tile) * triton.cdiv(weights.shared_intermediate_size, sizes["BLOCK_N"])
    programs += routed_tiles(tokens) * triton.cdiv(weights.intermediate_size, sizes["BLOCK_N"])
    _gate_up_gemm_kernel[(programs,)](
        x_BH,
        *lists_of(tokens, x_BH),
        *map(numbers_of, parts),
        *map(scale_of, parts),
        x_BH if routed_BKI is None else routed_BKI,
        x_BH if shared_BS is None else shared_BS,
        rows,
        H=hidden,
        I=weights.intermediate_size,
        S=weights.shared_intermediate_size,
        E=0 if tokens is None else weights.num_experts,
        TOP_K=1 if tokens is None else tokens.top_k,
        TILE=tile,
        **fmt,
        **sizes,
    )


def down_gemm(
    routed_BKI: torch.Tensor | None,
    shared_BS: torch.Tensor | None,
    weights: ExpertWeights,
    routed_BKH: torch.Tensor | None,
    shared_BH: torch.Tensor | None,
    tokens: ExpertTokens | None = None,
    **blocks: Any,
) -> None:
    """Write `down_plain` of contiguous rows; rows of no list have no expert."""
    weights.check()
    out = shared_BH if routed_BKH is None else routed_BKH
    if out is None:
        raise ValueError("A layer needs routed or shared experts.")
    parts = weights.downs()
    if not of_one_format(parts):
        down_gemm(routed_BKI, None, weights.routed_alone, routed_BKH, None, tokens, **blocks)
        down_gemm(None, shared_BS, weights.shared_alone, None, shared_BH, **blocks)
        return
    rows, hidden, fmt = out.shape[0], out.shape[-1], format_of(parts[0])
    widest = max(weights.intermediate_size, weights.shared_intermediate_size)
    narrow = is_narrow(rows, hidden)
    block_n, block_k = 64, 128 if narrow else 64
    if fmt["KIND"]:
        block_n, block_k = (64, 256) if rows <= 16 and not narrow else (128, 128)
    cut_by = {"BLOCK_K": tile_columns(widest, block_k), "STAGES": 4 if block_k == 64 else 3}
    sizes = {"BLOCK_N": block_n, "num_warps": 4, **cut_by, **(SINGLE_WARPS if fmt["KIND"] else {}), **blocks}
    sizes["BLOCK_N"] = min(sizes["BLOCK_N"], power_of_two(hidden, 16))
    tile = tile_rows(parts[0]) if tokens is None else tokens.tile
    programs = routed_tiles(tokens) + triton.cdiv(rows, tile) * (weights.shared_intermediate_size > 0)
    _down_gemm_kernel[(programs * triton.cdiv(hidden, sizes["BLOCK_N"]),)](
        out if routed_BKI is None else routed_BKI,
        out if shared_BS is None else shared_BS,
        *lists_of(tokens, out),
        *map(numbers_of, parts),
        *map(scale_of, parts),
        out if routed_BKH is None else routed_BKH,
        out if shared_BH is None else shared_BH,
        rows,
        H=hidden,
        I=weights.intermediate_size,
        S=weights.shared_intermediate_size,
        E=0 if tokens is None else weights.num_experts,
        TOP_K=1 if tokens is None else tokens.top_k,
        TILE=tile,
        **fmt,
        **sizes,
    )
