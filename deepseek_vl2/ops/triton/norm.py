"""RMS norm and layer norm fused with the residual addition before them.

Shape suffixes: B rows, H hidden size, K experts of a row, P = B * K routed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .common import check_rows, grid_wait, launch_dependents, power_of_two, rounded


def rms_norm_plain(x_BH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the RMS norm: in float32, rounded, then times the weight."""
    wide = x_BH.float()
    return weight_H * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_BH.dtype)


def fused_add_rms_norm_plain(
    residual_BH: torch.Tensor,
    routed_BKH: torch.Tensor,
    topk_weights_BK: torch.Tensor,
    shared_BH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return residual + weighted experts + shared experts, [B, H], and the RMS norm of that sum."""
    routed = (routed_BKH.float() * topk_weights_BK.unsqueeze(-1)).sum(dim=1).to(residual_BH.dtype)
    out = residual_BH + (routed + shared_BH)
    return out, rms_norm_plain(out, norm_H, eps)


@triton.jit
def _fused_add_rms_norm_kernel(
    residual_ptr: tl.tensor,
    routed_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    out_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    row_map_ptr: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    MAPPED: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    grid_wait(PDL)
    row = tl.program_id(0)
    dtype = out_ptr.dtype.element_ty
    h = tl.arange(0, BLOCK_H)
    held = h < H
    norm = tl.load(norm_ptr + h, mask=held, other=0.0).to(tl.float32)
    out = tl.load(residual_ptr + row * H + h, mask=held, other=0.0).to(tl.float32)
    if K > 0:
        total = tl.zeros([BLOCK_H], tl.float32)
        for slot in tl.static_range(K):
            weight = tl.load(weights_ptr + row * K + slot)
            place = (row * K + slot).to(tl.int64)
            if MAPPED:
                place = tl.load(row_map_ptr + place).to(tl.int64)
            part = tl.load(routed_ptr + place * H + h, mask=h < tl.where(place >= 0, H, 0), other=0.0)
            total += weight * part.to(tl.float32)
        total = rounded(total, dtype)
        if SHARED:
            total += tl.load(shared_ptr + row * H + h, mask=held, other=0.0).to(tl.float32)
        out += rounded(total, dtype)
    elif SHARED:
        out += tl.load(shared_ptr + row * H + h, mask=held, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * H + h, out.to(dtype), mask=held)
    wide = rounded(out, dtype)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / H + eps)
    tl.store(normed_ptr + row * H + h, (rounded(wide * inverse, dtype) * norm).to(dtype), mask=held)


def fused_add_rms_norm(
    residual_BH: torch.Tensor,
    routed_BKH: torch.Tensor | None,
    topk_weights_BK: torch.Tensor | None,
    shared_BH: torch.Tensor | None,
    norm_H: torch.Tensor,
    eps: float,
    out_BH: torch.Tensor,
    normed_BH: torch.Tensor,
    row_map_P: torch.Tensor | None = None,
    **options: Any,
) -> None:
    """Write `fused_add_rms_norm_plain`; without routed and shared experts, the norm alone.

    ``out_BH`` may be the residual itself. Rounds where the plain form rounds. All tensors are contiguous. With
    ``row_map_P`` the outputs are rows in the order of experts, [P, H], and routed token p's is ``row_map_P[p]``; below
    0: none.
    Options: of the launch, see `common.pdl_options`.
    """
    check_rows(residual_BH, out_BH, normed_BH)
    rows, hidden = residual_BH.shape
    _fused_add_rms_norm_kernel[(rows,)](
        residual_BH,
        residual_BH if routed_BKH is None else routed_BKH,
        residual_BH if topk_weights_BK is None else topk_weights_BK,
        residual_BH if shared_BH is None else shared_BH,
        norm_H,
        out_BH,
        normed_BH,
        residual_BH if row_map_P is None else row_map_P,
        eps,
        H=hidden,
        BLOCK_H=power_of_two(hidden, 16),
        K=0 if topk_weights_BK is None else topk_weights_BK.shape[1],
        SHARED=shared_BH is not None,
        MAPPED=row_map_P is not None,
        num_warps=8,
        **options,
    )


# ---------------------------------------------------------------- a sum and its layer norm

# Measured on an H100 (benchmarks/gpu_tower.py).
BLOCKS: dict[str, Any] = {"BLOCK_B": 1, "BLOCK_H": 2048, "num_warps": 4}


def add_layer_norm_plain(
    hidden_BH: torch.Tensor, new_BH: torch.Tensor, weight_H: torch.Tensor, bias_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden + new, and its layer norm, [B, H] each."""
    out = hidden_BH + new_BH
    return out, F.layer_norm(out, weight_H.shape, weight_H, bias_H, eps)


@triton.jit
def _add_layer_norm_kernel(
    hidden_ptr: tl.tensor,
    new_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    B: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    grid_wait(PDL)
    dtype = out_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    start = rows.to(tl.int64) * H
    sums = ()
    total = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for first in tl.static_range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)[None, :]
        held = (rows < B) & (h < H)
        hidden = tl.load(hidden_ptr + start + h, mask=held, other=0.0).to(tl.float32)
        new = tl.load(new_ptr + start + h, mask=held, other=0.0).to(tl.float32)
        x = rounded(hidden + new, dtype)
        sums += (x,)  # type: ignore[assignment]
        total += x
    mean = tl.sum(total, axis=1)[:, None] / H
    squares = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for part in tl.static_range((H + BLOCK_H - 1) // BLOCK_H):
        h = part * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
        tl.store(out_ptr + start + h, sums[part].to(dtype), mask=(rows < B) & (h < H))
        centred = tl.where(h < H, sums[part] - mean, 0.0)
        squares += centred * centred
    inverse = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / H + eps)
    for part in tl.static_range((H + BLOCK_H - 1) // BLOCK_H):
        h = part * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
        weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        normed = (sums[part] - mean) * inverse * weight + bias
        tl.store(normed_ptr + start + h, normed.to(dtype), mask=(rows < B) & (h < H))


def add_layer_norm(
    hidden_BH: torch.Tensor,
    new_BH: torch.Tensor,
    weight_H: torch.Tensor,
    bias_H: torch.Tensor,
    eps: float,
    out_BH: torch.Tensor,
    normed_BH: torch.Tensor,
    **blocks: Any,
) -> None:
    """Write `add_layer_norm_plain`, of contiguous rows; outputs may be inputs.

    The sum has the bits of PyTorch's. The norm is that of the rounded sum, in float32, and rounded once. Options:
    BLOCK_B and BLOCK_H, rows of a program and how many numbers of each are read at once; num_warps; and those of the
    launch, see `common.pdl_options`.
    """
    rows = (hidden_BH, new_BH, out_BH, normed_BH)
    if {tensor.shape for tensor in rows} != {hidden_BH.shape} or not all(tensor.is_contiguous() for tensor in rows):
        raise ValueError(f"Rows to add must be contiguous and alike; got {[list(tensor.shape) for tensor in rows]}.")
    check_rows(weight_H, bias_H)
    count, width = hidden_BH.shape
    options = {**BLOCKS, **blocks}
    options["BLOCK_H"] = min(options["BLOCK_H"], power_of_two(width, 16))
    _add_layer_norm_kernel[(triton.cdiv(count, options["BLOCK_B"]),)](
        hidden_BH, new_BH, weight_H, bias_H, out_BH, normed_BH, count, eps,
        H=width, **options,
    )  # fmt: skip
