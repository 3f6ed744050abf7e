"""The router: logits of a token, its top-k experts, and the RMS norm before them.

Shape suffixes: B rows, H hidden size, E routed experts, K experts of a row, G groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .common import check_rows, dot, grid_wait, launch_dependents, load_row, load_rows, power_of_two
from .decode_align import ExpertTokens, enter_row

GREEDY, GROUP_LIMITED, NOAUX_TC = 0, 1, 2
METHODS = {"greedy": GREEDY, "group_limited_greedy": GROUP_LIMITED, "noaux_tc": NOAUX_TC}


@dataclass(frozen=True)
class RouterConfig:
    """How the router selects experts from logits.

    Fields:
        num_experts: routed experts.
        top_k: experts a token.
        sigmoid: scores are sigmoids, not a softmax.
        method: `GREEDY`, `GROUP_LIMITED` or `NOAUX_TC` (by score plus bias, ``noaux_tc``).
        num_groups: groups of experts, of which ``topk_groups`` may be selected from.
        norm_topk_prob: weights of a token are divided by their sum.
        scale: then multiplied by this.
    """

    num_experts: int
    top_k: int
    sigmoid: bool = False
    method: int = GREEDY
    num_groups: int = 1
    topk_groups: int = 1
    norm_topk_prob: bool = False
    scale: float = 1.0

    @property
    def group_limited(self) -> bool:
        """Whether some groups are left out."""
        return self.method != GREEDY and self.topk_groups < self.num_groups

    def constants(self) -> dict[str, int | bool]:
        """Return the kernels' compile-time arguments, by name."""
        return {
            "E": self.num_experts,
            "E_PAD": power_of_two(self.num_experts, 16),
            "TOP_K": self.top_k,
            "TOP_K_PAD": power_of_two(self.top_k, 2),
            "SIGMOID": self.sigmoid,
            "NOAUX_TC": self.method == NOAUX_TC,
            "LIMITED": self.group_limited,
            "GROUP_SIZE": self.num_experts // self.num_groups,
            "TOPK_GROUPS": self.topk_groups,
            "NORM_TOPK": self.norm_topk_prob,
        }


