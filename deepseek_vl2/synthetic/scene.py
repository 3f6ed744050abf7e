"""Scenes: which things and printed words a picture shows, and where. Coordinates are pixels of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, NamedTuple

from deepseek_vl2.models.tiling import select_best_resolution

from .fonts import font_files, load_font
from .shapes import Box, Point, bounds, place, random_turn
from .words import COLOURS, RGB, SHAPES, SIZES, jittered

# Tiles of the pictures' reader: a picture is drawn so that its words are legible in these.
TILE = 96
CANDIDATES: tuple[tuple[int, int], ...] = tuple(
    (across * TILE, down * TILE) for across, down in ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2))
)
PictureSize = Literal["any", "small", "strip"]

MARGIN = 0.02  # of the shorter side, kept free around everything
TRIES = 40
# Least distance in RGB between a thing and the background, so that it is seen.
VISIBLE = 105.0


class Kind(NamedTuple):
    """What a thing is."""

    shape: str
    colour: str
    size: str


class Thing(NamedTuple):
    """A shape in a picture."""

    kind: Kind
    points: list[Point]
    box: Box
    fill: RGB
    outlined: bool

    @property
    def centre(self) -> Point:
        """Middle of the box."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


class Label(NamedTuple):
    """Printed words in a picture, on a plate or bare."""

    text: str
    font: int
    em: int
    box: Box
    anchor: Point
    ink: RGB
    plate: str | None
    plate_fill: RGB | None
    fine: bool


class Background(NamedTuple):
    """What lies behind everything."""

    pattern: str
    first: RGB
    second: RGB
    period: float
    across: bool


@dataclass
class Scene:
    """A picture's content, before it is drawn."""

    width: int
    height: int
    background: Background
    things: list[Thing] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    is_page: bool = False  # its labels are the lines of one text, top to bottom

    @property
    def shorter(self) -> int:
        """The picture's shorter side."""
        return min(self.width, self.height)

    @property
    def tile_scale(self) -> float:
        """Pixels in the tiles for one pixel of the picture."""
        width, height = select_best_resolution((self.width, self.height), CANDIDATES)
        return min(width / self.width, height / self.height)

    def normalised(self, box: Box) -> list[int]:
        """Return a box in thousandths of the picture, 0 to 999, as the model writes it."""
        across, down = 999 / self.width, 999 / self.height
        return [round(box[0] * across), round(box[1] * down), round(box[2] * across), round(box[3] * down)]

    def is_free(self, box: Box, gap: float) -> bool:
        """Whether a box, with ``gap`` pixels around it, touches nothing placed so far."""
        taken = [thing.box for thing in self.things] + [label.box for label in self.labels]
        return all(
            box[2] + gap <= other[0] or other[2] + gap <= box[0] or box[3] + gap <= other[1] or other[3] + gap <= box[1]
            for other in taken
        )

    def free_corner(self, width: float, height: float, rng: Random) -> Point | None:
        """Return where a box of this size fits, or ``None`` when no place was found."""
        margin = MARGIN * self.shorter
        room_x, room_y = self.width - width - 2 * margin, self.height - height - 2 * margin
        if room_x < 0 or room_y < 0:
            return None
        for _ in range(TRIES):
            x, y = margin + rng.random() * room_x, margin + rng.random() * room_y
            if self.is_free((x, y, x + width, y + height), 0.025 * self.shorter):
                return x, y
        return None

    def visible_colours(self) -> list[str]:
        """Return the colours that stand out from the background."""
        behind = (self.background.first, self.background.second)
        return [name for name, rgb in COLOURS.items() if all(distance(rgb, other) > VISIBLE for other in behind)]

    def add_thing(self, kind: Kind, rng: Random) -> bool:
        """Place a thing; false when there was no room."""
        low, high = SIZES[kind.size]
        points = place(kind.shape, random_turn(kind.shape, rng), rng.uniform(low, high) * self.shorter)
        _, _, width, height = bounds(points)
        corner = self.free_corner(width, height, rng)
        if corner is None:
            return False
        x, y = corner
        moved = [(px + x, py + y) for px, py in points]
        outlined = rng.random() < 0.25
        self.things.append(
            Thing(kind, moved, (x, y, x + width, y + height), jittered(COLOURS[kind.colour], rng), outlined)
        )
        return True

    def add_label(self, text: str, em: float, plate: str | None, rng: Random, fine: bool = False) -> bool:
        """Place printed words of ``em`` pixels (in the tiles); false when there was no room."""
        size = max(5, round(em / self.tile_scale))
        files = font_files()
        font = rng.randrange(len(files))
        left, top, right, bottom = load_font(files[font], size).getbbox(text)
        pad = 0.0 if plate is None else size * rng.uniform(0.25, 0.5)
        corner = self.free_corner(right - left + 2 * pad, bottom - top + 2 * pad, rng)
        if corner is None:
            return False
        x, y = corner
        box = (x, y, x + right - left + 2 * pad, y + bottom - top + 2 * pad)
        fill = None if plate is None else jittered(COLOURS[plate], rng)
        ink = readable_ink(fill or self.background.first, rng)
        self.labels.append(Label(text, font, size, box, (x + pad - left, y + pad - top), ink, plate, fill, fine))
        return True

    def add_page(self, texts: Sequence[str], em: float, rng: Random) -> None:
        """Print lines of text, one below the other in one font, as far as they fit; ``em`` in pixels of the tiles."""
        self.is_page = True
        size = max(5, round(em / self.tile_scale))
        files = font_files()
        index = rng.randrange(len(files))
        font = load_font(files[index], size)
        x, y = rng.uniform(0.03, 0.12) * self.width, rng.uniform(0.03, 0.1) * self.height
        ink = readable_ink(self.background.first, rng)
        step = size * rng.uniform(1.25, 1.6)
        for text in texts:
            left, top, right, bottom = font.getbbox(text)
            if y + bottom > self.height or x + right > self.width:
                break
            self.labels.append(
                Label(text, index, size, (x + left, y + top, x + right, y + bottom), (x, y), ink, None, None, False)
            )
            y += step


