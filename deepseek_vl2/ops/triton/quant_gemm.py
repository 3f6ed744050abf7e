"""Products of packed weights with a few rows, or many, by the matrix unit: weights become 16 bits in registers.

The plain form: `packed_linear` of `models`. Shape suffixes: B rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .quant_common import INTERPRETED, QuantWeight, block_k, fp8_to_float, grid_wait, launch_dependents, scales_of


@triton.jit
def unpacked_tile(
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return a tile of weights, [rows, BLOCK_K] in float32; those that share a scale with a whole row are unscaled."""
    BLOCK_N: tl.constexpr = rows.shape[0]
    if KIND == 0:
        word = start // 8 + tl.arange(0, BLOCK_K // 8)
        held = (rows < size)[:, None] & (word < K // 8)[None, :]
        places = rows.to(tl.int64)[:, None] * (K // 8) + word[None, :]
        words = tl.load(packed_ptr + places, mask=held, other=0)
        nibble = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
        numbers = tl.reshape(nibble - 8, (BLOCK_N, BLOCK_K)).to(tl.float32)
    else:
        column = start + tl.arange(0, BLOCK_K)
        held = (rows < size)[:, None] & (column < K)[None, :]
        places = rows.to(tl.int64)[:, None] * K + column[None, :]
        stored = tl.load(packed_ptr + places, mask=held, other=0)
        if KIND == 1:
            numbers = stored.to(tl.float32)
        else:
            numbers = fp8_to_float(stored)
    if GROUP > 0:
        scale = scales_of(scale_ptr, rows, size, start, K, BLOCK_K, GROUP, ROW_BLOCK)
        grouped = tl.reshape(numbers, (BLOCK_N, BLOCK_K // GROUP, GROUP)) * scale[:, :, None]
        numbers = tl.reshape(grouped, (BLOCK_N, BLOCK_K))
    return numbers


@triton.jit(do_not_specialize=["rows"])
def _gemm_kernel(
    x_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    x_row: tl.tensor,
    out_row: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    launch_dependents(EARLY)
    grid_wait(EARLY)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    # The weight stands on the left: its many rows fill the matrix unit, and the few tokens are its narrow side.
    total = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        weight = unpacked_tile(packed_ptr, scale_ptr, n, N, start, K, BLOCK_K, KIND, GROUP, ROW_BLOCK)
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + b.to(tl.int64)[None, :] * x_row + k[:, None], mask=(b < rows)[None, :] & (k < K)[:, None])
        x = tl.where((b < rows)[None, :] & (k < K)[:, None], x, 0.0)
        if INTERPRETED:
            total = tl.dot(weight, x.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(weight.to(x_ptr.dtype.element_ty), x, total, input_precision="ieee")
    if GROUP == 0:
        total *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    held = (n < N)[:, None] & (b < rows)[None, :]
    offsets = b.to(tl.int64)[None, :] * out_row + n[:, None]
    if RESIDUAL:
        total += tl.load(residual_ptr + offsets, mask=held, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=held)


def quant_gemm(
    x_BK: torch.Tensor,
    weight: QuantWeight,
    out_BN: torch.Tensor,
    residual_BN: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Write the products of rows with a packed matrix, plus a residual; sums are in float32.

    Args:
        x_BK: the rows, each without gaps.
        weight: [N, K].
        out_BN: of any floating dtype; may be the residual itself.
        residual_BN: added to the result; laid out like ``out_BN``.
        blocks: block sizes instead of the usual ones, and options of the launch.

    Raises:
        ValueError: a layout that the kernel does not read.
    """
    weight.check()
    if x_BK.stride(-1) != 1 or out_BN.stride(-1) != 1:
        raise ValueError("quant_gemm reads and writes rows without gaps.")
    if residual_BN is not None and residual_BN.stride() != out_BN.stride():
        raise ValueError("quant_gemm needs a residual laid out like its output.")
    rows, group = x_BK.shape[0], weight.constants["GROUP"]
    usual = {
        "BLOCK_N": 64 if weight.rows >= 64 * 132 else 32 if weight.rows > 1280 or rows > 16 else 16,
        "BLOCK_K": block_k(weight.columns, group, 128),
        "BLOCK_B": min(max(triton.next_power_of_2(rows), 16), 64),
        "STAGES": 3,
        "num_warps": 4,
    }
    sizes = {**usual, **blocks}
    _gemm_kernel[(triton.cdiv(weight.rows, sizes["BLOCK_N"]), triton.cdiv(rows, sizes["BLOCK_B"]))](
        x_BK,
        weight.numbers,
        weight.scale,
        out_BN if residual_BN is None else residual_BN,
        out_BN,
        rows,
        x_BK.stride(0),
        out_BN.stride(0),
        N=weight.rows,
        K=weight.columns,
        RESIDUAL=residual_BN is not None,
        **weight.constants,
        **sizes,
    )
