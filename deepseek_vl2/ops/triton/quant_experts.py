"""Routed and shared experts of one row over packed weights. The plain form: `PackedExperts.run_expert` of `models`.

Every program reads the ids of the chosen experts from device memory and streams its part of a weight where it lies; the
shared experts run in the same launch. A dense MLP is a layer with shared experts alone.

Shape suffixes: H hidden size, E routed experts, K experts of a row, I inner width of a routed expert, S of the shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .quant_common import QuantWeight, block_k, check_same, grid_wait, inverse_rms, launch_dependents, row_dot


@dataclass(frozen=True)
class QuantExperts:
    """The packed weights of a layer; either part may be missing, but not both.

    Fields:
        gate_up: [E, 2I, H], gate rows first.
        down: [E, H, I].
        shared_gate: [S, H].
        shared_up: [S, H].
        shared_down: [H, S].
    """

    gate_up: QuantWeight | None = None
    down: QuantWeight | None = None
    shared_gate: QuantWeight | None = None
    shared_up: QuantWeight | None = None
    shared_down: QuantWeight | None = None

    @property
    def inner(self) -> int:
        """The inner width of a routed expert."""
        return 0 if self.down is None else self.down.columns

    @property
    def shared_inner(self) -> int:
        """The inner width of the shared experts."""
        return 0 if self.shared_gate is None else self.shared_gate.rows

    def first(self, *parts: QuantWeight | None) -> QuantWeight:
        """Return the first part that is there: kernels take it in place of a missing one, which they never read."""
        found = next((part for part in parts if part is not None), None)
        if found is None:
            raise ValueError("A layer needs routed or shared experts.")
        return found

    def check(self) -> None:
        """Raise ``ValueError`` where gate and up of routed and shared experts are not of one format."""
        check_same([part for part in (self.gate_up, self.shared_gate, self.shared_up) if part is not None])
        for part in (self.down, self.shared_down):
            if part is not None:
                part.check()
        if self.gate_up is not None and self.gate_up.block and self.inner % 128:
            raise ValueError(f"Blocks of 128 rows do not divide the {self.inner} rows of an expert's gate.")


@triton.jit
def _inner_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    gate_up_scale_ptr: tl.tensor,
    shared_gate_ptr: tl.tensor,
    shared_gate_scale_ptr: tl.tensor,
    shared_up_ptr: tl.tensor,
    shared_up_scale_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    CHOSEN: tl.constexpr,
    PACKED_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    launch_dependents(EARLY)
    program = tl.program_id(0)
    shared_blocks: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    gate_ptr = shared_gate_ptr
    gate_scale_ptr = shared_gate_scale_ptr
    up_ptr = shared_up_ptr
    up_scale_ptr = shared_up_scale_ptr
    routed = program >= shared_blocks
    block = program
    shift = CHOSEN * I
    size = tl.where(routed, I, S)
    grid_wait(EARLY)
    if CHOSEN > 0:
        if routed:
            slot = (program - shared_blocks) // blocks
            block = (program - shared_blocks) % blocks
            shift = slot * I
            expert = tl.load(ids_ptr + slot).to(tl.int64)
            gate_ptr = gate_up_ptr + expert * (2 * I * PACKED_ROW)
            gate_scale_ptr = gate_up_scale_ptr + expert * (2 * I // ROW_BLOCK * SCALE_ROW)
            up_ptr = gate_ptr + I * PACKED_ROW
            up_scale_ptr = gate_scale_ptr + I // ROW_BLOCK * SCALE_ROW
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = row_dot(gate_ptr, gate_scale_ptr, x_ptr, norm_ptr, rows, size, H, BLOCK_H, KIND, GROUP, ROW_BLOCK, True)
    up = row_dot(up_ptr, up_scale_ptr, x_ptr, norm_ptr, rows, size, H, BLOCK_H, KIND, GROUP, ROW_BLOCK, True)
    inverse = inverse_rms(x_ptr, eps, H, BLOCK_H)
    gate *= inverse
    out = gate / (1.0 + tl.exp(-gate)) * (up * inverse)
    tl.store(inner_ptr + shift + rows, out.to(inner_ptr.dtype.element_ty), mask=rows < size)


def quant_inner(
    x_H: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weights: QuantExperts,
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
        blocks: block sizes instead of the usual ones, and options of the launch.
    """
    weights.check()
    hidden = x_H.shape[-1]
    some = weights.first(weights.gate_up, weights.shared_gate)
    routed, gate, up = (part or some for part in (weights.gate_up, weights.shared_gate, weights.shared_up))
    chosen = 0 if ids_K is None else ids_K.shape[-1]
    usual = {"BLOCK_N": 4, "BLOCK_H": block_k(hidden, some.constants["GROUP"]), "num_warps": 4}
    sizes = {**usual, **blocks}
    programs = triton.cdiv(weights.shared_inner, sizes["BLOCK_N"]) + chosen * triton.cdiv(
        weights.inner, sizes["BLOCK_N"]
    )
    _inner_kernel[(programs,)](
        x_H,
        norm_H,
        routed.numbers,
        routed.scale,
        gate.numbers,
        gate.scale,
        up.numbers,
        up.scale,
        inner_N,
        inner_N if ids_K is None else ids_K,
        eps,
        H=hidden,
        I=weights.inner,
        S=weights.shared_inner,
        CHOSEN=chosen,
        PACKED_ROW=some.packed.shape[-1],
        SCALE_ROW=some.scale.shape[-1],
        **some.constants,
        **sizes,
    )


