"""The choice of experts: scores of a row, their ranking, and the norm before them.

Shape suffixes: B rows, H hidden size, E routed experts, K experts of a row, G groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .primitives import check_rows, let_next_start, load_rows, power_of_two, wait_for_inputs

GREEDY, GROUP_LIMITED, CORRECTED = 0, 1, 2
METHODS = {"greedy": GREEDY, "group_limited_greedy": GROUP_LIMITED, "noaux_tc": CORRECTED}


@dataclass(frozen=True)
class GateRule:
    """How experts are chosen from logits.

    Fields:
        experts: how many there are.
        chosen: how many each row gets.
        sigmoid: scores are sigmoids, not a softmax.
        method: `GREEDY`, `GROUP_LIMITED` or `CORRECTED` (by score plus bias, ``noaux_tc``).
        groups: groups of experts, and ``kept_groups`` that may be chosen from.
        normalised: weights of a row are divided by their sum.
        scale: then multiplied by this.
    """

    experts: int
    chosen: int
    sigmoid: bool = False
    method: int = GREEDY
    groups: int = 1
    kept_groups: int = 1
    normalised: bool = False
    scale: float = 1.0

    @property
    def limited(self) -> bool:
        """Whether some groups are left out."""
        return self.method != GREEDY and self.kept_groups < self.groups

    def constants(self) -> dict[str, int | bool]:
        """Return the kernels' compile-time arguments, by name."""
        return {
            "E": self.experts,
            "E_PAD": power_of_two(self.experts, 16),
            "CHOSEN": self.chosen,
            "CHOSEN_PAD": power_of_two(self.chosen, 2),
            "SIGMOID": self.sigmoid,
            "CORRECTED": self.method == CORRECTED,
            "LIMITED": self.limited,
            "GROUP_SIZE": self.experts // self.groups,
            "KEPT_GROUPS": self.kept_groups,
            "NORMALISED": self.normalised,
        }


