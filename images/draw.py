"""Draw the example pictures of this folder.

Every picture is built from smooth outlines, gradients and soft shadows, painted at three times its final size and
then scaled down. All randomness is seeded, so the same version of Pillow gives the same files again.

    python images/draw.py             # rewrite the drawn pictures in place
    python images/draw.py --out DIR   # write them to another folder
    python images/draw.py --photos    # also rewrite the photographs (needs scikit-image)
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps

Point = tuple[float, float]
Outline = list[Point]
Mask = Image.Image

SUPERSAMPLE = 3


# --------------------------------------------------------------------------------------------------------------------
# Colours and outlines
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grad:
    """A two-colour gradient over the bounding box of a shape: vertical at tilt 0, horizontal at tilt 1."""

    start: str
    end: str
    tilt: float = 0.0
    radial: bool = False

    def render(self, size: tuple[int, int]) -> Image.Image:
        if self.radial:
            ramp = Image.radial_gradient("L")
        else:
            vertical = Image.linear_gradient("L")
            ramp = Image.blend(vertical, vertical.transpose(Image.Transpose.TRANSPOSE), self.tilt)
        ramp = ramp.resize(size, Image.Resampling.BILINEAR)
        return ImageOps.colorize(ramp, self.start, self.end)


Fill = str | Grad


def mix(first: str, second: str, amount: float) -> str:
    """Blend two colours; amount 0 gives the first and 1 the second."""
    pairs = zip(ImageColor.getrgb(first)[:3], ImageColor.getrgb(second)[:3], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * amount):02x}" for a, b in pairs)


def lighter(colour: str, amount: float = 0.25) -> str:
    return mix(colour, "#fff6e0", amount)


def darker(colour: str, amount: float = 0.25) -> str:
    return mix(colour, "#1c1630", amount)


def spline(points: Sequence[Sequence[float]], closed: bool = False, steps: int = 12) -> list[tuple[float, ...]]:
    """A Catmull-Rom curve through points of any dimension."""
    count = len(points)

    def at(index: int) -> Sequence[float]:
        return points[index % count] if closed else points[max(0, min(count - 1, index))]

    curve: list[tuple[float, ...]] = []
    for i in range(count if closed else count - 1):
        corners = list(zip(at(i - 1), at(i), at(i + 1), at(i + 2), strict=True))
        for step in range(steps):
            t = step / steps
            curve.append(
                tuple(
                    0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
                    for a, b, c, d in corners
                )
            )
    if not closed:
        curve.append(tuple(points[-1]))
    return curve


def blob(*points: Point) -> Outline:
    """A smooth closed outline through the points."""
    return [(p[0], p[1]) for p in spline(points, closed=True)]


def oval(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Outline:
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    steps = [2 * math.pi * i / 72 for i in range(72)]
    ring = [(rx * math.cos(a), ry * math.sin(a)) for a in steps]
    return [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in ring]


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Outline:
    """Points on an ellipse between two angles in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * i / 32) for i in range(33)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def box(x0: float, y0: float, x1: float, y1: float, radius: float = 0.0) -> Outline:
    """A rectangle, with rounded corners when a radius is given."""
    if radius <= 0:
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    corners = [(x1 - radius, y0 + radius, 270), (x1 - radius, y1 - radius, 0)]
    corners += [(x0 + radius, y1 - radius, 90), (x0 + radius, y0 + radius, 180)]
    return [p for x, y, start in corners for p in arc(x, y, radius, radius, start, start + 90)]


def ribbon(*points: tuple[float, float, float]) -> Outline:
    """A smooth band along (x, y, width) points, with round ends."""
    curve = spline(points)
    left: Outline = []
    right: Outline = []
    for i, (x, y, width) in enumerate(curve):
        before, after = curve[max(0, i - 1)], curve[min(len(curve) - 1, i + 1)]
        dx, dy = after[0] - before[0], after[1] - before[1]
        norm = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / norm * width / 2, dx / norm * width / 2
        left.append((x + nx, y + ny))
        right.append((x - nx, y - ny))
    return left + cap(left[-1], right[-1]) + right[::-1] + cap(right[0], left[0])


def cap(start: Point, end: Point) -> Outline:
    """A half circle from one point to another."""
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    radius = math.dist(start, end) / 2
    angle = math.atan2(start[1] - y, start[0] - x)
    return [
        (x + radius * math.cos(angle - math.pi * i / 8), y + radius * math.sin(angle - math.pi * i / 8))
        for i in range(1, 8)
    ]


def line(x0: float, y0: float, x1: float, y1: float, width: float) -> Outline:
    return ribbon((x0, y0, width), (x1, y1, width))


def bounds(points: Iterable[Point]) -> tuple[float, float, float, float]:
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def jittered(rng: random.Random, area: tuple[float, float, float, float], step: float, spread: float) -> Outline:
    """Points of a brick-like grid over the area, each moved a little at random."""
    points: Outline = []
    x0, y0, x1, y1 = area
    row, y = 0, y0 - step
    while y <= y1 + step:
        x = x0 - step + (row % 2) * step / 2
        while x <= x1 + step:
            points.append((x + rng.uniform(-spread, spread) * step, y + rng.uniform(-spread, spread) * step))
            x += step
        row, y = row + 1, y + step * 0.88
    return points


def cut(polygon: Outline, keep: Point, other: Point) -> Outline:
    """The part of a convex polygon that is nearer to one point than to the other."""
    mx, my = (keep[0] + other[0]) / 2, (keep[1] + other[1]) / 2
    dx, dy = other[0] - keep[0], other[1] - keep[1]
    sides = [(x - mx) * dx + (y - my) * dy for x, y in polygon]
    result: Outline = []
    for i, point in enumerate(polygon):
        j = (i + 1) % len(polygon)
        if sides[i] <= 0:
            result.append(point)
        if (sides[i] <= 0) != (sides[j] <= 0):
            t = sides[i] / (sides[i] - sides[j])
            result.append((point[0] + (polygon[j][0] - point[0]) * t, point[1] + (polygon[j][1] - point[1]) * t))
    return result


def cells(rng: random.Random, area: tuple[float, float, float, float], step: float, fullness: float) -> list[Outline]:
    """Voronoi cells over the area, each shrunk towards its own centre."""
    seeds = jittered(rng, area, step, 0.26)
    result = []
    for x, y in seeds:
        cell = box(x - step, y - step, x + step, y + step)
        for other in seeds:
            if 0 < math.dist((x, y), other) < 2.6 * step:
                cell = cut(cell, (x, y), other)
        if len(cell) >= 3:
            cx, cy = sum(p[0] for p in cell) / len(cell), sum(p[1] for p in cell) / len(cell)
            result.append([(cx + (px - cx) * fullness, cy + (py - cy) * fullness) for px, py in cell])
    return result


# --------------------------------------------------------------------------------------------------------------------
# Painting
# --------------------------------------------------------------------------------------------------------------------


class Canvas:
    """A picture under way, kept at SUPERSAMPLE times its final size."""

    def __init__(self, width: int, height: int, background: Fill = "#ffffff") -> None:
        self.width, self.height = width, height
        size = (width * SUPERSAMPLE, height * SUPERSAMPLE)
        self.image = background.render(size) if isinstance(background, Grad) else Image.new("RGB", size, background)

    def brush(self, x: float = 0, y: float = 0, scale: float = 1, **options: object) -> Brush:
        return Brush(self, x, y, scale, **options)  # type: ignore[arg-type]

    def finish(self) -> Image.Image:
        return self.image.resize((self.width, self.height), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Brush:
    """Paints in the coordinates of one object: origin at (x, y) of the canvas, y pointing down."""

    canvas: Canvas
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    flip: bool = False
    turn: float = 0.0
    haze: str = "#ffffff"
    haze_amount: float = 0.0

    def at(self, x: float, y: float, scale: float = 1.0, turn: float = 0.0) -> Brush:
        """A brush whose origin lies at (x, y) of this one."""
        px, py = self.place([(x, y)])[0]
        turned = self.turn + (-turn if self.flip else turn)
        return replace(self, x=px, y=py, scale=self.scale * scale, turn=turned)

    def place(self, points: Iterable[Point]) -> Outline:
        cos, sin = math.cos(math.radians(self.turn)), math.sin(math.radians(self.turn))
        sign = -1 if self.flip else 1
        local = ((sign * x * self.scale, y * self.scale) for x, y in points)
        return [(self.x + u * cos - v * sin, self.y + u * sin + v * cos) for u, v in local]

    def tint(self, fill: Fill) -> Fill:
        if isinstance(fill, Grad):
            start, end = (mix(c, self.haze, self.haze_amount) for c in (fill.start, fill.end))
            return replace(fill, start=start, end=end)
        return mix(fill, self.haze, self.haze_amount)

    def shape(
        self, points: Sequence[Point], fill: Fill, clip: Mask | None = None, blur: float = 0.0, opacity: float = 1.0
    ) -> None:
        """Fill an outline; clip keeps the paint inside a mask, blur softens the edge."""
        image = self.canvas.image
        placed = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in self.place(points)]
        radius = blur * self.scale * SUPERSAMPLE
        x0, y0, x1, y1 = bounds(placed)
        margin = 3 * radius + 2
        x0, y0 = math.floor(max(-margin, x0 - margin)), math.floor(max(-margin, y0 - margin))
        x1, y1 = math.ceil(min(image.width + margin, x1 + margin)), math.ceil(min(image.height + margin, y1 + margin))
        if x1 <= x0 or y1 <= y0:
            return
        mask = Image.new("L", (x1 - x0, y1 - y0), 0)
        ImageDraw.Draw(mask).polygon([(x - x0, y - y0) for x, y in placed], fill=round(255 * opacity))
        if radius:
            mask = mask.filter(ImageFilter.GaussianBlur(radius))
        if clip is not None:
            mask = ImageChops.multiply(mask, clip.crop((x0, y0, x1, y1)))
        paint = self.tint(fill)
        image.paste(paint.render(mask.size) if isinstance(paint, Grad) else paint, (x0, y0, x1, y1), mask)

    def shapes(self, outlines: Iterable[Sequence[Point]], fill: Fill, clip: Mask | None = None) -> None:
        for outline in outlines:
            self.shape(outline, fill, clip)

    def mask(self, *outlines: Sequence[Point]) -> Mask:
        """A mask of the union of some outlines, for clipping."""
        result = Image.new("L", self.canvas.image.size, 0)
        draw = ImageDraw.Draw(result)
        for outline in outlines:
            draw.polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in self.place(outline)], fill=255)
        return result

    def solid(self, outline: Sequence[Point], fill: Fill, shade: str = "#2a1a38", depth: float = 0.35) -> Mask:
        """Fill an outline and darken its lower right edge, so that it looks round. Returns its mask."""
        x0, y0, x1, y1 = bounds(outline)
        size = min(x1 - x0, y1 - y0)
        clip = self.mask(outline)
        self.shape(outline, fill)
        moved = self.mask([(x - size * 0.16, y - size * 0.13) for x, y in outline])
        edge = ImageChops.subtract(clip, moved)
        edge = edge.filter(ImageFilter.GaussianBlur(size * 0.1 * self.scale * SUPERSAMPLE))
        edge = ImageChops.multiply(edge, clip).point(lambda value: int(value * depth))
        paint = self.tint(shade)
        assert isinstance(paint, str)
        self.canvas.image.paste(paint, (0, 0, *self.canvas.image.size), edge)
        return clip

    def shadow(self, x: float, y: float, rx: float, ry: float, opacity: float = 0.3) -> None:
        self.shape(oval(x, y, rx, ry), "#241a2e", blur=ry * 0.45, opacity=opacity)

    def text(
        self, x: float, y: float, words: str, size: float, fill: str = "#222222", anchor: str = "mm", bold: float = 0.0
    ) -> None:
        """Write one line; the letters keep upright whatever the turn of the brush."""
        px, py = self.place([(x, y)])[0]
        pixels = size * self.scale * SUPERSAMPLE
        colour = self.tint(fill)
        ImageDraw.Draw(self.canvas.image).text(
            (px * SUPERSAMPLE, py * SUPERSAMPLE),
            words,
            fill=colour if isinstance(colour, str) else fill,
            font=ImageFont.load_default(size=pixels),
            anchor=anchor,
            stroke_width=round(pixels * bold * 0.04),
        )


