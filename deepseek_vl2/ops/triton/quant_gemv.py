"""Products of packed weights with one row, bound by reading the weights. The plain form: `packed_linear` of `models`.

Shape suffixes: K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .quant_common import QuantWeight, block_k, check_same, grid_wait, inverse_rms, launch_dependents, row_dot

MAX_WEIGHTS = 3


@triton.jit
def _gemv_kernel(
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
    best_ptr: tl.tensor,
    best_id_ptr: tl.tensor,
    eps: tl.tensor,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROUNDED: tl.constexpr,
    BEST: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    launch_dependents(EARLY)
    program = tl.program_id(0)
    blocks1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    blocks2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N
    in_second = program >= blocks1
    in_third = program >= blocks1 + blocks2
    packed_ptr = first_ptr
    scale_ptr = first_scale_ptr
    if in_third:
        packed_ptr = third_ptr
        scale_ptr = third_scale_ptr
    elif in_second:
        packed_ptr = second_ptr
        scale_ptr = second_scale_ptr
    block = program - tl.where(in_third, blocks1 + blocks2, tl.where(in_second, blocks1, 0))
    size = tl.where(in_third, N3, tl.where(in_second, N2, N1))
    shift = tl.where(in_third, N1 + N2, tl.where(in_second, N1, 0))
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    grid_wait(EARLY)
    out = row_dot(packed_ptr, scale_ptr, x_ptr, norm_ptr, rows, size, K, BLOCK_K, KIND, GROUP, ROW_BLOCK, NORMED)
    if NORMED:
        out *= inverse_rms(x_ptr, eps, K, BLOCK_K)
    if ROUNDED:
        out = out.to(x_ptr.dtype.element_ty).to(tl.float32)
    if RESIDUAL:
        out += tl.load(residual_ptr + shift + rows, mask=rows < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + shift + rows, out.to(out_ptr.dtype.element_ty), mask=rows < size)
    if BEST:
        shown = tl.where(rows < size, out, float("-inf"))
        best = tl.max(shown, axis=0)
        tl.store(best_ptr + program, best)
        tl.store(best_id_ptr + program, tl.min(tl.where((shown == best) & (rows < size), rows, 2147483647), axis=0))


def quant_gemv(
    x_K: torch.Tensor,
    weights: Sequence[QuantWeight],
    out_N: torch.Tensor,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_N: torch.Tensor | None = None,
    rounded: bool = False,
    best: tuple[torch.Tensor, torch.Tensor] | None = None,
    **blocks: Any,
) -> None:
    """Write the products of one row, RMS-normed where a weight for it is given, with one to three packed matrices.

    Sums are in float32, and only the result is rounded.

    Args:
        x_K: the row.
        weights: of one format and width; the products stand side by side.
        out_N: of any floating dtype; may be the residual itself.
        norm_K: the weight of an RMS norm that is folded into the product.
        eps: the norm's epsilon.
        residual_N: added to the result.
        rounded: round the product to the dtype of ``x_K`` although ``out_N`` is wider.
        best: where to write each program's largest output, float32, and its index, int32 (one weight only).
        blocks: block sizes instead of the usual ones, and options of the launch.

    Raises:
        ValueError: the matrices are of several formats, or more than three.
    """
    if not 1 <= len(weights) <= MAX_WEIGHTS or (best is not None and len(weights) > 1):
        raise ValueError(f"quant_gemv takes one to {MAX_WEIGHTS} weights, and one where the best is asked for.")
    check_same(weights)
    first = weights[0]
    sizes = [weight.rows for weight in weights] + [0] * (MAX_WEIGHTS - len(weights))
    filled = [*weights, *[first] * (MAX_WEIGHTS - len(weights))]
    usual = {"BLOCK_N": 4, "BLOCK_K": block_k(first.columns, first.constants["GROUP"]), "num_warps": 4}
    cut = {**usual, **blocks}
    _gemv_kernel[(sum(triton.cdiv(size, cut["BLOCK_N"]) for size in sizes),)](
        x_K,
        x_K if norm_K is None else norm_K,
        *(weight.numbers for weight in filled),
        *(weight.scale for weight in filled),
        x_K if residual_N is None else residual_N,
        out_N,
        *((out_N, out_N) if best is None else best),
        eps,
        *sizes,
        K=first.columns,
        NORMED=norm_K is not None,
        RESIDUAL=residual_N is not None,
        ROUNDED=rounded,
        BEST=best is not None,
        **first.constants,
        **cut,
    )
