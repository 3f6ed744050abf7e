"""How kernels read weights: plain matrices, or packed ones whose numbers are unpacked in registers.

A kernel is compiled for the format of its weights (`format_of`), and is otherwise the same for all. Packed matrices are
as `deepseek_vl2.models.quantization` says: rows are output channels, int4 has eight columns in a word.

An activation is never rounded for a packed weight: numbers of fp8 become 16 or 32 bits wide, as those of int4 and int8
do, rather than the activations eight. The tensor cores' own products of fp8 would need the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import INTERPRETED
from .unpack_pairs import unpack_pairs

PLAIN, INT4, INT8, FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
KINDS = {torch.int32: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
BLOCK = 128  # rows and columns of a block of fp8
SMALLEST_GROUP = 16
FRAGMENT = 64  # columns of `fragment_order`
PER_WORD = 8


@dataclass(frozen=True)
class QuantWeight:
    """A packed matrix, or one for each expert.

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
    def shape(self) -> torch.Size:
        """The unpacked shape."""
        *rows, columns = self.packed.shape
        return torch.Size((*rows, columns * (PER_WORD if self.packed.dtype == torch.int32 else 1)))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return int(self.packed.nbytes + self.scale.nbytes)

    def check(self) -> None:
        """Raise ``ValueError`` for what the kernels do not read."""
        if self.packed.dtype not in KINDS:
            raise ValueError(f"Packed weights are int32, int8 or float8_e4m3fn, not {self.packed.dtype}.")
        if not self.packed.is_contiguous() or not self.scale.is_contiguous():
            raise ValueError("The kernels need contiguous packed weights and scales.")
        group = self.group_size
        if group and (group & (group - 1) or group < SMALLEST_GROUP or self.shape[-1] % group):
            raise ValueError(f"The kernels know groups of powers of two that divide the columns, not {group}.")


Weight = torch.Tensor | QuantWeight


def numbers_of(weight: Weight) -> torch.Tensor:
    """Return a weight's numbers as kernels take them: fp8 as bytes, which are taken apart by integer operations."""
    if isinstance(weight, torch.Tensor):
        return weight
    return weight.packed.view(torch.int8) if weight.packed.dtype == torch.float8_e4m3fn else weight.packed


def scale_of(weight: Weight) -> torch.Tensor:
    """Return a weight's scales; of a plain one itself, which no kernel reads as such."""
    return weight if isinstance(weight, torch.Tensor) else weight.scale


def format_of(weight: Weight) -> dict[str, int]:
    """Return what a kernel is compiled for: the kind of numbers, columns and rows that share a scale."""
    if isinstance(weight, torch.Tensor):
        return {"KIND": 0, "GROUP": 0, "ROW_BLOCK": 1}
    group = BLOCK if weight.block else weight.group_size
    return {"KIND": KINDS[weight.packed.dtype], "GROUP": group, "ROW_BLOCK": BLOCK if weight.block else 1}


def of_one_format(weights: Sequence[Weight]) -> bool:
    """Whether one launch can read all of them."""
    return all(format_of(weight) == format_of(weights[0]) for weight in weights)


def check_weights(weights: Sequence[Weight]) -> None:
    """Raise ``ValueError`` for weights that the kernels do not read: rows must have no gaps."""
    for weight in weights:
        if isinstance(weight, QuantWeight):
            weight.check()
        elif weight.stride(-1) != 1:
            raise ValueError(f"The kernels read rows without gaps; got shape {list(weight.shape)}, {weight.stride()}.")


def tile_columns(columns: int, most: int = 128) -> int:
    """Return how many columns of a packed matrix a step of a GEMM takes: a power of two.

    Of several groups where there are as many: their scales are then read ahead with the numbers, and a step that is no
    wider than a group would wait for its scale.
    """
    return min(max(triton.next_power_of_2(columns), 16), most)