# --------------------------------------------------------------------------------------------------------------------
# Savanna
# --------------------------------------------------------------------------------------------------------------------

HIDE, PATCH, PATCH_DARK = "#efd09a", "#b0672f", "#8a4a20"


def swung(points: Iterable[Point], degrees: float, centre: Point = (21, -62)) -> Outline:
    """Points turned round a centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    cx, cy = centre
    return [(cx + (x - cx) * cos - (y - cy) * sin, cy + (x - cx) * sin + (y - cy) * cos) for x, y in points]


def giraffe_leg(b: Brush, path: Sequence[tuple[float, float, float]], rng: random.Random, far: bool) -> None:
    outline = ribbon(*path)
    clip = b.mask(outline)
    b.shape(outline, Grad("#c99f68", "#d8b98a") if far else Grad(HIDE, "#efd6a8"))
    x0, y0, x1, _ = bounds(outline)
    patch = mix(PATCH, "#6b4424", 0.45) if far else PATCH
    b.shapes(cells(rng, (x0, y0, x1, y0 + 24), 2.9, 0.72), patch, clip)
    b.shape(line(x1 - 0.4, y0, path[-1][0] + path[-1][2] / 2, path[-1][1], 1.5), "#5a3a2a", clip, 0.6, 0.35)
    x, y, _ = path[-1]
    b.shape([(x - 1.5, y - 0.8), (x + 1.4, y - 0.8), (x + 2.2, 0.4), (x - 1.9, 0.4)], "#3d2c25")


def giraffe_body(b: Brush, rng: random.Random) -> None:
    tail = ribbon((-14, -56, 1.8), (-17.5, -50, 1.2), (-18, -40, 0.9), (-17.4, -33, 0.9))
    b.shape(tail, "#c08f55")
    b.shape(ribbon((-17.4, -35, 1.2), (-17.2, -30, 2.4), (-17.8, -25, 0.4)), "#3b261c")
    outline = blob(
        (-15, -54), (-12, -59), (-4, -61), (8, -64.5), (18, -69), (26, -65), (29, -57), (24, -48), (9, -43.5),
        (-5, -45), (-13, -46),
    )  # fmt: skip
    clip = b.mask(outline)
    b.shape(outline, Grad("#f4d8a4", "#e2bd85"))
    b.shapes(cells(rng, (-16, -70, 30, -42), 5.4, 0.84), Grad(PATCH, PATCH_DARK), clip)
    b.shape(oval(7, -41, 26, 6), "#3a2036", clip, 3, 0.55)
    b.shape(oval(0, -63, 18, 2.5, -10), "#fff1c8", clip, 2, 0.4)


def giraffe_neck(b: Brush, rng: random.Random, tilt: float) -> None:
    neck = [(10, -62), (17, -68), (23, -76), (31, -86), (37.5, -96), (43, -95), (43, -88), (37, -78), (32, -67),
            (29, -55), (20, -54)]  # fmt: skip
    mane = spline([(17, -68.5, 1), (23, -77, 2), (31, -87, 2), (38, -97, 1)])
    ridge = swung(((p[0] - 0.3, p[1] - 0.2) for p in mane), tilt)
    b.shape(ribbon(*((x, y, p[2]) for (x, y), p in zip(ridge[::6], mane[::6], strict=True))), "#7c4526")
    outline = blob(*swung(neck, tilt))
    clip = b.mask(outline)
    fade = b.mask(swung([(0, -100), (60, -100), (60, -66), (23, -62), (8, -64)], tilt))
    b.shape(outline, Grad("#f6dca9", "#eac78e"))
    b.shapes(cells(rng, bounds(outline), 4.3, 0.82), Grad(PATCH, PATCH_DARK), clip)
    shade = ribbon(*((x, y, 3) for x, y in swung([(30, -55), (34, -68), (40, -80), (45, -88)], tilt)))
    b.shape(shade, "#3a2036", ImageChops.multiply(clip, fade), 1.4, 0.45)


def giraffe_head(b: Brush, tilt: float) -> None:
    def at(*points: Point) -> Outline:
        return swung(swung(points, tilt), -tilt * 0.6, swung([(40, -93)], tilt)[0])

    for x in (39.3, 42.3):
        (x0, y0), (x1, y1) = at((x, -96), (x - 1.6, -101.4))
        b.shape(line(x0, y0, x1, y1, 1.3), "#c8975a")
        b.shape(oval(x1, y1, 1.1, 1.0), "#3d2419")
    b.shape(blob(*at((38, -94.6), (34.5, -97.3), (31, -97.2), (33.5, -94.2), (37, -92.8))), "#dcb47b")
    b.shape(blob(*at((37, -94.4), (34.3, -96.2), (32.4, -96.4), (34.4, -94.4))), "#9c6a48")
    head = blob(*at((37.5, -95.5), (41.5, -97.3), (46, -95.4), (51, -91.4), (55.2, -88), (56, -85.4), (53.6, -83.8),
                    (49, -85.6), (44.5, -87.2), (39, -89)))  # fmt: skip
    clip = b.mask(head)
    b.shape(head, Grad("#f0d3a0", "#dfb680"))
    b.shape(oval(*at((42, -89.5))[0], 5, 2), "#9a5c2c", clip, 0.8, 0.55)
    b.shape(oval(*at((54.5, -85.4))[0], 3.6, 2.6), "#8d6a55", clip, 0.8, 0.7)
    b.shape(ribbon(*((x, y, 0.4) for x, y in at((55.3, -84.7), (53, -85.4), (51, -85.6)))), "#4a3026")
    b.shape(oval(*at((54.7, -87))[0], 0.5, 0.35), "#3a241d")
    b.shape(oval(*at((45.2, -92.6))[0], 1.25, 1.15), "#2a1a14")
    b.shape(oval(*at((45.6, -93))[0], 0.35, 0.3), "#ffffff")


def giraffe(b: Brush, seed: int, tilt: float = 0.0) -> None:
    """A giraffe a hundred units tall that looks to the right."""
    rng = random.Random(seed)
    b.shadow(7, 0.5, 26, 2.2, 0.4)
    giraffe_leg(b, [(24, -52, 7), (26.3, -27, 3.5), (26.8, -3, 2.4)], rng, far=True)
    giraffe_leg(b, [(-6, -50, 9), (-4.6, -30, 4), (-6.5, -18, 3), (-5, -3, 2.4)], rng, far=True)
    giraffe_leg(b, [(-10, -52, 11), (-10.5, -37, 6.5), (-13.8, -21, 3.2), (-12, -3, 2.5)], rng, far=False)
    giraffe_leg(b, [(21, -54, 9), (20.5, -40, 5), (21, -26, 3.8), (19.8, -3, 2.5)], rng, far=False)
    giraffe_body(b, rng)
    giraffe_neck(b, rng, tilt)
    giraffe_head(b, tilt)


def acacia(b: Brush, seed: int) -> None:
    """An umbrella thorn a hundred units tall."""
    rng = random.Random(seed)
    b.shadow(0, 1, 40, 3, 0.3)
    bark = Grad("#6a4a36", "#4a3228")
    b.shape(ribbon((0, 1, 9), (-2, -25, 6), (3, -48, 5)), bark)
    forks = [((3, -46), (-18, -64), (-38, -80)), ((3, -46), (20, -62), (40, -78)), ((2, -46), (0, -66), (-10, -84)),
             ((3, -46), (10, -66), (18, -84))]  # fmt: skip
    for start, middle, end in forks:
        b.shape(ribbon((*start, 4), (*middle, 2.6), (*end, 1.2)), bark)
    for level, colour in ((0, "#44582c"), (1, "#5b7434"), (2, "#7b9343")):
        for _ in range(46):
            reach = 58 - 7 * level
            x = rng.uniform(-reach, reach)
            y = -80 - 5 * level - 8 * (1 - (x / 60) ** 2) + rng.uniform(-2.5, 2.5)
            tone = mix(colour, rng.choice(["#2f4526", "#a6b860"]), rng.uniform(0, 0.25))
            b.shape(oval(x, y, rng.uniform(6, 11), rng.uniform(2, 4), rng.uniform(-8, 8)), tone, opacity=0.9)


def tuft(b: Brush, rng: random.Random, colours: Sequence[str]) -> None:
    for _ in range(rng.randint(5, 9)):
        x, lean, tall = rng.uniform(-0.4, 0.4), rng.uniform(-0.5, 0.5), rng.uniform(0.5, 1.1)
        blade = [(x - 0.05, 0), (x + lean * 0.4 - 0.03, -tall * 0.6), (x + lean, -tall), (x + 0.06 + lean * 0.4,
                 -tall * 0.6), (x + 0.05, 0)]  # fmt: skip
        b.shape(blade, rng.choice(colours), opacity=0.95)


def meadow(b: Brush, seed: int, span: tuple[float, float], count: int, colours: Sequence[str]) -> None:
    """Tufts of grass over a band of the picture, larger and denser towards its lower edge."""
    rng = random.Random(seed)
    top, bottom = span
    for depth in sorted(rng.random() ** 0.8 for _ in range(count)):
        y = top + (bottom - top) * depth
        size = 7 + 34 * ((y - top) / (b.canvas.height - top)) ** 1.3 + rng.uniform(0, 4)
        tuft(b.at(rng.uniform(-10, b.canvas.width + 10), y, size), rng, colours)


def ridge(b: Brush, seed: int, y: float, height: float, fill: Fill) -> None:
    """A line of hills across the picture."""
    rng = random.Random(seed)
    width = b.canvas.width
    crest = [(width * i / 8, y - height * rng.uniform(0.1, 1)) for i in range(-1, 10)]
    b.shape([(p[0], p[1]) for p in spline(crest)] + [(width * 1.2, y + 40), (-width * 0.2, y + 40)], fill)


def bird(b: Brush) -> None:
    for side in (-1, 1):
        b.shape(ribbon((0, 0, 0.24), (side * 0.5, -0.36, 0.2), (side * 1.2, -0.1, 0.05)), "#4b3a4a")


def sun(b: Brush, x: float, y: float, radius: float, colour: str) -> None:
    for size, opacity in ((4.2, 0.25), (2.4, 0.35), (1.5, 0.5)):
        b.shape(oval(x, y, radius * size, radius * size), colour, blur=radius * size * 0.35, opacity=opacity)
    b.shape(oval(x, y, radius, radius), lighter(colour, 0.6), blur=1)


def cloud(b: Brush, seed: int, colour: str = "#ffffff") -> None:
    rng = random.Random(seed)
    for tone, lift in ((darker(colour, 0.12), 0.0), (colour, 0.07)):
        rng.seed(seed)
        for i in range(9):
            x = -1 + i * 0.25
            size = 0.32 * math.cos(x * 1.25) + rng.uniform(0, 0.16)
            b.shape(oval(x, -size * 0.75 - lift, size * 0.95, size * 0.75), tone, blur=0.03, opacity=0.85)


def giraffes_at_dusk() -> Canvas:
    c = Canvas(1024, 768, Grad("#ef9a5e", "#fde9b8"))
    b = c.brush()
    b.shape(box(0, 0, 1024, 470), Grad("#e98f66", "#fdeebf"))
    sun(b, 740, 330, 44, "#ffd98a")
    for x, y, s in ((180, 120, 9), (215, 140, 7), (258, 112, 8), (560, 90, 7)):
        bird(b.at(x, y, s))
    ridge(b, 3, 452, 90, Grad("#c99a8e", "#e8bd97"))
    ridge(b, 8, 462, 46, Grad("#a98265", "#c9a06a"))
    b.shape(box(0, 455, 1024, 768), Grad("#dbb564", "#8a7a34"))
    acacia(c.brush(905, 476, 1.25, haze="#f0c48c", haze_amount=0.35), 5)
    acacia(c.brush(330, 468, 0.75, haze="#f0c48c", haze_amount=0.5), 6)
    meadow(b, 11, (458, 540), 260, ("#c9a452", "#b8964a", "#d9bb6b"))
    giraffe(c.brush(672, 528, 2.7, flip=True, haze="#f0c48c", haze_amount=0.2), 21, tilt=6)
    meadow(b, 12, (520, 690), 330, ("#a98b3c", "#c4a24c", "#8c8038", "#dcc071"))
    giraffe(c.brush(225, 704, 6.2), 4, tilt=-4)
    meadow(b, 13, (660, 800), 240, ("#6f6a2e", "#8c8238", "#b59a48", "#57602c"))
    return c


def giraffes_by_day() -> Canvas:
    c = Canvas(900, 1100, Grad("#6fb4dd", "#e9f4ee"))
    b = c.brush()
    for x, y, s, seed in ((150, 170, 110, 1), (700, 230, 130, 2), (430, 90, 70, 3)):
        cloud(b.at(x, y, s), seed)
    ridge(b, 5, 640, 110, Grad("#8fb0b8", "#b7cdb9"))
    ridge(b, 6, 655, 60, Grad("#7f9f78", "#a5b982"))
    b.shape(box(0, 640, 900, 1100), Grad("#bccb78", "#5f8237"))
    acacia(c.brush(150, 690, 2.2, haze="#cfe0d8", haze_amount=0.2), 15)
    meadow(b, 31, (648, 740), 240, ("#9fb25c", "#b7c270", "#8aa14e"))
    giraffe(c.brush(775, 752, 2.6, flip=True, haze="#cfe0d8", haze_amount=0.15), 22, tilt=-4)
    meadow(b, 32, (735, 900), 260, ("#86a048", "#a3b65a", "#6f8f3f"))
    giraffe(c.brush(235, 1010, 7.3), 24, tilt=-8)
    meadow(b, 33, (900, 1130), 400, ("#4f7030", "#6b8c3a", "#8aa648", "#3f5f2c"))
    return c


# --------------------------------------------------------------------------------------------------------------------
# Fruit on a table
# --------------------------------------------------------------------------------------------------------------------


def leaf(b: Brush, colour: str = "#5f9a3c") -> None:
    """A leaf of length one that points to the right."""
    outline = blob((0, 0), (0.3, -0.22), (0.7, -0.2), (1, 0), (0.65, 0.16), (0.28, 0.15))
    b.solid(outline, Grad(lighter(colour, 0.2), colour))
    b.shape(ribbon((0, 0, 0.03), (0.5, -0.03, 0.03), (0.92, 0, 0.01)), darker(colour, 0.3))


def gleam(b: Brush, clip: Mask, x: float, y: float, rx: float, ry: float, turn: float = -25) -> None:
    """The reflection of a window on something shiny."""
    b.shape(oval(x, y, rx, ry, turn), "#ffffff", clip, blur=rx * 0.3, opacity=0.75)


def apple(b: Brush, colour: str, shadow: bool = True) -> None:
    """An apple about two units wide, standing on the origin."""
    if shadow:
        b.shadow(0.15, -0.04, 1.1, 0.2, 0.45)
    outline = blob((0, -1.72), (0.45, -1.85), (0.92, -1.6), (1.06, -1.05), (0.82, -0.42), (0.38, -0.03), (0, -0.09),
                   (-0.38, -0.03), (-0.82, -0.42), (-1.06, -1.05), (-0.92, -1.6), (-0.45, -1.85))  # fmt: skip
    clip = b.solid(outline, Grad(lighter(colour, 0.12), darker(colour, 0.12), 0.4), depth=0.55)
    b.shape(oval(-0.2, -1.2, 0.8, 0.75), lighter(colour, 0.45), clip, 0.3, 0.45)
    rng = random.Random(colour)
    for _ in range(36):
        x, y = rng.uniform(-0.9, 0.9), rng.uniform(-1.6, -0.3)
        b.shape(oval(x, y, 0.018, 0.018), lighter(colour, 0.7), clip, opacity=0.6)
    b.shape(oval(0, -1.7, 0.36, 0.13), darker(colour, 0.5), clip, 0.08, 0.8)
    b.shape(ribbon((0, -1.68, 0.07), (0.03, -1.9, 0.07), (0.14, -2.1, 0.1)), "#5b3b22")
    leaf(b.at(0.08, -1.95, 0.72, turn=-18))
    gleam(b, clip, -0.45, -1.35, 0.14, 0.27, 28)


def pear(b: Brush, colour: str = "#c3c44a", shadow: bool = True) -> None:
    """A pear about two units wide, standing on the origin."""
    if shadow:
        b.shadow(0.15, -0.04, 1.0, 0.2, 0.45)
    right = [(0.34, -2.4), (0.46, -1.9), (0.72, -1.4), (0.98, -0.85), (0.82, -0.25), (0.3, -0.01)]
    outline = blob((0, -2.55), *right, *((-x, y) for x, y in reversed(right)))
    clip = b.solid(outline, Grad(lighter(colour, 0.2), darker(colour, 0.1), 0.4), depth=0.5)
    b.shape(oval(0.55, -0.8, 0.4, 0.6), "#d98a3c", clip, 0.25, 0.45)
    rng = random.Random(7)
    for _ in range(70):
        b.shape(oval(rng.uniform(-0.9, 0.9), rng.uniform(-2.4, -0.1), 0.014, 0.014), "#7d6a2c", clip, opacity=0.6)
    b.shape(ribbon((0, -2.5, 0.08), (0.02, -2.75, 0.07), (0.1, -2.95, 0.1)), "#5b3b22")
    gleam(b, clip, -0.4, -1.0, 0.13, 0.3, 15)


def lemon(b: Brush) -> None:
    """A lemon lying on the origin, about two units wide."""
    b.shadow(0.1, -0.04, 1.1, 0.18, 0.45)
    outline = blob((-1.22, -0.68), (-0.98, -0.95), (-0.45, -1.3), (0.3, -1.34), (0.9, -1.05), (1.2, -0.72),
                   (1.25, -0.56), (0.95, -0.36), (0.4, -0.02), (-0.35, -0.03), (-0.92, -0.42))  # fmt: skip
    clip = b.solid(outline, Grad("#fbe36a", "#e9bd2c"), shade="#8a4a10", depth=0.5)
    rng = random.Random(9)
    for _ in range(80):
        b.shape(oval(rng.uniform(-1.1, 1.1), rng.uniform(-1.3, 0), 0.02, 0.02), "#c99a1e", clip, opacity=0.5)
    gleam(b, clip, -0.35, -0.98, 0.25, 0.12, -15)


def wood(b: Brush, top: float, seed: int, colours: tuple[str, str] = ("#c98f56", "#8d5630")) -> None:
    """A wooden table top that fills the canvas below a line."""
    rng = random.Random(seed)
    width, height = b.canvas.width, b.canvas.height
    area = box(0, top, width, height)
    b.shape(area, Grad(*colours))
    clip = b.mask(area)
    for _ in range(90):
        y, x = top + (height - top) * rng.random() ** 0.8, rng.uniform(-200, width)
        long, wave = rng.uniform(120, 520), rng.uniform(-5, 5)
        tone = rng.choice((darker(colours[1], 0.2), lighter(colours[0], 0.25)))
        grain = ribbon((x, y, 0.6), (x + long / 2, y + wave, rng.uniform(1, 3)), (x + long, y, 0.4))
        b.shape(grain, tone, clip, opacity=0.28)
    for i in (1, 2, 3):
        y = top + (height - top) * (i / 4) ** 1.2
        b.shape(box(0, y, width, y + 2), darker(colours[1], 0.5), opacity=0.55)
        b.shape(box(0, y + 2, width, y + 4), lighter(colours[0], 0.4), opacity=0.3)


def bowl_front(b: Brush) -> None:
    """The front half of a blue bowl, eight units wide."""
    side = spline([(4, -2.6), (3.55, -1.5), (2.4, -0.5), (1.1, -0.12), (-1.1, -0.12), (-2.4, -0.5), (-3.55, -1.5),
                   (-4, -2.6)])  # fmt: skip
    outline = arc(0, -2.6, 4, 0.9, 180, 0) + [(p[0], p[1]) for p in side]
    clip = b.solid(outline, Grad("#5b8fb4", "#28526f", 0.3), depth=0.6)
    for drop in (0.28, 0.78):
        hoop = [(x, y + drop, 0.09) for x, y in arc(0, -2.6, 4, 0.9, 178, 2)]
        b.shape(ribbon(*hoop), "#f1ead8", clip)
    for i in range(-5, 6):
        b.shape(oval(i * 0.72, -2.07 + 0.9 * math.sqrt(1 - (i * 0.18) ** 2), 0.11, 0.11), "#f1ead8", clip)
    gleam(b, clip, -2.5, -0.95, 0.16, 0.4, -40)
    b.shape(box(-1.3, -0.28, 1.3, 0.06, 0.12), Grad("#2f5f80", "#1d3e57"))


def fruit_table() -> Canvas:
    c = Canvas(1024, 768, Grad("#e9dfcd", "#cdbb9f"))
    b = c.brush()
    b.shape(oval(260, 120, 420, 300), "#fff8e8", blur=90, opacity=0.7)
    for i in range(14):
        b.shape(box(i * 78, 0, i * 78 + 2, 430), "#b7a384", opacity=0.3)
    wood(b, 430, 3)
    b.shadow(500, 596, 330, 44, 0.5)
    bowl = b.at(480, 590, 68)
    bowl.shape(oval(0, -2.6, 4, 0.9), Grad("#1f4661", "#3c6f92"))
    pear(b.at(352, 410, 66, turn=-14), shadow=False)
    apple(b.at(486, 400, 68, turn=5), "#c22a2a", shadow=False)
    apple(b.at(612, 418, 66, turn=12), "#86ad3c", shadow=False)
    apple(b.at(290, 470, 62, turn=-16), "#86ad3c", shadow=False)
    pear(b.at(665, 480, 62, turn=24), "#d2b848", shadow=False)
    apple(b.at(405, 486, 70, turn=-5), "#c22a2a", shadow=False)
    apple(b.at(545, 492, 70, turn=8), "#b8242c", shadow=False)
    bowl_front(bowl)
    lemon(b.at(205, 640, 60, turn=-8))
    apple(b.at(845, 655, 74, turn=6), "#c22a2a")
    pear(b.at(110, 560, 58, turn=-4), "#aebb45")
    apple(b.at(690, 715, 78, turn=-6), "#86ad3c")
    lemon(b.at(330, 720, 66, turn=10))
    return c


# --------------------------------------------------------------------------------------------------------------------
# Street
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What a person wears."""

    coat: str
    trousers: str
    hair: str
    skin: str = "#f1c7a2"
    shoes: str = "#3b2f35"
    scarf: str = ""
    hat: str = ""
    long_hair: bool = False


