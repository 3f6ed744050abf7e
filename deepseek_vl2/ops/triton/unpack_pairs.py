"""Packed numbers to pairs of 16-bit floats, as tensor cores take them, two numbers an instruction.

A number cut out into the fraction of a float that is a power of two is that power plus the number, and the power is
taken off again: all of that is exact. The plain form is `weights.unpack`, rounded.

Two neighbours in a row lie in one register of the tensor cores, and both nibbles of a byte are neighbours: so no number
has to change threads, if each step of a product has a matrix's bytes, not its words.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

INT4, INT8 = tl.constexpr(1), tl.constexpr(2)
SPREAD = "prmt.b32 a, w, h, {};"  # two bytes of ``w`` to the places of two halves, zeros of ``h`` beside them
LOW, HIGH = 0x4140, 0x1404


def both(half: int) -> int:
    """Return 16 bits twice in a word."""
    return half << 16 | half


def select(source: str, mask: int, fill: int | str) -> str:
    """Return PTX of ``a = source & mask | fill``, of halves."""
    return f"lop3.b32 a, {source}, {both(mask)}, {both(fill) if isinstance(fill, int) else fill}, 234;"


def multiply_add(kind: str, source: str, factor: int, added: int | str) -> str:
    """Return PTX of ``a = source * factor + added``, of pairs of floats."""
    moves = f"mov.b32 x, {both(factor)};"
    if isinstance(added, int):
        moves, added = f"{moves} mov.b32 y, {both(added)};", "y"
    return f"{moves} fma.rn.{kind} a, {source}, x, {added};"


def program(lines: Sequence[str], result: str) -> tl.constexpr:
    """Return PTX of some lines, which make a pair ``a`` of the last operand, and of the result's move."""
    return tl.constexpr(f"{{ .reg .b32 w, h, a, b, x, y; {' '.join(lines)} mov.b32 {result}, a; }}")


def pair_of_nibbles(half: bool) -> tl.constexpr:
    """Return PTX that makes $0 and $1 of the nibbles of a byte, $2, which are stored plus 8; to float16 or bfloat16."""
    # 1024 or 128: a nibble then counts ones. What is taken off is 8 more.
    power, off, one, kind = (0x6400, 0xE408, 0x3C00, "f16x2") if half else (0x4300, 0xC308, 0x3F80, "bf16x2")
    lines = ["cvt.u32.u16 w, $2;", f"mul.lo.u32 a, w, {0x1001};", select("a", 0x000F, power)]
    return program([*lines, multiply_add(kind, "a", one, off)], "{$0, $1}")


def pair_of_int8(half: bool) -> tl.constexpr:
    """Return PTX that makes the pair $0 of two signed bytes, $1."""
    lines = ["cvt.u32.u16 w, $1;"]
    if half:  # 1024 and 128 more than the byte
        lines += [f"xor.b32 w, w, {0x8080};", f"mov.b32 h, {0x64646464};", SPREAD.format(LOW)]
        return program([*lines, multiply_add("f16x2", "a", 0x3C00, 0xE480)], "$0")
    # Seven bits more than 128, less 128 or, where the sign is set, 256.
    lines += ["mov.b32 h, 0;", SPREAD.format(LOW), "mov.b32 b, a;", select("b", 0x0080, 0x4300), "mov.b32 h, a;"]
    lines += [select("b", 0x007F, 0x4300), "mov.b32 b, a;"]
    return program([*lines, multiply_add("bf16x2", "h", 0xBF80, "b")], "$0")


def pair_of_fp8(half: bool) -> tl.constexpr:
    """Return PTX that makes the pair $0 of two bytes of e4m3, $1."""
    # Sign, exponent and fraction at their places are the number times 2^-8 or 2^-120, subnormal ones included.
    shift, mask, power, kind = (1, 0x3F80, 0x5C00, "f16x2") if half else (4, 0x07F0, 0x7B80, "bf16x2")
    lines = ["cvt.u32.u16 w, $1;", "mov.b32 h, 0;", SPREAD.format(HIGH), f"shr.u32 b, a, {shift};"]
    lines += [f"and.b32 b, b, {both(mask)};", select("a", 0x8000, "b")]
    return program([*lines, multiply_add(kind, "a", power, 0x8000)], "$0")


INT4_BF16, INT4_FP16 = pair_of_nibbles(False), pair_of_nibbles(True)
INT8_BF16, INT8_FP16 = pair_of_int8(False), pair_of_int8(True)
FP8_BF16, FP8_FP16 = pair_of_fp8(False), pair_of_fp8(True)


@triton.jit
def unpack_pairs(part: tl.tensor, KIND: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Return rows of a packed weight in float16 or bfloat16; scales are still to be applied.

    Args:
        part: bytes: of int4 uint8, [rows, columns / 2], otherwise int8, [rows, columns].
        KIND: of the numbers.
        DTYPE: of the result.
    """
    HALF: tl.constexpr = tl.float16 == DTYPE
    if KIND == INT4:
        low, high = tl.inline_asm_elementwise(
            INT4_FP16 if HALF else INT4_BF16, "=h,=h,h", [part.to(tl.int16)], dtype=(tl.int16, tl.int16),
            is_pure=True, pack=1,
        )  # fmt: skip
        bits = tl.interleave(low, high)
    elif KIND == INT8:
        bits = tl.inline_asm_elementwise(
            INT8_FP16 if HALF else INT8_BF16, "=r,h", [part], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        bits = tl.inline_asm_elementwise(
            FP8_FP16 if HALF else FP8_BF16, "=r,h", [part], dtype=tl.int16, is_pure=True, pack=2
        )
    return bits.to(DTYPE, bitcast=True)
