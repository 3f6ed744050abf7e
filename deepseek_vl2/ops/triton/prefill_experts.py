"""The routed experts of a prefill: two grouped GEMMs, and the permutation of tokens before and after them.

The plain form is `deepseek_vl2.models.moe.eager_experts_forward`. A row map gives the row of each routed token in the
order of experts.

Shape suffixes: N tokens, H hidden size, E experts, K experts a token (top_k), P = N * K routed tokens, I intermediate
size, J = 2 * I.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import grouped_gemm, packed_grouped_gemm
from .common import check_rows, power_of_two, rounded
from .weights import FRAGMENT, QuantWeight, Weight


@triton.jit
def _silu_and_mul_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stride: tl.tensor,
    I: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * stride + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + i, mask=i < I, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    silu = rounded(gate / (1.0 + tl.exp(-gate)), dtype)  # as the model's own activation is rounded
    tl.store(out_ptr + row * I + i, (silu * up).to(dtype), mask=i < I)


def silu_and_mul(gate_PI: torch.Tensor, up_PI: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [P, I], of rows without gaps in them, as far apart in one as in the other."""
    check_rows(gate_PI, up_PI)
    if gate_PI.stride() != up_PI.stride():
        raise ValueError(f"Gates and ups are laid out differently: {gate_PI.stride()}, {up_PI.stride()}.")
    routed_tokens, intermediate_size = gate_PI.shape
    out = gate_PI.new_empty(routed_tokens, intermediate_size)
    block = min(power_of_two(intermediate_size, 16), 1024)
    grid = (routed_tokens, triton.cdiv(intermediate_size, block))
    _silu_and_mul_kernel[grid](gate_PI, up_PI, out, gate_PI.stride(0), I=intermediate_size, BLOCK=block, num_warps=4)
    return out


