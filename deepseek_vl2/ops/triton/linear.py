"""Linear layers of any number of rows over weights of any format.

Plain weights are multiplied by PyTorch. Packed ones are unpacked in registers for the rows of a decoding step; for more
rows, whose products take the longer, one matrix at a time is unpacked into memory first and multiplied by PyTorch.

Shape suffixes: B rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .common import INTERPRETED
from .decode_gemm import linear_gemm
from .weights import INT4, QuantWeight, Weight, format_of, load_tile, numbers_of, row_scale, scale_of, tile_columns

# More rows than a decoding step has.
MAX_GEMM_ROWS = 256


@triton.jit
def _dequantize_kernel(
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> None:
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SCALES: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    dtype = out_ptr.dtype.element_ty
    tile = load_tile(packed_ptr, scale_ptr, n, N, start, K // PER, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype)
    if GROUP == 0:
        tile = tile * row_scale(scale_ptr, n, N, KIND, GROUP)[:, None]
    k = start + tl.arange(0, BLOCK_K)
    held = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + n.to(tl.int64)[:, None] * K + k[None, :], tile.to(dtype), mask=held)


def dequantize(weight: QuantWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return a packed matrix unpacked, [N, K], as `models.quantization.dequantize` does: each weight rounded once."""
    weight.check()
    (rows, columns), fmt = weight.shape, format_of(weight)
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    block_n, block_k = (64, 512) if INTERPRETED.value else (16, 256)
    block_k = tile_columns(columns, block_k)
    _dequantize_kernel[(triton.cdiv(rows, block_n), triton.cdiv(columns, block_k))](
        numbers_of(weight), scale_of(weight), out, N=rows, K=columns, BLOCK_N=block_n, BLOCK_K=block_k, **fmt,
        num_warps=4,
    )  # fmt: skip
    return out


def add_linear(x_BK: torch.Tensor, weight: Weight, out_BN: torch.Tensor) -> None:
    """Add the layer's output to what is there."""
    if isinstance(weight, torch.Tensor):
        torch.addmm(out_BN, x_BK, weight.mT, out=out_BN)
    else:
        linear_gemm(x_BK, [weight], out_BN, out_BN)


def linear(x_BK: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Return ``F.linear``, [B, N], in the dtype of the rows, which have no gaps."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x_BK, weight)
    if len(x_BK) > MAX_GEMM_ROWS:
        return F.linear(x_BK, dequantize(weight, x_BK.dtype))
    out = x_BK.new_empty(len(x_BK), weight.shape[0])
    linear_gemm(x_BK, [weight], out)
    return out
