"""Routed and shared experts of one row or a few rows, without gathering their weights.

Every program reads the ids of the chosen experts from device memory and streams its part of a weight where it lies;
the shared experts run in the same launch. A dense MLP is a layer with shared experts alone.

Shape suffixes: B rows, H hidden size, E routed experts, K experts of a row, I inner width of a routed expert, S inner
width of the shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .primitives import check_rows, dot, let_next_start, load_row, load_rows, power_of_two, wait_for_inputs


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

    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    shared_gate: torch.Tensor | None = None
    shared_up: torch.Tensor | None = None
    shared_down: torch.Tensor | None = None

    @property
    def any(self) -> torch.Tensor:
        """Some weight: kernels take it in place of a missing one, which they never read."""
        some = self.shared_gate if self.gate_up is None else self.gate_up
        if some is None:
            raise ValueError("A layer needs routed or shared experts.")
        return some

    @property
    def experts(self) -> int:
        """How many routed experts there are."""
        return 0 if self.gate_up is None else self.gate_up.shape[0]

    @property
    def inner(self) -> int:
        """The inner width of a routed expert."""
        return 0 if self.down is None else self.down.shape[2]

    @property
    def shared_inner(self) -> int:
        """The inner width of the shared experts."""
        return 0 if self.shared_gate is None else self.shared_gate.shape[0]

    def check(self) -> None:
        """Raise ``ValueError`` for weights that are not contiguous."""
        parts = (self.gate_up, self.down, self.shared_gate, self.shared_up, self.shared_down)
        if any_gap := [list(part.shape) for part in parts if part is not None and not part.is_contiguous()]:
            raise ValueError(f"The kernels need contiguous weights; these are not: {any_gap}.")


def inner_plain(
    x_BH: torch.Tensor, weights: ExpertWeights, ids_BK: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return silu(gate) * up of the routed experts, [B, K, I], and of the shared ones, [B, S]."""
    routed = shared = None
    if weights.gate_up is not None and ids_BK is not None:
        gate, up = torch.einsum("bh,bkih->bki", x_BH, weights.gate_up[ids_BK.long()]).chunk(2, dim=-1)
        routed = F.silu(gate) * up
    if weights.shared_gate is not None and weights.shared_up is not None:
        shared = F.silu(F.linear(x_BH, weights.shared_gate)) * F.linear(x_BH, weights.shared_up)
    return routed, shared


