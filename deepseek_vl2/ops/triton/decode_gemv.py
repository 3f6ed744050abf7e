"""Linear layers of a single token (GEMV), bound by reading the weights, and the argmax of logits.

Shape suffixes: B rows, K inputs, N outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import packed_gemv
from .common import check_rows, grid_wait, launch_dependents, load_row, load_rows, power_of_two
from .weights import QuantWeight, Weight, check_weights, format_of, of_one_format

MAX_WEIGHTS = 3


def norm_linear_plain(
    x_BK: torch.Tensor,
    weights: Sequence[torch.Tensor],
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_BN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return RMS norm (where a weight for it is given), then all products side by side, plus a residual: [B, N]."""
    if norm_K is not None:
        wide = x_BK.float()
        x_BK = norm_K * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_BK.dtype)
    out = torch.cat([F.linear(x_BK, weight) for weight in weights], dim=-1)
    return out if residual_BN is None else residual_BN + out


@triton.jit
def _gemv_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    third_ptr: tl.tensor,
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
    BLOCK_K: tl.constexpr,
    NORMED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROUNDED: tl.constexpr,
    ARGMAX: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    program = tl.program_id(0)
    blocks1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    blocks2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N
    in_second = program >= blocks1
    in_third = program >= blocks1 + blocks2
    weight_ptr = first_ptr
    if in_third:
        weight_ptr = third_ptr
    elif in_second:
        weight_ptr = second_ptr
    block = program - tl.where(in_third, blocks1 + blocks2, tl.where(in_second, blocks1, 0))
    size = tl.where(in_third, N3, tl.where(in_second, N2, N1))
    shift = tl.where(in_third, N1 + N2, tl.where(in_second, N1, 0))
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # All loads of the weight are on their way before the row is waited for.
    parts = load_rows(weight_ptr, rows, size, K, K, BLOCK_K)
    if NORMED:
        norms = load_row(norm_ptr, K, BLOCK_K)
    grid_wait(PDL)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for part in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        columns = part * BLOCK_K + tl.arange(0, BLOCK_K)
        held = columns < K
        x = tl.load(x_ptr + columns, mask=held, other=0.0).to(tl.float32)
        if NORMED:
            squares += x * x
            x *= norms[part].to(tl.float32)
        total += parts[part].to(tl.float32) * x[None, :]
    out = tl.sum(total, axis=1)
    if NORMED:
        out *= tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    if ROUNDED:
        out = out.to(x_ptr.dtype.element_ty).to(tl.float32)
    if RESIDUAL:
        out += tl.load(residual_ptr + shift + rows, mask=rows < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + shift + rows, out.to(out_ptr.dtype.element_ty), mask=rows < size)
    if ARGMAX:
        shown = tl.where(rows < size, out, float("-inf"))
        partials = tl.max(shown, axis=0)
        tl.store(max_ptr + program, partials)
        tl.store(argmax_ptr + program, tl.min(tl.where((shown == partials) & (rows < size), rows, 2147483647), axis=0))


def gemv_blocks(weight: Weight, rows: int) -> dict[str, int]:
    """Return rows a program, columns a step and warps for ``rows`` of weights of that kind and width.

    Of plain ones measured on an H200 (benchmarks/gpu_tune.py).
    """
    width = weight.shape[-1]
    if isinstance(weight, QuantWeight):
        return packed_gemv.gemv_blocks(width, format_of(weight))
    if width >= 2048 and rows <= 16384:
        return {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4}
    return {"BLOCK_N": 8, "BLOCK_K": min(power_of_two(width, 16), 512), "num_warps": 4}


def side_by_side(weights: Sequence[Weight]) -> Iterator[tuple[Weight, slice]]:
    """Yield weights, and where the outputs of each stand among those of all."""
    first = 0
    for weight in weights:
        yield weight, slice(first, first + weight.shape[0])
        first += weight.shape[0]


