"""Grouped GEMM over packed weights: routed tokens times the weights of their experts, unpacked in registers.

As `grouped_gemm`, whose order of programs it has, but that weights stand on the left: from registers the tensor cores
take that side, and tiles of rows on the other. Runs on every compute capability that Triton knows.

Shape suffixes: P routed tokens, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import check_rows, dot, power_of_two, rounded
from .grouped_gemm import find_tile
from .weights import FRAGMENT, INT4, QuantWeight, format_of, load_tile, numbers_of, row_scale, scale_of, tile_columns


@triton.jit
def _multiply_tile(
    rows_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    gate_scale_ptr: tl.tensor,
    up_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    OUT_FRAGMENTS: tl.constexpr,
) -> None:
    """Write the outputs ``n`` of up to BLOCK_P routed tokens of one expert, from ``first`` and before ``end``."""
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SCALES: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    dtype = out_ptr.dtype.element_ty
    p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
    gate = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(rows_ptr + p[None, :] * K + k[:, None], mask=(p < end)[None, :] & (k < K)[:, None], other=0.0)
        weight = load_tile(
            gate_ptr, gate_scale_ptr, n, N, start, K // PER, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype,
            FRAGMENTS, FRAGMENTS,
        )  # fmt: skip
        gate = dot(weight, x, gate)
        if GATED:
            weight = load_tile(
                up_ptr, up_scale_ptr, n, N, start, K // PER, SCALES, BLOCK_K, KIND, GROUP, ROW_BLOCK, dtype,
                FRAGMENTS, FRAGMENTS,
            )  # fmt: skip
            up = dot(weight, x, up)
    if GROUP == 0:
        gate *= row_scale(gate_scale_ptr, n, N, KIND, GROUP)[:, None]
    out = gate
    if GATED:
        if GROUP == 0:
            up *= row_scale(up_scale_ptr, n, N, KIND, GROUP)[:, None]
        gate = rounded(gate, dtype)
        out = rounded(gate / (1.0 + tl.exp(-gate)), dtype) * rounded(up, dtype)
    if OUT_FRAGMENTS:
        parts = tl.reshape(out, BLOCK_N // 64, 4, 8, 2, BLOCK_P)
        out = tl.reshape(tl.permute(parts, 0, 2, 1, 3, 4), BLOCK_N, BLOCK_P)
    held = (n < N)[:, None] & (p < end)[None, :]
    tl.store(out_ptr + p[None, :] * N + n[:, None], out.to(dtype), mask=held)


@triton.jit
def _grouped_kernel(
    rows_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    OUT_FRAGMENTS: tl.constexpr,
) -> None:
    PER: tl.constexpr = 8 if KIND == INT4 else 1
    SCALES: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    MATRIX: tl.constexpr = 2 * N if GATED else N  # rows of an expert's matrix; gates first, and then ups
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert, column, first, end = find_tile(ends_ptr, tl.program_id(0), E, E_PAD, columns, BLOCK_P)
    place = expert.to(tl.int64)
    gate_ptr = packed_ptr + place * (MATRIX * (K // PER))
    up_ptr = gate_ptr + N * (K // PER)
    gate_scale_ptr = scale_ptr + place * ((MATRIX + ROW_BLOCK - 1) // ROW_BLOCK * SCALES)
    up_scale_ptr = gate_scale_ptr + N // ROW_BLOCK * SCALES
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    # An expert's last rows, half a tile or less of them, are not multiplied as if there were more.
    half: tl.constexpr = BLOCK_P // 2 if BLOCK_P > 64 else 0
    if half < end - first:
        _multiply_tile(
            rows_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, out_ptr, n, first, end, N, K, BLOCK_P, BLOCK_N,
            BLOCK_K, STAGES, GATED, KIND, GROUP, ROW_BLOCK, FRAGMENTS, OUT_FRAGMENTS,
        )  # fmt: skip
    elif half > 0 and first < end:
        _multiply_tile(
            rows_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, out_ptr, n, first, end, N, K, half, BLOCK_N,
            BLOCK_K, STAGES, GATED, KIND, GROUP, ROW_BLOCK, FRAGMENTS, OUT_FRAGMENTS,
        )  # fmt: skip


def grouped_blocks(routed_tokens: int, experts: int, width: int, gated: bool) -> dict[str, Any]:
    """Return the block sizes: an expert has some 130 rows of a usual prompt.

    Each warp has 16 rows of weights of its own: of two that shared them, nibbles would change places. Gates and ups
    have two sums a program, and half as many rows of each.
    """
    block_p = 64 if routed_tokens <= (192 if gated else 64) * experts else 128
    sizes = {"BLOCK_P": block_p, "BLOCK_K": tile_columns(width, 64)}
    if gated:
        return {**sizes, "BLOCK_N": 64, "STAGES": 4, "num_warps": 4}
    return {**sizes, "BLOCK_N": 128, "STAGES": 3, "num_warps": 8}


def _grouped(
    rows_PK: torch.Tensor, weight: QuantWeight, ends_E: torch.Tensor, outputs: int, gated: bool, blocks: dict[str, Any]
) -> torch.Tensor:
    check_rows(rows_PK)
    weight.check()
    (experts, _, width), routed_tokens, fmt = weight.shape, len(rows_PK), format_of(weight)
    if gated and outputs % fmt["ROW_BLOCK"]:
        raise ValueError(f"Blocks of 128 rows do not divide the {outputs} rows of an expert's gate.")
    out = rows_PK.new_empty(routed_tokens, outputs)
    sizes = {**grouped_blocks(routed_tokens, experts, width, gated), **blocks}
    sizes["BLOCK_N"] = min(sizes["BLOCK_N"], power_of_two(outputs, 16))
    fragments, out_fragments = width % FRAGMENT == 0, gated and outputs % FRAGMENT == 0
    if any(size % FRAGMENT for size in [sizes["BLOCK_K"]] * fragments + [sizes["BLOCK_N"]] * out_fragments):
        raise ValueError(f"Fragments are of {FRAGMENT} columns: blocks of {sizes} would cut them.")
    tiles = experts + routed_tokens // sizes["BLOCK_P"]
    _grouped_kernel[(tiles * triton.cdiv(outputs, sizes["BLOCK_N"]),)](
        rows_PK, numbers_of(weight), scale_of(weight), ends_E, out,
        N=outputs, K=width, E=experts, E_PAD=power_of_two(experts), GATED=gated,
        FRAGMENTS=fragments, OUT_FRAGMENTS=out_fragments, **fmt, **sizes,
    )  # fmt: skip
    return out


def grouped_gate_up(rows_PH: torch.Tensor, gate_up: QuantWeight, ends_E: torch.Tensor, **blocks: Any) -> torch.Tensor:
    """Return silu(gate) * up of each routed token by its expert, [P, I], rounded where the model's modules round.

    Args:
        rows_PH: the routed tokens sorted by expert, contiguous, in `fragment_order` where H is a multiple of 64; those
            behind the last expert's are not read.
        gate_up: the experts' weights, [E, 2I, H], I rows of gates and then I of ups.
        ends_E: the end of each expert's rows, int32.
        blocks: block sizes instead of those of `grouped_blocks`.

    The result is in `fragment_order` where I is a multiple of 64, as `grouped_down` takes it.
    """
    return _grouped(rows_PH, gate_up, ends_E, gate_up.shape[1] // 2, True, blocks)


def grouped_down(intermediate_PI: torch.Tensor, down: QuantWeight, ends_E: torch.Tensor, **blocks: Any) -> torch.Tensor:
    """Return each routed token's product with its expert's weights, [P, H]; see `grouped_gate_up`."""
    return _grouped(intermediate_PI, down, ends_E, down.shape[1], False, blocks)
