"""Even use of the experts: the correction bias's step after each optimizer step, and figures for the log.

Shape suffixes: M mixture-of-experts layers, E routed experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepseek_vl2.models.router import MoEGate


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


class GateRecord:
    """What a gate said in its last call: its observer.

    All are of one class and hold nothing but tensors, and what they keep is added up elsewhere: so layers of one shape
    share one compiled graph, records included.
    """

    def __init__(self) -> None:
        self.load_E: torch.Tensor | None = None
        self.logit: torch.Tensor | None = None
        self.loss: torch.Tensor | None = None

    def __call__(self, logits_NE: torch.Tensor, load_E: torch.Tensor, loss: torch.Tensor | None) -> None:
        """Keep the load, the largest magnitude of a logit and the balance loss, until the next call."""
        with torch.no_grad():
            self.logit = logits_NE.abs().amax()
        self.load_E = load_E
        self.loss = loss


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
        self._records = {name: GateRecord() for name in self.gates}
        self._sums: dict[str, torch.Tensor] = {}
        self._calls = 0
        self._finished: dict[str, torch.Tensor] = {}
        for name, gate in self.gates.items():
            gate.observer = self._records[name]
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
        for record in self._records.values():
            record.load_E = record.logit = record.loss = None

    @torch.no_grad()
    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Add what all gates said to the step's sums: a few operations, whatever the number of layers."""
        records = [record for record in self._records.values() if record.load_E is not None]
        if not module.training or len(records) < len(self._records):
            return  # an evaluation, or a forward pass that failed on its way
        device = records[0].load_E.device  # type: ignore[union-attr]  # layers may lie on several
        stacked = {
            name: torch.stack([getattr(record, name).to(device) for record in records])
            for name in ("load_E", "logit", "loss")
            if getattr(records[0], name) is not None
        }
        parts = {"load": stacked["load_E"], "logit": stacked["logit"]}
        if "loss" in stacked:
            parts["loss"] = stacked["loss"].sum()
        for name, part in parts.items():
            before = self._sums.get(name)
            join = torch.maximum if name == "logit" else torch.add
            self._sums[name] = part if before is None else join(before, part)
        self._calls += 1

    @torch.no_grad()
    def step(self) -> None:
        """Move each bias towards even loads by the rate, from the tokens seen since the last step; call it everywhere.

        An expert that got less than the mean load is chosen more readily afterwards, one that got more less so.
        Processes add up their loads first, so that all move the bias alike.
        """
        if not self._sums:
            return
        load_ME, logit_M, loss = self._sums["load"], self._sums["logit"], self._sums.get("loss")
        if loss is not None:
            loss = loss / self._calls
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load_ME)
            dist.all_reduce(logit_M, op=dist.ReduceOp.MAX)
            if loss is not None:
                dist.all_reduce(loss)
                loss = loss / dist.get_world_size()
        direction_ME = torch.sign(load_ME.mean(dim=1, keepdim=True) - load_ME)
        moved = [
            (gate.e_score_correction_bias, direction_E)
            for gate, direction_E in zip(self.gates.values(), direction_ME.unbind(), strict=True)
            if gate.topk_method == "noaux_tc" and self.rate > 0
        ]
        if moved:
            steps = [direction_E.to(bias_E.device) for bias_E, direction_E in moved]
            torch._foreach_add_([bias_E for bias_E, _ in moved], steps, alpha=self.rate)
        self._finished = {"load": load_ME, "logit": logit_M}
        if loss is not None:
            self._finished["loss"] = loss
        self._sums, self._calls = {}, 0

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
