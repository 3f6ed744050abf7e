"""Routed and shared experts of one row (GEMV), without gathering their weights.

Every program reads the ids of the selected experts from device memory and streams its part of a weight where it lies;
the shared experts run in the same launch.

Shape suffixes: H hidden size, K experts of the row, I intermediate size of a routed expert, S that of the shared
experts, N = K * I + S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import packed_gemv
from .common import check_rows, grid_wait, launch_dependents, load_row, load_rows, multiprocessors, power_of_two
from .decode_experts import ExpertWeights, silu_mul
from .weights import QuantWeight, format_of, of_one_format


@triton.jit
def _gate_up_gemv_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    shared_gate_ptr: tl.tensor,
    shared_up_ptr: tl.tensor,
    intermediate_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    program = tl.program_id(0)
    shared_blocks: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    gate_ptr = shared_gate_ptr
    up_ptr = shared_up_ptr
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
            gate_ptr = gate_up_ptr + expert * (2 * I * H)
            up_ptr = gate_ptr + I * H
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # The shared experts come first, and their weights are on the way before the row and the choice are waited for.
    gates = load_rows(gate_ptr, rows, size, H, H, BLOCK_K)
    ups = load_rows(up_ptr, rows, size, H, H, BLOCK_K)
    grid_wait(PDL)
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for part in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
        h = part * BLOCK_K + tl.arange(0, BLOCK_K)
        held = h < H
        x = tl.load(x_ptr + h, mask=held, other=0.0).to(tl.float32)
        squares += x * x
        x *= norms[part].to(tl.float32)
        gate += gates[part].to(tl.float32) * x[None, :]
        up += ups[part].to(tl.float32) * x[None, :]
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    out = silu_mul(tl.sum(gate, axis=1) * inverse, tl.sum(up, axis=1) * inverse)
    tl.store(intermediate_ptr + shift + rows, out.to(intermediate_ptr.dtype.element_ty), mask=rows < size)


def gate_up_blocks(hidden: int) -> dict[str, int]:
    """Return rows a program, columns a step and warps, of plain weights."""
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
    matrices: Sequence[Any]
    if not of_one_format(parts):
        gate_up_gemv(x_H, norm_H, eps, weights.routed_alone, intermediate_N, topk_ids_K, **blocks)
        rest_N = intermediate_N[top_k * weights.intermediate_size :]
        gate_up_gemv(x_H, norm_H, eps, weights.shared_alone, rest_N, None, **blocks)
        return
    hidden = x_H.shape[-1]
    if isinstance(parts[0], QuantWeight):
        kernel, matrices = packed_gemv.packed_gate_up_kernel, packed_gemv.words_and_scales(parts)
        sizes = {**packed_gemv.gate_up_blocks(hidden, format_of(parts[0])), **blocks}
    else:
        kernel, matrices, sizes = _gate_up_gemv_kernel, parts, {**gate_up_blocks(hidden), **blocks}
    routed_blocks = top_k * triton.cdiv(weights.intermediate_size, sizes["BLOCK_N"])
    kernel[(triton.cdiv(weights.shared_intermediate_size, sizes["BLOCK_N"]) + routed_blocks,)](
        x_H,
        norm_H,
        *matrices,
        intermediate_N,
        intermediate_N if topk_ids_K is None else topk_ids_K,
        eps,
        H=hidden,
        I=weights.intermediate_size,
        S=weights.shared_intermediate_size,
        TOP_K=top_k,
        **sizes,
    )


@triton.jit
def _add_down(
    total: tl.tensor,
    part: tl.tensor,
    factor: tl.tensor,
    intermediate_ptr: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Return ``total`` plus the products of some columns with an intermediate state, times the expert's weight."""
    columns = start + tl.arange(0, BLOCK_K)
    inner = tl.load(intermediate_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
    return total + part.to(tl.float32) * (inner * factor)[None, :]


@triton.jit
def _down_gemv_kernel(
    intermediate_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    down_ptr: tl.tensor,
    shared_down_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held_rows = (rows < H)[:, None]
    step = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # The shared experts come first: their weights, up to some registers full, are on the way before the wait.
    ahead: tl.constexpr = min(S, AHEAD * BLOCK_K)
    parts = load_rows(shared_down_ptr, rows, H, S, ahead, BLOCK_K)
    grid_wait(PDL)
    shared_ptr = intermediate_ptr + TOP_K * I
    for index in tl.static_range((ahead + BLOCK_K - 1) // BLOCK_K):
        total = _add_down(total, parts[index], 1.0, shared_ptr, index * BLOCK_K, S, BLOCK_K)
    for start in tl.static_range(AHEAD * BLOCK_K, S, BLOCK_K):
        s = start + step
        mask = held_rows & (s < S)[None, :]
        offsets = rows[:, None] * S + s[None, :]
        part = tl.load(shared_down_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        total = _add_down(total, part, 1.0, shared_ptr, start, S, BLOCK_K)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + slot).to(tl.int64)
        topk_weight = tl.load(weights_ptr + slot)
        matrix = down_ptr + expert * (H * I)
        for start in tl.static_range(0, I, BLOCK_K):
            i = start + step
            offsets = rows[:, None] * I + i[None, :]
            mask = held_rows & (i < I)[None, :]
            part = tl.load(matrix + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            total = _add_down(total, part, topk_weight, intermediate_ptr + slot * I, start, I, BLOCK_K)
    out = tl.sum(total, axis=1) + tl.load(residual_ptr + rows, mask=rows < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < H)


def down_blocks(weights: ExpertWeights, hidden: int, programs: int) -> dict[str, int]:
    """Return rows a program, columns a step, steps of shared experts read ahead, and warps, for plain weights."""
    widest = power_of_two(max(weights.intermediate_size, weights.shared_intermediate_size), 16)
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
    matrices: Sequence[Any]
    if not of_one_format(parts):
        down_gemv(intermediate_N, weights.routed_alone, residual_H, out_H, topk_ids_K, topk_weights_K, **blocks)
        rest_N = intermediate_N[top_k * weights.intermediate_size :]
        down_gemv(rest_N, weights.shared_alone, out_H, out_H, **blocks)
        return
    hidden = out_H.shape[-1]
    if isinstance(parts[0], QuantWeight):
        kernel, matrices = packed_gemv.packed_down_kernel, packed_gemv.words_and_scales(parts)
        width = weights.intermediate_size or weights.shared_intermediate_size
        sizes = {**packed_gemv.down_blocks(width, format_of(parts[0])), **blocks}
    else:
        kernel, matrices = _down_gemv_kernel, parts
        sizes = {**down_blocks(weights, hidden, multiprocessors(out_H.device)), **blocks}
    kernel[(triton.cdiv(hidden, sizes["BLOCK_N"]),)](
        intermediate_N,
        intermediate_N if topk_ids_K is None else topk_ids_K,
        intermediate_N if topk_weights_K is None else topk_weights_K,
        *matrices,
        residual_H,
        out_H,
        H=hidden,
        I=weights.intermediate_size,
        S=weights.shared_intermediate_size,
        TOP_K=top_k,
        **sizes,
    )
