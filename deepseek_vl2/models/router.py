"""The router: which experts a token gets, with which weights, and the losses that balance them.

Shape suffixes: B batch, T sequence, N = B * T tokens, H hidden size, E routed experts, K experts of a token, G groups
of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_deepseek import DeepseekV2Config
from .cpu import row_kernels


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
