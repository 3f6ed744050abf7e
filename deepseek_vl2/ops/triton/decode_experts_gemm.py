"""Routed and shared experts of a small batch (GEMM with 2 to 64 rows), without gathering their weights.

Every program finds the rows of its expert by itself and streams its part of a weight where it lies; the shared experts
run in the same launch.

Shape suffixes: B rows, H hidden size, E routed experts, K experts of a row, I intermediate size of a routed expert, S
that of the shared experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import check_rows, dot, grid_wait, launch_dependents, power_of_two
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


@triton.jit
def slots_of_expert(
    ids_ptr: tl.tensor,
    expert: tl.tensor,
    rows: tl.tensor,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
) -> tl.tensor:
    """Return in which slot each row has an expert, -1 for none, [ROWS_PAD], and how many rows have it."""
    b = tl.arange(0, ROWS_PAD)
    k = tl.arange(0, TOP_K_PAD)
    held = (b < rows)[:, None] & (k < TOP_K)[None, :]
    same = tl.load(ids_ptr + b[:, None] * TOP_K + k[None, :], mask=held, other=-1) == expert
    slots = tl.max(tl.where(same, k[None, :], -1), axis=1)
    return slots, tl.sum((slots >= 0).to(tl.int32), axis=0)


@triton.jit
def rows_of_block(slots: tl.tensor, first: tl.tensor, ROWS_PAD: tl.constexpr, BLOCK_B: tl.constexpr) -> tl.tensor:
    """Return the rows that have an expert, those numbered ``first`` and on, and the slot in which each has it.

    Each program sorts out its own rows: it counts, for every row that has the expert, how many stand before it. No
    sorting pass runs before, and no other program is waited for.
    """
    b = tl.arange(0, ROWS_PAD)
    has = slots >= 0
    before = tl.sum((has[None, :] & (b[None, :] < b[:, None])).to(tl.int32), axis=1)
    wanted = first + tl.arange(0, BLOCK_B)
    taken = has[None, :] & (before[None, :] == wanted[:, None])
    row = tl.sum(tl.where(taken, b[None, :], 0), axis=1)
    row_slot = tl.sum(tl.where(taken, slots[None, :], 0), axis=1)
    return row, row_slot


@triton.jit(do_not_specialize=["rows"])
def _gate_up_gemm_kernel(
    x_ptr: tl.tensor,
    ids_ptr: tl.tensor,
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
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
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
    # Blocks of rows beyond the first, of which routed experts seldom have any, come last and end at once.
    programs = tl.num_programs(0) // ROW_BLOCKS
    program = tl.program_id(0) % programs
    row_block = tl.program_id(0) // programs
    routed = program >= shared_blocks
    size = tl.where(routed, I, S)
    block = program
    row = row_block * BLOCK_B + tl.arange(0, BLOCK_B)
    count = rows
    gate_ptr = shared_gate_ptr
    up_ptr = shared_up_ptr
    gate_scale_ptr = shared_gate_scale_ptr
    up_scale_ptr = shared_up_scale_ptr
    out_ptr = shared_ptr
    place = row
    slots = tl.full([ROWS_PAD], -1, tl.int32)
    if TOP_K > 0:
        if routed:
            expert = (program - shared_blocks) // blocks
            block = (program - shared_blocks) % blocks
            slots, count = slots_of_expert(ids_ptr, expert, rows, TOP_K, TOP_K_PAD, ROWS_PAD)
            gate_ptr = gate_up_ptr + expert.to(tl.int64) * (2 * I * (H // PER))
            up_ptr = gate_ptr + I * (H // PER)
            gate_scale_ptr = gate_up_scale_ptr + expert.to(tl.int64) * (2 * I // ROW_BLOCK * SCALES)
            up_scale_ptr = gate_scale_ptr + I // ROW_BLOCK * SCALES
            out_ptr = routed_ptr
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if count > row_block * BLOCK_B:
        if TOP_K > 0:
            if routed:
                row, slot = rows_of_block(slots, row_block * BLOCK_B, ROWS_PAD, BLOCK_B)
                place = row * TOP_K + slot
        present = tl.arange(0, BLOCK_B) < count - row_block * BLOCK_B
        gate = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
            h = start + tl.arange(0, BLOCK_K)
            if KIND == PLAIN:
                offsets = n[:, None] * H + h[None, :]
                mask = (n < size)[:, None] & (h < H)[None, :]
                gate_weight = tl.load(gate_ptr + offsets, mask=mask, other=0.0)
                up_weight = tl.load(up_ptr + offsets, mask=mask, other=0.0)
            else:
                dtype = x_ptr.dtype.element_ty
                gate_weight = load_tile(
                    gate_ptr, gate_scale_ptr, n, size, start, H // PER, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype
                )
                up_weight = load_tile(
                    up_ptr, up_scale_ptr, n, size, start, H // PER, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype
                )
            x = tl.load(x_ptr + row[None, :] * H + h[:, None], mask=present[None, :] & (h < H)[:, None], other=0.0)
            gate = dot(gate_weight, x, gate)
            up = dot(up_weight, x, up)
        if KIND != PLAIN and GROUP == 0:
            gate *= row_scale(gate_scale_ptr, n, size, KIND, GROUP)[:, None]
            up *= row_scale(up_scale_ptr, n, size, KIND, GROUP)[:, None]
        dtype = x_ptr.dtype.element_ty
        out = silu_mul(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32))
        tl.store(
            out_ptr + place[None, :] * size + n[:, None],
            out.to(out_ptr.dtype.element_ty),
            mask=present[None, :] & (n < size)[:, None],
        )
    launch_dependents(PDL_LAUNCH)  # not before: programs of the next kernel would take the place of these


@triton.jit(do_not_specialize=["rows"])
def _down_gemm_kernel(
    routed_intermediate_ptr: tl.tensor,
    shared_intermediate_ptr: tl.tensor,
    ids_ptr: tl.tensor,
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
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
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
    SHARED_SCALES: tl.constexpr = 1 if GROUP == 0 else (S + GROUP - 1) // GROUP
    blocks: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    shared_blocks: tl.constexpr = blocks if S > 0 else 0
    programs = tl.num_programs(0) // ROW_BLOCKS
    program = tl.program_id(0) % programs
    row_block = tl.program_id(0) // programs
    routed = program >= shared_blocks
    size = tl.where(routed, I, S)
    block = program
    row = row_block * BLOCK_B + tl.arange(0, BLOCK_B)
    count = rows
    in_ptr = shared_intermediate_ptr
    matrix = shared_down_ptr
    scale_ptr = shared_down_scale_ptr
    out_ptr = shared_ptr
    place = row
    slots = tl.full([ROWS_PAD], -1, tl.int32)
    if TOP_K > 0:
        if routed:
            expert = (program - shared_blocks) // blocks
            block = (program - shared_blocks) % blocks
            slots, count = slots_of_expert(ids_ptr, expert, rows, TOP_K, TOP_K_PAD, ROWS_PAD)
            in_ptr = routed_intermediate_ptr
            matrix = down_ptr + expert.to(tl.int64) * (H * (I // PER))
            scale_ptr = down_scale_ptr + expert.to(tl.int64) * ((H + ROW_BLOCK - 1) // ROW_BLOCK * SCALES)
            out_ptr = routed_ptr
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    grid_wait(PDL)  # the ids are older: the kernel before this one starts when all before it have ended
    if count > row_block * BLOCK_B:
        if TOP_K > 0:
            if routed:
                row, slot = rows_of_block(slots, row_block * BLOCK_B, ROWS_PAD, BLOCK_B)
                place = row * TOP_K + slot
        present = tl.arange(0, BLOCK_B) < count - row_block * BLOCK_B
        total = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        for start in tl.range(0, size, BLOCK_K, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_K)
            if KIND == PLAIN:
                mask = (n < H)[:, None] & (i < size)[None, :]
                weight = tl.load(matrix + n[:, None] * size + i[None, :], mask=mask, other=0.0)
            else:
                width, scales = tl.where(routed, I // PER, S // PER), tl.where(routed, SCALES, SHARED_SCALES)
                dtype = in_ptr.dtype.element_ty
                weight = load_tile(
                    matrix, scale_ptr, n, H, start, width, scales, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype
                )
            x_mask = present[None, :] & (i < size)[:, None]
            x = tl.load(in_ptr + place[None, :] * size + i[:, None], mask=x_mask, other=0.0)
            total = dot(weight, x, total)
        if KIND != PLAIN and GROUP == 0:
            total *= row_scale(scale_ptr, n, H, KIND, GROUP)[:, None]
        tl.store(
            out_ptr + place[None, :] * H + n[:, None],
            total.to(out_ptr.dtype.element_ty),
            mask=present[None, :] & (n < H)[:, None],
        )


def row_blocks(rows: int, top_k: int) -> dict[str, int]:
    """Return the blocks of rows of the GEMM kernels, of 16: launched for the most there can be."""
    return {
        "TOP_K": top_k,
        "TOP_K_PAD": power_of_two(top_k, 2),
        "ROWS_PAD": power_of_two(rows, 16),
        "BLOCK_B": 16,
        "ROW_BLOCKS": triton.cdiv(rows, 16),
    }


def is_narrow(rows: int, hidden: int) -> bool:
    """Whether the GEMMs are of tiny's width or less, where other blocks were faster (gpu_tune.py)."""
    return rows <= 16 and hidden <= 1280


