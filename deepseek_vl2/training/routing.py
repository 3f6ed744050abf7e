"""Even use of the experts: the correction bias's step after each optimizer step, and figures for the log.

Shape suffixes: M mixture-of-experts layers, E routed experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepseek_vl2.models.moe import MoEGate


def find_gates(model: nn.Module) -> dict[str, MoEGate]:
    """Return the gates of a model, whatever wraps it, by their names; also of one loaded as remote code."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "MoEGate"}  # type: ignore[misc]


def find_decoder(model: nn.Module) -> nn.Module:
    """Return the stack of decoder layers.

    Raises:
        ValueError: the model has none.
    """
    for module in model.modules():
        if hasattr(module, "layers") and hasattr(module, "rotary_emb"):
            return module
    raise ValueError(f"{type(model).__name__} holds no DeepSeek-V2 language model.")


class RoutingBiasUpdater:
    """Counts each expert's load in training, and balances the loads without a loss.

    Counts over all micro-batches of a step and over all processes; padding is not counted, and neither is what
    gradient checkpointing computes again. Call `step` after each optimizer step. Only gates of kind ``noaux_tc`` have
    a bias to move; figures are kept for all kinds.

    Args:
        model: the model, wrapped or not; on its device already, or moved there later.
        rate: how much the bias of an expert changes in a step; 0 keeps the figures only.

    Raises:
        ValueError: a model without mixture-of-experts layers, or a negative rate.

    Source: section 2.1.2 of the DeepSeek-V3 report.
    """

    def __init__(self, model: nn.Module, rate: float = 0.001) -> None:
        self.gates = find_gates(model)
        if not self.gates:
            raise ValueError(f"{type(model).__name__} has no mixture-of-experts layers to balance.")
        if rate < 0:
            raise ValueError(f"rate must not be negative, got {rate}.")
        self.rate = rate
        self._counting = False
        self._load: dict[str, torch.Tensor] = {}
        self._logit: dict[str, torch.Tensor] = {}
        self._loss: dict[str, torch.Tensor] = {}
        self._calls = 0
        self._finished: dict[str, torch.Tensor] = {}
        for name, gate in self.gates.items():
            gate.observer = self._observer(name)
        # Recomputed layers run outside of a forward pass of the whole stack, in the backward pass.
        decoder = find_decoder(model)
        self._hooks = [
            decoder.register_forward_pre_hook(self._begin),
            decoder.register_forward_hook(self._end, always_call=True),
        ]

    def close(self) -> None:
        """Stop counting, and let go of the model."""
        for hook in self._hooks:
            hook.remove()
        for gate in self.gates.values():
            gate.observer = None

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._counting = True
        self._calls += module.training

    def _end(self, *ignored: Any) -> None:
        self._counting = False

    def _observer(self, name: str) -> Any:
        def observe(logits_NE: torch.Tensor, load_E: torch.Tensor, loss: torch.Tensor | None) -> None:
            if not self._counting:
                return
            with torch.no_grad():
                logit = logits_NE.abs().amax()
                before = self._load.get(name)
                self._load[name] = load_E if before is None else before + load_E
                self._logit[name] = logit if before is None else torch.maximum(self._logit[name], logit)
                if loss is not None:
                    self._loss[name] = loss if before is None else self._loss[name] + loss

        return observe

    @torch.no_grad()
    def step(self) -> None:
        """Move each bias towards even loads by the rate, from the tokens seen since the last step; call it everywhere.

        An expert that got less than the mean load is chosen more readily afterwards, one that got more less so.
        Processes add up their loads first, so that all move the bias alike.
        """
        if not self._load:
            return
        device = next(iter(self._load.values())).device  # layers may lie on several
        load_ME = torch.stack([self._load[name].to(device) for name in self.gates])
        logit_M = torch.stack([self._logit[name].to(device) for name in self.gates])
        loss = (
            torch.stack([loss.to(device) for loss in self._loss.values()]).sum() / self._calls if self._loss else None
        )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load_ME)
            dist.all_reduce(logit_M, op=dist.ReduceOp.MAX)
            if loss is not None:
                dist.all_reduce(loss)
                loss = loss / dist.get_world_size()
        direction_ME = torch.sign(load_ME.mean(dim=1, keepdim=True) - load_ME)
        for gate, direction_E in zip(self.gates.values(), direction_ME, strict=True):
            if gate.topk_method == "noaux_tc" and self.rate > 0:
                gate.e_score_correction_bias += self.rate * direction_E.to(gate.e_score_correction_bias.device)
        self._finished = {"load": load_ME, "logit": logit_M}
        if loss is not None:
            self._finished["loss"] = loss
        self._load, self._logit, self._loss, self._calls = {}, {}, {}, 0

    def statistics(self) -> dict[str, float]:
        """Return figures of the last step, means over the layers unless said; reads them from the device.

        Returns:
            ``routed_tokens``: how many tokens the step had, over all processes; ``load_max`` and ``load_min``: load of
            the busiest and of the idlest expert over the mean load, of the worst layer each; ``load_entropy``: entropy
            of the loads over that of even ones; ``dead_experts``: the fraction of experts without a token;
            ``router_logit_max``: the largest magnitude of a logit; ``bias_max``: that of the correction bias, where
            there is one; ``balance_loss``: the auxiliary loss of a micro-batch, summed over the layers, where there is
            one. Empty before the first step.
        """
        if not self._finished:
            return {}
        load_ME = self._finished["load"]
        relative_ME = load_ME / load_ME.mean(dim=1, keepdim=True).clamp(min=1e-9)
        share_ME = load_ME / load_ME.sum(dim=1, keepdim=True).clamp(min=1e-9)
        entropy_M = torch.special.entr(share_ME).sum(dim=1) / math.log(max(2, load_ME.shape[1]))
        figures = {
            "routed_tokens": load_ME.sum() / sum(gate.top_k for gate in self.gates.values()),
            "load_max": relative_ME.max(),
            "load_min": relative_ME.amin(dim=1).min(),
            "load_entropy": entropy_M.mean(),
            "dead_experts": (load_ME == 0).float().mean(),
            "router_logit_max": self._finished["logit"].max(),
        }
        biases = [
            g.e_score_correction_bias.to(load_ME.device) for g in self.gates.values() if g.topk_method == "noaux_tc"
        ]
        if biases:
            figures["bias_max"] = torch.stack(biases).abs().max()
        if "loss" in self._finished:
            figures["balance_loss"] = self._finished["loss"]
        values = torch.stack([value.float() for value in figures.values()]).tolist()
        return dict(zip(figures, values, strict=True))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the biases in float32, by the names of their gates: what a resumed training needs."""
        return {
            name: gate.e_score_correction_bias.detach().cpu().clone()
            for name, gate in self.gates.items()
            if gate.topk_method == "noaux_tc"
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put saved biases back.

        Raises:
            ValueError: they are of another model.
        """
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise ValueError("The saved routing state is of another model: gates or numbers of experts differ.")
        for name, bias in state.items():
            self.gates[name].e_score_correction_bias.copy_(bias)