def linear_gemv(
    x_K: torch.Tensor,
    weights: Sequence[Weight],
    out_N: torch.Tensor,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_N: torch.Tensor | None = None,
    rounded: bool = False,
    partials: tuple[torch.Tensor, torch.Tensor] | None = None,
    **blocks: Any,
) -> None:
    """Write `norm_linear_plain` of one row into ``out_N``, which may be the residual itself.

    Sums are in float32, and only the result is rounded: the normed row is not, where the plain form rounds it.

    Args:
        x_K: the row.
        weights: one to three matrices [N_i, K]; those of several formats take a launch each.
        out_N: of any floating dtype.
        norm_K: the weight of an RMS norm that is folded into the product.
        eps: the norm's epsilon.
        residual_N: added to the result.
        rounded: round the product to the dtype of ``x_K`` although ``out_N`` is wider, as the plain form does.
        partials: where to write each program's largest output, float32, and its index, int32 (one weight only).
        blocks: block sizes instead of those of `gemv_blocks`, and options of the launch (`pdl_options`).
    """
    check_rows(x_K, out_N)
    check_weights(weights)
    if not 1 <= len(weights) <= MAX_WEIGHTS or (partials is not None and len(weights) > 1):
        raise ValueError(f"linear_gemv takes one to {MAX_WEIGHTS} weights, and one where the argmax is asked for.")
    if not of_one_format(weights):
        for weight, span in side_by_side(weights):
            residual = None if residual_N is None else residual_N[span]
            linear_gemv(x_K, [weight], out_N[span], norm_K, eps, residual, rounded, **blocks)
        return
    sizes = [weight.shape[0] for weight in weights] + [0] * (MAX_WEIGHTS - len(weights))
    filled = [*weights, *[weights[0]] * (MAX_WEIGHTS - len(weights))]
    cut = {**gemv_blocks(weights[0], sum(sizes)), **blocks}
    common = {"NORMED": norm_K is not None, "RESIDUAL": residual_N is not None, "ROUNDED": rounded}
    kernel: Any = _gemv_kernel
    matrices: Sequence[Any] = filled
    if isinstance(weights[0], QuantWeight):
        kernel, matrices = packed_gemv.packed_gemv_kernel, packed_gemv.words_and_scales(filled)
    kernel[(sum(triton.cdiv(size, cut["BLOCK_N"]) for size in sizes),)](
        x_K,
        x_K if norm_K is None else norm_K,
        *matrices,
        x_K if residual_N is None else residual_N,
        out_N,
        *((out_N, out_N) if partials is None else partials),
        eps,
        *sizes,
        K=x_K.shape[-1],
        ARGMAX=partials is not None,
        **common,
        **cut,
    )


@triton.jit(do_not_specialize=["N"])
def _reduce_argmax_kernel(
    max_ptr: tl.tensor,
    argmax_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    grid_wait(PDL)
    max_ptr += tl.program_id(0) * N
    argmax_ptr += tl.program_id(0) * N
    index = tl.arange(0, BLOCK)
    value = tl.full([BLOCK], float("-inf"), tl.float32)
    winner = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, N, BLOCK):
        held = start + index < N
        new = tl.load(max_ptr + start + index, mask=held, other=float("-inf"))
        new_id = tl.load(argmax_ptr + start + index, mask=held, other=2147483647)
        better = (new > value) | ((new == value) & (new_id < winner))
        value = tl.where(better, new, value)
        winner = tl.where(better, new_id, winner)
    top = tl.max(value, axis=0)
    winning = tl.min(tl.where(value == top, winner, 2147483647), axis=0)
    winning = tl.where(
        winning == 2147483647, 0, winning
    )  # of what is not a number none is largest: any id of the table
    tl.store(out_ptr + tl.program_id(0), winning.to(tl.int64))


def reduce_argmax(partials: tuple[torch.Tensor, torch.Tensor], out_B: torch.Tensor, **options: Any) -> None:
    """Write the argmax of each row, the first one of equals; 0 where no output is a number.

    Args:
        partials: the maximum of each part and its index, as `linear_gemv` or `partial_argmax` wrote them.
        out_B: written, int64.
        options: of the launch, see `common.pdl_options`.
    """
    values, ids = partials
    _reduce_argmax_kernel[(out_B.shape[0],)](values, ids, out_B, values.shape[-1], BLOCK=2048, num_warps=8, **options)


ARGMAX_BLOCK = 4096


@triton.jit(do_not_specialize=["V"])
def _partial_argmax_kernel(
    logits_ptr: tl.tensor,
    max_ptr: tl.tensor,
    argmax_ptr: tl.tensor,
    V: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    grid_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shown = tl.load(logits_ptr + row * V + index, mask=index < V, other=float("-inf"))
    partials = tl.max(shown, axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(max_ptr + place, partials)
    tl.store(argmax_ptr + place, tl.min(tl.where((shown == partials) & (index < V), index, 2147483647), axis=0))


def partial_argmax(logits_BV: torch.Tensor, partials: tuple[torch.Tensor, torch.Tensor], **options: Any) -> None:
    """Write the maximum of each `ARGMAX_BLOCK` logits of a row, [B, parts], and its index, for `reduce_argmax`.

    PyTorch's own argmax has one program for a row, which takes longer than a layer's attention.

    Args:
        logits_BV: contiguous, float32.
        partials: written; float32 and int32.
        options: of the launch, see `common.pdl_options`.
    """
    check_rows(logits_BV)
    rows, vocabulary = logits_BV.shape
    _partial_argmax_kernel[(rows, partials[0].shape[1])](
        logits_BV, *partials, vocabulary, BLOCK=ARGMAX_BLOCK, num_warps=4, **options
    )
