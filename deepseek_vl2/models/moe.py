"""Mixture of experts: the gate, the fused experts and the layer that joins them.

Shape suffixes: B batch, T sequence, N = B * T tokens, H hidden size, E routed experts, K experts of a token,
I inner width of an expert, G groups of experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .configuration_deepseek import DeepseekV2Config


class DeepseekV2MLP(nn.Module):
    """SwiGLU MLP: down(act(gate(x)) * up(x)), [..., H] in and out."""

    def __init__(self, config: DeepseekV2Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        inner = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def keep_best_groups(choice_NE: torch.Tensor, group_scores_NG: torch.Tensor, kept: int) -> torch.Tensor:
    """Set to zero the scores of all experts outside the ``kept`` best groups of each token."""
    best_NG = group_scores_NG.topk(kept, dim=-1, sorted=False).indices
    mask_NG = torch.zeros_like(group_scores_NG, dtype=torch.bool).scatter_(1, best_NG, True)
    group_size = choice_NE.shape[1] // group_scores_NG.shape[1]
    return choice_NE.masked_fill(~mask_NG.repeat_interleave(group_size, dim=1), 0.0)


class MoEGate(nn.Module):
    """Choose experts for each token, and their weights. Logits and scores are float32 whatever the model's dtype.

    Source: section 2.2 of the DeepSeek-V2 paper, section 2.1.2 of the DeepSeek-V3 report (``noaux_tc``);
    ``MoEGate`` of the original package.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        assert config.n_routed_experts is not None and config.num_experts_per_tok is not None
        self.top_k = config.num_experts_per_tok
        self.n_routed_experts = config.n_routed_experts
        self.n_group = config.n_group or 1
        self.topk_group = config.topk_group or 1
        self.scoring_func = config.scoring_func
        self.topk_method = config.topk_method
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.alpha = config.aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if self.topk_method == "noaux_tc":
            # A buffer: it steers the choice and takes no gradient.
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def scores(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Return each expert's score for each token, [N, E], in float32."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            logits_NE = F.linear(hidden_NH.float(), self.weight.float())
        return logits_NE.softmax(dim=-1) if self.scoring_func == "softmax" else logits_NE.sigmoid()

    def choose(self, scores_NE: torch.Tensor) -> torch.Tensor:
        """Return the ids of each token's experts, [N, K]."""
        choice_NE = scores_NE
        if self.topk_method == "noaux_tc":
            choice_NE = scores_NE + self.e_score_correction_bias
            best_two_NG2 = choice_NE.unflatten(1, (self.n_group, -1)).topk(2, dim=-1).values
            choice_NE = keep_best_groups(choice_NE, best_two_NG2.sum(dim=-1), self.topk_group)
        elif self.topk_method == "group_limited_greedy":
            best_NG = scores_NE.unflatten(1, (self.n_group, -1)).amax(dim=-1)
            choice_NE = keep_best_groups(scores_NE, best_NG, self.topk_group)
        return choice_NE.topk(self.top_k, dim=-1, sorted=False).indices

    def weigh(self, scores_NE: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        """Return the weights of the chosen experts, [N, K], in float32."""
        weights_NK = scores_NE.gather(1, ids_NK)
        if self.norm_topk_prob and self.top_k > 1:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_NK * self.routed_scaling_factor

    def balance_loss(self, scores_NE: torch.Tensor, ids_NK: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the load-balance loss, a scalar: small when experts are chosen evenly."""
        rows = batch if self.seq_aux else 1
        chosen_R = ids_NK.reshape(rows, -1)
        counts_RE = scores_NE.new_zeros(rows, self.n_routed_experts)
        counts_RE.scatter_add_(1, chosen_R, torch.ones_like(chosen_R, dtype=counts_RE.dtype))
        load_RE = counts_RE * (self.n_routed_experts / chosen_R.shape[1])
        mean_scores_RE = scores_NE.view(rows, -1, self.n_routed_experts).mean(dim=1)
        return (load_RE * mean_scores_RE).sum(dim=1).mean() * self.alpha

    def forward(self, hidden_BTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return expert ids [N, K], weights [N, K] and, while training, the balance loss."""
        scores_NE = self.scores(hidden_BTH.reshape(-1, hidden_BTH.shape[-1]))
        ids_NK = self.choose(scores_NE)
        loss = None
        if self.training and self.alpha > 0:
            loss = self.balance_loss(scores_NE, ids_NK, hidden_BTH.shape[0])
        return ids_NK, self.weigh(scores_NE, ids_NK), loss


class AddAuxiliaryLoss(torch.autograd.Function):
    """Pass a tensor through unchanged and let a loss join the gradient there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], torch.ones((), dtype=ctx.loss_dtype, device=grads[0].device)


def sum_weighted(rows_NKH: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum over K of [N, K, H], in float32."""
    if torch.is_grad_enabled():
        return (rows_NKH * weights_NK.unsqueeze(-1)).sum(dim=1)
    # The same sums in the same order, without a float32 copy of all rows.
    total_NH = rows_NKH[:, 0].float() * weights_NK[:, 0, None]
    for k in range(1, rows_NKH.shape[1]):
        total_NH += rows_NKH[:, k].float().mul_(weights_NK[:, k, None])
    return total_NH


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
    tokens, top_k = ids_NK.shape
    if tokens == 1 and not torch.is_grad_enabled():
        return one_token_experts_forward(experts, hidden_NH, ids_NK, weights_NK)
    sorted_ids, order = ids_NK.reshape(-1).sort()
    ends_E = torch.searchsorted(sorted_ids, torch.arange(experts.num_experts, device=ids_NK.device), right=True).int()
    rows = hidden_NH[order // top_k].to(experts.gate_up_proj.dtype)
    gate, up = F.grouped_mm(rows, experts.gate_up_proj.mT, offs=ends_E).chunk(2, dim=-1)
    outputs = F.grouped_mm(experts.act_fn(gate) * up, experts.down_proj.mT, offs=ends_E)
    restored = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return sum_weighted(outputs[restored].view(tokens, top_k, -1), weights_NK).to(hidden_NH.dtype)


# Up to this many pairs of token and expert, copying the experts' weights is cheaper on a GPU than grouping the tokens.
MAX_BATCHED_PAIRS = 64


def experts_forward(
    experts: DeepseekV2Experts, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Run the experts in the way that suits the device and the number of tokens; [N, H]."""
    if hidden_NH.device.type == "cpu" and hasattr(F, "grouped_mm"):
        return cpu_experts_forward(experts, hidden_NH, ids_NK, weights_NK)
    few = ids_NK.numel() <= MAX_BATCHED_PAIRS and not torch.is_grad_enabled() and hidden_NH.device.type != "cpu"
    return ALL_EXPERTS_FUNCTIONS["batched_mm" if few else "grouped_mm"](experts, hidden_NH, ids_NK, weights_NK)


EXPERTS_IMPLEMENTATION = "deepseek_vl2"
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


@use_experts_implementation
class DeepseekV2Experts(nn.Module):
    """All routed experts of a layer, fused: gate_up_proj [E, 2I, H] and down_proj [E, H, I].

    transformers' experts interface replaces ``forward`` by `experts_forward` ("deepseek_vl2", the default) or by an
    implementation of its own ("grouped_mm", "batched_mm"); what stands here is "eager", the plain definition.
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.num_experts = config.n_routed_experts
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's experts, [N, H]; summed in float32."""
        tokens, top_k = ids_NK.shape
        flat_ids, order = ids_NK.reshape(-1).sort()
        counts = torch.bincount(flat_ids, minlength=self.num_experts).tolist()
        outputs, start = [], 0
        for expert, count in enumerate(counts):
            if count:
                rows = hidden_NH[order[start : start + count] // top_k]
                gate, up = F.linear(rows, self.gate_up_proj[expert]).chunk(2, dim=-1)
                outputs.append(F.linear(self.act_fn(gate) * up, self.down_proj[expert]))
                start += count
        if not outputs:
            return torch.zeros_like(hidden_NH)
        sorted_outputs = torch.cat(outputs)
        restored = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        weighted_NKH = sorted_outputs[restored].view(tokens, top_k, -1) * weights_NK.unsqueeze(-1)
        return weighted_NKH.sum(dim=1).to(hidden_NH.dtype)


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

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        ids_NK, weights_NK, balance_loss = self.gate(hidden_BTH)
        hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
        out = self.experts(hidden_NH, ids_NK, weights_NK).view(hidden_BTH.shape)
        if balance_loss is not None and balance_loss.requires_grad:
            out = AddAuxiliaryLoss.apply(out, balance_loss)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden_BTH)
        return out
