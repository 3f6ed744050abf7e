"""How many values a JSON text holds, told before any of them is made.

A megabyte of ``[0,0,...]`` is half a million values, which take seconds and gigabytes to read, check and complain
about, and hold up the whole process while they do. Counting them takes a millisecond.
"""

from __future__ import annotations

import numpy as np

MAX_VALUES = 32_768
MAX_QUOTES = 300_000
BLOCK = 1 << 20  # counted at a time, between which other threads run
SEPARATORS = b",[{"
LEAST_FOR_NUMPY = 4096  # bytes; it counts several times as fast, once it has begun


def count_separators(body: bytes, start: int, end: int) -> int:
    """Return how many separators of values a part of a JSON text holds, those in strings included."""
    if end - start < LEAST_FOR_NUMPY:
        return sum(body.count(mark, start, end) for mark in SEPARATORS)
    part = np.frombuffer(body, np.uint8, end - start, start)
    return sum(int(np.count_nonzero(part == mark)) for mark in SEPARATORS)


def count_values(body: bytes, enough: int) -> int:
    """Return about how many values a JSON text holds; counting may end beyond ``enough``.

    What stands in strings does not count: they may be long, and full of commas.
    """

    def separators(start: int, end: int) -> int:
        found = 0
        while start < end and found <= enough:
            block = min(start + BLOCK, end)
            found += count_separators(body, start, block)
            start = block
        return found

    whole = separators(0, len(body))
    if whole <= enough:
        return whole
    if body.count(b'"') > MAX_QUOTES:
        return enough + 1
    found = position = 0
    while found <= enough:
        opening = body.find(b'"', position)
        if opening < 0:
            return found + separators(position, len(body))
        found += separators(position, opening)
        position = end_of_string(body, opening)
    return found


def end_of_string(body: bytes, opening: int) -> int:
    """Return the position behind the string that begins with the quote at ``opening``."""
    start = opening + 1
    while (quote := body.find(b'"', start)) >= 0:
        before = body[start:quote]
        escapes = len(before) - len(before.rstrip(b"\\"))
        if escapes % 2 == 0:
            return quote + 1
        start = quote + 1
    return len(body)
