"""Mixture of experts: dense MLPs, the fused experts, and the layer that joins them with the router.

Shape suffixes: B batch, T sequence, N = B * T tokens, H hidden size, E routed experts, K experts of a token,
I inner width of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .backend import backend
from .configuration_deepseek import DeepseekV2Config
from .cpu import grouped_products, is_bare, is_untouched, project, row_kernels
from .experts_autograd import SortRows, SumSortedRows, grouped_product, sum_weighted
from .loss import compute_dtype
from .parallel import holds_some_experts
from .quantized_layers import is_bare_packed
from .router import AddAuxiliaryLoss, MoEGate, RoutingContext

SILU = type(ACT2FN["silu"])


def is_silu(activation: nn.Module) -> bool:
    """Whether an activation is SiLU, and no hook waits for it."""
    return type(activation) is SILU and is_untouched(activation)


class DeepseekV2MLP(nn.Module):
    """SwiGLU MLP: down(act(gate(x)) * up(x)), [..., H] in and out."""

    def __init__(self, config: DeepseekV2Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        inner = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def is_plain(self) -> bool:
        """Whether nothing stands between the three weights but SiLU: no bias, no hook, no module of another kind."""
        parts = (self.gate_proj, self.up_proj, self.down_proj)
        return is_silu(self.act_fn) and all(is_bare(part) and part.bias is None for part in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output."""
        if (kernels := row_kernels()) is not None:
            parts, out = (self.gate_proj, self.up_proj, self.down_proj), None
            if self.is_plain():
                out = kernels.mlp(x, *(part.weight for part in parts))
            elif is_silu(self.act_fn) and all(map(is_bare_packed, parts)) and (engine := backend()) is not None:
                out = engine.run_packed_mlp(parts, x)
            if out is not None:
                return out
        return project(self.down_proj, self.act_fn(project(self.gate_proj, x)) * project(self.up_proj, x))