def face(b: Brush, look: Look) -> None:
    if look.long_hair:
        b.shape(blob((-8.5, -92), (0, -101), (8.5, -92), (9.5, -80), (7, -73), (0, -76), (-7, -73), (-9.5, -80)),
                Grad(look.hair, darker(look.hair, 0.3)))  # fmt: skip
    b.shape(box(-2.6, -82, 2.6, -74, 1), darker(look.skin, 0.15))
    head = oval(0, -88, 7.2, 8.4)
    clip = b.solid(head, Grad(lighter(look.skin, 0.15), look.skin), shade="#7a3a30", depth=0.4)
    for side in (-1, 1):
        b.shape(oval(side * 7.2, -87.3, 1.3, 1.9), look.skin)
        b.shape(oval(side * 4.2, -84.8, 1.7, 1.1), "#e58a78", clip, 0.6, 0.5)
        b.shape(oval(side * 2.7, -87.8, 0.8, 1.1), "#2d2024")
        b.shape(oval(side * 2.7 + 0.25, -88.2, 0.25, 0.3), "#ffffff")
        b.shape(ribbon((side * 1.6, -90.4, 0.5), (side * 2.8, -90.9, 0.6), (side * 3.9, -90.4, 0.4)), look.hair)
    b.shape(ribbon((0.1, -87, 0.5), (0.7, -85.6, 0.5), (-0.1, -85.3, 0.4)), darker(look.skin, 0.25))
    b.shape(ribbon((-2, -83.6, 0.5), (0, -82.6, 0.7), (2, -83.6, 0.5)), "#9c3f3f")
    fringe = blob(
        (-7.6, -88), (-7.4, -94), (-3, -98), (3, -98), (7.4, -94), (7.6, -88), (5, -92.5), (0, -94), (-5, -92)
    )
    b.shape(fringe, Grad(lighter(look.hair, 0.15), look.hair))
    if look.hat:
        b.solid(blob((-8, -92.6), (-7.4, -98), (0, -102.4), (7.4, -98), (8, -92.6), (0, -94)), look.hat)
        b.shape(ribbon((-8, -92.8, 2.6), (0, -94.3, 2.8), (8, -92.8, 2.6)), darker(look.hat, 0.2))
        b.shape(oval(0, -103, 2, 2), lighter(look.hat, 0.35))