def distance(a: RGB, b: RGB) -> float:
    """Return the distance of two colours in RGB."""
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def brightness(colour: RGB) -> float:
    """Return how bright a colour is, 0 to 255."""
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def readable_ink(behind: RGB, rng: Random) -> RGB:
    """Return a dark or bright colour that is read easily on ``behind``."""
    dark = brightness(behind) > 125
    base = rng.choice(((20, 20, 20), (30, 30, 90), (90, 20, 20)) if dark else ((245, 245, 245), (250, 240, 190)))
    return jittered(base, rng, 10)


def random_background(rng: Random) -> Background:
    """Return a pale, grey or dark background, plain or with a faint pattern."""
    level = rng.choice((rng.randint(185, 235), rng.randint(185, 235), rng.randint(120, 185), rng.randint(60, 100)))
    first: RGB = (level, level, level)
    first = jittered(first, rng, 18)
    second = jittered(first, rng, 20)
    pattern = rng.choice(("plain", "plain", "gradient", "stripes", "checks", "dots", "blotches"))
    return Background(pattern, first, second, rng.uniform(0.06, 0.25), rng.random() < 0.5)


def random_size(rng: Random, size: PictureSize = "any") -> tuple[int, int]:
    """Return a picture's (width, height): one tile ("small"), a strip of two or three, or most often four ("any")."""
    if size == "small":
        return rng.randint(72, 96), rng.randint(72, 96)
    longer = rng.randint(150, 288)
    strip = size == "strip" or rng.random() < 0.15
    shorter = round(longer * (rng.uniform(0.4, 0.5) if strip else rng.uniform(0.72, 1.0)))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)


def random_kind(rng: Random, colours: Sequence[str], shapes: Sequence[str] = SHAPES, large: float = 0.45) -> Kind:
    """Return a random shape, colour and size."""
    return Kind(rng.choice(shapes), rng.choice(colours), "large" if rng.random() < large else "small")
