"""What kernels over packed weights do with words: load them, and multiply the numbers in them with columns.

A thread has one word of a row at a time, of eight columns of int4 or four of eight bits, and those columns of the
activation, so that no number changes threads. A number in its place in a word, all other bits masked, is a float as it
stands, if a very small one: a weight costs a mask and a multiply-add.

Shape suffixes: W words that a program reads at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .common import INTERPRETED
from .weights import INT4, INT8

# Activations are scaled by the first, and so products with bits times 2^-149 by the second.
LARGE = tl.constexpr(2.0**100)
SMALL = tl.constexpr(2.0**-49)


def assembly(first: str, cuts: Sequence[str]) -> tl.constexpr:
    """Return PTX that adds products of numbers with planes to the last operand, $0 being the result and $1 the word.

    Args:
        first: what is done to the word ``w`` before.
        cuts: how each number is cut out into ``n``.
    """
    products = "".join(f"{cut} fma.rn.f32 t, n, ${2 + place}, t; " for place, cut in enumerate(cuts))
    return tl.constexpr(
        f"{{ .reg .b32 w, h, n; .reg .f32 t; mov.b32 w, $1; mov.f32 t, ${2 + len(cuts)}; {first} {products}"
        "mov.f32 $0, t; }"
    )


DOT_INT4 = assembly(
    "shr.u32 h, w, 8;",
    [*(f"and.b32 n, w, {15 << 4 * place};" for place in range(6)), *(f"and.b32 n, h, {15 << k};" for k in (16, 20))],
)
DOT_INT8 = assembly(
    f"xor.b32 w, w, {0x80808080}; shr.u32 h, w, 8;",
    [*(f"and.b32 n, w, {255 << 8 * place};" for place in range(3)), f"and.b32 n, h, {255 << 16};"],
)
DOT_FP8 = assembly("", [f"shl.b32 h, w, {24 - 8 * k}; shr.s32 h, h, 4; and.b32 n, h, {0x87F00000};" for k in range(4)])


@triton.jit
def halves(x: tl.tensor) -> Any:
    """Return the columns of even and of odd places of a block, [W, places]."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def split_row(x: tl.tensor, KIND: tl.constexpr) -> Any:
    """Return a row's columns by their places in a word, each scaled for `dot_words`, and what sums begin with, [W]."""
    PER: tl.constexpr = 8 if KIND == INT4 else 4
    even, odd = halves(tl.reshape(x, (x.shape[0] // PER, PER)))
    if KIND == INT4:
        a, c = halves(even)
        b, d = halves(odd)
        p0, p4 = tl.split(a)
        p2, p6 = tl.split(c)
        p1, p5 = tl.split(b)
        p3, p7 = tl.split(d)
        start = (p0 + p1 + p2 + p3 + p4 + p5 + p6 + p7) * (-8.0 * SMALL)
        planes = (
            p0 * LARGE, p1 * (LARGE / 2**4), p2 * (LARGE / 2**8), p3 * (LARGE / 2**12), p4 * (LARGE / 2**16),
            p5 * (LARGE / 2**20), p6 * (LARGE / 2**16), p7 * (LARGE / 2**20),
        )  # fmt: skip
    else:
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
        if KIND == INT8:
            start = (p0 + p1 + p2 + p3) * (-128.0 * SMALL)
            planes = (  # type: ignore[assignment]
                p0 * LARGE, p1 * (LARGE / 2**8), p2 * (LARGE / 2**16), p3 * (LARGE / 2**16),
            )  # fmt: skip
        else:
            start = p0 * 0.0
            # e4m3's bits at float32's places are the number times 2^-120.
            scaled: tl.constexpr = SMALL * 2.0**120
            planes = (p0 * scaled, p1 * scaled, p2 * scaled, p3 * scaled)  # type: ignore[assignment]
    return planes, start


@triton.jit
def dot_words(words: tl.tensor, planes: tl.tuple, start: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Return SMALL times the product of each word's numbers with their columns, [W]; scales are still to be applied.

    Bits below 2^24 are as a float the same number times 2^-149, exactly: a nibble or byte is cut out where it stands,
    and the columns are scaled for its place. What stored numbers have too much, 8 or 128, is in ``start``.

    On a device it is one piece of assembly: of a compiler's passes over that many operations some take seconds.
    """
    if INTERPRETED:
        total = start
        if KIND == INT4:
            high = words >> 8
            for place in tl.static_range(6):
                total += (words & (15 << (4 * place))).to(tl.float32, bitcast=True) * planes[place]
            total += (high & 0xF0000).to(tl.float32, bitcast=True) * planes[6]
            total += (high & 0xF00000).to(tl.float32, bitcast=True) * planes[7]
        elif KIND == INT8:
            words = words ^ -2139062144  # 128 more, and so not negative
            for place in tl.static_range(3):
                total += (words & (255 << (8 * place))).to(tl.float32, bitcast=True) * planes[place]
            total += ((words >> 8) & 0xFF0000).to(tl.float32, bitcast=True) * planes[3]
        else:
            for place in tl.static_range(4):
                bits = ((words << (24 - 8 * place)) >> 4) & -2014314496
                total += bits.to(tl.float32, bitcast=True) * planes[place]
        return total
    elif KIND == INT4:
        return tl.inline_asm_elementwise(
            DOT_INT4, "=f,r,f,f,f,f,f,f,f,f,f",
            [words, planes[0], planes[1], planes[2], planes[3], planes[4], planes[5], planes[6], planes[7], start],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            DOT_INT8 if KIND == INT8 else DOT_FP8, "=f,r,f,f,f,f,f",
            [words, planes[0], planes[1], planes[2], planes[3], start], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def load_words(
    words_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
) -> Any:
    """Return the words of ROWS rows of a weight [size, K], part by part, and their scales where columns have them."""
    PER: tl.constexpr = 8 if KIND == INT4 else 4
    WIDTH: tl.constexpr = K // PER
    COUNT: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    words = ()
    scales = ()
    for start in tl.static_range(0, WIDTH, WORDS):
        word = start + tl.arange(0, WORDS)
        for index in tl.static_range(ROWS):
            row = (first + index).to(tl.int64)
            held = (word < WIDTH) & (row < size)
            place = words_ptr + row * WIDTH + word
            words += (tl.load(place, mask=held, other=0, eviction_policy="evict_first"),)  # type: ignore[assignment]
            if GROUP > 0:
                place = scale_ptr + (row // ROW_BLOCK) * COUNT + word // (GROUP // PER)
                scales += (tl.load(place, mask=held, other=0.0),)  # type: ignore[assignment]
    return words, scales


@triton.jit
def add_words(
    totals: tl.tuple,
    words: tl.tuple,
    scales: tl.tuple,
    x: tl.tensor,
    part: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
) -> Any:
    """Return the sums of ROWS rows with the products of a part of their words added."""
    planes, start = split_row(x, KIND)
    added = ()
    for index in tl.static_range(ROWS):
        sums = dot_words(words[part * ROWS + index], planes, start, KIND)
        if GROUP > 0:
            sums *= scales[part * ROWS + index].to(tl.float32)
        added += (totals[index] + sums,)  # type: ignore[assignment]
    return added


@triton.jit
def zeros_of(ROWS: tl.constexpr, WORDS: tl.constexpr) -> Any:
    """Return ROWS blocks of zeros."""
    totals = ()
    for _ in tl.static_range(ROWS):
        totals += (tl.zeros([WORDS], tl.float32),)  # type: ignore[assignment]
    return totals


@triton.jit
def load_columns(row_ptr: tl.tensor, start: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """Return some numbers of a row in float32."""
    columns = start + tl.arange(0, COLUMNS)
    return tl.load(row_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