def person(b: Brush, look: Look, raised: bool = False) -> None:
    """A person a hundred units tall; one hand can be raised to hold something."""
    b.shadow(0, 0, 18, 2.6, 0.4)
    for side in (-1, 1):
        b.shape(ribbon((side * 4.5, -40, 9), (side * 5, -22, 7.5), (side * 5, -4, 6)),
                Grad(look.trousers, darker(look.trousers, 0.2)))  # fmt: skip
        b.solid(
            blob((side * 2, -1), (side * 2.4, -4.6), (side * 6, -5), (side * 10, -2.4), (side * 9.6, 0.4)), look.shoes
        )
    sleeve = Grad(lighter(look.coat, 0.06), darker(look.coat, 0.12))
    b.shape(ribbon((-11, -71, 8), (-15.5, -58, 7), (-14.8, -44, 6)), sleeve)
    b.shape(oval(-14.7, -40.8, 2.6, 3), look.skin)
    coat = blob((-5, -77), (5, -77), (11.6, -74), (12.2, -58), (13.2, -44), (15.4, -31), (0, -29), (-15.4, -31),
                (-13.2, -44), (-12.2, -58), (-11.6, -74))  # fmt: skip
    clip = b.solid(coat, Grad(lighter(look.coat, 0.1), look.coat), depth=0.45)
    b.shape(line(0, -76, 0, -29, 0.6), darker(look.coat, 0.4), clip)
    for y in (-66, -58, -50, -42):
        b.shape(oval(2.2, y, 0.9, 0.9), darker(look.coat, 0.5))
    for side in (-1, 1):
        b.shape(box(side * 8 - 3, -47, side * 8 + 3, -45.4, 0.6), darker(look.coat, 0.3), clip)
        b.shape([(0, -73), (side * 2, -78), (side * 6.4, -76.4), (side * 4, -70)], lighter(look.coat, 0.2))
    if raised:
        b.solid(ribbon((11, -71, 8), (16.5, -62, 7), (17.5, -72, 6)), sleeve)
        b.shape(oval(17.6, -75, 2.6, 2.8), look.skin)
    else:
        b.shape(ribbon((11, -71, 8), (15.5, -58, 7), (14.8, -44, 6)), sleeve)
        b.shape(oval(14.7, -40.8, 2.6, 3), look.skin)
    face(b, look)
    if look.scarf:
        b.solid(blob((-6.5, -79), (0, -76.6), (6.5, -79), (6.8, -75.6), (0, -72.8), (-6.8, -75.6)), look.scarf)
        b.solid(blob((2, -75), (5.5, -75), (6.4, -60), (2.6, -60)), look.scarf)


def umbrella(b: Brush, colours: tuple[str, str]) -> None:
    """An open umbrella whose handle starts at the origin."""
    b.shape(line(0, 4, 0, -42, 1.1), "#5b4632")
    b.shape(ribbon((0, 4, 1.3), (0.6, 8, 1.3), (3.4, 8, 1.3), (3.8, 5.4, 1.2)), "#5b4632")
    dome = arc(0, -34, 34, 24, 180, 360)
    for i in range(5):
        dome += arc(34 - 6.8 - 13.6 * i, -34, 6.8, 3, 0, -180)
    clip = b.solid(dome, Grad(lighter(colours[0], 0.15), colours[0]), depth=0.5)
    for x0, x1 in ((-20.4, -6.8), (6.8, 20.4)):
        edge = 180 if x0 < 0 else 360
        gore = [(0.0, -58.5), *arc(0, -34, abs(x0), 24.5, 270, edge), *arc(0, -34, abs(x1), 24.5, edge, 270)]
        b.shape(gore, colours[1], clip)
    b.shape(line(0, -58, 0, -62, 1.4), "#5b4632")


def dog(b: Brush) -> None:
    """A brown dog forty units tall that looks to the right."""
    b.shadow(0, 0, 24, 2.6, 0.4)
    coat, dark = "#b9793f", "#8a5429"
    for x in (-13, 12):
        b.shape(ribbon((x + 3, -18, 6), (x + 4, -9, 4), (x + 4, -1.6, 4.4)), dark)
    b.shape(ribbon((-18, -25, 3.5), (-25, -32, 3), (-24, -40, 1.6)), coat)
    b.solid(blob((-20, -22), (-14, -29), (0, -28), (12, -31), (18, -26), (16, -16), (4, -13), (-12, -13)), coat)
    for x in (-16, 11):
        b.solid(ribbon((x, -20, 8), (x, -9, 4.6), (x + 0.8, -1.6, 4.8)), coat)
    b.solid(blob((10, -28), (12, -40), (20, -43), (26, -39), (33, -36), (33, -31.5), (25, -30), (18, -25)), coat)
    b.solid(blob((12, -41), (17, -41.5), (17, -33), (13.5, -28.6), (10.4, -33)), dark)
    b.shape(oval(32.8, -35.4, 1.8, 1.5), "#2b1c1a")
    b.shape(oval(24, -38, 1.2, 1.3), "#2b1c1a")
    b.shape(ribbon((31.6, -32.4, 0.6), (28.6, -32, 0.6), (26, -33, 0.5)), "#5a3420")
    b.shape(ribbon((11.6, -29.4, 2.4), (15.4, -26.4, 2.4), (19.4, -25.6, 2.2)), "#c8373f")


def window(b: Brush, width: float, height: float, frame: str = "#f6efe2") -> None:
    """A window whose lower left corner is the origin."""
    b.shape(box(-5, -height - 5, width + 5, 5), frame)
    pane = box(0, -height, width, 0)
    clip = b.mask(pane)
    b.shape(pane, Grad("#7ba3bd", "#c9dfe6", 0.3))
    b.shape([(width * 0.1, 0), (width * 0.55, -height), (width * 0.8, -height), (width * 0.35, 0)], "#ffffff", clip,
            opacity=0.3)  # fmt: skip
    for side in (0, 1):
        x = side * width
        inner = width * (0.24 if side == 0 else 0.76)
        b.shape(blob((x, -height), (inner, -height), (inner, -height * 0.6), (x, -height * 0.2)), "#f4e3c8", clip,
                opacity=0.85)  # fmt: skip
    b.shape(box(width / 2 - 2, -height, width / 2 + 2, 0), frame)
    b.shape(box(0, -height * 0.58, width, -height * 0.58 + 4), frame)
    b.shape(box(-9, 4, width + 9, 12, 2), lighter(frame, 0.4))
    b.shape(box(-9, 11, width + 9, 14), "#3a2a3a", blur=2, opacity=0.3)


def shop(b: Brush, width: float, height: float, wall: str, awning: str, sign: str) -> None:
    """A house with a shop on the ground floor; its lower left corner is the origin."""
    b.shape(box(0, -height, width, 0), Grad(lighter(wall, 0.15), darker(wall, 0.08)))
    rng = random.Random(sign)
    for _ in range(60):
        x, y = rng.uniform(4, width - 24), rng.uniform(-height + 20, -190)
        b.shape(box(x, y, x + 18, y + 7, 1), rng.choice((lighter(wall, 0.3), darker(wall, 0.18))), opacity=0.4)
    b.shape(box(-4, -height - 6, width + 4, -height + 14), Grad(lighter(wall, 0.5), wall))
    for i in range(2):
        window(b.at(width * (0.14 + 0.44 * i), -228), width * 0.26, 92)
    b.shape(box(0, -196, width, -162), darker(awning, 0.45))
    b.text(width * 0.42, -179, sign, 24, "#fff4d8", bold=0.6)
    shop_front(b, width, awning)


def shop_front(b: Brush, width: float, awning: str) -> None:
    door = width * 0.68
    b.shape(box(14, -124, door - 12, -22), "#4a3a36")
    glass = box(20, -120, door - 18, -30)
    clip = b.mask(glass)
    b.shape(glass, Grad("#f9dfa6", "#c58f5a"))
    rng = random.Random(awning)
    for i in range(6):
        x = 34 + i * (door - 60) / 6
        colour = rng.choice(("#b5542f", "#7a9a4a", "#3f6f94", "#d8a23c", "#a8475f"))
        b.shape(box(x, -30 - rng.uniform(18, 44), x + 15, -30, 3), colour, clip)
    b.shape([(40, -30), (84, -120), (112, -120), (68, -30)], "#ffffff", clip, opacity=0.28)
    b.shape(box(door, -126, width - 14, 0), darker(awning, 0.4))
    b.shape(box(door + 8, -118, width - 22, -52), Grad("#a9c6d2", "#dbe9e8", 0.4))
    b.shape(oval(door + 8, -38, 3, 3), "#e8c35c")
    stripes = max(6, round(width / 24))
    step = (width - 4) / stripes
    b.shape(box(6, -128, width - 4, -104), "#2a1a30", blur=6, opacity=0.4)
    for i in range(stripes):
        x = 2 + i * step
        tone = awning if i % 2 == 0 else "#fbf3e2"
        drop = arc(x + step / 2, -122, step / 2, 9, 0, 180)
        b.shape(
            [(x + 3, -164), (x + step + 3, -164), (x + step, -122), *drop, (x, -122)], Grad(tone, darker(tone, 0.15))
        )


def lamp_post(b: Brush) -> None:
    b.shadow(0, 0, 16, 3, 0.4)
    iron = "#2f3a3f"
    b.shape(blob((-9, 0), (-8, -12), (-4, -22), (4, -22), (8, -12), (9, 0)), iron)
    b.shape(line(0, -10, 0, -330, 7), Grad(lighter(iron, 0.2), iron, 1))
    b.shape(oval(0, -356, 44, 44), "#ffe9a8", blur=18, opacity=0.5)
    b.shape([(-13, -332), (13, -332), (19, -372), (-19, -372)], Grad("#fff3c6", "#f7cf74"))
    b.shape([(-23, -372), (23, -372), (9, -390), (-9, -390)], iron)
    b.shape(box(-15, -336, 15, -329, 2), iron)


