"""What the kernels over packed weights share: how weights are described, loaded and turned into float32.

Weights are packed as `deepseek_vl2.models.quantization` says. Every thread reads whole words: sixteen bytes of int4 are
a group of 32 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # releases of Triton that know no dependent launch, or have no part for NVIDIA
    gdc_launch_dependents = gdc_wait = None

# Under TRITON_INTERPRET=1 kernels run on a CPU, in NumPy, which knows no bfloat16: products are of float32 there.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
INT4, INT8, FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KINDS = {torch.int32: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
BLOCK = 128


@dataclass(frozen=True)
class QuantWeight:
    """A packed matrix, or one for each expert, as kernels take it.

    Fields:
        packed: int32 [..., O, I / 8], int8 or float8_e4m3fn [..., O, I].
        scale: [..., O, I / group_size], [..., O, 1], or [..., ceil(O / 128), ceil(I / 128)].
        group_size: columns that share a scale; 0: a whole row does.
        block: scales are of 128 x 128 weights.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    group_size: int = 0
    block: bool = False

    @property
    def columns(self) -> int:
        """Weights of a row."""
        return self.packed.shape[-1] * (8 if self.packed.dtype == torch.int32 else 1)

    @property
    def rows(self) -> int:
        """Rows of a matrix."""
        return self.packed.shape[-2]

    @property
    def numbers(self) -> torch.Tensor:
        """The packed tensor, with fp8 as bytes: kernels take it apart by integer operations, on any device."""
        return self.packed.view(torch.uint8) if self.packed.dtype == torch.float8_e4m3fn else self.packed

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for."""
        group = BLOCK if self.block else self.group_size
        kind = KINDS[self.packed.dtype]
        return {"KIND": kind, "GROUP": group, "ROW_BLOCK": BLOCK if self.block else 1}

    def check(self) -> None:
        """Raise ``ValueError`` for what the kernels do not read."""
        if self.packed.dtype not in KINDS:
            raise ValueError(f"Packed weights are int32, int8 or float8_e4m3fn, not {self.packed.dtype}.")
        if not self.packed.is_contiguous() or not self.scale.is_contiguous():
            raise ValueError("The kernels need contiguous packed weights and scales.")
        group = self.group_size
        if group and (group & (group - 1) or group < 8 or self.columns % group):
            raise ValueError(f"The kernels know groups of powers of two that divide the columns, not {group}.")


def check_same(weights: Sequence[QuantWeight]) -> None:
    """Raise ``ValueError`` for matrices that one launch cannot read together."""
    for weight in weights:
        weight.check()
    first = weights[0]
    if any(w.constants != first.constants or w.columns != first.columns for w in weights):
        raise ValueError("Matrices of one launch must have one format and one width.")


@triton.jit
def launch_dependents(EARLY: tl.constexpr) -> None:
    """Let the next kernel start, as far as there is room, once all programs of this one have come here."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def grid_wait(EARLY: tl.constexpr) -> None:
    """Wait until the kernel before, and so all before it, have ended; before this only weights may be read."""
    if EARLY:
        gdc_wait()


@triton.jit
def fp8_to_float(numbers: tl.tensor) -> tl.tensor:
    """Return e4m3 numbers, given as bytes, in float32."""
    wide = numbers.to(tl.int32)
    # Exponent and fraction at float32's places are the number times 2^-120, subnormal ones included.
    size = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((wide & 0x80) != 0, -size, size)


@triton.jit
def nibbles(words: tl.tensor, place: tl.constexpr) -> tl.tensor:
    """Return the numbers at one of the eight places of int4 words, in float32."""
    return (((words >> (4 * place)) & 15) - 8).to(tl.float32)


@triton.jit
def scales_of(
    scale_ptr: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the scales of a tile's groups, [rows, BLOCK_K / GROUP] in float32: each is loaded once."""
    count: tl.constexpr = (K + GROUP - 1) // GROUP
    group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
    places = (rows // ROW_BLOCK).to(tl.int64)[:, None] * count + group[None, :]
    held = (rows < size)[:, None] & (group < count)[None, :]
    return tl.load(scale_ptr + places, mask=held, other=0.0).to(tl.float32)


@triton.jit
def row_dot(
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
) -> tl.tensor:
    """Return rows of a packed matrix times one row (times a norm's weight), [rows] in float32, scaled."""
    BLOCK_N: tl.constexpr = rows.shape[0]
    out = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        if KIND == 0:
            word = start // 8 + tl.arange(0, BLOCK_K // 8)
            held = (rows < size)[:, None] & (word < K // 8)[None, :]
            places = rows.to(tl.int64)[:, None] * (K // 8) + word[None, :]
            words = tl.load(packed_ptr + places, mask=held, other=0, eviction_policy="evict_first")
            part = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
            for place in tl.static_range(8):
                column = word * 8 + place
                x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
                if NORMED:
                    x *= tl.load(norm_ptr + column, mask=column < K, other=0.0).to(tl.float32)
                part += nibbles(words, place) * x[None, :]
        else:
            column = start + tl.arange(0, BLOCK_K)
            held = (rows < size)[:, None] & (column < K)[None, :]
            places = rows.to(tl.int64)[:, None] * K + column[None, :]
            numbers = tl.load(packed_ptr + places, mask=held, other=0, eviction_policy="evict_first")
            x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
            if NORMED:
                x *= tl.load(norm_ptr + column, mask=column < K, other=0.0).to(tl.float32)
            if KIND == 1:
                part = numbers.to(tl.float32) * x[None, :]
            else:
                part = fp8_to_float(numbers) * x[None, :]
        if GROUP > 0:
            scale = scales_of(scale_ptr, rows, size, start, K, BLOCK_K, GROUP, ROW_BLOCK)
            grouped = tl.reshape(part, (BLOCK_N, BLOCK_K // GROUP, part.shape[1] // (BLOCK_K // GROUP)))
            out += tl.sum(tl.sum(grouped, axis=2) * scale, axis=1)
        else:
            out += tl.sum(part, axis=1)
    if GROUP == 0:
        out *= tl.load(scale_ptr + rows, mask=rows < size, other=0.0).to(tl.float32)
    return out


@triton.jit
def inverse_rms(x_ptr: tl.tensor, eps: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """Return one over the root mean square of a row."""
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, axis=0) / K + eps)


def block_k(columns: int, group: int, most: int = 1024) -> int:
    """Return how many columns a step takes: a power of two, whole groups."""
    return max(min(triton.next_power_of_2(columns), most), group, 16)
