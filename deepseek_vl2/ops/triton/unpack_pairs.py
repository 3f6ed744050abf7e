"""Packed numbers to pairs of 16-bit floats, as tensor cores take them, two numbers an instruction.

A number cut out into the fraction of a float that is a power of two is that power plus the number, and the power is
taken off again: all of that is exact. The plain form is `weights.unpack`, rounded.

Two neighbours in a row lie in one register of the tensor cores, and both nibbles of a byte are neighbours: so no number
has to change threads, if each step of a product has a matrix's bytes, not its words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl

INT4, INT8 = tl.constexpr(1), tl.constexpr(2)


def both(half: int) -> int:
    """Return 16 bits twice in a word."""
    return half << 16 | half


def select(result: str, source: str, mask: int, fill: int | str) -> str:
    """Return PTX of ``result = source & mask | fill``, of halves."""
    return f"lop3.b32 {result}, {source}, {both(mask)}, {both(fill) if isinstance(fill, int) else fill}, 234;"


def multiply_add(kind: str, result: str, source: str, factor: int, added: int | str) -> str:
    """Return PTX of ``result = source * factor + added``, of pairs of floats."""
    moves = f"mov.b32 x, {both(factor)};"
    if isinstance(added, int):
        moves, added = f"{moves} mov.b32 y, {both(added)};", "y"
    return f"{moves} fma.rn.{kind} {result}, {source}, x, {added};"


def program(lines: Sequence[str]) -> tl.constexpr:
    """Return PTX of some lines."""
    return tl.constexpr(f"{{ .reg .b32 w, h, a, b, x, y; {' '.join(lines)} }}")


def pairs_of_nibbles(half: bool, count: int) -> tl.constexpr:
    """Return PTX that makes pairs of the nibbles of one or four bytes, which are stored plus 8."""
    # 1024 or 128: a nibble then counts ones. What is taken off is 8 more.
    power, off, one, kind = (0x6400, 0xE408, 0x3C00, "f16x2") if half else (0x4300, 0xC308, 0x3F80, "bf16x2")
    end = [select("a", "a", 0x000F, power), multiply_add(kind, "a", "a", one, off)]
    if count == 1:
        return program(["cvt.u32.u16 w, $2;", f"mul.lo.u32 a, w, {0x1001};", *end, "mov.b32 {$0, $1}, a;"])
    lines = ["mov.b32 w, $4;", "shr.u32 h, w, 4;"]
    for place in range(4):  # the byte, and in the upper half the same one moved by a nibble; the rest is masked out
        lines += [f"prmt.b32 a, w, h, {place | (place + 4) << 8};", *end, f"mov.b32 ${place}, a;"]
    return program(lines)


def pairs_of_bytes(count: int, made: Callable[[int], list[str]]) -> tl.constexpr:
    """Return PTX that makes one pair or two of the bytes of ``w``, by lines that make ``a`` of the pair of a number."""
    lines = ["cvt.u32.u16 w, $1;" if count == 1 else "mov.b32 w, $2;"]
    for pair in range(count):
        lines += [*made(pair), f"mov.b32 ${pair}, a;"]
    return program(lines)


def pairs_of_int8(half: bool, count: int) -> tl.constexpr:
    """Return PTX that makes one pair or two of signed bytes."""

    def made(pair: int) -> list[str]:
        if half:  # 1024 and 128 more than the byte
            flipped = [f"xor.b32 b, w, {0x80808080};", f"mov.b32 h, {0x64646464};"]
            return [
                *flipped,
                f"prmt.b32 a, b, h, {(0x4140, 0x4342)[pair]};",
                multiply_add("f16x2", "a", "a", 0x3C00, 0xE480),
            ]
        # Seven bits more than 128, less 128 or, where the sign is set, 256. The upper bytes of halves are masked out.
        parts = [select("b", "a", 0x007F, 0x4300), select("a", "a", 0x0080, 0x4300)]
        return [f"prmt.b32 a, w, w, {(0x0100, 0x0302)[pair]};", *parts, multiply_add("bf16x2", "a", "a", 0xBF80, "b")]

    return pairs_of_bytes(count, made)


def pairs_of_fp8(half: bool, count: int) -> tl.constexpr:
    """Return PTX that makes one pair or two of bytes of e4m3."""
    # Sign, exponent and fraction at their places are the number times 2^-8 or 2^-120, subnormal ones included.
    shift, mask, power, kind = (1, 0x3F80, 0x5C00, "f16x2") if half else (4, 0x07F0, 0x7B80, "bf16x2")

    def made(pair: int) -> list[str]:
        start = [
            f"prmt.b32 a, w, w, {(0x1000, 0x3020)[pair]};",
            f"shr.u32 b, a, {shift};",
            f"and.b32 b, b, {both(mask)};",
        ]
        return [*start, select("a", "a", 0x8000, "b"), multiply_add(kind, "a", "a", power, 0x8000)]

    return pairs_of_bytes(count, made)


INT4_BF16, INT4_FP16 = pairs_of_nibbles(False, 1), pairs_of_nibbles(True, 1)
INT8_BF16, INT8_FP16 = pairs_of_int8(False, 1), pairs_of_int8(True, 1)
FP8_BF16, FP8_FP16 = pairs_of_fp8(False, 1), pairs_of_fp8(True, 1)
INT4_WORD_BF16, INT4_WORD_FP16 = pairs_of_nibbles(False, 4), pairs_of_nibbles(True, 4)
INT8_WORD_BF16, INT8_WORD_FP16 = pairs_of_int8(False, 2), pairs_of_int8(True, 2)
FP8_WORD_BF16, FP8_WORD_FP16 = pairs_of_fp8(False, 2), pairs_of_fp8(True, 2)


@triton.jit
def unpack_pairs(part: tl.tensor, KIND: tl.constexpr, DTYPE: tl.constexpr, BY_WORD: tl.constexpr) -> tl.tensor:
    """Return rows of a packed weight in float16 or bfloat16; scales are still to be applied.

    Args:
        part: bytes: of int4 uint8, [rows, columns / 2], otherwise int8, [rows, columns].
        KIND: of the numbers.
        DTYPE: of the result.
        BY_WORD: unpack four bytes at a time, for products whose threads hold neighbouring ones: a warp's (``mma``).
            Threads of a warp group's (``wgmma``) hold bytes far apart.
    """
    HALF: tl.constexpr = tl.float16 == DTYPE
    if KIND == INT4 and BY_WORD:
        pairs = tl.inline_asm_elementwise(
            INT4_WORD_FP16 if HALF else INT4_WORD_BF16, "=r,=r,=r,=r,r", [part], dtype=tl.int32, is_pure=True, pack=4
        )
        bits = tl.interleave(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    elif KIND == INT4:
        low, high = tl.inline_asm_elementwise(
            INT4_FP16 if HALF else INT4_BF16, "=h,=h,h", [part.to(tl.int16)], dtype=(tl.int16, tl.int16),
            is_pure=True, pack=1,
        )  # fmt: skip
        bits = tl.interleave(low, high)
    elif BY_WORD:
        int8: tl.constexpr = INT8_WORD_FP16 if HALF else INT8_WORD_BF16
        fp8: tl.constexpr = FP8_WORD_FP16 if HALF else FP8_WORD_BF16
        asm: tl.constexpr = int8 if KIND == INT8 else fp8
        bits = tl.inline_asm_elementwise(asm, "=r,=r,r", [part], dtype=tl.int16, is_pure=True, pack=4)
    else:
        int8_pair: tl.constexpr = INT8_FP16 if HALF else INT8_BF16
        fp8_pair: tl.constexpr = FP8_FP16 if HALF else FP8_BF16
        asm_pair: tl.constexpr = int8_pair if KIND == INT8 else fp8_pair
        bits = tl.inline_asm_elementwise(asm_pair, "=r,h", [part], dtype=tl.int16, is_pure=True, pack=2)
    return bits.to(DTYPE, bitcast=True)