def leafy_tree(b: Brush, seed: int) -> None:
    rng = random.Random(seed)
    b.shadow(0, 0, 40, 6, 0.35)
    b.shape(ribbon((0, 0, 24), (3, -60, 17), (-2, -130, 12)), Grad("#7a5840", "#5a3d2e", 1))
    b.shape(ribbon((0, -100, 10), (24, -140, 6)), "#5a3d2e")
    for level, colour in enumerate(("#3f6b35", "#558a3f", "#79a94f")):
        for _ in range(34):
            angle, reach = rng.uniform(0, 2 * math.pi), 84 * math.sqrt(rng.random()) * (1 - 0.18 * level)
            x, y = reach * math.cos(angle) - 6 * level, -195 + reach * 0.85 * math.sin(angle) - 9 * level
            tone = mix(colour, rng.choice(("#2f5a30", "#a5c864")), rng.uniform(0, 0.25))
            b.shape(oval(x, y, rng.uniform(13, 24), rng.uniform(11, 18)), tone, opacity=0.9)


def street() -> Canvas:
    c = Canvas(1024, 683, Grad("#8fb7cf", "#e6e6d8"))
    b = c.brush()
    cloud(b.at(880, 70, 80), 4, "#f6f3ec")
    shop(b.at(-30, 500), 330, 430, "#c98a6a", "#b8433c", "BAKERY")
    shop(b.at(300, 500), 350, 470, "#d9c08c", "#3f7a62", "BOOKS")
    shop(b.at(650, 500), 400, 405, "#8fa6b2", "#35618f", "FLOWERS")
    b.shape(box(0, 498, 1024, 604), Grad("#b9b1a6", "#d3cabb"))
    for i in range(-6, 20):
        x = 512 + (i - 6.5) * 84
        b.shape([(x, 498), (x + 2, 498), (512 + (x - 512) * 1.25 + 3, 604), (512 + (x - 512) * 1.25, 604)], "#8f877c",
                opacity=0.6)  # fmt: skip
    b.shape(box(0, 542, 1024, 544), "#8f877c", opacity=0.6)
    b.shape(box(0, 604, 1024, 616), Grad("#e4ddd0", "#8f877c"))
    b.shape(box(0, 616, 1024, 683), Grad("#5b5a62", "#46454d"))
    for x in range(-40, 1024, 190):
        b.shape([(x, 656), (x + 100, 656), (x + 94, 666), (x - 6, 666)], "#ece6d2", opacity=0.85)
    leafy_tree(b.at(955, 560), 9)
    lamp_post(b.at(335, 548))
    walker = Look("#3c6aa0", "#3d3a46", "#5b3a26", scarf="#c8463c")
    umbrella_brush = b.at(205, 572, 2.35)
    umbrella(umbrella_brush.at(17.6, -78), ("#e4b43a", "#f7e2a0"))
    person(umbrella_brush, walker, raised=True)
    person(b.at(560, 585, 2.45), Look("#f2bd2c", "#35506e", "#2f2226", "#c98d63", shoes="#7a3f2c", long_hair=True))
    dog(b.at(686, 592, 1.75))
    b.shape(ribbon((560 + 36, 486, 2), (640, 520, 1.6), (711, 545, 2)), "#5a2f35")
    person(b.at(825, 572, 2.3), Look("#a5463f", "#4a4a52", "#b9b2a8", "#e9b793", hat="#4c6b57", scarf="#e7dcc2"))
    return c


# --------------------------------------------------------------------------------------------------------------------
# Things in a room
# --------------------------------------------------------------------------------------------------------------------


def pot(b: Brush, colour: str = "#c8714a") -> None:
    """A clay pot forty units high with a rim."""
    b.shadow(4, -1, 26, 4, 0.45)
    b.solid([(-19, -34), (19, -34), (14, 0), (-14, 0)], Grad(lighter(colour, 0.1), darker(colour, 0.15), 0.6))
    b.shape(box(-19, -33, 19, -29), "#3a1d20", blur=1.2, opacity=0.4)
    b.shape(oval(0, -41, 21, 3.4), "#4a3026")
    b.solid(box(-23, -42, 23, -32, 2), Grad(lighter(colour, 0.25), colour, 0.6))


def spines(b: Brush, clip: Mask, area: tuple[float, float, float, float], seed: int) -> None:
    rng = random.Random(seed)
    for x, y in jittered(rng, area, 7, 0.12):
        for turn in (-60, 0, 60):
            dx, dy = 2.2 * math.sin(math.radians(turn)), -2.2 * math.cos(math.radians(turn))
            b.shape(line(x, y, x + dx, y + dy, 0.45), "#f6f0cf", clip, opacity=0.9)


def stem(b: Brush, path: Sequence[tuple[float, float, float]], seed: int) -> None:
    outline = ribbon(*path)
    clip = b.solid(outline, Grad("#7fb25a", "#457a3c", 0.8), depth=0.55)
    for offset in (-0.28, 0.0, 0.28):
        rib = ribbon(*((x + offset * width, y, width * 0.07) for x, y, width in path))
        b.shape(rib, "#2f5c30", clip, opacity=0.55)
    spines(b, clip, bounds(outline), seed)


def cactus(b: Brush) -> None:
    """A potted column cactus with two arms, a hundred and forty units tall."""
    stem(b, [(-8, -78, 12), (-24, -80, 12), (-27, -92, 12), (-27, -104, 11)], 2)
    stem(b, [(8, -62, 12), (24, -64, 12), (28, -76, 12), (28, -92, 11)], 3)
    stem(b, [(0, -36, 22), (0, -80, 25), (0, -126, 22)], 1)
    pot(b)


def ball_cactus(b: Brush) -> None:
    """A potted round cactus with a pink flower, a hundred units tall."""
    outline = oval(0, -64, 31, 29)
    clip = b.solid(outline, Grad("#86b86a", "#3f7446", 0.5), depth=0.6)
    for reach in (-26, -16, -5, 5, 16, 26):
        b.shape(
            ribbon((reach * 0.3, -94, 0.6), (reach, -64, 1.4), (reach * 0.5, -34, 0.6)), "#2f5c30", clip, opacity=0.6
        )
    spines(b, clip, (-31, -93, 31, -35), 5)
    for turn in range(-75, 76, 25):
        petal = b.at(2, -90, 17, turn=turn - 90)
        petal.solid(blob((0, 0), (0.4, -0.24), (1, 0), (0.4, 0.24)), Grad("#f7a6c4", "#d94f8a"))
    b.shape(oval(2, -92, 4.4, 3.6), "#f4c94a")
    pot(b, "#d9c8a8")


def mug(b: Brush, colour: str, steam: bool = True) -> None:
    """A mug fifty units high with its handle on the right."""
    b.shadow(6, -1, 28, 4, 0.45)
    b.shape(ribbon((19, -40, 6), (35, -38, 6), (35, -18, 6), (17, -12, 6)), Grad(colour, darker(colour, 0.25)))
    body = [(-22, -48), (22, -48), (21, -8), *arc(0, -8, 21, 7, 0, 180), (-21, -8)]
    clip = b.solid(body, Grad(lighter(colour, 0.25), darker(colour, 0.1), 1))
    b.shape(box(-22, -32, 22, -28), "#fbf3e2", clip, opacity=0.9)
    b.shape(oval(0, -48, 22, 5), lighter(colour, 0.4))
    b.shape(oval(0, -47.4, 19.5, 3.8), "#5a3622")
    for x in (-6, 6) if steam else ():
        b.shape(ribbon((x, -52, 2), (x - 5, -62, 4), (x + 4, -72, 4), (x - 2, -84, 1)), "#ffffff", blur=2, opacity=0.5)


def book_pile(b: Brush, colours: Sequence[str]) -> None:
    """Books lying on each other, about a hundred and ten units wide."""
    rng = random.Random(len(colours))
    b.shadow(6, -1, 66, 5, 0.45)
    y = 0.0
    for colour in colours:
        shift, thick = rng.uniform(-8, 8), rng.uniform(17, 24)
        x0, x1 = -56 + shift, 56 + shift + rng.uniform(-10, 4)
        b.solid(box(x0, y - thick, x1, y, 3), Grad(lighter(colour, 0.15), darker(colour, 0.15)), depth=0.3)
        for x in (x0 + 12, x1 - 15):
            b.shape(box(x, y - thick, x + 3, y), "#f0d9a0", opacity=0.85)
        b.shape(box(x0 + 30, y - thick * 0.58, x1 - 34, y - thick * 0.42), "#f0d9a0", opacity=0.7)
        y -= thick


FUR, FUR_DARK, FUR_PALE = "#e59a4e", "#b8682a", "#fbe7cb"


def cat_eye(b: Brush, x: float, mood: str) -> None:
    if mood == "asleep":
        b.shape(ribbon((x - 5, -2, 1.3), (x, 0.8, 1.6), (x + 5, -2, 1.3)), "#4a2a20")
        return
    ball = oval(x, -3, 5.4, 6.2)
    clip = b.mask(ball)
    b.shape(ball, Grad("#cfe08a", "#8fb44c"))
    drop = 1.6 if mood == "tired" else 0.0
    b.shape(oval(x, -3 + drop, 2.6, 4.6), "#231815", clip)
    b.shape(oval(x + 1.2, -5 + drop, 1.1, 1.2), "#ffffff", clip)
    if mood == "tired":
        b.shape(box(x - 7, -12, x + 7, -3), darker(FUR, 0.12), clip)
        b.shape(line(x - 5.6, -3, x + 5.6, -3, 1.3), "#5a2f1e")
        for y, width in ((5.2, 1.2), (7.6, 0.9)):
            b.shape(ribbon((x - 4.5, y - 1.2, width), (x, y + 0.6, width), (x + 4.5, y - 1.2, width)), "#8a4a5a",
                    opacity=0.8)  # fmt: skip


def cat_head(b: Brush, mood: str) -> None:
    """A ginger cat's head about sixty units wide; mood is awake, tired or asleep."""
    sag = 9.0 if mood == "tired" else 0.0
    for side in (-1, 1):
        b.solid(
            blob((side * 8, -20), (side * 20, -34 + sag), (side * (27 + sag / 2), -38 + sag), (side * 28, -12)), FUR
        )
        b.shape(blob((side * 14, -20), (side * 21, -29 + sag), (side * (25 + sag / 3), -32 + sag), (side * 25, -16)),
                "#e8a79a")  # fmt: skip
    head = blob((0, -25), (16, -23), (28, -10), (31, 6), (20, 20), (0, 24), (-20, 20), (-31, 6), (-28, -10), (-16, -23))
    clip = b.solid(head, Grad(lighter(FUR, 0.18), FUR))
    for x, tall in ((-7, 11), (0, 14), (7, 11)):
        b.shape(ribbon((x, -27, 3.4), (x * 0.9, -24 + tall, 1)), FUR_DARK, clip)
    for side in (-1, 1):
        for y in (3.0, 10.0):
            b.shape(ribbon((side * 32, y - 2, 3), (side * 21, y + 1, 0.6)), FUR_DARK, clip)
        cat_eye(b, side * 12.5, mood)
    b.shape(oval(-6, 11.5, 8.4, 6.6), FUR_PALE)
    b.shape(oval(6, 11.5, 8.4, 6.6), FUR_PALE)
    b.shape(oval(0, 16.4, 6, 4.6), FUR_PALE)
    b.shape(blob((-3.6, 5.6), (0, 4.6), (3.6, 5.6), (0, 9.4)), "#cf6a66")
    curl = -1.6 if mood == "tired" else 1.8
    for side in (-1, 1):
        b.shape(ribbon((0, 9, 0.9), (side * 1.4, 12.4, 0.9), (side * 6.4, 12 + (1.4 - curl), 0.9)), "#5a2f2a")
        for y in (9, 12.5):
            b.shape(
                ribbon((side * 12, y, 0.7), (side * 26, y - 2 + sag / 5, 0.6), (side * 38, y + sag / 2, 0.2)), "#fff8ec"
            )