def down_plain(
    routed_BKI: torch.Tensor | None,
    shared_BS: torch.Tensor | None,
    weights: ExpertWeights,
    ids_BK: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the outputs of the routed experts, [B, K, H], unweighted, and of the shared ones, [B, H]."""
    routed = shared = None
    if routed_BKI is not None and weights.down is not None and ids_BK is not None:
        routed = torch.einsum("bki,bkhi->bkh", routed_BKI, weights.down[ids_BK.long()])
    if shared_BS is not None and weights.shared_down is not None:
        shared = F.linear(shared_BS, weights.shared_down)
    return routed, shared


@triton.jit
def silu_product(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    """Return silu(gate) * up, in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


# ---------------------------------------------------------------- one row


@triton.jit
def _one_row_inner_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    shared_gate_ptr: tl.tensor,
    shared_up_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    let_next_start(EARLY)
    program = tl.program_id(0)
    shared_blocks: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    gate_ptr = shared_gate_ptr
    up_ptr = shared_up_ptr
    routed = program >= shared_blocks
    block = program
    shift = CHOSEN * I
    norms = load_row(norm_ptr, H, BLOCK_H)
    size = tl.where(routed, I, S)
    if CHOSEN > 0:
        if routed:
            wait_for_inputs(EARLY)
            slot = (program - shared_blocks) // blocks
            block = (program - shared_blocks) % blocks
            shift = slot * I
            gate_ptr = gate_up_ptr + tl.load(ids_ptr + slot).to(tl.int64) * (2 * I * H)
            up_ptr = gate_ptr + I * H
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # The shared experts come first, and their weights are on the way before the row and the choice are waited for.
    gates = load_rows(gate_ptr, rows, size, H, H, BLOCK_H)
    ups = load_rows(up_ptr, rows, size, H, H, BLOCK_H)
    wait_for_inputs(EARLY)
    gate = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    squares = tl.zeros([BLOCK_H], tl.float32)
    for part in tl.static_range((H + BLOCK_H - 1) // BLOCK_H):
        h = part * BLOCK_H + tl.arange(0, BLOCK_H)
        held = h < H
        x = tl.load(x_ptr + h, mask=held, other=0.0).to(tl.float32)
        squares += x * x
        x *= norms[part].to(tl.float32)
        gate += gates[part].to(tl.float32) * x[None, :]
        up += ups[part].to(tl.float32) * x[None, :]
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    out = silu_product(tl.sum(gate, axis=1) * inverse, tl.sum(up, axis=1) * inverse)
    tl.store(inner_ptr + shift + rows, out.to(inner_ptr.dtype.element_ty), mask=rows < size)


def one_row_inner(
    x_H: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weights: ExpertWeights,
    inner_N: torch.Tensor,
    ids_K: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Norm one row, and write silu(gate) * up of its experts.

    Args:
        x_H: the row, before its norm, which is folded into the products.
        norm_H: the norm's weight.
        eps: the norm's epsilon.
        weights: of the experts.
        inner_N: K * I numbers of the routed experts, in the order of their ids, then S of the shared ones.
        ids_K: the experts chosen, int32; with routed experts only.
        blocks: block sizes instead of the usual ones, and options of the launch (`early_start`).
    """
    check_rows(x_H, norm_H, inner_N)
    weights.check()
    hidden, some = x_H.shape[-1], weights.any
    chosen = 0 if ids_K is None else ids_K.shape[-1]
    # Measured on an H200 (benchmarks/gpu_tune.py): long rows want few of them in a program, and wide loads.
    block_n, block_h = (2, 1024) if hidden >= 2048 else (4, 512)
    sizes = {"BLOCK_N": block_n, "BLOCK_H": min(power_of_two(hidden, 16), block_h), "num_warps": 4, **blocks}
    routed_blocks = chosen * triton.cdiv(weights.inner, sizes["BLOCK_N"])
    _one_row_inner_kernel[(triton.cdiv(weights.shared_inner, sizes["BLOCK_N"]) + routed_blocks,)](
        x_H,
        norm_H,
        some if weights.gate_up is None else weights.gate_up,
        some if weights.shared_gate is None else weights.shared_gate,
        some if weights.shared_up is None else weights.shared_up,
        inner_N,
        inner_N if ids_K is None else ids_K,
        eps,
        H=hidden,
        I=weights.inner,
        S=weights.shared_inner,
        CHOSEN=chosen,
        **sizes,
    )


@triton.jit
def _one_row_down_kernel(
    inner_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    down_ptr: tl.tensor,
    shared_down_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    let_next_start(EARLY)
    rows = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    held_rows = (rows < H)[:, None]
    step = tl.arange(0, BLOCK_I)
    total = tl.zeros([BLOCK_H, BLOCK_I], tl.float32)
    # The shared experts come first: their weights, up to some registers full, are on the way before the wait.
    ahead: tl.constexpr = min(S, AHEAD * BLOCK_I)
    parts = load_rows(shared_down_ptr, rows, H, S, ahead, BLOCK_I)
    wait_for_inputs(EARLY)
    for part in tl.static_range((ahead + BLOCK_I - 1) // BLOCK_I):
        s = part * BLOCK_I + step
        inner = tl.load(inner_ptr + CHOSEN * I + s, mask=s < S, other=0.0).to(tl.float32)
        total += parts[part].to(tl.float32) * inner[None, :]
    for start in tl.static_range(AHEAD * BLOCK_I, S, BLOCK_I):
        s = start + step
        offsets = rows[:, None] * S + s[None, :]
        mask = held_rows & (s < S)[None, :]
        weight = tl.load(shared_down_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        inner = tl.load(inner_ptr + CHOSEN * I + s, mask=s < S, other=0.0).to(tl.float32)
        total += weight.to(tl.float32) * inner[None, :]
    for slot in tl.static_range(CHOSEN):
        matrix = down_ptr + tl.load(ids_ptr + slot).to(tl.int64) * (H * I)
        share = tl.load(weights_ptr + slot)
        for start in tl.static_range(0, I, BLOCK_I):
            i = start + step
            offsets = rows[:, None] * I + i[None, :]
            mask = held_rows & (i < I)[None, :]
            weight = tl.load(matrix + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            inner = tl.load(inner_ptr + slot * I + i, mask=i < I, other=0.0).to(tl.float32) * share
            total += weight.to(tl.float32) * inner[None, :]
    out = tl.sum(total, axis=1) + tl.load(residual_ptr + rows, mask=rows < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < H)


def one_row_down(
    inner_N: torch.Tensor,
    weights: ExpertWeights,
    residual_H: torch.Tensor,
    out_H: torch.Tensor,
    ids_K: torch.Tensor | None = None,
    weights_K: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Write residual + weighted sum of one row's experts + its shared experts, all summed in float32.

    Args:
        inner_N: as `one_row_inner` wrote it.
        weights: of the experts.
        residual_H: what the sum is added to.
        out_H: may be the residual itself.
        ids_K: the experts chosen, int32; with routed experts only.
        weights_K: their weights, float32.
        blocks: block sizes instead of the usual ones, and options of the launch (`early_start`).
    """
    check_rows(inner_N, residual_H, out_H)
    weights.check()
    hidden, some = out_H.shape[-1], weights.any
    widest = power_of_two(max(weights.inner, weights.shared_inner), 16)
    # Measured on an H200 (benchmarks/gpu_tune.py), where 64 registers a thread let 1,056 programs of four warps run at
    # once, or twice as many of two. Rows of small's width just fit as the former, and wide loads are faster then.
    cut = {"BLOCK_H": 2, "BLOCK_I": min(widest, 512), "AHEAD": 6, "num_warps": 2}
    if 2048 <= hidden <= 2 * 1056:
        cut = {"BLOCK_H": 2, "BLOCK_I": min(widest, 1024), "AHEAD": 3, "num_warps": 4}
    sizes = {**cut, **blocks}
    _one_row_down_kernel[(triton.cdiv(hidden, sizes["BLOCK_H"]),)](
        inner_N,
        inner_N if ids_K is None else ids_K,
        inner_N if weights_K is None else weights_K,
        some if weights.down is None else weights.down,
        some if weights.shared_down is None else weights.shared_down,
        residual_H,
        out_H,
        H=hidden,
        I=weights.inner,
        S=weights.shared_inner,
        CHOSEN=0 if ids_K is None else ids_K.shape[-1],
        **sizes,
    )


# ---------------------------------------------------------------- a few rows


@triton.jit
def rows_of_expert(
    ids_ptr: tl.tensor,
    expert: tl.tensor,
    block: tl.tensor,
    rows: tl.tensor,
    CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> tl.tensor:
    """Return which rows chose an expert, the slot in which each has it, and how many there are in this block.

    Each program sorts out its own rows: it counts, for every row that has the expert, how many stand before it, and
    takes those numbered ``block`` * BLOCK_B and on. No sorting pass runs before, and no other program is waited for.
    """
    b = tl.arange(0, ROWS_PAD)
    k = tl.arange(0, CHOSEN_PAD)
    held = (b < rows)[:, None] & (k < CHOSEN)[None, :]
    same = tl.load(ids_ptr + b[:, None] * CHOSEN + k[None, :], mask=held, other=-1) == expert
    has = tl.sum(same.to(tl.int32), axis=1) > 0
    slot = tl.sum(tl.where(same, k[None, :], 0), axis=1)
    before = tl.sum((has[None, :] & (b[None, :] < b[:, None])).to(tl.int32), axis=1)
    wanted = block * BLOCK_B + tl.arange(0, BLOCK_B)
    taken = has[None, :] & (before[None, :] == wanted[:, None])
    row = tl.sum(tl.where(taken, b[None, :], 0), axis=1)
    row_slot = tl.sum(tl.where(taken, slot[None, :], 0), axis=1)
    count = tl.sum(has.to(tl.int32), axis=0) - block * BLOCK_B
    return row, row_slot, count


@triton.jit(do_not_specialize=["rows"])
def _few_rows_inner_kernel(
    x_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    shared_gate_ptr: tl.tensor,
    shared_up_ptr: tl.tensor,
    routed_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    NEXT_EARLY: tl.constexpr = False,
) -> None:
    program = tl.program_id(0) // ROW_BLOCKS
    row_block = tl.program_id(0) % ROW_BLOCKS
    shared_blocks: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    routed = program >= shared_blocks
    row = row_block * BLOCK_B + tl.arange(0, BLOCK_B)
    count = rows - row_block * BLOCK_B
    size = tl.where(routed, I, S)
    block = program
    gate_ptr = shared_gate_ptr
    up_ptr = shared_up_ptr
    out_ptr = shared_ptr
    place = row
    if CHOSEN > 0:
        if routed:
            expert = (program - shared_blocks) // blocks
            block = (program - shared_blocks) % blocks
            row, slot, count = rows_of_expert(ids_ptr, expert, row_block, rows, CHOSEN, CHOSEN_PAD, ROWS_PAD, BLOCK_B)
            place = row * CHOSEN + slot
            gate_ptr = gate_up_ptr + expert.to(tl.int64) * (2 * I * H)
            up_ptr = gate_ptr + I * H
            out_ptr = routed_ptr
    if count > 0:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        present = tl.arange(0, BLOCK_B) < count
        gate = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        for start in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            h = start + tl.arange(0, BLOCK_H)
            offsets = n[:, None] * H + h[None, :]
            mask = (n < size)[:, None] & (h < H)[None, :]
            gate_weight = tl.load(gate_ptr + offsets, mask=mask, other=0.0)
            up_weight = tl.load(up_ptr + offsets, mask=mask, other=0.0)
            x = tl.load(x_ptr + row[None, :] * H + h[:, None], mask=present[None, :] & (h < H)[:, None], other=0.0)
            gate = dot(gate_weight, x, gate)
            up = dot(up_weight, x, up)
        let_next_start(NEXT_EARLY)  # not before: programs of the next kernel would take the room of these
        dtype = x_ptr.dtype.element_ty
        out = silu_product(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32))
        tl.store(
            out_ptr + place[None, :] * size + n[:, None],
            out.to(out_ptr.dtype.element_ty),
            mask=present[None, :] & (n < size)[:, None],
        )


@triton.jit(do_not_specialize=["rows"])
def _few_rows_down_kernel(
    routed_inner_ptr: tl.tensor,
    shared_inner_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    down_ptr: tl.tensor,
    shared_down_ptr: tl.tensor,
    routed_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    program = tl.program_id(0) // ROW_BLOCKS
    row_block = tl.program_id(0) % ROW_BLOCKS
    blocks: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    shared_blocks: tl.constexpr = blocks if S > 0 else 0
    routed = program >= shared_blocks
    row = row_block * BLOCK_B + tl.arange(0, BLOCK_B)
    count = rows - row_block * BLOCK_B
    size = tl.where(routed, I, S)
    in_ptr = shared_inner_ptr
    matrix = shared_down_ptr
    out_ptr = shared_ptr
    place = row
    if CHOSEN > 0:
        if routed:
            expert = (program - shared_blocks) // blocks
            row, slot, count = rows_of_expert(ids_ptr, expert, row_block, rows, CHOSEN, CHOSEN_PAD, ROWS_PAD, BLOCK_B)
            place = row * CHOSEN + slot
            in_ptr = routed_inner_ptr
            matrix = down_ptr + expert.to(tl.int64) * (H * I)
            out_ptr = routed_ptr
    wait_for_inputs(EARLY)  # the ids are older: the kernel before this one starts when all before it have ended
    if count > 0:
        n = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        present = tl.arange(0, BLOCK_B) < count
        total = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        for start in tl.range(0, size, BLOCK_I, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_I)
            mask = (n < H)[:, None] & (i < size)[None, :]
            weight = tl.load(matrix + n[:, None] * size + i[None, :], mask=mask, other=0.0)
            x_mask = present[None, :] & (i < size)[:, None]
            x = tl.load(in_ptr + place[None, :] * size + i[:, None], mask=x_mask, other=0.0)
            total = dot(weight, x, total)
        tl.store(
            out_ptr + place[None, :] * H + n[:, None],
            total.to(out_ptr.dtype.element_ty),
            mask=present[None, :] & (n < H)[:, None],
        )


def row_blocks(rows: int, chosen: int) -> dict[str, int]:
    """Return how the kernels for a few rows cut them up: blocks of 16, launched for the most there can be."""
    return {
        "CHOSEN": chosen,
        "CHOSEN_PAD": power_of_two(chosen, 2),
        "ROWS_PAD": power_of_two(rows, 16),
        "BLOCK_B": 16,
        "ROW_BLOCKS": triton.cdiv(rows, 16),
    }


def is_narrow(rows: int, hidden: int) -> bool:
    """Whether products of a few rows are of tiny's width or less, where other blocks were faster (gpu_tune.py)."""
    return rows <= 16 and hidden <= 1280


def few_rows_inner(
    x_BH: torch.Tensor,
    weights: ExpertWeights,
    routed_BKI: torch.Tensor | None,
    shared_BS: torch.Tensor | None,
    ids_BK: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Write `inner_plain` of contiguous, normed rows; ids are int32, and an id of -1 stands for no expert."""
    check_rows(x_BH)
    weights.check()
    rows, hidden = x_BH.shape
    some = weights.any
    stages = 3 if is_narrow(rows, hidden) else 4
    sizes = {"BLOCK_N": 64, "BLOCK_H": min(power_of_two(hidden, 16), 64), "STAGES": stages, "num_warps": 4, **blocks}
    sizes["BLOCK_N"] = min(sizes["BLOCK_N"], power_of_two(max(weights.inner, weights.shared_inner), 16))
    cut = row_blocks(rows, 0 if ids_BK is None else ids_BK.shape[1])
    programs = triton.cdiv(weights.shared_inner, sizes["BLOCK_N"])
    programs += weights.experts * triton.cdiv(weights.inner, sizes["BLOCK_N"])
    _few_rows_inner_kernel[(programs * cut["ROW_BLOCKS"],)](
        x_BH,
        x_BH if ids_BK is None else ids_BK,
        some if weights.gate_up is None else weights.gate_up,
        some if weights.shared_gate is None else weights.shared_gate,
        some if weights.shared_up is None else weights.shared_up,
        x_BH if routed_BKI is None else routed_BKI,
        x_BH if shared_BS is None else shared_BS,
        rows,
        H=hidden,
        I=weights.inner,
        S=weights.shared_inner,
        **cut,
        **sizes,
    )


def few_rows_down(
    routed_BKI: torch.Tensor | None,
    shared_BS: torch.Tensor | None,
    weights: ExpertWeights,
    routed_BKH: torch.Tensor | None,
    shared_BH: torch.Tensor | None,
    ids_BK: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Write `down_plain` of contiguous rows; ids are int32, and an id of -1 stands for no expert."""
    weights.check()
    out = shared_BH if routed_BKH is None else routed_BKH
    if out is None:
        raise ValueError("A layer needs routed or shared experts.")
    some, rows, hidden = weights.any, out.shape[0], out.shape[-1]
    widest = power_of_two(max(weights.inner, weights.shared_inner), 16)
    cut_by = {"BLOCK_I": 128, "STAGES": 3} if is_narrow(rows, hidden) else {"BLOCK_I": 64, "STAGES": 4}
    sizes = {"BLOCK_N": 64, "num_warps": 4, **cut_by, **blocks}
    sizes["BLOCK_I"] = min(sizes["BLOCK_I"], widest)
    sizes["BLOCK_N"] = min(sizes["BLOCK_N"], power_of_two(hidden, 16))
    cut = row_blocks(rows, 0 if ids_BK is None else ids_BK.shape[1])
    programs = (weights.experts + (weights.shared_inner > 0)) * triton.cdiv(hidden, sizes["BLOCK_N"])
    _few_rows_down_kernel[(programs * cut["ROW_BLOCKS"],)](
        out if routed_BKI is None else routed_BKI,
        out if shared_BS is None else shared_BS,
        out if ids_BK is None else ids_BK,
        some if weights.down is None else weights.down,
        some if weights.shared_down is None else weights.shared_down,
        out if routed_BKH is None else routed_BKH,
        out if shared_BH is None else shared_BH,
        rows,
        H=hidden,
        I=weights.inner,
        S=weights.shared_inner,
        **cut,
        **sizes,
    )
