"""Routed and shared experts of one row (GEMV), without gathering their weights.

Every program reads the ids of the selected experts from device memory and streams its part of a weight where it lies;
the shared experts run in the same launch.

Shape suffixes: H hidden size, K experts of the row, I intermediate size of a routed expert, S that of the shared
experts, N = K * I + S.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import check_rows, grid_wait, launch_dependents, load_row, load_rows, multiprocessors, power_of_two
from .decode_experts import ExpertWeights, silu_mul
from .weights import (
    INT4,
    PLAIN,
    fold,
    format_of,
    load_scale,
    load_scales,
    numbers_of,
    of_one_format,
    packed_blocks,
    row_scale,
    scale_of,
    unpack,
)


@triton.jit
def _gate_up_gemv_kernel(
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
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SPAN: tl.constexpr = 1 if KIND == PLAIN else 16
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
    norms = load_row(norm_ptr, H, BLOCK_K)
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
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # The shared experts come first, and their weights are on the way before the row and the choice are waited for.
    gates = load_rows(gate_ptr, rows, size, H, H, BLOCK_K, PER)
    ups = load_rows(up_ptr, rows, size, H, H, BLOCK_K, PER)
    gate_scales = load_scales(gate_scale_ptr, rows, size, H, H, BLOCK_K, KIND, GROUP, ROW_BLOCK)
    up_scales = load_scales(up_scale_ptr, rows, size, H, H, BLOCK_K, KIND, GROUP, ROW_BLOCK)
    gate_rest = row_scale(gate_scale_ptr, rows, size, KIND, GROUP)
    up_rest = row_scale(up_scale_ptr, rows, size, KIND, GROUP)
    grid_wait(PDL)
    gate = tl.zeros([BLOCK_N, BLOCK_K // SPAN], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K // SPAN], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for part in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
        h = part * BLOCK_K + tl.arange(0, BLOCK_K)
        held = h < H
        x = tl.load(x_ptr + h, mask=held, other=0.0).to(tl.float32)
        squares += x * x
        x *= norms[part].to(tl.float32)
        gate_scale = gate_scales[part] if GROUP > 0 else gates[part]
        up_scale = up_scales[part] if GROUP > 0 else ups[part]
        gate += fold(unpack(gates[part], gate_scale, KIND, GROUP) * x[None, :], SPAN)
        up += fold(unpack(ups[part], up_scale, KIND, GROUP) * x[None, :], SPAN)
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    out = silu_mul(tl.sum(gate, axis=1) * (gate_rest * inverse), tl.sum(up, axis=1) * (up_rest * inverse))
    tl.store(intermediate_ptr + shift + rows, out.to(intermediate_ptr.dtype.element_ty), mask=rows < size)


def gate_up_blocks(hidden: int, fmt: dict[str, int]) -> dict[str, int]:
    """Return rows a program, columns a step and warps."""
    if fmt["KIND"]:
        return packed_blocks(hidden, fmt, parts_a_thread=3, warps=2)
    # Measured on an H200 (benchmarks/gpu_tune.py): long rows want few of them in a program, and wide loads.
    block_n, block_k = (2, 1024) if hidden >= 2048 else (4, 512)
    return {"BLOCK_N": block_n, "BLOCK_K": min(power_of_two(hidden, 16), block_k), "num_warps": 4}


def gate_up_gemv(
    x_H: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weights: ExpertWeights,
    intermediate_N: torch.Tensor,
    topk_ids_K: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Norm one row, and write silu(gate) * up of its experts.

    Args:
        x_H: the row, before its norm, which is folded into the products.
        norm_H: the norm's weight.
        eps: the norm's epsilon.
        weights: of the experts.
        intermediate_N: K * I numbers of the routed experts, in the order of their ids, then S of the shared ones.
        topk_ids_K: the selected experts, int32; with routed experts only.
        blocks: block sizes instead of the usual ones, and options of the launch (`pdl_options`).
    """
    check_rows(x_H, norm_H, intermediate_N)
    weights.check()
    top_k, parts = 0 if topk_ids_K is None else topk_ids_K.shape[-1], weights.gates_and_ups()
    if not of_one_format(parts):
        gate_up_gemv(x_H, norm_H, eps, weights.routed_alone, intermediate_N, topk_ids_K, **blocks)
        rest_N = intermediate_N[top_k * weights.intermediate_size :]
        gate_up_gemv(x_H, norm_H, eps, weights.shared_alone, rest_N, None, **blocks)
        return
    hidden, fmt = x_H.shape[-1], format_of(parts[0])
    sizes = {**gate_up_blocks(hidden, fmt), **blocks}
    routed_blocks = top_k * triton.cdiv(weights.intermediate_size, sizes["BLOCK_N"])
    _gate_up_gemv_kernel[(triton.cdiv(weights.shared_intermediate_size, sizes["BLOCK_N"]) + routed_blocks,)](
        x_H,
        norm_H,
        *map(numbers_of, parts),
        *map(scale_of, parts),
        intermediate_N,
        intermediate_N if topk_ids_K is None else topk_ids_K,
        eps,
        H=hidden,
        I=weights.intermediate_size,
        S=weights.shared_intermediate_size,
        TOP_K=top_k,
        **fmt,
        **sizes,
    )


