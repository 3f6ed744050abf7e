"""The experts of a whole prompt: two grouped matrix products of PyTorch, with one pass over memory between them.

The plain form is `deepseek_vl2.models.moe.eager_experts_forward`.

Shape suffixes: N tokens, H hidden size, E experts, K experts of a token, P = N * K pairs of both, I inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .experts import silu_product
from .primitives import check_rows, power_of_two


@triton.jit
def _silu_product_kernel(both_ptr: tl.tensor, out_ptr: tl.tensor, I: tl.constexpr, BLOCK: tl.constexpr) -> None:  # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both_ptr + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * I + i, silu_product(gate, up).to(out_ptr.dtype.element_ty), mask=i < I)


def silu_of_gate_times_up(both_PJ: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [P, I], of both side by side, [P, 2I], contiguous."""
    check_rows(both_PJ)
    pairs, inner = both_PJ.shape[0], both_PJ.shape[1] // 2
    out = both_PJ.new_empty(pairs, inner)
    block = min(power_of_two(inner, 16), 1024)
    _silu_product_kernel[(pairs, triton.cdiv(inner, block))](both_PJ, out, I=inner, BLOCK=block, num_warps=4)
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
        total += weight * tl.load(rows_ptr + place * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)


def sum_of_experts(rows_PH: torch.Tensor, places_P: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return each token's weighted sum over its experts, [N, H], in float32 and then rounded.

    Args:
        rows_PH: outputs of the pairs in any order.
        places_P: where in it each pair stands, token after token.
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


def takes(experts: Any, hidden_NH: torch.Tensor) -> bool:
    """Whether a layer's experts and the rows for them are of a kind that this form is for."""
    weights = (experts.gate_up_proj, experts.down_proj)
    return (
        hasattr(F, "grouped_mm")
        and all(type(w) is torch.nn.Parameter and w.is_contiguous() for w in weights)
        and {w.dtype for w in (*weights, hidden_NH)} == {torch.bfloat16}
        and {w.device for w in weights} == {hidden_NH.device}
        and all(width % 8 == 0 for width in (experts.hidden_size, experts.inner_size))
        and experts.num_experts <= 256
        and "silu" in type(experts.act_fn).__name__.lower()
        and not torch.is_autocast_enabled(hidden_NH.device.type)
        and not torch.compiler.is_compiling()
    )


def experts_of_prompt(
    experts: Any, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Run the experts of all tokens; [N, H], summed in float32.

    Args:
        experts: a `DeepseekV2Experts` that `takes` accepts.
        hidden_NH: the tokens.
        ids_NK: the experts of each.
        weights_NK: their weights, float32.
    """
    # Ids of one byte are sorted in one pass.
    sorted_ids, order = ids_NK.flatten().to(torch.uint8).sort()
    numbers_E = torch.arange(experts.num_experts, dtype=torch.uint8, device=order.device)
    ends_E = torch.searchsorted(sorted_ids, numbers_E, right=True, out_int32=True)
    rows = hidden_NH[order // ids_NK.shape[1]]
    both = F.grouped_mm(rows, experts.gate_up_proj.mT, offs=ends_E)
    outputs = F.grouped_mm(silu_of_gate_times_up(both), experts.down_proj.mT, offs=ends_E)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return sum_of_experts(outputs, places, weights_NK.contiguous())
