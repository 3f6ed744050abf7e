"""Linear layers of a small batch (GEMM with 2 to 64 rows), bound by reading the weights.

Shape suffixes: B rows, K inputs, N outputs, G groups with weights of their own (attention heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .common import check_rows, dot, grid_wait, launch_dependents, multiprocessors, power_of_two, shared_memory
from .decode_gemv import MAX_WEIGHTS, side_by_side
from .weights import (
    INT4,
    PLAIN,
    Weight,
    check_weights,
    format_of,
    load_tile,
    numbers_of,
    of_one_format,
    row_scale,
    scale_of,
    tile_columns,
)

# Bytes of shared memory that 64 rows of 256 inputs take in three or four stages, beside the weights.
WIDE_SHARED_BYTES = 150_000


@triton.jit(do_not_specialize=["rows"])
def _gemm_kernel(
    x_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    third_ptr: tl.tensor,
    first_scale_ptr: tl.tensor,
    second_scale_ptr: tl.tensor,
    third_scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    x_row: tl.tensor,
    x_group: tl.tensor,
    out_row: tl.tensor,
    out_group: tl.tensor,
    w_group: tl.tensor,
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROUNDED: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    grid_wait(PDL)
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SCALES: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    program = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    blocks1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    blocks2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N
    in_second = program >= blocks1
    in_third = program >= blocks1 + blocks2
    matrix = first_ptr + group * w_group
    scale_ptr = first_scale_ptr
    if in_third:
        matrix = third_ptr
        scale_ptr = third_scale_ptr
    elif in_second:
        matrix = second_ptr
        scale_ptr = second_scale_ptr
    block = program - tl.where(in_third, blocks1 + blocks2, tl.where(in_second, blocks1, 0))
    size = tl.where(in_third, N3, tl.where(in_second, N2, N1))
    shift = tl.where(in_third, N1 + N2, tl.where(in_second, N1, 0))
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    # The weight stands on the left: its many rows fill the matrix unit, and the few tokens are its narrow side.
    total = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        if KIND == PLAIN:
            weight_offsets = n.to(tl.int64)[:, None] * W_N + k[None, :] * W_K
            weight = tl.load(matrix + weight_offsets, mask=(n < size)[:, None] & (k < K)[None, :], other=0.0)
        else:
            dtype = x_ptr.dtype.element_ty
            weight = load_tile(
                matrix, scale_ptr, n, size, start, K // PER, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype,
                BY_WORD=BLOCK_N < 64,
            )  # fmt: skip
        x_offsets = group * x_group + b[None, :] * x_row + k[:, None]
        x = tl.load(x_ptr + x_offsets, mask=(b < rows)[None, :] & (k < K)[:, None], other=0.0)
        total = dot(weight, x, total)
    if KIND != PLAIN and GROUP == 0:
        total *= row_scale(scale_ptr, n, size, KIND, GROUP)[:, None]
    if ROUNDED:
        total = total.to(x_ptr.dtype.element_ty).to(tl.float32)
    held = (n < size)[:, None] & (b < rows)[None, :]
    offsets = group * out_group + b[None, :] * out_row + shift + n[:, None]
    if RESIDUAL:
        total += tl.load(residual_ptr + offsets, mask=held, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=held)


def gemm_blocks(rows: int, outputs: int, inputs: int, device: torch.device, fmt: dict[str, int]) -> dict[str, int]:
    """Return the block sizes of a GEMM: enough programs for the device's multiprocessors, 64 rows at most."""
    block_n = 64 if outputs >= 64 * multiprocessors(device) else 32 if outputs > 1280 or rows > 16 else 16
    block_k, stages, warps = tile_columns(inputs), 4, 4
    if fmt["KIND"] and rows <= 16:
        block_n, block_k, stages, warps = 16, tile_columns(inputs, 512), 3, 2
    elif fmt["KIND"]:
        # Rows of packed weights are short: more columns at a time, where there is memory for as many of the inputs.
        roomy = shared_memory(device) > WIDE_SHARED_BYTES
        block_k = tile_columns(inputs, 256) if roomy else block_k
        stages = 4 if roomy and block_n < 64 else 3
        if roomy:
            block_n, stages = (64, 3) if outputs > 2560 else (16, 4)
    return {
        "BLOCK_N": min(block_n, power_of_two(outputs, 16)),
        "BLOCK_K": block_k,
        "BLOCK_B": min(power_of_two(rows, 8), 64),
        "STAGES": stages,
        "num_warps": warps,
    }


