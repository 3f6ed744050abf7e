"""Draw a scene: antialiased shapes and words on a background, with some noise of a camera."""

from __future__ import annotations

from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .fonts import font_files, load_font
from .scene import Background, Label, Scene, Thing
from .shapes import ROUND
from .words import RGB, jittered

OVERSAMPLING = 2
RING_WIDTH = 0.2  # of the ring's side


@cache
def _ramp(across: bool) -> Image.Image:
    ramp = Image.linear_gradient("L")
    return ramp.transpose(Image.Transpose.ROTATE_90) if across else ramp


def draw_background(background: Background, size: tuple[int, int], rng: Random) -> Image.Image:
    """Return a field of ``size`` pixels with the background on it."""
    width, height = size
    field = Image.new("RGB", size, background.first)
    draw = ImageDraw.Draw(field)
    step = max(6, round(background.period * min(size)))
    if background.pattern == "gradient":
        field.paste(Image.new("RGB", size, background.second), mask=_ramp(background.across).resize(size))
    elif background.pattern == "stripes":
        for start in range(0, width if background.across else height, 2 * step):
            box = (start, 0, start + step, height) if background.across else (0, start, width, start + step)
            draw.rectangle(box, fill=background.second)
    elif background.pattern == "checks":
        for i in range(0, width, step):
            for j in range((i // step % 2) * step, height, 2 * step):
                draw.rectangle((i, j, i + step - 1, j + step - 1), fill=background.second)
    elif background.pattern == "dots":
        for i in range(step // 2, width, step):
            for j in range(step // 2, height, step):
                draw.ellipse((i - step // 6, j - step // 6, i + step // 6, j + step // 6), fill=background.second)
    elif background.pattern == "blotches":
        for _ in range(12):
            x, y, radius = rng.random() * width, rng.random() * height, rng.uniform(0.05, 0.25) * min(size)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=jittered(background.first, rng, 14))
    return field


def _edge(fill: RGB) -> RGB:
    return (20, 20, 20) if sum(fill) > 200 else (235, 235, 235)


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, scale: float) -> None:
    """Draw one shape; coordinates are multiplied by ``scale``."""
    edge = _edge(thing.fill) if thing.outlined else None
    if thing.kind.shape not in ROUND:
        points = [(x * scale, y * scale) for x, y in thing.points]
        draw.polygon(points, fill=thing.fill, outline=edge, width=round(scale))
        return
    left, top, right, bottom = (value * scale for value in thing.box)
    box = (left, top, right - 1, bottom - 1)
    if thing.kind.shape == "ring":
        draw.ellipse(box, outline=thing.fill, width=max(2, round(RING_WIDTH * (right - left))))
    else:
        draw.ellipse(box, fill=thing.fill, outline=edge, width=round(scale))


def draw_label(draw: ImageDraw.ImageDraw, label: Label, scale: int) -> None:
    """Draw printed words and the plate behind them."""
    if label.plate_fill is not None:
        left, top, right, bottom = (value * scale for value in label.box)
        draw.rounded_rectangle((left, top, right - 1, bottom - 1), radius=label.em * scale * 0.2, fill=label.plate_fill)
    font = load_font(font_files()[label.font], label.em * scale)
    draw.text((label.anchor[0] * scale, label.anchor[1] * scale), label.text, fill=label.ink, font=font)


def add_noise(image: Image.Image, rng: Random) -> Image.Image:
    """Return the image with the grain, the light and now and then the blur of a camera."""
    if rng.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(0.5))
    if rng.random() < 0.5:
        return image
    pixels = np.asarray(image, dtype=np.int16)
    grain = np.random.default_rng(rng.getrandbits(32)).integers(-128, 128, pixels.shape[:2], dtype=np.int16)
    amount = rng.choice((6, 12, 18))
    noisy = pixels + (grain * amount >> 8)[..., None] + rng.randint(-8, 8)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def draw_scene(scene: Scene, rng: Random) -> Image.Image:
    """Return the RGB picture of a scene."""
    scale = OVERSAMPLING
    canvas = draw_background(scene.background, (scene.width * scale, scene.height * scale), rng)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        draw_thing(draw, thing, scale)
    for label in scene.labels:
        draw_label(draw, label, scale)
    return add_noise(canvas.reduce(scale), rng)
