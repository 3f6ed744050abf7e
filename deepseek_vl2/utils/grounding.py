"""Boxes in the model's text: reading them and drawing them.

The model writes ``<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>``. Coordinates run from 0 to 999 over the
width and the height of the original image. The text comes from a model: it is searched, never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

COORDINATE_MAX = 999
Box = tuple[int, int, int, int]

_REFERENCE = re.compile(r"<\|ref\|>(.*?)<\|/ref\|>", re.DOTALL)
_DETECTION = re.compile(r"<\|det\|>(.*?)<\|/det\|>", re.DOTALL)
_NUMBER = r"\s*(-?\d{1,9}(?:\.\d*)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")

COLORS = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5b5", "#f032e6", "#9a6324", "#808000", "#000075",
)  # fmt: skip


@dataclass(frozen=True)
class GroundedObject:
    """A label and where it was found.

    Attributes:
        label: what the model names.
        boxes: (left, top, right, bottom), 0 to 999, left <= right and top <= bottom.
        span: where label and boxes stand in the text, as character offsets.
    """

    label: str
    boxes: list[Box] = field(default_factory=list)
    span: tuple[int, int] = (0, 0)


def _read_box(numbers: Sequence[str]) -> Box:
    x1, y1, x2, y2 = (min(max(round(float(number)), 0), COORDINATE_MAX) for number in numbers)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def parse_grounding(text: str) -> list[GroundedObject]:
    """Return the labelled boxes of a response, in order.

    A label belongs to the list of boxes that follows it before the next label does. Numbers beyond 0 to 999 are
    clamped and swapped corners put right; what is no box of four numbers is left out. Nothing raises.
    """
    objects = []
    references = list(_REFERENCE.finditer(text))
    for index, reference in enumerate(references):
        end = references[index + 1].start() if index + 1 < len(references) else len(text)
        detection = _DETECTION.search(text, reference.end(), end)
        if detection is None:
            continue
        boxes = [_read_box(numbers) for numbers in _BOX.findall(detection.group(1))]
        objects.append(GroundedObject(reference.group(1).strip(), boxes, (reference.start(), detection.end())))
    return objects


def to_pixels(box: Box, size: tuple[int, int]) -> Box:
    """Return a box in pixels of an image of ``size`` (width, height), rounded down."""
    width, height = size
    x1, y1, x2, y2 = box
    return (
        int(x1 / COORDINATE_MAX * width),
        int(y1 / COORDINATE_MAX * height),
        int(x2 / COORDINATE_MAX * width),
        int(y2 / COORDINATE_MAX * height),
    )


def draw_boxes(image: Image.Image, objects: Sequence[GroundedObject]) -> Image.Image:
    """Return a copy of an image with boxes and labels drawn on it, one colour for each label."""
    canvas = image.convert("RGB")
    if canvas is image:
        canvas = image.copy()
    draw = ImageDraw.Draw(canvas)
    thickness = max(2, round(min(canvas.size) / 200))
    font = ImageFont.load_default(size=max(12, round(min(canvas.size) / 30)))
    labels = list(dict.fromkeys(found.label for found in objects))
    for found in objects:
        color = COLORS[labels.index(found.label) % len(COLORS)]
        for box in found.boxes:
            left, top, right, bottom = to_pixels(box, canvas.size)
            draw.rectangle((left, top, right, bottom), outline=color, width=thickness)
            _draw_label(draw, found.label, (left, top), font, color, canvas.size)
    return canvas


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    corner: tuple[int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    color: str,
    size: tuple[int, int],
) -> None:
    """Write a label on a field of its colour above a box's corner, moved to stay inside the picture."""
    if not label:
        return
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    width, height = int(right - left) + 8, int(bottom - top) + 8
    x = max(0, min(corner[0], size[0] - width))
    y = max(0, min(corner[1] - height, size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + 4 - left, y + 4 - top), label, fill="white", font=font)