def pytorch_grouped_product(rows: torch.Tensor, weights_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiply sorted rows by their expert's matrix, [S, I] by [E, O, I], by PyTorch's own kernel."""
    return F.grouped_mm(rows, weights_EOI.mT, offs=ends_E)


def train_experts_forward(
    experts: DeepseekV2Experts, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Run the experts as two grouped matrix products that gradients flow through, on any device; [N, H].

    Autocast does not know grouped products: weights are cast here, and their gradients come back in their own dtype.
    """
    sorted_ids, order = ids_NK.reshape(-1).sort()
    restored = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends_E = torch.searchsorted(sorted_ids, torch.arange(experts.num_experts, device=order.device), right=True).int()
    gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj  # read once: adapters compute them when read
    dtype = compute_dtype(gate_up_proj)
    rows = SortRows.apply(hidden_NH.to(dtype), order, restored, ids_NK.shape[1])
    product = grouped_product if is_cpu_graph(rows) else pytorch_grouped_product
    gate, up = product(rows, gate_up_proj.to(dtype), ends_E).chunk(2, dim=-1)
    outputs = product(experts.act_fn(gate) * up, down_proj.to(dtype), ends_E)
    return SumSortedRows.apply(outputs, weights_NK, order, restored).to(hidden_NH.dtype)


def one_token_experts_forward(
    experts: DeepseekV2Experts, hidden_1H: torch.Tensor, ids_1K: torch.Tensor, weights_1K: torch.Tensor
) -> torch.Tensor:
    """Run the chosen experts of a single token, on a CPU; [1, H].

    A grouped product would visit the experts that were not chosen too, which costs as much as half of the work.
    """
    chosen = ids_1K[0].tolist()
    rows = hidden_1H.to(experts.gate_up_proj.dtype)
    gate, up = torch.cat([F.linear(rows, experts.gate_up_proj[expert]) for expert in chosen]).chunk(2, dim=-1)
    inner = (experts.act_fn(gate) * up).split(1)
    outputs = [F.linear(part, experts.down_proj[expert]) for part, expert in zip(inner, chosen, strict=True)]
    return sum_weighted(torch.cat(outputs)[None], weights_1K).to(hidden_1H.dtype)


def cpu_experts_forward(
    experts: DeepseekV2Experts, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Run the experts as two grouped matrix products over tokens sorted by expert; [N, H]."""
    if (kernels := row_kernels()) is not None and is_silu(experts.act_fn):
        out: torch.Tensor | None = kernels.experts(
            hidden_NH, experts.gate_up_proj, experts.down_proj, ids_NK, weights_NK
        )
        if out is not None:
            return out
    tokens, top_k = ids_NK.shape
    if tokens == 1:
        return one_token_experts_forward(experts, hidden_NH, ids_NK, weights_NK)
    sorted_ids, order = ids_NK.reshape(-1).sort()
    ends_E = torch.searchsorted(sorted_ids, torch.arange(experts.num_experts, device=ids_NK.device), right=True).int()
    rows = hidden_NH[order // top_k].to(experts.gate_up_proj.dtype)
    gate, up = grouped_products(rows, experts.gate_up_proj, ends_E).chunk(2, dim=-1)
    outputs = grouped_products(experts.act_fn(gate) * up, experts.down_proj, ends_E)
    restored = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return sum_weighted(outputs[restored].view(tokens, top_k, -1), weights_NK).to(hidden_NH.dtype)


# Up to this many pairs of token and expert, copying the experts' weights is cheaper on a GPU than grouping the tokens.
MAX_BATCHED_PAIRS = 64


def rows_are_aligned(experts: DeepseekV2Experts, hidden: torch.Tensor) -> bool:
    """Whether rows of all matrices start at multiples of 16 bytes, as grouped products on a GPU need."""
    itemsize = compute_dtype(hidden).itemsize
    return all(width * itemsize % 16 == 0 for width in (experts.hidden_size, experts.inner_size))


def is_cpu_graph(hidden: torch.Tensor) -> bool:
    """Whether a graph is traced on a CPU, where PyTorch's grouped products trace bfloat16 alone."""
    return hidden.device.type == "cpu" and torch.compiler.is_compiling()


def experts_forward(
    experts: DeepseekV2Experts, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Run the experts in the way that suits the device and the number of tokens; [N, H]."""
    if is_cpu_graph(hidden_NH) and not holds_some_experts(experts):
        return train_experts_forward(experts, hidden_NH, ids_NK, weights_NK)
    if compute_dtype(experts.gate_up_proj) == torch.float64:  # grouped products know no float64
        return eager_experts_forward(experts, hidden_NH, ids_NK, weights_NK)
    if holds_some_experts(experts):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_NH, ids_NK, weights_NK)
    on_cpu = hidden_NH.device.type == "cpu"
    if torch.is_grad_enabled() and hasattr(F, "grouped_mm"):
        if on_cpu or rows_are_aligned(experts, hidden_NH):
            return train_experts_forward(experts, hidden_NH, ids_NK, weights_NK)
        return eager_experts_forward(experts, hidden_NH, ids_NK, weights_NK)
    if on_cpu and hasattr(F, "grouped_mm"):
        return cpu_experts_forward(experts, hidden_NH, ids_NK, weights_NK)
    few = ids_NK.numel() <= MAX_BATCHED_PAIRS and not on_cpu and not torch.is_grad_enabled()
    if not few and not torch.is_grad_enabled() and (engine := backend()) is not None:
        out: torch.Tensor | None = engine.run_experts(experts, hidden_NH, ids_NK, weights_NK)
        if out is not None:
            return out
    return ALL_EXPERTS_FUNCTIONS["batched_mm" if few else "grouped_mm"](experts, hidden_NH, ids_NK, weights_NK)


def eager_experts_forward(
    experts: DeepseekV2Experts, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Run expert after expert: the plain definition; [N, H], summed in float32."""
    tokens, top_k = ids_NK.shape
    flat_ids, order = ids_NK.reshape(-1).sort()
    counts = torch.bincount(flat_ids, minlength=experts.num_experts).tolist()
    outputs, start = [], 0
    for expert, count in enumerate(counts[: experts.num_experts]):
        if count:
            rows = hidden_NH[order[start : start + count] // top_k]
            gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(experts.act_fn(gate) * up, experts.down_proj[expert]))
            start += count
    if start < len(order):  # the last ids stand for experts that other processes hold
        outputs.append(hidden_NH.new_zeros(len(order) - start, hidden_NH.shape[1]))
    if not outputs:
        return torch.zeros_like(hidden_NH)
    sorted_outputs = torch.cat(outputs)
    restored = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    weighted_NKH = sorted_outputs[restored].view(tokens, top_k, -1) * weights_NK.unsqueeze(-1)
    return weighted_NKH.sum(dim=1).to(hidden_NH.dtype)


def fuse_released(experts: DeepseekV2Experts, state_dict: dict[str, Any], prefix: str) -> None:
    """Replace matrices under released names, ``<prefix>3.up_proj.weight``, by the fused ones, in place.

    Experts that a state dict lacks keep their weights: the shards of a checkpoint come one by one.
    """
    inner = experts.gate_up_proj.shape[1] // 2
    places = {
        "gate_proj": ("gate_up_proj", slice(0, inner)),
        "up_proj": ("gate_up_proj", slice(inner, 2 * inner)),
        "down_proj": ("down_proj", slice(None)),
    }
    for part, (fused_name, rows) in places.items():
        for expert in range(experts.num_experts):
            matrix = state_dict.pop(f"{prefix}{expert}.{part}.weight", None)
            if matrix is None:
                continue
            if prefix + fused_name not in state_dict:
                state_dict[prefix + fused_name] = getattr(experts, fused_name).detach().clone()
            state_dict[prefix + fused_name][expert, rows] = matrix


EXPERTS_IMPLEMENTATION = "deepseek_vl2"
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


@use_experts_implementation
class DeepseekV2Experts(nn.Module):
    """All routed experts of a layer, fused: gate_up_proj [E, 2I, H] and down_proj [E, H, I].

    transformers' experts interface replaces ``forward`` by `experts_forward` ("deepseek_vl2", the default) or by an
    implementation of its own ("grouped_mm", "batched_mm"); what stands here is "eager", `eager_experts_forward`.
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.num_experts = config.n_routed_experts
        self.inner_size, self.hidden_size = inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Let ``load_state_dict`` take the released names too: transformers' Trainer resumes from such files."""
        fuse_released(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's experts, [N, H]; summed in float32."""
        return eager_experts_forward(self, hidden_NH, ids_NK, weights_NK)


class DeepseekV2MoE(nn.Module):
    """A mixture-of-experts layer: routed experts plus the experts shared by all tokens, [B, T, H] in and out."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.experts = DeepseekV2Experts(config)
        self.gate = MoEGate(config)
        self.shared_experts = (
            DeepseekV2MLP(config, intermediate_size=config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, hidden_BTH: torch.Tensor, routing: RoutingContext | None = None) -> torch.Tensor:
        """Return the layer's output; in training the balance loss joins its gradient."""
        token_mask, balance_share = (None, None) if routing is None else routing
        ids_NK, weights_NK, balance_loss = self.gate(hidden_BTH, token_mask)
        hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
        out = self.experts(hidden_NH, ids_NK, weights_NK).view(hidden_BTH.shape)
        if balance_loss is not None and balance_loss.requires_grad:
            out = AddAuxiliaryLoss.apply(out, balance_loss if balance_share is None else balance_loss * balance_share)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden_BTH)
        return out
