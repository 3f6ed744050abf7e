"""Mixture of experts: the gate, the fused experts and the layer that joins them.

Shape suffixes: B batch, T sequence, N = B * T tokens, H hidden size, E routed experts, K experts of a token,
I inner width of an expert, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .backend import backend
from .configuration_deepseek import DeepseekV2Config
from .cpu import grouped_products, is_bare, is_untouched, project, row_kernels
from .loss import compute_dtype

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
        if (kernels := row_kernels()) is not None and self.is_plain():
            out: torch.Tensor | None = kernels.mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
            if out is not None:
                return out
        return project(self.down_proj, self.act_fn(project(self.gate_proj, x)) * project(self.up_proj, x))


def keep_best_groups(choice_NE: torch.Tensor, group_scores_NG: torch.Tensor, kept: int) -> torch.Tensor:
    """Set to zero the scores of all experts outside the ``kept`` best groups of each token."""
    best_NG = group_scores_NG.topk(kept, dim=-1, sorted=False).indices
    mask_NG = torch.zeros_like(group_scores_NG, dtype=torch.bool).scatter_(1, best_NG, True)
    group_size = choice_NE.shape[1] // group_scores_NG.shape[1]
    return choice_NE.masked_fill(~mask_NG.repeat_interleave(group_size, dim=1), 0.0)


class RoutingContext(NamedTuple):
    """What routing must know of a batch in training.

    Fields:
        token_mask: [B, T], true where a token is not padding; ``None``: all are real.
        balance_share: weight of the balance loss, a scalar: the share that a micro-batch has in a step's loss.
    """

    token_mask: torch.Tensor | None = None
    balance_share: torch.Tensor | None = None


RoutingObserver = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], None]


class MoEGate(nn.Module):
    """Choose experts for each token, and their weights. Logits and scores are float32 whatever the model's dtype.

    ``observer`` is called in training with the logits [N, E], the load [E] of this call, padding not counted, and the
    balance loss. The correction bias stays float32 whatever the model is cast to: its steps would vanish in bfloat16.

    Source: section 2.2 of the DeepSeek-V2 paper, section 2.1.2 of the DeepSeek-V3 report (``noaux_tc``);
    ``MoEGate`` of the original package.
    """

    e_score_correction_bias: torch.Tensor
    observer: RoutingObserver | None = None

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
            bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias_E)

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Return each expert's logit for each token, [N, E], in float32."""
        if (kernels := row_kernels()) is not None:
            out: torch.Tensor | None = kernels.logits(hidden_NH, self.weight)
            if out is not None:
                return out
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return F.linear(hidden_NH.float(), self.weight.float())

    def scores_of(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """Return the scores of logits, [N, E], in float32."""
        return logits_NE.softmax(dim=-1) if self.scoring_func == "softmax" else logits_NE.sigmoid()

    def scores(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Return each expert's score for each token, [N, E], in float32."""
        return self.scores_of(self.logits(hidden_NH))

    def choose(self, scores_NE: torch.Tensor) -> torch.Tensor:
        """Return the ids of each token's experts, [N, K]."""
        choice_NE = scores_NE.detach()
        if self.topk_method == "noaux_tc":
            choice_NE = choice_NE + self.e_score_correction_bias
        if self.topk_group >= self.n_group:
            pass  # every group is kept
        elif self.topk_method == "noaux_tc":
            best_two_NG2 = choice_NE.unflatten(1, (self.n_group, -1)).topk(2, dim=-1).values
            choice_NE = keep_best_groups(choice_NE, best_two_NG2.sum(dim=-1), self.topk_group)
        elif self.topk_method == "group_limited_greedy":
            best_NG = choice_NE.unflatten(1, (self.n_group, -1)).amax(dim=-1)
            choice_NE = keep_best_groups(choice_NE, best_NG, self.topk_group)
        return choice_NE.topk(self.top_k, dim=-1, sorted=False).indices

    def weigh(self, scores_NE: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        """Return the weights of the chosen experts, [N, K], in float32."""
        weights_NK = scores_NE.gather(1, ids_NK)
        if self.norm_topk_prob and self.top_k > 1:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_NK if self.routed_scaling_factor == 1 else weights_NK * self.routed_scaling_factor

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MoEGate:
        exact = self._buffers.get("e_score_correction_bias")
        super()._apply(fn, recurse)
        moved = self._buffers.get("e_score_correction_bias")
        if exact is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(moved.device, torch.float32)
        return self

    def count_load(self, ids_NK: torch.Tensor, rows: int, token_mask_BT: torch.Tensor | None) -> torch.Tensor:
        """Return how many tokens chose each expert, [rows, E] in float32; ``rows`` equal parts, padding not counted."""
        chosen_NE = torch.zeros(len(ids_NK), self.n_routed_experts, device=ids_NK.device).scatter_(1, ids_NK, 1.0)
        if token_mask_BT is not None:
            chosen_NE = chosen_NE * token_mask_BT.reshape(-1, 1)
        return chosen_NE.view(rows, -1, self.n_routed_experts).sum(dim=1)

    def balance_loss(
        self, scores_NE: torch.Tensor, load_RE: torch.Tensor, token_mask_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the load-balance loss, a scalar: small when experts are chosen evenly; padding does not count.

        ``load_RE`` holds the rows of `count_load` over each of which experts shall be balanced.
        """
        scores_RTE = scores_NE.view(len(load_RE), -1, self.n_routed_experts)
        fraction_RE = load_RE * (self.n_routed_experts / self.top_k)
        if token_mask_BT is None:
            fraction_RE, mean_scores_RE = fraction_RE / scores_RTE.shape[1], scores_RTE.mean(dim=1)
        else:
            mask_RT1 = token_mask_BT.reshape(len(load_RE), -1, 1).to(scores_NE.dtype)
            tokens_R1 = mask_RT1.sum(dim=1).clamp(min=1)
            fraction_RE, mean_scores_RE = fraction_RE / tokens_R1, (scores_RTE * mask_RT1).sum(dim=1) / tokens_R1
        return (fraction_RE * mean_scores_RE).sum(dim=1).mean() * self.alpha

    def forward(
        self, hidden_BTH: torch.Tensor, token_mask_BT: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return expert ids [N, K], weights [N, K] and, while training, the balance loss over the mask's tokens."""
        logits_NE = self.logits(hidden_BTH.reshape(-1, hidden_BTH.shape[-1]))
        scores_NE = self.scores_of(logits_NE)
        ids_NK = self.choose(scores_NE)
        loss = None
        if self.training and (self.alpha > 0 or self.observer is not None):
            load_RE = self.count_load(ids_NK, hidden_BTH.shape[0] if self.seq_aux else 1, token_mask_BT)
            if self.alpha > 0:
                loss = self.balance_loss(scores_NE, load_RE, token_mask_BT)
            if self.observer is not None:
                self.observer(logits_NE.detach(), load_RE.sum(dim=0), None if loss is None else loss.detach())
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
    """Return the weighted sum over K of [N, K, H], in float32, without a float32 copy of all rows."""
    total_NH = rows_NKH[:, 0].float() * weights_NK[:, 0, None]
    for k in range(1, rows_NKH.shape[1]):
        total_NH += rows_NKH[:, k].float().mul_(weights_NK[:, k, None])
    return total_NH


# On a CPU sums over experts are taken for this many tokens at a time: float32 copies of their rows stay in its cache,
# where those of all rows would be new memory in each step, which takes longer to get than the sum to compute.
BLOCK_TOKENS = 128


def in_blocks(x: torch.Tensor) -> bool:
    """Whether rows are summed block by block: on a CPU, outside of compilation."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def take_rows(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return some rows of a matrix; on a CPU indexing is several times slower than this."""
    return x.index_select(0, ids) if x.device.type == "cpu" else x[ids]


class SortRows(torch.autograd.Function):
    """Copy each token's row once for each of its experts, sorted by expert: [N, H] to [N * K, H].

    Autograd's own backward of such a gather adds rows up with atomics, or sorts again; this one reads them in order.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, order: torch.Tensor, restored: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(restored)
        ctx.top_k = top_k
        return take_rows(hidden_NH, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (restored,) = ctx.saved_tensors
        if in_blocks(grad):
            return F.embedding_bag(restored.view(-1, ctx.top_k), grad, mode="sum"), None, None, None
        return grad[restored].unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None


def weighted_sum(rows: torch.Tensor, weights_NK: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum, [N, H] in the weights' dtype, of each token's K rows; ``restored`` says which."""
    return (take_rows(rows, restored).view(*weights_NK.shape, -1) * weights_NK.unsqueeze(-1)).sum(dim=1)


class SumSortedRows(torch.autograd.Function):
    """Weighted sum of each token's rows, which stand sorted by expert: [N * K, H] to [N, H], in float32.

    Keeps neither a reordered nor a float32 copy of the rows for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weights_NK: torch.Tensor, order: torch.Tensor, restored: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weights_NK, order, restored)
        if not in_blocks(rows):
            return weighted_sum(rows, weights_NK, restored)
        sums_NH = weights_NK.new_empty(len(weights_NK), rows.shape[1])
        ids_NK = restored.view(weights_NK.shape)
        blocks = (part.split(BLOCK_TOKENS) for part in (sums_NH, weights_NK, ids_NK))
        for sums, weights, ids in zip(*blocks, strict=True):
            sums.copy_(weighted_sum(rows, weights, ids.flatten()))
        return sums_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows, weights_NK, order, restored = ctx.saved_tensors
        top_k = weights_NK.shape[1]
        tokens = order // top_k
        weights = weights_NK.flatten()[order]
        if not in_blocks(rows):
            grad_rows, grad_weights = scaled_rows(grad_NH, rows, weights, tokens)
            return grad_rows, grad_weights[restored].view_as(weights_NK), None, None
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
        blocks = (part.split(BLOCK_TOKENS * top_k) for part in (grad_rows, grad_weights, rows, weights, tokens))
        for grad_row, grad_weight, *given in zip(*blocks, strict=True):
            for out, computed in zip((grad_row, grad_weight), scaled_rows(grad_NH, *given), strict=True):
                out.copy_(computed)
        return grad_rows, grad_weights[restored].view_as(weights_NK), None, None


def scaled_rows(
    grad_NH: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of rows and of their weights, given those of the weighted sums and each row's token."""
    grad_rows = take_rows(grad_NH, tokens)
    return (grad_rows * weights[:, None]).to(rows.dtype), (grad_rows * rows).sum(dim=-1)


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
    gate, up = F.grouped_mm(rows, gate_up_proj.to(dtype).mT, offs=ends_E).chunk(2, dim=-1)
    outputs = F.grouped_mm(experts.act_fn(gate) * up, down_proj.to(dtype).mT, offs=ends_E)
    return SumSortedRows.apply(outputs, weights_NK, order, restored).to(hidden_NH.dtype)


def one_token_experts_forward(
    experts: DeepseekV2Experts, hidden_1H: torch.Tensor, ids_1K: torch.Tensor, weights_1K: torch.Tensor
) -> torch.Tensor:
    """Run the chosen experts of a single token, on a CPU; [1, H].

    A grouped product would visit the experts that were not chosen too, which costs as much as half of the work.
    """
    if (kernels := row_kernels()) is not None and is_silu(experts.act_fn):
        out: torch.Tensor | None = kernels.experts(
            hidden_1H, experts.gate_up_proj, experts.down_proj, ids_1K, weights_1K
        )
        if out is not None:
            return out
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


def experts_forward(
    experts: DeepseekV2Experts, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Run the experts in the way that suits the device and the number of tokens; [N, H]."""
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
    for expert, count in enumerate(counts):
        if count:
            rows = hidden_NH[order[start : start + count] // top_k]
            gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(experts.act_fn(gate) * up, experts.down_proj[expert]))
            start += count
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
