"""Grouped GEMM: routed tokens times the weights of their experts, by TMA descriptors (compute capability 9).

Routed tokens are sorted by expert. A program takes up to 128 of one expert and 128 or 256 columns;
programs that share weights start one after the other, so that memory is read once. An expert has some 130
of a usual prompt; PyTorch's grouped product, which runs elsewhere, is made for more of them.

The plain form is `torch.nn.functional.grouped_mm`, and between the two products silu(gate) * up.

Shape suffixes: P routed tokens, E experts, H hidden size, I intermediate size, J = 2 * I.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, check_rows, dot, power_of_two, rounded

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # releases of Triton that have none
    TensorDescriptor = None

BLOCK_K = 64


def is_supported(weights: torch.Tensor, hidden: int, inner: int) -> bool:
    """Whether the kernels are for weights on this device, of these sizes."""
    if TensorDescriptor is None or hidden % 128 or inner % 128:
        return False
    if weights.device.type != "cuda":
        return INTERPRETED.value
    return torch.version.hip is None and torch.cuda.get_device_capability(weights.device)[0] == 9


@triton.jit
def find_tile(
    ends_ptr: tl.tensor,
    number: tl.tensor,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return a program's expert, block of columns, first row and the row behind its last one; no rows: none is left.

    Programs of one expert and one block of columns are neighbours.
    """
    e = tl.arange(0, E_PAD)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (end - start + BLOCK - 1) // BLOCK
    expert = tl.sum((tl.cumsum(tiles, axis=0) * COLUMNS <= number).to(tl.int32), axis=0)
    own = e == expert
    local = number - tl.sum(tl.where(e < expert, tiles, 0), axis=0) * COLUMNS
    count = tl.maximum(tl.sum(tl.where(own, tiles, 0), axis=0), 1)
    first = tl.sum(tl.where(own, start, 0), axis=0) + local % count * BLOCK
    return expert, local // count, first, tl.sum(tl.where(own, end, 0), axis=0)


@triton.jit
def _multiply_tile(
    rows_desc: tl.tensor,
    weights_desc: tl.tensor,
    out_ptr: tl.tensor,
    line: tl.tensor,
    column: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
) -> None:
    dtype = out_ptr.dtype.element_ty
    out = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        rows = rows_desc.load([first, k])
        out = dot(rows, weights_desc.load([line, k]).T, out)
        if GATED:
            up = dot(rows, weights_desc.load([line + N, k]).T, up)
    if GATED:
        gate = rounded(out, dtype)
        out = rounded(gate / (1.0 + tl.exp(-gate)), dtype) * rounded(up, dtype)
    p = first + tl.arange(0, BLOCK_P)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + p.to(tl.int64)[:, None] * N + n[None, :], out.to(dtype), mask=(p < end)[:, None])


@triton.jit
def _grouped_kernel(
    rows_desc: tl.tensor,
    half_desc: tl.tensor,
    weights_desc: tl.tensor,
    ends_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
) -> None:
    MATRIX: tl.constexpr = 2 * N if GATED else N  # rows of an expert's matrix; gates first, and then ups
    expert, column, first, end = find_tile(ends_ptr, tl.program_id(0), E, E_PAD, N // BLOCK_N, BLOCK_P)
    line = expert * MATRIX + column * BLOCK_N
    # An expert's last rows, half a tile or less of them, are not multiplied as if there were more.
    if end - first > HALF:
        _multiply_tile(
            rows_desc, weights_desc, out_ptr, line, column, first, end, N, K, BLOCK_P, BLOCK_N, BLOCK_K, GATED
        )  # fmt: skip
    elif HALF > 0 and first < end:
        _multiply_tile(
            half_desc, weights_desc, out_ptr, line, column, first, end, N, K, HALF, BLOCK_N, BLOCK_K, GATED
        )  # fmt: skip


def _grouped(
    rows_PK: torch.Tensor, weights_EMK: torch.Tensor, ends_E: torch.Tensor, outputs: int, gated: bool, block_n: int
) -> torch.Tensor:
    check_rows(rows_PK, weights_EMK)
    (experts, _, width), routed_tokens = weights_EMK.shape, len(rows_PK)
    out = rows_PK.new_empty(routed_tokens, outputs)
    few = routed_tokens <= 64 * experts
    block, half = (64, 0) if few else (128, 64)
    _grouped_kernel[((experts + routed_tokens // block) * (outputs // block_n),)](
        TensorDescriptor.from_tensor(rows_PK, [block, BLOCK_K]),
        TensorDescriptor.from_tensor(rows_PK, [64, BLOCK_K]),
        TensorDescriptor.from_tensor(weights_EMK.view(-1, width), [block_n, BLOCK_K]),
        ends_E, out,
        N=outputs, K=width, E=experts, E_PAD=power_of_two(experts), BLOCK_P=block, HALF=half, BLOCK_N=block_n,
        BLOCK_K=BLOCK_K, GATED=gated, num_warps=4 if few else 8, num_stages=4,
    )  # fmt: skip
    return out


def grouped_gate_up(rows_PH: torch.Tensor, gate_up_EJH: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of each routed token by its expert, [P, I], rounded where the model's modules round.

    Args:
        rows_PH: the routed tokens sorted by expert, contiguous; those behind the last expert's are not read.
        gate_up_EJH: the experts' weights, I rows of gates and then I of ups, contiguous.
        ends_E: the end of each expert's rows, int32.
    """
    return _grouped(rows_PH, gate_up_EJH, ends_E, gate_up_EJH.shape[1] // 2, True, 128)


def grouped_down(intermediate_PI: torch.Tensor, down_EHI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Return each routed token's product with its expert's weights, [P, H]; see `grouped_gate_up`."""
    hidden = down_EHI.shape[1]
    return _grouped(intermediate_PI, down_EHI, ends_E, hidden, False, 128 if hidden % 256 else 256)