def linear_gemm(
    x_BK: torch.Tensor,
    weights: Sequence[Weight],
    out_BN: torch.Tensor,
    residual_BN: torch.Tensor | None = None,
    rounded: bool = False,
    **blocks: Any,
) -> None:
    """Write the outputs of one to three linear layers side by side, plus a residual.

    Args:
        x_BK: the rows.
        weights: matrices [N_i, K], contiguous; those of several formats take a launch each.
        out_BN: of any floating dtype; may be the residual itself.
        residual_BN: added to the result; laid out like ``out_BN``.
        rounded: round the product to the dtype of ``x_BK`` although ``out_BN`` is wider.
        blocks: block sizes instead of those of `gemm_blocks`.
    """
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"linear_gemm takes one to {MAX_WEIGHTS} weights, got {len(weights)}.")
    check_weights(weights)
    if residual_BN is not None and residual_BN.stride() != out_BN.stride():
        raise ValueError("linear_gemm needs a residual laid out like its output.")
    if not of_one_format(weights):
        for weight, span in side_by_side(weights):
            part = None if residual_BN is None else residual_BN[:, span]
            linear_gemm(x_BK, [weight], out_BN[:, span], part, rounded, **blocks)
        return
    residual = None if residual_BN is None else residual_BN.unsqueeze(1)
    _launch_gemm(x_BK.unsqueeze(1), weights, out_BN.unsqueeze(1), residual, rounded, blocks)


def batched_gemm(x_BGK: torch.Tensor, weight_GNK: torch.Tensor, out_BGN: torch.Tensor, **blocks: Any) -> None:
    """Write the batched products of rows with a matrix for each group (head), [B, G, N].

    Args:
        x_BGK: rows of any strides but the last.
        weight_GNK: of any strides: a transposed view will do.
        out_BGN: of any strides but the last.
        blocks: block sizes instead of those of `gemm_blocks`.
    """
    _launch_gemm(x_BGK, [weight_GNK], out_BGN, None, False, blocks)


def _launch_gemm(
    x_BGK: torch.Tensor,
    weights: Sequence[Weight],
    out_BGN: torch.Tensor,
    residual_BGN: torch.Tensor | None,
    rounded: bool,
    blocks: dict[str, Any],
) -> None:
    check_rows(x_BGK, out_BGN)
    rows, groups, inputs = x_BGK.shape
    outputs = [weight.shape[-2] for weight in weights] + [0] * (MAX_WEIGHTS - len(weights))
    filled = [*weights, *[weights[0]] * (MAX_WEIGHTS - len(weights))]
    fmt = format_of(weights[0])
    sizes = {**gemm_blocks(rows, groups * sum(outputs), inputs, x_BGK.device, fmt), **blocks}
    # Packed matrices are read without strides.
    strides = weights[0].stride() if isinstance(weights[0], torch.Tensor) else (inputs, 1)
    programs = sum(triton.cdiv(size, sizes["BLOCK_N"]) for size in outputs)
    _gemm_kernel[(programs, groups, triton.cdiv(rows, sizes["BLOCK_B"]))](
        x_BGK,
        *map(numbers_of, filled),
        *map(scale_of, filled),
        x_BGK if residual_BGN is None else residual_BGN,
        out_BGN,
        rows,
        x_BGK.stride(0),
        x_BGK.stride(1),
        out_BGN.stride(0),
        out_BGN.stride(1),
        strides[0] if groups > 1 else 0,
        *strides[-2:],
        *outputs,
        K=inputs,
        **fmt,
        RESIDUAL=residual_BGN is not None,
        ROUNDED=rounded,
        **sizes,
    )