def choose_plain(
    logits_BE: torch.Tensor, bias_E: torch.Tensor | None, rule: GateRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts' ids [B, K], best first, and their weights [B, K]."""
    scores_BE = logits_BE.sigmoid() if rule.sigmoid else logits_BE.softmax(dim=-1)
    choice_BE = scores_BE if bias_E is None else scores_BE + bias_E
    if rule.limited:
        grouped_BGS = choice_BE.unflatten(1, (rule.groups, -1))
        best = 2 if rule.method == CORRECTED else 1
        kept = grouped_BGS.topk(best, dim=-1).values.sum(-1).topk(rule.kept_groups, dim=-1).indices
        mask_BG = torch.zeros(grouped_BGS.shape[:2], dtype=torch.bool, device=kept.device).scatter_(1, kept, True)
        choice_BE = (grouped_BGS * mask_BG.unsqueeze(-1)).flatten(1)
    ids_BK = choice_BE.topk(rule.chosen, dim=-1).indices
    weights_BK = scores_BE.gather(1, ids_BK)
    if rule.normalised:
        weights_BK = weights_BK / (weights_BK.sum(dim=-1, keepdim=True) + 1e-20)
    return ids_BK, weights_BK * rule.scale


def route_plain(
    x_BH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_EH: torch.Tensor,
    bias_E: torch.Tensor | None,
    rule: GateRule,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the normed rows [B, H], the experts' ids [B, K] and their weights [B, K]."""
    wide = x_BH.float()
    normed = norm_H * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_BH.dtype)
    return (normed, *choose_plain(F.linear(normed.float(), weight_EH.float()), bias_E, rule))


@triton.jit
def choose_experts(
    logits: tl.tensor,
    bias_ptr: tl.tensor,
    scale: tl.tensor,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    LIMITED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    NORMALISED: tl.constexpr,
) -> tl.tensor:
    """Return ids and weights of one row's experts, best first, from logits [E_PAD] that are -inf beyond E.

    Ranks are counted, not sorted: an expert's rank is the number of experts that beat it (equals: the first one).
    """
    e = tl.arange(0, E_PAD)
    real = e < E
    if SIGMOID:
        score = tl.where(real, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    else:
        power = tl.exp(logits - tl.max(logits, axis=0))
        score = power / tl.sum(power, axis=0)
    choice = score
    if CORRECTED:
        choice += tl.load(bias_ptr + e, mask=real, other=0.0).to(tl.float32)
    choice = tl.where(real, choice, float("-inf"))
    earlier = e[None, :] < e[:, None]
    if LIMITED:
        group = e // GROUP_SIZE
        same = group[None, :] == group[:, None]
        beaten = (choice[None, :] > choice[:, None]) | ((choice[None, :] == choice[:, None]) & earlier)
        rank = tl.sum((same & beaten).to(tl.int32), axis=1)
        best = 2 if CORRECTED else 1
        group_score = tl.sum(tl.where(same & (rank < best)[None, :], choice[None, :], 0.0), axis=1)
        higher = (group_score[None, :] > group_score[:, None]) | (
            (group_score[None, :] == group_score[:, None]) & (group[None, :] < group[:, None])
        )
        group_rank = tl.sum((higher & (rank == 0)[None, :]).to(tl.int32), axis=1)
        choice = tl.where(real, tl.where(group_rank < KEPT_GROUPS, choice, 0.0), float("-inf"))
    beaten = (choice[None, :] > choice[:, None]) | ((choice[None, :] == choice[:, None]) & earlier)
    rank = tl.sum(beaten.to(tl.int32), axis=1)
    slot = tl.arange(0, CHOSEN_PAD)
    holds = (rank[None, :] == slot[:, None]) & (slot < CHOSEN)[:, None]
    ids = tl.sum(tl.where(holds, e[None, :], 0), axis=1)
    weights = tl.sum(tl.where(holds, score[None, :], 0.0), axis=1)
    if NORMALISED:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    return ids, weights * scale


@triton.jit
def _route_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    AT_ONCE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    LIMITED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    NORMALISED: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    dtype = x_ptr.dtype.element_ty
    e = tl.arange(0, E_PAD)
    step = tl.arange(0, BLOCK_H)
    squares = tl.zeros([BLOCK_H], tl.float32)
    for start in tl.static_range(0, H, BLOCK_H):
        h = start + step
        x = tl.load(x_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)
        squares += x * x
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    total = tl.zeros([E_PAD, BLOCK_H], tl.float32)
    # Some loads are under way together; all of them would not fit into the registers.
    for outer in range(0, H, AT_ONCE * BLOCK_H):
        for inner in tl.static_range(0, AT_ONCE * BLOCK_H, BLOCK_H):
            h = outer + inner + step
            held = (e < E)[:, None] & (h < H)[None, :]
            weight = tl.load(weight_ptr + e[:, None] * H + h[None, :], mask=held, other=0.0)
            x = tl.load(x_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)
            norm = tl.load(norm_ptr + h, mask=h < H, other=0.0).to(tl.float32)
            normed = ((x * inverse).to(dtype).to(tl.float32) * norm).to(dtype)  # rounded where the plain form rounds
            tl.store(normed_ptr + row * H + h, normed, mask=h < H)
            total += weight.to(tl.float32) * normed.to(tl.float32)[None, :]
    logits = tl.where(e < E, tl.sum(total, axis=1), float("-inf"))
    ids, weights = choose_experts(
        logits, bias_ptr, scale, E, E_PAD, CHOSEN, CHOSEN_PAD, SIGMOID, CORRECTED, LIMITED, GROUP_SIZE, KEPT_GROUPS,
        NORMALISED,
    )  # fmt: skip
    slot = tl.arange(0, CHOSEN_PAD)
    tl.store(ids_ptr + row * CHOSEN + slot, ids, mask=slot < CHOSEN)
    tl.store(weights_ptr + row * CHOSEN + slot, weights, mask=slot < CHOSEN)


def route(
    x_BH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_EH: torch.Tensor,
    bias_E: torch.Tensor | None,
    rule: GateRule,
    normed_BH: torch.Tensor,
    ids_BK: torch.Tensor,
    weights_BK: torch.Tensor,
) -> None:
    """Write `route_plain` of contiguous rows; ids are int32, weights float32. One program a row."""
    check_rows(x_BH, weight_EH, normed_BH, ids_BK, weights_BK)
    constants = rule.constants()
    _route_kernel[(x_BH.shape[0],)](
        x_BH,
        norm_H,
        weight_EH,
        weights_BK if bias_E is None else bias_E,
        normed_BH,
        ids_BK,
        weights_BK,
        eps,
        rule.scale,
        H=x_BH.shape[-1],
        BLOCK_H=min(power_of_two(x_BH.shape[-1], 16), 128),
        AT_ONCE=4,
        **constants,
        num_warps=16 if rule.experts > 64 else 8,
    )


@triton.jit
def _one_row_route_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    ticket_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROGRAMS: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    LIMITED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    NORMALISED: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    let_next_start(EARLY)
    own = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    parts = load_rows(weight_ptr, own, E, H, H, BLOCK_H)
    wait_for_inputs(EARLY)
    total = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
    squares = tl.zeros([BLOCK_H], tl.float32)
    for part in tl.static_range((H + BLOCK_H - 1) // BLOCK_H):
        h = part * BLOCK_H + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        squares += x * x
        x *= tl.load(norm_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        total += parts[part].to(tl.float32) * x[None, :]
    own_logits = tl.sum(total, axis=1) * tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    tl.store(logits_ptr + own, own_logits, mask=own < E)
    # Whoever draws the last ticket sees all logits, and chooses.
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    if ticket == PROGRAMS - 1:
        e = tl.arange(0, E_PAD)
        logits = tl.load(logits_ptr + e, mask=e < E, other=float("-inf"), cache_modifier=".cg")
        ids, weights = choose_experts(
            logits, bias_ptr, scale, E, E_PAD, CHOSEN, CHOSEN_PAD, SIGMOID, CORRECTED, LIMITED, GROUP_SIZE,
            KEPT_GROUPS, NORMALISED,
        )  # fmt: skip
        slot = tl.arange(0, CHOSEN_PAD)
        tl.store(ids_ptr + slot, ids, mask=slot < CHOSEN)
        tl.store(weights_ptr + slot, weights, mask=slot < CHOSEN)
        tl.store(ticket_ptr, 0)


def one_row_route(
    x_H: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_EH: torch.Tensor,
    bias_E: torch.Tensor | None,
    rule: GateRule,
    logits_E: torch.Tensor,
    ticket_1: torch.Tensor,
    ids_K: torch.Tensor,
    weights_K: torch.Tensor,
    **blocks: Any,
) -> None:
    """Choose one row's experts as `route_plain` does, by several programs; its norm is folded into the logits.

    Args:
        x_H: the row, before its norm.
        norm_H: the norm's weight.
        eps: the norm's epsilon.
        weight_EH: the gate's, contiguous.
        bias_E: what a corrected choice adds to the scores.
        rule: how experts are chosen.
        logits_E: written, float32.
        ticket_1: int32; 0, before and after.
        ids_K: written, int32, best first.
        weights_K: written, float32.
        blocks: block sizes instead of the usual ones, and options of the launch (`early_start`).
    """
    check_rows(x_H, weight_EH, logits_E, ids_K, weights_K)
    hidden = x_H.shape[-1]
    sizes = {"BLOCK_E": 2, "BLOCK_H": min(power_of_two(hidden, 16), 512), "num_warps": 8, **blocks}
    programs = triton.cdiv(rule.experts, sizes["BLOCK_E"])
    _one_row_route_kernel[(programs,)](
        x_H,
        norm_H,
        weight_EH,
        logits_E if bias_E is None else bias_E,
        logits_E,
        ticket_1,
        ids_K,
        weights_K,
        eps,
        rule.scale,
        H=hidden,
        PROGRAMS=programs,
        **rule.constants(),
        **sizes,
    )
