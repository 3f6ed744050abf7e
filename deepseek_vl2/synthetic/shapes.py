"""Outlines of the shapes: polygons around the origin, before they are turned and scaled."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from random import Random

Point = tuple[float, float]
Box = tuple[float, float, float, float]

ROUND = ("circle", "ring")
# How far each shape may be turned, in degrees either way; a square turned by 45 would be a diamond.
TURNS = {"square": 10, "triangle": 18, "star": 180, "diamond": 7, "cross": 14, "hexagon": 180, "heart": 15, "moon": 180}


def _arc(radius: float, start: float, end: float, centre: Point = (0.0, 0.0), steps: int = 24) -> list[Point]:
    angles = [start + (end - start) * step / steps for step in range(steps + 1)]
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]


def _regular(corners: int) -> list[Point]:
    return _arc(1.0, -math.pi / 2, 1.5 * math.pi, steps=corners)[:-1]


def _star() -> list[Point]:
    tips, notches = _regular(5), _regular(5)
    turned = [
        (x * math.cos(math.pi / 5) - y * math.sin(math.pi / 5), x * math.sin(math.pi / 5) + y * math.cos(math.pi / 5))
        for x, y in notches
    ]
    return [point for tip, (x, y) in zip(tips, turned, strict=True) for point in (tip, (0.42 * x, 0.42 * y))]


def _cross() -> list[Point]:
    a = 0.34
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


def _moon() -> list[Point]:
    # The inner arc ends where both circles meet.
    half = math.acos(0.35)
    outer = _arc(1.0, half, 2 * math.pi - half, steps=32)
    inner_radius = math.hypot(math.cos(half) - 0.55, math.sin(half))
    inner_half = math.atan2(math.sin(half), math.cos(half) - 0.55)
    inner = _arc(inner_radius, 2 * math.pi - inner_half, inner_half, (0.55, 0.0))
    return outer + inner


def _heart() -> list[Point]:
    points = []
    for step in range(48):
        t = 2 * math.pi * step / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16, -y / 16))
    return points


@cache
def outline(shape: str) -> tuple[Point, ...]:
    """Return the corners of a shape, y pointing down.

    Raises:
        ValueError: an unknown shape.
    """
    outlines: dict[str, Callable[[], list[Point]]] = {
        "circle": lambda: _arc(1.0, 0, 2 * math.pi, steps=48),
        "ring": lambda: _arc(1.0, 0, 2 * math.pi, steps=48),
        "square": lambda: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": lambda: [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
        "star": _star,
        "diamond": lambda: [(0, -1), (0.66, 0), (0, 1), (-0.66, 0)],
        "cross": _cross,
        "hexagon": lambda: _regular(6),
        "arrow": lambda: [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
        "moon": _moon,
        "heart": _heart,
    }
    if shape not in outlines:
        raise ValueError(f"Unknown shape {shape!r}: expected one of {', '.join(outlines)}.")
    return tuple(outlines[shape]())


def random_turn(shape: str, rng: Random) -> float:
    """Return an angle in radians by which a drawn shape is turned."""
    if shape == "arrow":
        return math.radians(90 * rng.randrange(4) + rng.uniform(-12, 12))
    most = TURNS.get(shape, 0)
    return math.radians(rng.uniform(-most, most))


def place(shape: str, turn: float, side: float) -> list[Point]:
    """Return the corners of a shape turned and scaled, with the longer side of its box ``side`` and corner (0, 0)."""
    cos, sin = math.cos(turn), math.sin(turn)
    points = [(x * cos - y * sin, x * sin + y * cos) for x, y in outline(shape)]
    left, top, right, bottom = bounds(points)
    scale = side / max(right - left, bottom - top)
    return [((x - left) * scale, (y - top) * scale) for x, y in points]


def bounds(points: list[Point]) -> Box:
    """Return the tight box (left, top, right, bottom) of points."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)