@triton.jit
def _down_kernel(
    inner_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    down_ptr: tl.tensor,
    down_scale_ptr: tl.tensor,
    shared_down_ptr: tl.tensor,
    shared_down_scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    CHOSEN: tl.constexpr,
    PACKED: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SHARED_KIND: tl.constexpr,
    SHARED_GROUP: tl.constexpr,
    SHARED_ROW_BLOCK: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    launch_dependents(EARLY)
    rows = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    grid_wait(EARLY)
    out = tl.load(residual_ptr + rows, mask=rows < H, other=0.0).to(tl.float32)
    if S > 0:
        out += row_dot(
            shared_down_ptr, shared_down_scale_ptr, inner_ptr + CHOSEN * I, inner_ptr, rows, H, S, BLOCK_S,
            SHARED_KIND, SHARED_GROUP, SHARED_ROW_BLOCK, False,
        )  # fmt: skip
    for slot in tl.static_range(CHOSEN):
        expert = tl.load(ids_ptr + slot).to(tl.int64)
        part = row_dot(
            down_ptr + expert * PACKED, down_scale_ptr + expert * SCALES, inner_ptr + slot * I, inner_ptr, rows, H, I,
            BLOCK_I, KIND, GROUP, ROW_BLOCK, False,
        )  # fmt: skip
        out += part * tl.load(weights_ptr + slot)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < H)


def quant_down(
    inner_N: torch.Tensor,
    weights: QuantExperts,
    residual_H: torch.Tensor,
    out_H: torch.Tensor,
    ids_K: torch.Tensor | None = None,
    weights_K: torch.Tensor | None = None,
    **blocks: Any,
) -> None:
    """Write residual + weighted sum of one row's experts + its shared experts, all summed in float32.

    Args:
        inner_N: as `quant_inner` wrote it.
        weights: of the experts; routed and shared ones may be of different formats.
        residual_H: what the sum is added to.
        out_H: may be the residual itself.
        ids_K: the experts chosen, int32; with routed experts only.
        weights_K: their weights, float32.
        blocks: block sizes instead of the usual ones, and options of the launch.
    """
    weights.check()
    some = weights.first(weights.down, weights.shared_down)
    routed, shared = weights.down or some, weights.shared_down or some
    usual = {
        "BLOCK_H": 4,
        "BLOCK_I": block_k(max(weights.inner, 1), routed.constants["GROUP"]),
        "BLOCK_S": block_k(max(weights.shared_inner, 1), shared.constants["GROUP"]),
        "num_warps": 4,
    }
    sizes = {**usual, **blocks}
    shared_constants = {f"SHARED_{name}": value for name, value in shared.constants.items()}
    _down_kernel[(triton.cdiv(out_H.shape[-1], sizes["BLOCK_H"]),)](
        inner_N,
        inner_N if ids_K is None else ids_K,
        inner_N if weights_K is None else weights_K,
        routed.numbers,
        routed.scale,
        shared.numbers,
        shared.scale,
        residual_H,
        out_H,
        H=out_H.shape[-1],
        I=weights.inner,
        S=weights.shared_inner,
        CHOSEN=0 if ids_K is None else ids_K.shape[-1],
        PACKED=routed.packed.shape[-2] * routed.packed.shape[-1],
        SCALES=routed.scale.shape[-2] * routed.scale.shape[-1],
        **routed.constants,
        **shared_constants,
        **sizes,
    )
