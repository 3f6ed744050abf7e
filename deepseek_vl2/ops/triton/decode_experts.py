"""The weights of a layer's experts as decoding kernels read them, and the plain forms of those kernels.

A dense MLP is a layer with shared experts alone.

Shape suffixes: B rows, H hidden size, E routed experts, K experts of a row, I intermediate size of a routed expert, S
that of the shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .weights import QuantWeight, Weight, check_weights, format_of, of_one_format


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of a layer; either part may be missing, but not both.

    Fields:
        gate_up: [E, 2I, H], gate rows first.
        down: [E, H, I].
        shared_gate: [S, H].
        shared_up: [S, H].
        shared_down: [H, S].
    """

    gate_up: Weight | None = None
    down: Weight | None = None
    shared_gate: Weight | None = None
    shared_up: Weight | None = None
    shared_down: Weight | None = None

    def gates_and_ups(self) -> tuple[Weight, Weight, Weight]:
        """Return ``gate_up``, ``shared_gate`` and ``shared_up``; a missing one's place, never read, another takes."""
        some = self.shared_gate if self.gate_up is None else self.gate_up
        if some is None:
            raise ValueError("A layer needs routed or shared experts.")
        routed, gate, up = (some if w is None else w for w in (self.gate_up, self.shared_gate, self.shared_up))
        return routed, gate, up

    def downs(self) -> tuple[Weight, Weight]:
        """Return ``down`` and ``shared_down``; a missing one's place, never read, the other takes."""
        some = self.shared_down if self.down is None else self.down
        if some is None:
            raise ValueError("A layer needs routed or shared experts.")
        return some if self.down is None else self.down, some if self.shared_down is None else self.shared_down

    @property
    def routed_alone(self) -> ExpertWeights:
        """The routed experts."""
        return replace(self, shared_gate=None, shared_up=None, shared_down=None)

    @property
    def shared_alone(self) -> ExpertWeights:
        """The shared experts."""
        return replace(self, gate_up=None, down=None)

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""
        return 0 if self.gate_up is None else self.gate_up.shape[0]

    @property
    def intermediate_size(self) -> int:
        """Intermediate size of a routed expert."""
        return 0 if self.down is None else self.down.shape[2]

    @property
    def shared_intermediate_size(self) -> int:
        """Intermediate size of the shared experts."""
        return 0 if self.shared_gate is None else self.shared_gate.shape[0]

    def check(self) -> None:
        """Raise ``ValueError`` for weights that the kernels do not read."""
        every = (self.gate_up, self.down, self.shared_gate, self.shared_up, self.shared_down)
        parts = [part for part in every if part is not None]
        check_weights(parts)
        plain = [part for part in parts if isinstance(part, torch.Tensor)]
        if any_gap := [list(part.shape) for part in plain if not part.is_contiguous()]:
            raise ValueError(f"The kernels need contiguous weights; these are not: {any_gap}.")
        if not of_one_format(self.gates_and_ups()[1:]):
            raise ValueError("Gates and ups of the shared experts must be of one format.")
        if isinstance(self.gate_up, QuantWeight) != isinstance(self.down, QuantWeight):
            # Down over packed weights reads the choice early, which only packed gates and ups allow.
            raise ValueError("Both matrices of the routed experts must be packed, or none.")
        rows = self.intermediate_size
        if self.gate_up is not None and rows % format_of(self.gate_up)["ROW_BLOCK"]:
            raise ValueError(f"Blocks of 128 rows do not divide the {rows} rows of an expert's gate.")


def gate_up_plain(
    x_BH: torch.Tensor, weights: ExpertWeights, topk_ids_BK: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return silu(gate) * up of the routed experts, [B, K, I], and of the shared ones, [B, S]; of plain weights."""
    routed = shared = None
    if isinstance(weights.gate_up, torch.Tensor) and topk_ids_BK is not None:
        gate, up = torch.einsum("bh,bkih->bki", x_BH, weights.gate_up[topk_ids_BK.long()]).chunk(2, dim=-1)
        routed = F.silu(gate) * up
    if isinstance(weights.shared_gate, torch.Tensor) and isinstance(weights.shared_up, torch.Tensor):
        shared = F.silu(F.linear(x_BH, weights.shared_gate)) * F.linear(x_BH, weights.shared_up)
    return routed, shared


def down_plain(
    routed_BKI: torch.Tensor | None,
    shared_BS: torch.Tensor | None,
    weights: ExpertWeights,
    topk_ids_BK: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the outputs of the routed experts, [B, K, H], unweighted, and of the shared ones, [B, H]."""
    routed = shared = None
    if routed_BKI is not None and isinstance(weights.down, torch.Tensor) and topk_ids_BK is not None:
        routed = torch.einsum("bki,bkhi->bkh", routed_BKI, weights.down[topk_ids_BK.long()])
    if shared_BS is not None and isinstance(weights.shared_down, torch.Tensor):
        shared = F.linear(shared_BS, weights.shared_down)
    return routed, shared


@triton.jit
def silu_mul(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    """Return silu(gate) * up, in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up