def fragment_order(columns: int) -> list[int]:
    """Return the order of columns, multiples of 64, in which a warp group's threads have neighbours of a row.

    Of every 16 columns of a product a thread of the tensor cores multiplies two pairs, eight columns apart. Any order
    will do that both factors have; in this one the pairs of 64 columns lie side by side, and are read as words.
    """
    order = [block + 16 * pair + 2 * step + k for block in range(0, columns, FRAGMENT) for step in range(8)
             for pair in range(4) for k in range(2)]  # fmt: skip
    return order


# ---------------------------------------------------------------- inside of kernels


@triton.jit
def fp8_to_float(numbers: tl.tensor) -> tl.tensor:
    """Return e4m3 numbers, given as int8, in float32; there is no number for e4m3's NaN."""
    # Sign, exponent and fraction at float32's places are the number times 2^-120, subnormal ones included.
    bits = (numbers.to(tl.int32) << 20) & -2014314496
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def unpack_words(words: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """Return the numbers of int4 words times a factor for each word, [rows, 8 * words] in float32."""
    shift = factor * 24.0
    factor = factor * 16.0
    planes = ()
    for place in tl.static_range(8):
        # As the highest bits of a float's fraction, a stored nibble n is 1 + n / 16: no slow conversion is needed.
        if place < 5:
            bits = words << (19 - 4 * place)
        else:
            bits = words >> (4 * place - 19)
        number = ((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)
        planes += (number * factor - shift,)  # type: ignore[assignment]
    # A thread's own numbers change places, and none leaves it.
    a, b, c, d, e, f, g, h = planes  # type: ignore[misc]
    even = tl.interleave(tl.interleave(a, e), tl.interleave(c, g))
    odd = tl.interleave(tl.interleave(b, f), tl.interleave(d, h))
    return tl.interleave(even, odd)


@triton.jit
def unpack(part: tl.tensor, scale: tl.tensor, KIND: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """Return rows of a packed weight in float32, in the order of columns; scales of whole rows are still to be applied.

    Args:
        part: the packed numbers.
        scale: what `load_scale` read for them; not looked at where groups of columns have none.
        KIND: of the numbers.
        GROUP: columns that share a scale.
    """
    if KIND == INT4:
        if GROUP > 0:
            numbers = unpack_words(part, scale.to(tl.float32))
        else:
            numbers = unpack_words(part, tl.full(part.shape, 1.0, tl.float32))
    else:
        if KIND == INT8:
            numbers = part.to(tl.float32)
        else:
            numbers = fp8_to_float(part)
        if GROUP > 0:
            numbers = numbers * scale.to(tl.float32)
    return numbers


@triton.jit
def load_scale(
    scale_ptr: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the scale of each STEP columns, [rows, BLOCK_K / STEP], of a row that has ``count`` of them.

    Those of int4's words, of 8 columns, have the words' own layout: no number has to change threads for them.
    """
    # What the quotient is a multiple of the compiler does not see, and would read scale by scale.
    first = tl.multiple_of(start // GROUP, BLOCK_K // GROUP if BLOCK_K > GROUP else 1)
    if STEP == GROUP:
        group = first + tl.arange(0, BLOCK_K // STEP)
    else:
        group = first + tl.arange(0, BLOCK_K // STEP) * STEP // GROUP
    places = (rows // ROW_BLOCK).to(tl.int64)[:, None] * count + group[None, :]
    return tl.load(scale_ptr + places, mask=(rows < size)[:, None] & (group < count)[None, :], other=0.0)


@triton.jit
def load_column_scale(
    scale_ptr: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the scale of each column, [rows, BLOCK_K], or of all of them, [rows, 1]; each is read once."""
    STEP: tl.constexpr = GROUP if GROUP < BLOCK_K else BLOCK_K
    scale = load_scale(scale_ptr, rows, size, start, count, BLOCK_K, STEP, GROUP, ROW_BLOCK)
    if STEP < BLOCK_K:
        spread = tl.broadcast_to(scale[:, :, None], rows.shape[0], BLOCK_K // STEP, STEP)
        scale = tl.reshape(spread, rows.shape[0], BLOCK_K)
    return scale


@triton.jit
def row_scale(
    scale_ptr: tl.tensor, rows: tl.tensor, size: tl.tensor, KIND: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    """Return what is still to be applied to products with some rows: their scales, or 1."""
    if KIND != PLAIN and GROUP == 0:
        scale = tl.load(scale_ptr + rows, mask=rows < size, other=0.0).to(tl.float32)
    else:
        scale = 1.0
    return scale


@triton.jit
def to_fragments(tile: tl.tensor, EACH: tl.constexpr) -> tl.tensor:
    """Return a tile with its columns in `fragment_order`, of which each thread has EACH elements."""
    BLOCKS: tl.constexpr = tile.shape[1] // (4 * EACH)
    parts = tl.reshape(tile, tile.shape[0], BLOCKS, 4, 8, EACH // 8)
    return tl.reshape(tl.permute(parts, 0, 1, 3, 2, 4), tile.shape[0], tile.shape[1])


@triton.jit
def load_tile(
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    start: tl.tensor,
    width: tl.tensor,
    count: tl.tensor,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    BY_WORD: tl.constexpr = False,
    FRAGMENTS: tl.constexpr = False,
) -> tl.tensor:
    """Return a tile of a packed weight, [rows, BLOCK_K]; scales of whole rows are still to be applied.

    A packed row has ``width`` numbers and ``count`` scales. BY_WORD: see `unpack_pairs`. FRAGMENTS: return the columns
    in `fragment_order`.
    """
    HALF: tl.constexpr = tl.float16 == DTYPE or tl.bfloat16 == DTYPE
    if HALF and not INTERPRETED:
        PER_BYTE: tl.constexpr = 2 if KIND == INT4 else 1
        bytes_ptr = packed_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) if KIND == INT4 else packed_ptr
        row_bytes = width * 4 if KIND == INT4 else width
        columns = tl.multiple_of(start // PER_BYTE, BLOCK_K // PER_BYTE) + tl.arange(0, BLOCK_K // PER_BYTE)
        held = (rows < size)[:, None] & (columns < row_bytes)[None, :]
        part = tl.load(bytes_ptr + rows.to(tl.int64)[:, None] * row_bytes + columns[None, :], mask=held, other=0)
        if FRAGMENTS:
            part = to_fragments(part, 16 // PER_BYTE)
        tile = unpack_pairs(part, KIND, DTYPE, BY_WORD)
        if GROUP > 0:
            scale = load_column_scale(scale_ptr, rows, size, start, count, BLOCK_K, GROUP, ROW_BLOCK)
            if FRAGMENTS:
                scale = to_fragments(tl.broadcast_to(scale, tile.shape), 16)
            tile = (tile * scale).to(DTYPE)
    else:
        PER: tl.constexpr = 8 if KIND == INT4 else 1
        # The compiler does not see what the quotient is a multiple of, and would read word by word.
        columns = tl.multiple_of(start // PER, BLOCK_K // PER) + tl.arange(0, BLOCK_K // PER)
        held = (rows < size)[:, None] & (columns < width)[None, :]
        part = tl.load(packed_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=held, other=0)
        scale = part
        if GROUP > 0 and KIND == INT4:
            scale = load_scale(scale_ptr, rows, size, start, count, BLOCK_K, PER, GROUP, ROW_BLOCK)
        elif GROUP > 0:
            scale = load_column_scale(scale_ptr, rows, size, start, count, BLOCK_K, GROUP, ROW_BLOCK)
        tile = unpack(part, scale, KIND, GROUP).to(DTYPE)
        if FRAGMENTS:
            tile = to_fragments(tile, 16)
    return tile