def silu_and_mul_packed(gate_up_PJ: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [P, I], of both side by side, [P, 2I]."""
    return silu_and_mul(*gate_up_PJ.chunk(2, dim=-1))


# ---------------------------------------------------------------- permutation into the order of experts


@triton.jit
def _align_kernel(
    ids_ptr: tl.tensor,
    row_map_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    routed_tokens: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, routed_tokens, BLOCK):
        p = start + tl.arange(0, BLOCK)
        before += (tl.load(ids_ptr + p, mask=p < routed_tokens, other=E) < expert).to(tl.int32)
    place = tl.sum(before, axis=0)
    for start in range(0, routed_tokens, BLOCK):
        p = start + tl.arange(0, BLOCK)
        id_ = tl.load(ids_ptr + p, mask=p < routed_tokens, other=E)
        own = (id_ == expert).to(tl.int32)
        tl.store(row_map_ptr + p, place + tl.cumsum(own, axis=0) - 1, mask=id_ == expert)
        if expert == 0:
            tl.store(row_map_ptr + p, -1, mask=(p < routed_tokens) & (id_ >= E))
        place += tl.sum(own, axis=0)
    tl.store(ends_ptr + expert, place)


def moe_align(topk_ids_NK: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort routed tokens by their experts, and by token within an expert: a stable sort.

    Args:
        topk_ids_NK: the expert of each routed token; where the id is no expert's it gets no row.
        experts: how many there are.

    Returns:
        The row map, int32 [P], -1 for none; and the end of each expert's rows, int32 [E].
    """
    ids_P = topk_ids_NK.flatten()
    row_map = torch.empty(len(ids_P), dtype=torch.int32, device=ids_P.device)
    ends = torch.empty(experts, dtype=torch.int32, device=ids_P.device)
    block = min(power_of_two(len(ids_P), 16), 2048)
    _align_kernel[(experts,)](ids_P, row_map, ends, len(ids_P), E=experts, BLOCK=block, num_warps=8)
    return row_map, ends


@triton.jit
def _permute_kernel(
    x_ptr: tl.tensor,
    row_map_ptr: tl.tensor,
    out_ptr: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    FRAGMENTS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = h
    if FRAGMENTS:
        source = h // 64 * 64 + h % 8 // 2 * 16 + h % 64 // 8 * 2 + h % 2
    x = tl.load(x_ptr + token * H + source, mask=h < H, other=0.0)
    for slot in tl.static_range(K):
        place = tl.load(row_map_ptr + token * K + slot).to(tl.int64)
        if place >= 0:
            tl.store(out_ptr + place * H + h, x, mask=h < H)


def permute_tokens(x_NH: torch.Tensor, row_map_P: torch.Tensor, fragments: bool = False) -> torch.Tensor:
    """Return a row for each routed token, [P, H], in the order of experts.

    Rows behind the last expert's, as many as there are ids of no expert, are unset. With ``fragments`` columns are in
    `weights.fragment_order`.
    """
    check_rows(x_NH)
    (tokens, hidden), routed_tokens = x_NH.shape, len(row_map_P)
    out = x_NH.new_empty(routed_tokens, hidden)
    block = min(power_of_two(hidden, 16), 2048)
    _permute_kernel[(tokens, triton.cdiv(hidden, block))](
        x_NH, row_map_P, out, H=hidden, K=routed_tokens // tokens, BLOCK=block, FRAGMENTS=fragments, num_warps=8
    )
    return out


@triton.jit
def _combine_kernel(
    rows_ptr: tl.tensor,
    row_map_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(K):
        place = tl.load(row_map_ptr + token * K + slot).to(tl.int64)
        weight = tl.load(weights_ptr + token * K + slot)
        row = tl.load(rows_ptr + place * H + h, mask=h < tl.where(place >= 0, H, 0), other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out_ptr + token * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)


def combine_tokens(rows_PH: torch.Tensor, row_map_P: torch.Tensor, topk_weights_NK: torch.Tensor) -> torch.Tensor:
    """Return each token's weighted sum over its experts, [N, H], in float32 and then rounded.

    Args:
        rows_PH: outputs of the routed tokens, in the order of experts.
        row_map_P: the row of each routed token, token after token; below 0: none.
        topk_weights_NK: float32.
    """
    check_rows(rows_PH, topk_weights_NK)
    (tokens, top_k), hidden = topk_weights_NK.shape, rows_PH.shape[1]
    out = rows_PH.new_empty(tokens, hidden)
    block = min(power_of_two(hidden, 16), 1024)
    _combine_kernel[(tokens, triton.cdiv(hidden, block))](
        rows_PH, row_map_P, topk_weights_NK, out, H=hidden, K=top_k, BLOCK=block, num_warps=4
    )
    return out


def permuted_experts(
    hidden_NH: torch.Tensor, gate_up_EJH: Weight, down_EHI: Weight, topk_ids_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the experts of all tokens; returns the outputs in the order of experts, [P, H], and the row map, [P]."""
    experts, hidden, intermediate_size = down_EHI.shape
    row_map, ends = moe_align(topk_ids_NK, experts)
    packed = isinstance(gate_up_EJH, QuantWeight)
    rows = permute_tokens(hidden_NH, row_map, packed and hidden % FRAGMENT == 0)
    if isinstance(gate_up_EJH, QuantWeight) and isinstance(down_EHI, QuantWeight):
        intermediate_PI = packed_grouped_gemm.grouped_gate_up(rows, gate_up_EJH, ends)
        return packed_grouped_gemm.grouped_down(intermediate_PI, down_EHI, ends), row_map
    if not isinstance(gate_up_EJH, torch.Tensor) or not isinstance(down_EHI, torch.Tensor):
        raise ValueError("Both matrices of the experts must be packed, or none.")
    if grouped_gemm.is_supported(down_EHI, hidden, intermediate_size):
        intermediate_PI = grouped_gemm.grouped_gate_up(rows, gate_up_EJH, ends)
        return grouped_gemm.grouped_down(intermediate_PI, down_EHI, ends), row_map
    both = F.grouped_mm(rows, gate_up_EJH.mT, offs=ends)
    return F.grouped_mm(silu_and_mul_packed(both), down_EHI.mT, offs=ends), row_map


def fused_experts(
    hidden_NH: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    topk_ids_NK: torch.Tensor,
    topk_weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Run the experts of all tokens; [N, H], summed in float32.

    Args:
        hidden_NH: the tokens.
        gate_up_EJH: the experts' weights, I rows of gates and then I of ups, contiguous bfloat16, as all weights.
        down_EHI: likewise.
        topk_ids_NK: the experts of each.
        topk_weights_NK: their weights, float32.
    """
    outputs, row_map = permuted_experts(hidden_NH, gate_up_EJH, down_EHI, topk_ids_NK)
    return combine_tokens(outputs, row_map, topk_weights_NK.contiguous())