def cat_asleep(b: Brush) -> None:
    """A curled up cat about a hundred and sixty units wide."""
    b.shadow(6, -2, 90, 8, 0.45)
    body = blob((-80, -26), (-64, -58), (-20, -78), (34, -72), (74, -44), (82, -14), (50, -1), (-50, -1), (-78, -8))
    clip = b.solid(body, Grad(lighter(FUR, 0.15), FUR), depth=0.5)
    for x in (-8, 12, 32, 52):
        b.shape(ribbon((x, -82, 7), (x + 9, -60, 5), (x + 12, -44, 1)), FUR_DARK, clip)
    b.shape(ribbon((40, -26, 3), (52, -44, 2), (72, -42, 1)), darker(FUR, 0.3), clip, opacity=0.6)
    b.solid(ribbon((76, -16, 17), (40, -7, 17), (0, -8, 16), (-30, -7, 13)), FUR)
    for x in (50, 25, 0):
        b.shape(ribbon((x - 2, -16, 4), (x, 0, 4)), FUR_DARK)
    cat_head(b.at(-52, -34, 1.0, turn=-8), "asleep")


def sill_view(b: Brush, width: float, height: float) -> None:
    """What is to be seen through a large window: sky, hills and a lake."""
    view = box(0, 0, width, height)
    clip = b.mask(view)
    b.shape(view, Grad("#86bfe0", "#f2efdc"))
    for x, y, rx, ry in ((140, 90, 70, 18), (190, 78, 50, 20), (600, 130, 80, 18), (660, 116, 46, 20)):
        b.shape(oval(x, y, rx, ry), "#ffffff", clip, blur=3, opacity=0.85)
    hills = [(-60, 300), (90, 210), (240, 270), (400, 180), (560, 260), (720, 200), (900, 290)]
    b.shape([(p[0], p[1]) for p in spline(hills)] + [(900, 420), (-60, 420)], Grad("#8aa9a8", "#a9c29c"), clip)
    hills = [(-60, 330), (160, 290), (380, 330), (600, 285), (900, 330)]
    b.shape([(p[0], p[1]) for p in spline(hills)] + [(900, 460), (-60, 460)], Grad("#6f9a5c", "#a4c07a"), clip)
    b.shape(oval(420, 430, 300, 50), Grad("#a9d2e4", "#6fa8c6"), clip)


def window_sill() -> Canvas:
    c = Canvas(960, 720, Grad("#e8d9c4", "#d3bfa4"))
    b = c.brush()
    sill_view(b.at(90, 50), 780, 480)
    frame = "#f8f4ea"
    for x in (74, 466, 866):
        b.shape(box(x, 34, x + 22, 540), Grad(frame, "#d9d0bf", 1))
    for y in (34, 214):
        b.shape(box(74, y, 888, y + 18), Grad(frame, "#d9d0bf"))
    for side in (0, 1):
        x0, x1 = (0, 120) if side == 0 else (840, 960)
        b.solid(blob((x0, -20), (x1, -20), (x1 - 12 + 24 * side, 250), (x1 if side else x1 + 10, 560), (x0, 560)),
                Grad("#c9d7c2", "#9db59a", 1))  # fmt: skip
    b.shape(box(0, 530, 960, 640), Grad("#f7f0e2", "#dccfb8"))
    b.shape(box(0, 640, 960, 664), Grad("#c4b395", "#a8967a"))
    b.shape(box(0, 664, 960, 684), "#3a2a30", blur=8, opacity=0.35)
    b.shape(box(0, 664, 960, 720), Grad("#cdb898", "#dac8ac"), opacity=0.6)
    cat_asleep(b.at(235, 610, 1.35))
    book_pile(b.at(470, 596, 1.15), ("#35618f", "#b8433c", "#4c7a5c", "#d8a23c"))
    cactus(b.at(655, 600, 1.85))
    mug(b.at(820, 615, 1.35), "#4f7fae")
    mark(b, 578, 312, 734, 612)
    return c


def mark(b: Brush, x0: float, y0: float, x1: float, y1: float, width: float = 6) -> None:
    """The outline of a red rectangle."""
    for edge in (box(x0, y0, x1, y0 + width), box(x0, y1 - width, x1, y1), box(x0, y0, x0 + width, y1),
                 box(x1 - width, y0, x1, y1)):  # fmt: skip
        b.shape(edge, "#ff1a1a")


def desk_lamp(b: Brush) -> None:
    """A lamp two hundred and sixty units tall that shines to the right."""
    b.shape([(52, -222), (92, -202), (250, 0), (20, 0)], "#fff0b0", blur=14, opacity=0.45)
    b.shadow(4, -2, 48, 7, 0.45)
    b.solid(arc(0, -4, 44, 18, 180, 360) + arc(0, -4, 44, 7, 0, 180), "#3f7a72")
    b.shape(line(0, -18, -38, -130, 6), "#c9b27a")
    b.shape(line(-38, -130, 48, -232, 6), "#c9b27a")
    b.shape(oval(-38, -130, 7, 7), "#3f7a72")
    b.solid([(36, -252), (60, -262), (112, -206), (46, -186)], Grad("#5f9f95", "#3f7a72"))
    b.shape(oval(79, -196, 33, 8, -17), "#fff3c6")


def laptop(b: Brush) -> None:
    """An open laptop three hundred units wide."""
    b.shadow(0, -1, 185, 9, 0.45)
    b.shape(box(-150, -212, 150, -16, 10), Grad("#5a5f68", "#3c4048"))
    screen = box(-139, -201, 139, -28)
    clip = b.mask(screen)
    b.shape(screen, Grad("#26384f", "#3f6079"))
    b.shape(box(-126, -188, -20, -42, 4), "#f4f1e8", clip)
    for i in range(8):
        b.shape(box(-116, -176 + i * 16, -116 + (84, 70, 88, 40, 80, 66, 88, 52)[i], -170 + i * 16, 2), "#8a9099", clip)
    for i, tall in enumerate((34, 58, 46, 82, 104)):
        b.shape(box(4 + i * 24, -50 - tall, 20 + i * 24, -50, 2), ("#e0a13c", "#5fa08a", "#d2604a")[i % 3], clip)
    b.shape([(-60, -28), (30, -201), (80, -201), (-10, -28)], "#ffffff", clip, opacity=0.08)
    b.shape([(-150, -18), (150, -18), (184, -4), (-184, -4)], Grad("#b9bdc4", "#d9dce0"))
    b.shape([(-132, -15), (132, -15), (140, -9), (-140, -9)], "#4a4e56")
    b.shape(box(-184, -5, 184, 2, 3), "#8d929a")


def pencil_pot(b: Brush) -> None:
    for x, lean, colour in ((-12, -14, "#d8a23c"), (-3, -3, "#c8463c"), (6, 6, "#4f7fae"), (13, 16, "#5fa05a")):
        b.shape(line(x, -40, x + lean, -112, 8), Grad(lighter(colour, 0.2), colour, 1))
        b.shape(blob((x + lean - 4, -110), (x + lean + 4, -110), (x + lean * 1.1, -124)), "#f0d3a8")
    b.shadow(4, -1, 30, 4, 0.45)
    body = [(-25, -64), (25, -64), (24, -6), *arc(0, -6, 24, 6, 0, 180), (-24, -6)]
    b.solid(body, Grad("#f0e3cb", "#c4a98a", 1))
    for y in (-52, -20):
        b.shape(box(-24.6, y, 24.6, y + 5), "#a5563c", opacity=0.8)


def desk() -> Canvas:
    c = Canvas(1024, 768, Grad("#b9cbc6", "#d9e0d4"))
    b = c.brush()
    b.shape(box(688, 92, 908, 292), "#3a2a30", blur=8, opacity=0.3)
    b.shape(box(680, 80, 900, 280), Grad("#8a5a38", "#6b4228"))
    b.shape(box(694, 94, 886, 266), "#f8f4ea")
    picture = box(714, 114, 866, 246)
    clip = b.mask(picture)
    b.shape(picture, Grad("#f2b27a", "#f7e2b0"))
    b.shape(oval(800, 190, 22, 22), "#fbf3d6", clip)
    b.shape(blob((690, 250), (740, 190), (790, 226), (836, 182), (890, 250)), "#6d6a8a", clip)
    wood(b, 560, 12, ("#d2a06a", "#94603a"))
    desk_lamp(b.at(130, 640, 1.35))
    laptop(b.at(480, 640, 1.25))
    pencil_pot(b.at(735, 622, 1.3))
    ball_cactus(b.at(882, 690, 1.75))
    mug(b.at(250, 720, 1.5), "#c8563f")
    book_pile(b.at(590, 730, 0.95), ("#6b4f8a", "#3f7a62"))
    return c


# --------------------------------------------------------------------------------------------------------------------
# Kitchen
# --------------------------------------------------------------------------------------------------------------------


def fridge(b: Brush) -> None:
    """A fridge two hundred units wide and four hundred and eighty tall."""
    b.shadow(100, 0, 120, 10, 0.4)
    b.solid(box(0, -480, 200, -6, 16), Grad("#e3ecec", "#b9c8ca", 0.9))
    b.shape(box(0, -322, 200, -317), "#8a9a9c")
    for y0, y1 in ((-420, -350), (-290, -180)):
        b.shape(box(172, y0, 182, y1, 5), Grad("#9aa8aa", "#5f6c70", 1))
    b.shape(box(40, -275, 96, -205), "#fdf6d8")
    for i in range(4):
        b.shape(box(48, -262 + i * 12, 48 + (38, 30, 36, 20)[i], -259 + i * 12), "#7a8a9a")
    b.shape(oval(68, -275, 6, 6), "#d2463c")
    for x in (14, 170):
        b.shape(box(x, -8, x + 18, 0), "#3a3a40")


def cupboards(b: Brush, width: float, count: int) -> None:
    """A row of floor cupboards two hundred units high with a worktop."""
    b.shape(box(0, -190, width, -14), "#6f8f86")
    step = width / count
    for i in range(count):
        x = i * step
        b.solid(box(x + 5, -184, x + step - 5, -20, 4), Grad("#8fb0a4", "#7a9d92"), depth=0.25)
        b.shape(box(x + 20, -168, x + step - 20, -36, 3), Grad("#7a9d92", "#8fb0a4"))
        b.shape(box(x + step / 2 - 16, -178, x + step / 2 + 16, -172, 3), "#e0c486")
    b.shape(box(0, -14, width, 0), "#3f4a4c")
    b.shape(box(-8, -204, width + 8, -186, 3), Grad("#d9b283", "#a87848"))
    b.shape(box(0, -186, width, -178), "#2a1a30", blur=3, opacity=0.4)


def tap(b: Brush) -> None:
    b.shape(ribbon((0, -5, 9), (0, -52, 9), (14, -78, 9), (38, -72, 8), (42, -52, 8)), Grad("#e2e8ea", "#8d999d", 1))
    b.shape(box(-12, -8, 12, 0, 3), "#8d999d")
    b.shape(line(0, -22, -18, -30, 5), "#a9b4b8")


def cooking_pot(b: Brush) -> None:
    b.solid(box(-52, -58, 52, 0, 10), Grad("#d2604a", "#9c3a30", 0.7), depth=0.5)
    for side in (-1, 1):
        b.shape(ribbon((side * 50, -44, 6), (side * 66, -42, 6), (side * 66, -32, 6), (side * 50, -30, 6)), "#4a3a3a")
    b.shape(arc(0, -58, 54, 16, 180, 360), Grad("#e8806a", "#b04a3c"))
    b.shape(box(-56, -61, 56, -55, 3), "#7a2f2a")
    b.shape(oval(0, -76, 8, 6), "#3a2f30")