@triton.jit
def _add_down(
    total: tl.tensor,
    part: tl.tensor,
    scale: tl.tensor,
    rest: tl.tensor,
    factor: tl.tensor,
    intermediate_ptr: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """Return ``total`` plus the products of some columns with an intermediate state, times the expert's weight."""
    columns = start + tl.arange(0, BLOCK_K)
    inner = tl.load(intermediate_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
    if KIND == PLAIN:
        total += part.to(tl.float32) * (inner * factor)[None, :]
    else:
        sums = fold(unpack(part, scale, KIND, GROUP) * inner[None, :], SPAN)
        if GROUP == 0:
            sums *= rest[:, None]
        total += sums * factor
    return total


@triton.jit
def _down_gemv_kernel(
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
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SPAN: tl.constexpr = 1 if KIND == PLAIN else 16
    SCALES: tl.constexpr = 1 if GROUP == 0 else (I + GROUP - 1) // GROUP
    SHARED_SCALES: tl.constexpr = 1 if GROUP == 0 else (S + GROUP - 1) // GROUP
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held_rows = (rows < H)[:, None]
    step = tl.arange(0, BLOCK_K // PER)
    total = tl.zeros([BLOCK_N, BLOCK_K // SPAN], tl.float32)
    # The shared experts come first: their weights, up to some registers full, are on the way before the wait.
    ahead: tl.constexpr = min(S, AHEAD * BLOCK_K)
    parts = load_rows(shared_down_ptr, rows, H, S, ahead, BLOCK_K, PER)
    scales = load_scales(shared_down_scale_ptr, rows, H, S, ahead, BLOCK_K, KIND, GROUP, ROW_BLOCK)
    rest = row_scale(shared_down_scale_ptr, rows, H, KIND, GROUP)
    grid_wait(PDL)
    shared_ptr = intermediate_ptr + TOP_K * I
    for index in tl.static_range((ahead + BLOCK_K - 1) // BLOCK_K):
        scale = scales[index] if GROUP > 0 else parts[index]
        total = _add_down(
            total, parts[index], scale, rest, 1.0, shared_ptr, index * BLOCK_K, S, BLOCK_K, KIND, GROUP, SPAN
        )
    for start in tl.static_range(AHEAD * BLOCK_K, S, BLOCK_K):
        s = start // PER + step
        offsets = rows[:, None] * (S // PER) + s[None, :]
        mask = held_rows & (s < S // PER)[None, :]
        part = tl.load(shared_down_ptr + offsets, mask=mask, other=0, eviction_policy="evict_first")
        scale = part
        if GROUP > 0:
            scale = load_scale(shared_down_scale_ptr, rows, H, start, SHARED_SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK)
        total = _add_down(total, part, scale, rest, 1.0, shared_ptr, start, S, BLOCK_K, KIND, GROUP, SPAN)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + slot).to(tl.int64)
        topk_weight = tl.load(weights_ptr + slot)
        matrix = down_ptr + expert * (H * (I // PER))
        scale_ptr = down_scale_ptr + expert * ((H + ROW_BLOCK - 1) // ROW_BLOCK * SCALES)
        rest = row_scale(scale_ptr, rows, H, KIND, GROUP)
        for start in tl.static_range(0, I, BLOCK_K):
            i = start // PER + step
            offsets = rows[:, None] * (I // PER) + i[None, :]
            mask = held_rows & (i < I // PER)[None, :]
            part = tl.load(matrix + offsets, mask=mask, other=0, eviction_policy="evict_first")
            scale = part
            if GROUP > 0:
                scale = load_scale(scale_ptr, rows, H, start, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK)
            total = _add_down(
                total, part, scale, rest, topk_weight, intermediate_ptr + slot * I, start, I, BLOCK_K, KIND, GROUP, SPAN
            )
    out = tl.sum(total, axis=1) + tl.load(residual_ptr + rows, mask=rows < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < H)


def down_blocks(weights: ExpertWeights, hidden: int, fmt: dict[str, int], programs: int) -> dict[str, int]:
    """Return rows a program, columns a step, steps of shared experts that are read ahead, and warps."""
    widest = max(weights.intermediate_size, weights.shared_intermediate_size)
    if fmt["KIND"]:
        # A step serves both kinds of experts, and the routed ones are most.
        width = weights.intermediate_size or widest
        return {**packed_blocks(width, fmt, parts_a_thread=1, warps=2), "AHEAD": 6}
    widest = power_of_two(widest, 16)
    # Measured on an H200 (benchmarks/gpu_tune.py), where 64 registers a thread let 8 programs of four warps run on a
    # multiprocessor at once, or twice as many of two. Rows of small's width just fit as the former, and wide loads are
    # faster then.
    if 2048 <= hidden <= 2 * 8 * programs:
        return {"BLOCK_N": 2, "BLOCK_K": min(widest, 1024), "AHEAD": 3, "num_warps": 4}
    return {"BLOCK_N": 2, "BLOCK_K": min(widest, 512), "AHEAD": 6, "num_warps": 2}


def down_gemv(
    intermediate_N: torch.Tensor,
    weights: ExpertWeights,
    residual_H: torch.Tensor,
    out_H: torch.Tensor,
    topk_ids_K: torch.Tensor | None = None,
    topk_weights_K: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Write residual + weighted sum of one row's experts + its shared experts, all summed in float32.

    Args:
        intermediate_N: as `gate_up_gemv` wrote it.
        weights: of the experts.
        residual_H: what the sum is added to.
        out_H: may be the residual itself.
        topk_ids_K: the selected experts, int32; with routed experts only.
        topk_weights_K: their weights, float32.
        blocks: block sizes instead of the usual ones, and options of the launch (`pdl_options`).
    """
    check_rows(intermediate_N, residual_H, out_H)
    weights.check()
    top_k, parts = 0 if topk_ids_K is None else topk_ids_K.shape[-1], weights.downs()
    if not of_one_format(parts):
        down_gemv(intermediate_N, weights.routed_alone, residual_H, out_H, topk_ids_K, topk_weights_K, **blocks)
        rest_N = intermediate_N[top_k * weights.intermediate_size :]
        down_gemv(rest_N, weights.shared_alone, out_H, out_H, **blocks)
        return
    hidden, fmt = out_H.shape[-1], format_of(parts[0])
    sizes = {**down_blocks(weights, hidden, fmt, multiprocessors(out_H.device)), **blocks}
    _down_gemv_kernel[(triton.cdiv(hidden, sizes["BLOCK_N"]),)](
        intermediate_N,
        intermediate_N if topk_ids_K is None else topk_ids_K,
        intermediate_N if topk_weights_K is None else topk_weights_K,
        *map(numbers_of, parts),
        *map(scale_of, parts),
        residual_H,
        out_H,
        H=hidden,
        I=weights.intermediate_size,
        S=weights.shared_intermediate_size,
        TOP_K=top_k,
        **fmt,
        **sizes,
    )