def gate_up_gemm(
    x_BH: torch.Tensor,
    weights: ExpertWeights,
    routed_BKI: torch.Tensor | None,
    shared_BS: torch.Tensor | None,
    topk_ids_BK: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Write `gate_up_plain` of contiguous, normed rows; ids are int32, and an id of -1 stands for no expert."""
    check_rows(x_BH)
    weights.check()
    parts = weights.gates_and_ups()
    if not of_one_format(parts):
        gate_up_gemm(x_BH, weights.routed_alone, routed_BKI, None, topk_ids_BK, **blocks)
        gate_up_gemm(x_BH, weights.shared_alone, None, shared_BS, **blocks)
        return
    (rows, hidden), fmt = x_BH.shape, format_of(parts[0])
    narrow = is_narrow(rows, hidden)
    sizes = {"BLOCK_N": 64, "BLOCK_K": tile_columns(hidden, 64), "STAGES": 3 if narrow else 4, "num_warps": 4}
    if fmt["KIND"]:
        sizes |= {"BLOCK_K": tile_columns(hidden), "STAGES": 3}
    if fmt["KIND"] == INT4.value:
        sizes |= {"BLOCK_N": 32, "num_warps": 2}
    sizes |= blocks
    sizes["BLOCK_N"] = min(
        sizes["BLOCK_N"], power_of_two(max(weights.intermediate_size, weights.shared_intermediate_size), 16)
    )
    cut = row_blocks(rows, 0 if topk_ids_BK is None else topk_ids_BK.shape[1])
    programs = triton.cdiv(weights.shared_intermediate_size, sizes["BLOCK_N"])
    programs += weights.num_experts * triton.cdiv(weights.intermediate_size, sizes["BLOCK_N"])
    _gate_up_gemm_kernel[(programs * cut["ROW_BLOCKS"],)](
        x_BH,
        x_BH if topk_ids_BK is None else topk_ids_BK,
        *map(numbers_of, parts),
        *map(scale_of, parts),
        x_BH if routed_BKI is None else routed_BKI,
        x_BH if shared_BS is None else shared_BS,
        rows,
        H=hidden,
        I=weights.intermediate_size,
        S=weights.shared_intermediate_size,
        **fmt,
        **cut,
        **sizes,
    )


def down_gemm(
    routed_BKI: torch.Tensor | None,
    shared_BS: torch.Tensor | None,
    weights: ExpertWeights,
    routed_BKH: torch.Tensor | None,
    shared_BH: torch.Tensor | None,
    topk_ids_BK: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Write `down_plain` of contiguous rows; ids are int32, and an id of -1 stands for no expert."""
    weights.check()
    out = shared_BH if routed_BKH is None else routed_BKH
    if out is None:
        raise ValueError("A layer needs routed or shared experts.")
    parts = weights.downs()
    if not of_one_format(parts):
        down_gemm(routed_BKI, None, weights.routed_alone, routed_BKH, None, topk_ids_BK, **blocks)
        down_gemm(None, shared_BS, weights.shared_alone, None, shared_BH, **blocks)
        return
    rows, hidden, fmt = out.shape[0], out.shape[-1], format_of(parts[0])
    widest = max(weights.intermediate_size, weights.shared_intermediate_size)
    wide = bool(fmt["KIND"]) or is_narrow(rows, hidden)
    block_n = 128 if fmt["KIND"] and rows > 4 else 64
    cut_by = {"BLOCK_K": tile_columns(widest, 128 if wide else 64), "STAGES": 3 if wide else 4}
    sizes = {"BLOCK_N": block_n, "num_warps": 4, **cut_by, **blocks}
    sizes["BLOCK_N"] = min(sizes["BLOCK_N"], power_of_two(hidden, 16))
    cut = row_blocks(rows, 0 if topk_ids_BK is None else topk_ids_BK.shape[1])
    programs = (weights.num_experts + (weights.shared_intermediate_size > 0)) * triton.cdiv(hidden, sizes["BLOCK_N"])
    _down_gemm_kernel[(programs * cut["ROW_BLOCKS"],)](
        out if routed_BKI is None else routed_BKI,
        out if shared_BS is None else shared_BS,
        out if topk_ids_BK is None else topk_ids_BK,
        *map(numbers_of, parts),
        *map(scale_of, parts),
        out if routed_BKH is None else routed_BKH,
        out if shared_BH is None else shared_BH,
        rows,
        H=hidden,
        I=weights.intermediate_size,
        S=weights.shared_intermediate_size,
        **fmt,
        **cut,
        **sizes,
    )