def rubbish_bin(b: Brush) -> None:
    """A pedal bin with its lid open and a bag inside, a hundred and eighty units tall."""
    b.shadow(4, -2, 64, 9, 0.5)
    b.shape(oval(0, -150, 50, 11), "#23262b")
    lid = blob((-50, -156), (-44, -204), (0, -222), (44, -204), (50, -156), (0, -166))
    b.solid(lid, Grad("#6d747c", "#3f454c"), depth=0.5)
    b.shape(blob((-38, -164), (-32, -196), (0, -208), (32, -196), (38, -164), (0, -172)), "#2d3238", opacity=0.6)
    crumple = blob((-34, -152), (-26, -170), (-8, -164), (4, -178), (22, -170), (34, -154), (0, -144))
    b.solid(crumple, "#efe9dc")
    for x in (-18, 0, 14):
        b.shape(ribbon((x, -164, 0.8), (x + 5, -156, 1), (x + 2, -150, 0.6)), "#b9ae9a")
    body = [*arc(0, -150, 50, 11, 180, 0), (46, -10), *arc(0, -10, 46, 10, 0, 180)]
    clip = b.solid(body, Grad("#dfe4e8", "#8b949c", 1), depth=0.6)
    b.shape(box(-30, -150, -18, 0), "#ffffff", clip, blur=4, opacity=0.7)
    bag = [(x, y - 3) for x, y in arc(0, -150, 51, 11, 180, 0)]
    hem = [(x, -128 + 8 * math.cos(x * 0.33) + 9 * (1 - (x / 51) ** 2)) for x in range(51, -52, -3)]
    b.solid([*bag, *hem], Grad("#4a4f57", "#2c3036"), depth=0.3)
    b.shape(box(-47, -20, 47, -10), "#3a4047", clip, opacity=0.85)
    b.shape(blob((-16, -4), (16, -4), (20, 7), (-20, 7)), "#2c3036")


def rubbish_bag(b: Brush) -> None:
    """A tied bag a hundred units tall."""
    b.shadow(4, -2, 54, 8, 0.45)
    outline = blob((-46, -6), (-54, -34), (-36, -66), (-10, -84), (10, -84), (38, -64), (54, -32), (44, -5), (0, 0))
    clip = b.solid(outline, Grad("#565c66", "#2a2d34"), depth=0.5)
    b.shape(blob((-10, -80), (-22, -104), (-4, -96), (6, -108), (12, -94), (24, -100), (11, -80)), "#3a3e46")
    b.shape(ribbon((-12, -83, 5), (0, -80, 5), (12, -83, 5)), "#c8463c")
    for x0, x1 in ((-6, -34), (0, -8), (6, 30)):
        b.shape(ribbon((x0, -78, 1.5), ((x0 + x1) / 2 - 3, -52, 4), (x1, -22, 1)), "#8a929e", clip, 1, 0.6)


def chair(b: Brush) -> None:
    """A wooden chair seen from the front, two hundred and thirty units tall."""
    b.shadow(0, 0, 70, 8, 0.35)
    tone = "#b9814c"
    for x in (-44, 44):
        b.solid(box(x - 6, -232, x + 6, -20, 4), darker(tone, 0.15), depth=0.3)
    for y in (-222, -186, -150):
        b.solid(box(-42, y, 42, y + 18, 6), lighter(tone, 0.1), depth=0.3)
    for x in (-52, 52):
        b.solid(box(x - 7, -108, x + 7, 0, 3), tone, depth=0.4)
    b.solid([(-52, -126), (52, -126), (64, -106), (-64, -106)], lighter(tone, 0.25), depth=0.2)
    b.shape(box(-64, -106, 64, -94, 3), Grad(tone, darker(tone, 0.2)))
    b.shape(box(-50, -56, 50, -48), darker(tone, 0.1))


def floor_tiles(b: Brush, top: float) -> None:
    width, height = b.canvas.width, b.canvas.height
    area = box(0, top, width, height)
    clip = b.mask(area)
    b.shape(area, Grad("#c9b89c", "#e3d5ba"))
    for i in range(-12, 13):
        x = width / 2 + i * 90
        b.shape(line(width / 2 + i * 70, top, x + i * 50, height, 2), "#a8957a", clip, opacity=0.6)
    for i in range(1, 6):
        b.shape(box(0, top + 9 * i * i, width, top + 9 * i * i + 2), "#a8957a", clip, opacity=0.6)


def wall_tiles(b: Brush, top: float, bottom: float) -> None:
    b.shape(box(0, top, b.canvas.width, bottom), "#d2d8d2")
    rng = random.Random(2)
    row, y = 0, top
    while y < bottom:
        for x in range(-60 + (row % 2) * 30, b.canvas.width, 60):
            tone = mix("#f4f3ea", "#dfe6de", rng.random())
            b.shape(box(x + 1, y + 1, x + 59, y + 27, 2), tone)
        row, y = row + 1, y + 28


def kitchen() -> Canvas:
    c = Canvas(1024, 768, Grad("#f3e3c4", "#ecd8b4"))
    b = c.brush()
    wall_tiles(b, 280, 400)
    window(b.at(380, 262), 250, 200)
    floor_tiles(b, 560)
    cupboards(b.at(270, 580), 480, 4)
    for i in range(2):
        b.shape(box(770, 120 + i * 92, 985, 130 + i * 92), Grad("#c99a68", "#94683e"))
        b.shape(box(775, 130 + i * 92, 980, 136 + i * 92), "#2a1a30", blur=3, opacity=0.3)
    mug(b.at(820, 120, 0.9), "#d2604a", steam=False)
    mug(b.at(890, 120, 0.9), "#5f8fae", steam=False)
    for x, colour in ((800, "#d8a23c"), (850, "#7a9a4a"), (900, "#b5542f"), (950, "#e3d3b0")):
        b.solid(box(x - 18, 160, x + 18, 212, 5), lighter(colour, 0.25), depth=0.3)
        b.shape(box(x - 20, 154, x + 20, 164, 3), "#7a5236")
    tap(b.at(480, 378))
    cooking_pot(b.at(680, 377))
    apple(b.at(330, 377, 15), "#c22a2a")
    apple(b.at(364, 377, 15), "#86ad3c")
    apple(b.at(398, 378, 15), "#c22a2a")
    fridge(b.at(40, 600))
    chair(b.at(345, 715, 1.05))
    rubbish_bag(b.at(640, 700, 1.0))
    rubbish_bin(b.at(850, 690, 1.35))
    return c


# --------------------------------------------------------------------------------------------------------------------
# Friday and Monday
# --------------------------------------------------------------------------------------------------------------------


def cat_sitting(b: Brush) -> None:
    """A cat that sits upright, about a hundred and fifty units tall, without its head."""
    b.shadow(0, 0, 56, 7, 0.45)
    b.solid(ribbon((30, -12, 12), (58, -16, 12), (70, -44, 12), (60, -72, 9)), FUR)
    for x, y in ((50, -16), (66, -32), (67, -54)):
        b.shape(oval(x, y, 7, 3.4, -50), FUR_DARK)
    body = blob((0, -104), (22, -94), (32, -60), (42, -24), (32, -1), (-32, -1), (-42, -24), (-32, -60), (-22, -94))
    clip = b.solid(body, Grad(lighter(FUR, 0.15), FUR))
    b.shape(oval(0, -58, 17, 34), FUR_PALE, clip, 2, 0.9)
    for side in (-1, 1):
        for y in (-70, -54, -38):
            b.shape(ribbon((side * 46, y - 4, 6), (side * 24, y, 1)), FUR_DARK, clip)
        b.solid(oval(side * 31, -17, 17, 20, side * 20), FUR, depth=0.3)
        b.solid(oval(side * 35, -6, 15, 8.5), FUR_PALE, depth=0.25)
        for x in (30, 36, 42):
            b.shape(oval(side * x, -7, 2, 2.4), "#e8a79a")


def friday_cat(b: Brush) -> None:
    cat_sitting(b)
    for side in (-1, 1):
        b.solid(ribbon((side * 26, -84, 15), (side * 48, -106, 13), (side * 52, -130, 12)), FUR)
        b.shape(oval(side * 52, -136, 8, 7.4), FUR_PALE)
    head = b.at(0, -122, 1.15, turn=-6)
    cat_head(head, "awake")
    glasses = "#22222c"
    for side in (-1, 1):
        b_clip = head.solid(
            blob((side * 2, -11), (side * 24, -12), (side * 24, 0), (side * 14, 5), (side * 4, 0)), glasses
        )
        head.shape([(side * 8, 4), (side * 15, -12), (side * 19, -12), (side * 12, 4)], "#8fb4d8", b_clip, opacity=0.6)
    head.shape(line(-26, -10, 26, -10, 2.6), glasses)
    cone = [(-14, -23), (14, -23), (0, -64)]
    clip = head.mask(cone)
    head.shape(cone, Grad("#e0508a", "#b52f6a"))
    for y in (-30, -42, -54):
        head.shape(ribbon((-16, y, 3), (16, y - 7, 3)), "#ffe08a", clip)
    head.shape(oval(0, -65, 5, 5), "#5fb4c8")


def monday_cat(b: Brush) -> None:
    """The same cat, poured over the table."""
    b.shadow(6, 0, 128, 9, 0.5)
    b.solid(ribbon((104, -10, 15), (138, -10, 13), (152, 14, 11), (150, 44, 8)), FUR)
    body = blob((-60, -18), (-30, -44), (30, -50), (84, -42), (116, -20), (112, -1), (-40, 0))
    clip = b.solid(body, Grad(lighter(FUR, 0.05), darker(FUR, 0.08)))
    for x in (10, 32, 54, 76):
        b.shape(ribbon((x, -56, 7), (x + 8, -34, 4), (x + 10, -22, 1)), FUR_DARK, clip)
    for x0, x1, y in ((-30, -118, -4), (-20, 30, 0)):
        b.solid(ribbon((x0, -12, 17), ((x0 + x1) / 2, -8, 15), (x1, y - 4, 14)), FUR)
        b.shape(oval(x1, y - 4, 9, 7), FUR_PALE)
    flat = b.at(-48, -27, 1.3, turn=-7)
    cat_head(flat, "tired")


def alarm_clock(b: Brush) -> None:
    """A ringing alarm clock eighty units tall that shows half past six."""
    b.shadow(0, 0, 32, 4, 0.4)
    metal = "#b8433c"
    for side in (-1, 1):
        b.shape(line(side * 14, -10, side * 22, 0, 5), "#5a3a3a")
        b.solid(blob((side * 6, -66), (side * 16, -76), (side * 28, -68), (side * 30, -56)), lighter(metal, 0.2))
        for i, turn in enumerate((20, 42, 64)):
            x, y = side * math.cos(math.radians(turn)), -math.sin(math.radians(turn))
            reach = 48 + 4 * (i % 2)
            b.shape(line(x * reach, -36 + y * reach, x * (reach + 10), -36 + y * (reach + 10), 2.4), "#e8c35c")
    b.solid(oval(0, -36, 33, 33), metal)
    b.shape(oval(0, -36, 26, 26), "#fdf8ea")
    for hour in range(12):
        angle = math.radians(hour * 30)
        b.shape(oval(22 * math.sin(angle), -36 - 22 * math.cos(angle), 1.3, 1.3), "#4a3a3a")
    angle = math.radians(195)
    b.shape(line(0, -36, 12 * math.sin(angle), -36 - 12 * math.cos(angle), 3), "#2d2428")
    b.shape(line(0, -36, 0, -17, 2.2), "#2d2428")
    b.shape(oval(0, -36, 2.4, 2.4), metal)


def confetti(b: Brush, width: float, height: float) -> None:
    rng = random.Random(5)
    for _ in range(90):
        x, y, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(4, 8)
        tone = rng.choice(("#e0508a", "#4f9fd8", "#f4c94a", "#6fbf73", "#a46fd0"))
        b.shape(swung(box(x, y, x + size, y + size * 0.5), rng.uniform(0, 180), (x, y)), tone)


