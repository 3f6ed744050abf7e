"""The experts of a whole prompt: two grouped matrix products, and what puts pairs in order for them.

The plain form is `deepseek_vl2.models.moe.eager_experts_forward`.

Shape suffixes: N tokens, H hidden size, E experts, K experts of a token, P = N * K pairs of both, I inner width,
J = 2 * I.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import grouped_gemm
from .common import check_rows, power_of_two, rounded


@triton.jit
def _silu_product_kernel(
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


def silu_times(gate_PI: torch.Tensor, up_PI: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [P, I], of rows without gaps in them, as far apart in one as in the other."""
    check_rows(gate_PI, up_PI)
    if gate_PI.stride() != up_PI.stride():
        raise ValueError(f"Gates and ups are laid out differently: {gate_PI.stride()}, {up_PI.stride()}.")
    pairs, inner = gate_PI.shape
    out = gate_PI.new_empty(pairs, inner)
    block = min(power_of_two(inner, 16), 1024)
    grid = (pairs, triton.cdiv(inner, block))
    _silu_product_kernel[grid](gate_PI, up_PI, out, gate_PI.stride(0), I=inner, BLOCK=block, num_warps=4)
    return out


def silu_of_gate_times_up(both_PJ: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [P, I], of both side by side, [P, 2I]."""
    return silu_times(*both_PJ.chunk(2, dim=-1))


# ---------------------------------------------------------------- pairs in the order of their experts


@triton.jit
def _place_kernel(
    ids_ptr: tl.tensor,
    places_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    pairs: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        before += (tl.load(ids_ptr + p, mask=p < pairs, other=E) < expert).to(tl.int32)
    place = tl.sum(before, axis=0)
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        id_ = tl.load(ids_ptr + p, mask=p < pairs, other=E)
        own = (id_ == expert).to(tl.int32)
        tl.store(places_ptr + p, place + tl.cumsum(own, axis=0) - 1, mask=id_ == expert)
        if expert == 0:
            tl.store(places_ptr + p, -1, mask=(p < pairs) & (id_ >= E))
        place += tl.sum(own, axis=0)
    tl.store(ends_ptr + expert, place)


def place_pairs(ids_NK: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put pairs in the order of their experts, and of their tokens within an expert: a stable sort.

    Args:
        ids_NK: the expert of each pair; a pair whose id is no expert's gets no place.
        experts: how many there are.

    Returns:
        Each pair's place, int32 [P], -1 for none; and behind which place each expert ends, int32 [E].
    """
    ids_P = ids_NK.flatten()
    places = torch.empty(len(ids_P), dtype=torch.int32, device=ids_P.device)
    ends = torch.empty(experts, dtype=torch.int32, device=ids_P.device)
    block = min(power_of_two(len(ids_P), 16), 2048)
    _place_kernel[(experts,)](ids_P, places, ends, len(ids_P), E=experts, BLOCK=block, num_warps=8)
    return places, ends


@triton.jit
def _spread_kernel(
    x_ptr: tl.tensor,
    places_ptr: tl.tensor,
    out_ptr: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * H + h, mask=h < H, other=0.0)
    for slot in tl.static_range(K):
        place = tl.load(places_ptr + token * K + slot).to(tl.int64)
        if place >= 0:
            tl.store(out_ptr + place * H + h, x, mask=h < H)


def spread_rows(x_NH: torch.Tensor, places_P: torch.Tensor) -> torch.Tensor:
    """Return a row for each pair, [P, H], at the pair's place; the last ones are unset where pairs have no place."""
    check_rows(x_NH)
    (tokens, hidden), pairs = x_NH.shape, len(places_P)
    out = x_NH.new_empty(pairs, hidden)
    block = min(power_of_two(hidden, 16), 2048)
    _spread_kernel[(tokens, triton.cdiv(hidden, block))](
        x_NH, places_P, out, H=hidden, K=pairs // tokens, BLOCK=block, num_warps=8
    )
    return out


@triton.jit
def _sum_kernel(
    rows_ptr: tl.tensor,
    places_ptr: tl.tensor,
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
        place = tl.load(places_ptr + token * K + slot).to(tl.int64)
        weight = tl.load(weights_ptr + token * K + slot)
        row = tl.load(rows_ptr + place * H + h, mask=h < tl.where(place >= 0, H, 0), other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out_ptr + token * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)


def sum_of_experts(rows_PH: torch.Tensor, places_P: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return each token's weighted sum over its experts, [N, H], in float32 and then rounded.

    Args:
        rows_PH: outputs of the pairs in any order.
        places_P: where in it each pair stands, token after token; below 0: nowhere.
        weights_NK: float32.
    """
    check_rows(rows_PH, weights_NK)
    (tokens, chosen), hidden = weights_NK.shape, rows_PH.shape[1]
    out = rows_PH.new_empty(tokens, hidden)
    block = min(power_of_two(hidden, 16), 1024)
    _sum_kernel[(tokens, triton.cdiv(hidden, block))](
        rows_PH, places_P, weights_NK, out, H=hidden, K=chosen, BLOCK=block, num_warps=4
    )
    return out


def run_pairs(
    hidden_NH: torch.Tensor, gate_up_EJH: torch.Tensor, down_EHI: torch.Tensor, ids_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the experts of all tokens; returns the pairs' outputs, [P, H], and the place of each among them, [P]."""
    experts, hidden, inner_size = down_EHI.shape
    places, ends = place_pairs(ids_NK, experts)
    rows = spread_rows(hidden_NH, places)
    if grouped_gemm.takes(down_EHI, hidden, inner_size):
        inner = grouped_gemm.inner_of_pairs(rows, gate_up_EJH, ends)
        return grouped_gemm.down_of_pairs(inner, down_EHI, ends), places
    both = F.grouped_mm(rows, gate_up_EJH.mT, offs=ends)
    return F.grouped_mm(silu_of_gate_times_up(both), down_EHI.mT, offs=ends), places


def experts_of_prompt(
    hidden_NH: torch.Tensor,
    gate_up_EJH: torch.Tensor,
    down_EHI: torch.Tensor,
    ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Run the experts of all tokens; [N, H], summed in float32.

    Args:
        hidden_NH: the tokens.
        gate_up_EJH: the experts' weights, I rows of gates and then I of ups, contiguous bfloat16, as all weights.
        down_EHI: likewise.
        ids_NK: the experts of each.
        weights_NK: their weights, float32.
    """
    outputs, places = run_pairs(hidden_NH, gate_up_EJH, down_EHI, ids_NK)
    return sum_of_experts(outputs, places, weights_NK.contiguous())
