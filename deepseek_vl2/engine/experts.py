"""The routed experts of a prefill: which modules the kernels are for, and calling them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..models.moe import is_silu
from ..models.quantized_layers import PackedExperts
from ..ops.triton import prefill_experts


def is_supported(experts: Any, hidden_NH: torch.Tensor) -> bool:
    """Whether a layer's experts and the rows for them are of a kind that the kernels are for."""
    if isinstance(experts, PackedExperts):
        return is_silu(experts.act_fn)  # else as `support` has accepted them
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


def run_experts(
    experts: Any, hidden_NH: torch.Tensor, topk_ids_NK: torch.Tensor, topk_weights_NK: torch.Tensor
) -> torch.Tensor:
    """Run a module's experts, which `is_supported` accepts, for all tokens; see `prefill_experts.fused_experts`."""
    return prefill_experts.fused_experts(
        hidden_NH, experts.gate_up_proj, experts.down_proj, topk_ids_NK, topk_weights_NK
    )