def rainy_window(b: Brush) -> None:
    window(b, 190, 180, "#c9ccd2")
    pane = box(0, -180, 190, 0)
    clip = b.mask(pane)
    b.shape(pane, Grad("#6f7c8a", "#98a3ad"), clip, opacity=0.85)
    rng = random.Random(8)
    for _ in range(60):
        x, y = rng.uniform(0, 200), rng.uniform(-180, 0)
        b.shape(line(x, y, x - 5, y + 17, 1.4), "#dfe8ee", clip, opacity=0.7)
    b.shape(box(93, -180, 97, 0), "#c9ccd2")


def friday_and_monday() -> Canvas:
    c = Canvas(1100, 700, "#ffffff")
    b = c.brush()
    b.shape(box(0, 0, 546, 700), Grad("#ffd98a", "#f7a26a"))
    for i in range(14):
        a0, a1 = math.radians(i * 360 / 14), math.radians((i + 0.5) * 360 / 14)
        ray = [(273, 330), (273 + 800 * math.cos(a0), 330 + 800 * math.sin(a0)),
               (273 + 800 * math.cos(a1), 330 + 800 * math.sin(a1))]  # fmt: skip
        b.shape(ray, "#fff3c6", b.mask(box(0, 0, 546, 700)), opacity=0.35)
    confetti(b, 536, 560)
    b.shape(box(0, 560, 546, 700), Grad("#c97a4a", "#a85a34"))
    friday_cat(b.at(273, 592, 2.3))
    b.shape(box(554, 0, 1100, 700), Grad("#9aa5b4", "#c3c8ce"))
    rainy_window(b.at(620, 320))
    b.shape(box(554, 520, 1100, 700), Grad("#8d7f78", "#6d605c"))
    b.shape(box(554, 520, 1100, 528), "#b0a39a")
    alarm_clock(b.at(985, 535, 1.7))
    mug(b.at(625, 545, 1.7), "#5f6f86")
    monday_cat(b.at(806, 622, 1.6))
    b.shape(box(546, 0, 554, 700), "#ffffff")
    for x, words in ((273, "FRIDAY"), (827, "MONDAY")):
        b.text(x + 2, 58, words, 66, "#3a2a30", bold=4)
        b.text(x, 55, words, 66, "#ffffff", bold=1.2)
    return c


# --------------------------------------------------------------------------------------------------------------------
# Chart, receipt, table, logo
# --------------------------------------------------------------------------------------------------------------------

LENT = {
    "January": 420,
    "February": 385,
    "March": 510,
    "April": 465,
    "May": 340,
    "June": 295,
    "July": 610,
    "August": 575,
}


def bar_chart() -> Canvas:
    c = Canvas(960, 640, "#fdfcf8")
    b = c.brush()
    b.text(480, 48, "Books lent by the town library in 2023", 31, "#27323c", bold=0.5)
    b.text(480, 84, "Number of books per month", 18, "#6a747c")
    left, bottom, height = 100, 545, 420
    for value in range(0, 701, 100):
        y = bottom - height * value / 700
        b.shape(box(left, y - 0.8, 920, y + 0.8), "#d9d8d0" if value else "#4a545c")
        b.text(left - 14, y, str(value), 17, "#4a545c", "rm")
    step = (920 - left) / len(LENT)
    for i, (month, value) in enumerate(LENT.items()):
        x, top = left + step * i + step * 0.19, bottom - height * value / 700
        tone = "#e08a3c" if value == max(LENT.values()) else "#4f86a8"
        b.shape(box(x, top, x + step * 0.62, bottom - 1), Grad(lighter(tone, 0.15), tone))
        b.shape(box(x + 12, top - 26, x + step * 0.62 - 12, top - 2), "#fdfcf8")
        b.text(x + step * 0.31, top - 14, str(value), 18, "#27323c", bold=0.4)
        b.text(x + step * 0.31, bottom + 24, month, 17, "#27323c")
    b.text(510, 610, "Month", 18, "#6a747c")
    return c


RECEIPT = [
    ("Wholemeal bread", "3.20"),
    ("Oat milk 1 l  x 2", "4.58"),
    ("Tomatoes 0.76 kg", "2.66"),
    ("Free range eggs x 10", "3.95"),
    ("Mountain cheese 250 g", "5.40"),
    ("Apples 1.2 kg", "3.48"),
    ("Dark chocolate", "1.99"),
]


def dashes(b: Brush, y: float, width: float) -> None:
    for x in range(40, round(width) - 40, 14):
        b.shape(box(x, y, x + 8, y + 1.6), "#6a6660")


def receipt_paper(width: int, height: int) -> Canvas:
    c = Canvas(width, height, Grad("#fdfbf5", "#f1ede2", 0.3))
    b = c.brush()
    ink, middle, right = "#2c2a2e", width / 2, width - 42
    b.text(middle, 62, "GREEN LEAF GROCERY", 34, ink, bold=0.8)
    for i, words in enumerate(("14 Harbour Street", "Open Monday to Saturday, 8 am - 7 pm")):
        b.text(middle, 104 + 28 * i, words, 19, ink)
    dashes(b, 162, width)
    b.text(42, 188, "Receipt No. 20417", 19, ink, "lm")
    b.text(right, 188, "18 May 2024  16:42", 19, ink, "rm")
    dashes(b, 212, width)
    y = 250.0
    for item, price in RECEIPT:
        b.text(42, y, item, 22, ink, "lm")
        b.text(right, y, price, 22, ink, "rm")
        y += 40
    dashes(b, y - 12, width)
    total = sum(float(price) for _, price in RECEIPT)
    for words, amount, size, bold in (("TOTAL", total, 30, 0.8), ("Cash", 30.0, 22, 0), ("Change", 30 - total, 22, 0)):
        y += 30 if bold else 40
        b.text(42, y, words, size, ink, "lm", bold)
        b.text(right, y, f"{amount:.2f}", size, ink, "rm", bold)
    dashes(b, y + 30, width)
    b.text(middle, y + 68, "Thank you for shopping with us!", 22, ink)
    barcode(b, middle - 150, y + 98, 300)
    return c


def barcode(b: Brush, x: float, y: float, width: float) -> None:
    rng = random.Random(20417)
    end = x + width
    while x < end:
        bar = rng.choice((2, 2, 3, 5))
        b.shape(box(x, y, x + bar, y + 56), "#2c2a2e")
        x += bar + rng.choice((2, 3, 4))


def receipt() -> Canvas:
    c = Canvas(768, 1024)
    b = c.brush()
    wood(b, 0, 17, ("#9c6a44", "#6f452b"))
    paper = receipt_paper(560, 880).image.convert("RGBA")
    turned = paper.rotate(1.6, Image.Resampling.BICUBIC, expand=True)
    x, y = (c.image.width - turned.width) // 2, (c.image.height - turned.height) // 2
    for blur, shift, opacity in ((16, 14, 0.5), (4, 4, 0.35)):
        edge = Image.new("L", c.image.size, 0)
        edge.paste(turned.getchannel("A").point(lambda v, k=opacity: int(v * k)), (x + shift * 3, y + shift * 3))
        c.image.paste("#1c120c", (0, 0, *c.image.size), edge.filter(ImageFilter.GaussianBlur(blur * SUPERSAMPLE)))
    c.image.paste(turned, (x, y), turned)
    leaf(b.at(52, 930, 130, turn=-38))
    leaf(b.at(60, 930, 96, turn=12))
    return c


PLANETS = [
    ("Planet", "Diameter (km)", "Day (hours)", "Year (days)"),
    ("Mercury", "4,879", "4,222.6", "88.0"),
    ("Venus", "12,104", "2,802.0", "224.7"),
    ("Earth", "12,756", "24.0", "365.2"),
    ("Mars", "6,792", "24.7", "687.0"),
    ("Jupiter", "142,984", "9.9", "4,331"),
]


def table() -> Canvas:
    c = Canvas(800, 420, "#ffffff")
    b = c.brush()
    left, top, columns, row_height = 40, 40, (0, 180, 390, 560, 720), 56
    for row, entries in enumerate(PLANETS):
        y = top + row * row_height
        tone = "#2f5d7c" if row == 0 else ("#eef3f6" if row % 2 == 0 else "#ffffff")
        b.shape(box(left, y, left + columns[-1], y + row_height), tone)
        for column, words in enumerate(entries):
            ink = "#ffffff" if row == 0 else "#22303a"
            if column == 0:
                b.text(left + 18, y + row_height / 2, words, 22, ink, "lm", 0.5)
            else:
                b.text(
                    left + columns[column + 1] - 18, y + row_height / 2, words, 22, ink, "rm", 0.5 if row == 0 else 0
                )
    for row in range(len(PLANETS) + 1):
        y = top + row * row_height
        b.shape(box(left, y - 0.7, left + columns[-1], y + 0.7), "#9fb2bf")
    for x in columns:
        b.shape(box(left + x - 0.7, top, left + x + 0.7, top + row_height * len(PLANETS)), "#9fb2bf")
    return c


LOGO = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128" role="img" aria-label="An eye inside a bounding box">
  <defs>
    <linearGradient id="iris" x1="0" y1="0" x2="1" y2="1">
      <stop offset="0" stop-color="#3fb6a8"/>
      <stop offset="1" stop-color="#1f5f8b"/>
    </linearGradient>
  </defs>
  <path d="M14 64 C34 30 94 30 114 64 C94 98 34 98 14 64 Z" fill="#f6faf9" stroke="#1d3f5e" stroke-width="6"
        stroke-linejoin="round"/>
  <g fill="url(#iris)">
    <rect x="45" y="45" width="17.5" height="17.5" rx="4"/>
    <rect x="65.5" y="45" width="17.5" height="17.5" rx="4"/>
    <rect x="45" y="65.5" width="17.5" height="17.5" rx="4"/>
    <rect x="65.5" y="65.5" width="17.5" height="17.5" rx="4"/>
  </g>
  <circle cx="64" cy="64" r="8" fill="#12283c"/>
  <circle cx="67" cy="61" r="2.4" fill="#ffffff"/>
  <g fill="none" stroke="#ef8354" stroke-width="6" stroke-linecap="round" stroke-linejoin="round">
    <path d="M10 30 V14 H26"/>
    <path d="M102 14 H118 V30"/>
    <path d="M118 98 V114 H102"/>
    <path d="M26 114 H10 V98"/>
  </g>
</svg>
"""


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------

DRAWINGS: dict[str, Callable[[], Canvas]] = {
    "visual_grounding.jpeg": giraffes_at_dusk,
    "visual_grounding_1.jpeg": giraffes_by_day,
    "visual_grounding_2.jpg": fruit_table,
    "visual_grounding_3.png": street,
    "incontext_visual_grounding_1.jpeg": window_sill,
    "icl_vg_2.jpeg": desk,
    "grounding_conversation_1.jpeg": kitchen,
    "monday.jpg": friday_and_monday,
    "vqa_1.jpg": bar_chart,
    "sample.jpg": receipt,
    "table.png": table,
}

PHOTOS = {
    "multi_image_1.jpeg": "coffee",
    "multi_image_2.jpeg": "chelsea",
    "multi_image_3.jpeg": "rocket",
    "vg_2.jpeg": "astronaut",
}


def photo(name: str) -> Image.Image:
    """One of the free photographs that the scikit-image package carries."""
    from skimage import data

    return Image.fromarray(getattr(data, name)())


def save(image: Image.Image, path: Path) -> None:
    if path.suffix == ".png":
        image.save(path, optimize=True)
    else:
        image.save(path, quality=88, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the example pictures of this folder.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="write only these files")
    parser.add_argument("--photos", action="store_true", help="also write the photographs, from scikit-image")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def wanted(name: str) -> bool:
        return args.only is None or name in args.only

    for name, draw in DRAWINGS.items():
        if wanted(name):
            save(draw().finish(), args.out / name)
    if wanted("logo.svg"):
        (args.out / "logo.svg").write_text(LOGO, encoding="utf-8")
    if args.photos:
        for name, source in PHOTOS.items():
            if wanted(name):
                save(photo(source), args.out / name)


if __name__ == "__main__":
    main()