def select_topk_plain(
    logits_BE: torch.Tensor, bias_E: torch.Tensor | None, routing: RouterConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts' ids [B, K], best first, and their weights [B, K]."""
    scores_BE = logits_BE.sigmoid() if routing.sigmoid else logits_BE.softmax(dim=-1)
    choice_BE = scores_BE if bias_E is None else scores_BE + bias_E
    if routing.group_limited:
        grouped_BGS = choice_BE.unflatten(1, (routing.num_groups, -1))
        best = 2 if routing.method == NOAUX_TC else 1
        kept = grouped_BGS.topk(best, dim=-1).values.sum(-1).topk(routing.topk_groups, dim=-1).indices
        mask_BG = torch.zeros(grouped_BGS.shape[:2], dtype=torch.bool, device=kept.device).scatter_(1, kept, True)
        choice_BE = (grouped_BGS * mask_BG.unsqueeze(-1)).flatten(1)
    topk_ids_BK = choice_BE.topk(routing.top_k, dim=-1).indices
    topk_weights_BK = scores_BE.gather(1, topk_ids_BK)
    if routing.norm_topk_prob:
        topk_weights_BK = topk_weights_BK / (topk_weights_BK.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_ids_BK, topk_weights_BK * routing.scale


def route_plain(
    x_BH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_EH: torch.Tensor,
    bias_E: torch.Tensor | None,
    routing: RouterConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the normed rows [B, H], the experts' ids [B, K] and their weights [B, K]."""
    wide = x_BH.float()
    normed = norm_H * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_BH.dtype)
    return (normed, *select_topk_plain(F.linear(normed.float(), weight_EH.float()), bias_E, routing))


@triton.jit
def select_topk(
    logits: tl.tensor,
    bias_ptr: tl.tensor,
    scale: tl.tensor,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    NOAUX_TC: tl.constexpr,
    LIMITED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    NORM_TOPK: tl.constexpr,
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
    if NOAUX_TC:
        choice += tl.load(bias_ptr + e, mask=real, other=0.0).to(tl.float32)
    # NaN ranks first, as in torch.topk: no comparison holds for it, so several experts would have one rank, and the sum
    # of their ids would be no expert's.
    choice = tl.where(choice != choice, float("inf"), choice)
    choice = tl.where(real, choice, float("-inf"))
    earlier = e[None, :] < e[:, None]
    if LIMITED:
        group = e // GROUP_SIZE
        same = group[None, :] == group[:, None]
        beaten = (choice[None, :] > choice[:, None]) | ((choice[None, :] == choice[:, None]) & earlier)
        rank = tl.sum((same & beaten).to(tl.int32), axis=1)
        best = 2 if NOAUX_TC else 1
        group_score = tl.sum(tl.where(same & (rank < best)[None, :], choice[None, :], 0.0), axis=1)
        higher = (group_score[None, :] > group_score[:, None]) | (
            (group_score[None, :] == group_score[:, None]) & (group[None, :] < group[:, None])
        )
        group_rank = tl.sum((higher & (rank == 0)[None, :]).to(tl.int32), axis=1)
        choice = tl.where(real, tl.where(group_rank < TOPK_GROUPS, choice, 0.0), float("-inf"))
    beaten = (choice[None, :] > choice[:, None]) | ((choice[None, :] == choice[:, None]) & earlier)
    rank = tl.sum(beaten.to(tl.int32), axis=1)
    slot = tl.arange(0, TOP_K_PAD)
    matches = (rank[None, :] == slot[:, None]) & (slot < TOP_K)[:, None]
    ids = tl.sum(tl.where(matches, e[None, :], 0), axis=1)
    weights = tl.sum(tl.where(matches, score[None, :], 0.0), axis=1)
    if NORM_TOPK:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    return ids, weights * scale


@triton.jit
def _route_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    live_ptr: tl.tensor,
    expert_counts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    further_ptr: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROGRAMS: tl.constexpr,
    NORMED: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    NOAUX_TC: tl.constexpr,
    LIMITED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    NORM_TOPK: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    row = tl.program_id(1)
    own = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    parts = load_rows(weight_ptr, own, E, H, H, BLOCK_H)
    norms = load_row(norm_ptr, H, BLOCK_H)
    grid_wait(PDL)
    total = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
    squares = tl.zeros([BLOCK_H], tl.float32)
    for part in tl.static_range(blocks):
        h = part * BLOCK_H + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)
        squares += x * x
        if not NORMED:
            x *= norms[part].to(tl.float32)
            total += parts[part].to(tl.float32) * x[None, :]
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    if NORMED:  # rounded where the plain form rounds
        dtype = normed_ptr.dtype.element_ty
        for part in tl.static_range(blocks):
            h = part * BLOCK_H + tl.arange(0, BLOCK_H)
            x = tl.load(x_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)
            normed = ((x * inverse).to(dtype).to(tl.float32) * norms[part].to(tl.float32)).to(dtype)
            if tl.program_id(0) == 0:
                tl.store(normed_ptr + row * H + h, normed, mask=h < H)
            total += parts[part].to(tl.float32) * normed.to(tl.float32)[None, :]
        own_logits = tl.sum(total, axis=1)
    else:
        own_logits = tl.sum(total, axis=1) * inverse
    tl.store(logits_ptr + row * E + own, own_logits, mask=own < E)
    # The last program to finish a row sees all its logits and selects the experts.
    tl.debug_barrier()
    counter = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel")
    if counter == PROGRAMS - 1:
        e = tl.arange(0, E_PAD)
        logits = tl.load(logits_ptr + row * E + e, mask=e < E, other=float("-inf"), cache_modifier=".cg")
        ids, weights = select_topk(
            logits, bias_ptr, scale, E, E_PAD, TOP_K, TOP_K_PAD, SIGMOID, NOAUX_TC, LIMITED, GROUP_SIZE,
            TOPK_GROUPS, NORM_TOPK,
        )  # fmt: skip
        if PADDED:
            ids = tl.where(row < tl.load(live_ptr), ids, -1)
        slot = tl.arange(0, TOP_K_PAD)
        tl.store(ids_ptr + row * TOP_K + slot, ids, mask=slot < TOP_K)
        tl.store(weights_ptr + row * TOP_K + slot, weights, mask=slot < TOP_K)
        if TILE > 0:
            rows = tl.num_programs(1)
            enter_row(ids, row, rows, expert_counts_ptr, tokens_ptr, further_ptr, E, TOP_K, TOP_K_PAD, TILE)
        tl.store(counters_ptr + row, 0)


def route(
    x_BH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_EH: torch.Tensor,
    bias_E: torch.Tensor | None,
    routing: RouterConfig,
    logits_BE: torch.Tensor,
    counters_B: torch.Tensor,
    topk_ids_BK: torch.Tensor,
    topk_weights_BK: torch.Tensor,
    normed_BH: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    tokens: ExpertTokens | None = None,
    **blocks: Any,
) -> None:
    """Write `route_plain` of contiguous rows, several programs a row.

    Args:
        x_BH: the rows, before their norm.
        norm_H: the norm's weight.
        eps: the norm's epsilon.
        weight_EH: the gate's.
        bias_E: what a corrected choice adds to the scores.
        routing: how experts are selected.
        logits_BE: written, float32.
        counters_B: int32; 0, before and after.
        topk_ids_BK: written, int32, best first.
        topk_weights_BK: written, float32.
        normed_BH: written; without it the norm is folded into the logits, and not rounded.
        live_rows: how many rows are no padding, int32 [1]: those behind them get ids of -1, no expert, whose weights
            `decode_experts_gemm` does not read. Not for a single row: `decode_experts_gemv` knows no such id.
        tokens: written, `align_plain` of the ids but for the order of its lists; its counts must be 0 before.
        blocks: block sizes instead of the usual ones, and options of the launch (`pdl_options`).
    """
    check_rows(x_BH, weight_EH, logits_BE, topk_ids_BK, topk_weights_BK)
    rows, hidden = x_BH.shape
    if live_rows is not None and rows == 1:
        raise ValueError("A single row is never padding: the experts of one row need ids of experts.")
    block_e = 1 if rows == 1 else 16 if rows <= 16 else 8
    sizes = {"BLOCK_E": block_e, "BLOCK_H": min(power_of_two(hidden, 16), 512), "num_warps": 8, **blocks}
    programs = triton.cdiv(routing.num_experts, sizes["BLOCK_E"])
    _route_kernel[(programs, rows)](
        x_BH,
        norm_H,
        weight_EH,
        logits_BE if bias_E is None else bias_E,
        logits_BE,
        counters_B,
        topk_ids_BK,
        topk_weights_BK,
        x_BH if normed_BH is None else normed_BH,
        topk_ids_BK if live_rows is None else live_rows,
        *((topk_ids_BK,) * 3 if tokens is None else (tokens.counts, tokens.tokens, tokens.further)),
        eps,
        routing.scale,
        H=hidden,
        PROGRAMS=programs,
        NORMED=normed_BH is not None,
        PADDED=live_rows is not None,
        TILE=0 if tokens is None else tokens.tile,
        **routing.constants(),
        **sizes,
    )


@triton.jit
def _route_tokens_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    last_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    NOAUX_TC: tl.constexpr,
    NORM_TOPK: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, E_PAD)
    logits = tl.zeros([BLOCK_N, E_PAD], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + n[:, None] * H + h[None, :], mask=(n < rows)[:, None] & (h < H)[None, :], other=0.0)
        weight = tl.load(weight_ptr + e[None, :] * H + h[:, None], mask=(e < E)[None, :] & (h < H)[:, None], other=0.0)
        logits = dot(x, weight, logits)
    real = (e < E)[None, :]
    if SIGMOID:
        scores = tl.where(real, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    else:
        logits = tl.where(real, logits, float("-inf"))
        power = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = power / tl.sum(power, axis=1)[:, None]
    choice = scores
    if NOAUX_TC:
        choice += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(real, choice, float("-inf"))
    slots = tl.arange(0, TOP_K_PAD)[None, :]
    ids = tl.zeros([BLOCK_N, TOP_K_PAD], tl.int32)
    weights = tl.zeros([BLOCK_N, TOP_K_PAD], tl.float32)
    for slot in tl.static_range(TOP_K):
        best = tl.argmax(choice, axis=1)
        taken = e[None, :] == best[:, None]
        weight_of_best = tl.sum(tl.where(taken, scores, 0.0), axis=1)
        ids = tl.where(slots == slot, best[:, None], ids)
        weights = tl.where(slots == slot, weight_of_best[:, None], weights)
        choice = tl.where(taken, float("-inf"), choice)
    if NORM_TOPK:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
    # By id, and the last one stays the last.
    first = slots < TOP_K - 1
    lower = (ids[:, None, :] < ids[:, :, None]) & first[:, None, :]
    place = tl.where(first, tl.sum(lower.to(tl.int32), axis=2), slots)
    moved = place[:, None, :] == slots[:, :, None]
    ids = tl.sum(tl.where(moved, ids[:, None, :], 0), axis=2)
    weights = tl.sum(tl.where(moved, weights[:, None, :], 0.0), axis=2)
    if PADDED:
        last = tl.load(last_ptr + n // positions, mask=n < rows, other=0)
        ids = tl.where((n > last)[:, None], E, ids)
    places = n[:, None] * TOP_K + slots
    held = (n < rows)[:, None] & (slots < TOP_K)
    tl.store(ids_ptr + places, ids, mask=held)
    tl.store(weights_ptr + places, weights * scale, mask=held)


def route_tokens(
    x_NH: torch.Tensor,
    weight_EH: torch.Tensor,
    bias_E: torch.Tensor | None,
    routing: RouterConfig,
    last: torch.Tensor | None = None,
    positions: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of many rows, which are normed already; the plain form is `select_topk_plain` of their logits.

    Products of bfloat16 are exact in float32, where they are summed: logits are as good as those of float32 inputs.

    Args:
        x_NH: the rows, contiguous, in the dtype of the gate's weight.
        weight_EH: the gate's.
        bias_E: what a corrected choice adds to the scores.
        routing: how experts are selected; not from groups of which some are left out.
        last: of each prompt, the row of its last token that is not padding, [N / positions, rounded up]: those behind
            it get no expert, which is id E; -1: all of them. ``None``: there is no padding.
        positions: how many rows a prompt takes, its padding included; the last one may take fewer.

    Returns:
        Ids, int32 [N, K], and weights, float32 [N, K]: by id, but for the least likely one, which is the last. So does
        a GPU's ``topk`` leave them, and sums of experts are taken in this order.
    """
    check_rows(x_NH, weight_EH)
    if routing.group_limited:
        raise ValueError("Groups of experts that are left out need the plain form.")
    rows, hidden = x_NH.shape
    if last is not None and len(last) != triton.cdiv(rows, positions):
        raise ValueError(f"{len(last)} prompts of {positions} rows are not the {rows} rows given.")
    ids = torch.empty(rows, routing.top_k, dtype=torch.int32, device=x_NH.device)
    weights = torch.empty(rows, routing.top_k, dtype=torch.float32, device=x_NH.device)
    constants = routing.constants()
    for name in ("LIMITED", "GROUP_SIZE", "TOPK_GROUPS"):
        del constants[name]
    _route_tokens_kernel[(triton.cdiv(rows, 16),)](
        x_NH, weight_EH, weights if bias_E is None else bias_E, ids if last is None else last, ids, weights,
        rows, positions, routing.scale,
        H=hidden, PADDED=last is not None, BLOCK_N=16, BLOCK_H=min(power_of_two(hidden, 16), 128), **constants,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return ids, weights
