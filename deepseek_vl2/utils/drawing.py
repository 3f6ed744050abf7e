"""Boxes on pictures, with labels that can be read and stay inside."""

from __future__ import annotations

import colorsys
import logging
import unicodedata
from collections.abc import Sequence
from typing import Protocol

from PIL import Image, ImageColor, ImageDraw

from deepseek_vl2.utils.fonts import Font, font_for
from deepseek_vl2.utils.label_places import place_label

logger = logging.getLogger(__name__)

COORDINATE_MAX = 999
Box = tuple[int, int, int, int]
Size = tuple[int, int]
Color = tuple[int, int, int]

COLORS = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5b5", "#f032e6", "#9a6324", "#808000", "#000075",
)  # fmt: skip
MARK_COLOR = "red"
LINES = 240  # a line is this part of the picture's mean side thick
LETTERS = 32  # letters are this part of it high
SMALLEST_LETTERS = 12


class Labelled(Protocol):
    """What can be drawn: a label and boxes from 0 to 999."""

    @property
    def label(self) -> str:
        """What is written beside the boxes."""

    @property
    def boxes(self) -> list[Box]:
        """(left, top, right, bottom)."""


def to_pixels(box: Box, size: Size | Image.Image) -> Box:
    """Return a box in pixels, rounded down.

    Args:
        box: (left, top, right, bottom), 0 to 999.
        size: the image, or (width, height) of it upright: that of a file opened by Pillow may be (height, width), until
            the image is turned as its EXIF orientation says.
    """
    width, height = size_of(size)
    x1, y1, x2, y2 = box
    return (
        int(x1 / COORDINATE_MAX * width),
        int(y1 / COORDINATE_MAX * height),
        int(x2 / COORDINATE_MAX * width),
        int(y2 / COORDINATE_MAX * height),
    )


def size_of(size: Size | Image.Image) -> Size:
    """Return (width, height), in pixels, of an image as it is seen: turned as its EXIF orientation says."""
    if not isinstance(size, Image.Image):
        return size
    from deepseek_vl2.models.image_modes import upright_size  # imports torch, which numbers alone do not need

    return upright_size(size)


def color_of(index: int) -> Color:
    """Return the colour of the label of that number: ten that differ most, then hues that never repeat."""
    if index < len(COLORS):
        red, green, blue = ImageColor.getrgb(COLORS[index])[:3]
        return red, green, blue
    hue = (index * 0.618034) % 1  # the golden section spreads any number of hues
    values = colorsys.hsv_to_rgb(hue, 0.85, 0.9 - 0.3 * (index % 2))
    red, green, blue = (round(value * 255) for value in values)
    return red, green, blue


def text_color(background: Color) -> Color:
    """Return black or white, whichever reads better on a background."""
    red, green, blue = background
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 150
    return (0, 0, 0) if bright else (255, 255, 255)


def draw_boxes(image: Image.Image, objects: Sequence[Labelled]) -> Image.Image:
    """Return an upright RGB copy of an image with boxes and labels drawn on it, one colour for each label.

    A label stands beside its box, clear of the other boxes and labels where there is room. Lines and letters grow with
    the image. A label that no font of the system can write is drawn as its number.
    """
    canvas = _canvas(image)
    painter = _Painter(canvas)
    numbers = {label: number for number, label in enumerate(dict.fromkeys(found.label for found in objects))}
    for found in objects:
        for box in found.boxes:
            painter.outline(to_pixels(box, canvas.size), color_of(numbers[found.label]))
    for found in objects:  # after all lines, so that no line runs through a label
        for box in found.boxes:
            number = numbers[found.label]
            painter.write(found.label, number + 1, to_pixels(box, canvas.size), color_of(number))
    return canvas


def mark_object(image: Image.Image, box: Box, color: str = MARK_COLOR) -> Image.Image:
    """Return an upright RGB copy of an image with one box, 0 to 999, drawn: the example of an in-context prompt."""
    canvas = _canvas(image)
    red, green, blue = ImageColor.getrgb(color)[:3]
    _Painter(canvas).outline(to_pixels(box, canvas.size), (red, green, blue))
    return canvas


def _canvas(image: Image.Image) -> Image.Image:
    """Return an image as the model sees it, to be drawn on."""
    from deepseek_vl2.models.image_loading import to_rgb

    canvas = to_rgb(image, "The image")
    return canvas.copy() if canvas is image else canvas


class _Painter:
    """Draws on one canvas, and remembers where boxes and labels are."""

    def __init__(self, canvas: Image.Image) -> None:
        self.size = canvas.size
        self.draw = ImageDraw.Draw(canvas)
        mean_side = (canvas.width * canvas.height) ** 0.5
        self.thickness = max(2, round(mean_side / LINES))
        self.letters = max(SMALLEST_LETTERS, min(round(mean_side / LETTERS), min(canvas.size) // 5))
        self.padding = max(2, self.letters // 3), max(2, self.letters // 5)  # around a label's letters
        self.boxes: list[Box] = []
        self.labels: list[Box] = []
        self.fonts: dict[str, tuple[str, Font]] = {}

    def outline(self, box: Box, color: Color) -> None:
        """Draw a box, with a thin light line around it that keeps it apart from a picture of its own colour."""
        left, top, right, bottom = self._inside(box)
        self.boxes.append((left, top, right, bottom))
        around = (left - 1, top - 1, right + 1, bottom + 1)
        self.draw.rectangle(around, outline="white", width=1)
        self.draw.rectangle((left, top, right, bottom), outline=color, width=self.thickness)

    def write(self, label: str, number: int, box: Box, color: Color) -> None:
        """Write a label on a field of its colour at a box, clear of the labels written before."""
        text = "".join(character for character in " ".join(label.split()) if character.isprintable())
        if not text:
            return
        text, font = self._typeset(text, number)
        left, top, right, bottom = (int(value) for value in self.draw.textbbox((0, 0), text, font=font))
        pad_x, pad_y = self.padding
        width, height = right - left + 2 * pad_x, bottom - top + 2 * pad_y
        x, y = place_label(self._inside(box), (width, height), self.size, self.boxes, self.labels)
        self.labels.append((x, y, x + width, y + height))
        field = (x, y, x + width, y + height)
        self.draw.rounded_rectangle(field, self.letters // 5, fill=color, corners=self._free_corners(field, box))
        self.draw.text((x + pad_x - left, y + pad_y - top), text, fill=text_color(color), font=font)

    def _free_corners(self, field: Box, box: Box) -> tuple[bool, bool, bool, bool]:
        """Return which corners of a label's field are round, from the top left on: those away from its box."""
        left, top, right, bottom = self._inside(box)
        above, below = field[3] <= top, field[1] >= bottom
        before, behind = field[2] <= left, field[0] >= right
        return above or before, above or behind, below or behind, below or before

    def _typeset(self, text: str, number: int) -> tuple[str, Font]:
        """Return what is written and in which font: shortened to the picture's width."""
        if text not in self.fonts:
            self.fonts[text] = self._writable(text, number)
        text, font = self.fonts[text]
        room = self.size[0] - 3 * self.padding[0]
        if self.draw.textlength(text, font=font) <= room:
            return text, font
        low, high = 1, len(text)  # the longest beginning that fits, found by halving
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.draw.textlength(text[:middle] + "…", font=font) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return text[:low] + "…", font

    def _writable(self, text: str, number: int) -> tuple[str, Font]:
        """Return a label, or else it without symbols such as emoji, or else its number, and a font that has it."""
        letters = "".join(character for character in text if not unicodedata.category(character).startswith("S"))
        for candidate in (text, " ".join(letters.split())):
            font = font_for(candidate + "…", self.letters)
            if candidate and font is not None:
                return candidate, font
        logger.warning(
            "No font here has all characters of the label %r, so its number %d is drawn. Install one, such as Debian's "
            "fonts-noto-cjk for Chinese.",
            text,
            number,
        )
        font = font_for(str(number), self.letters)
        assert font is not None  # Pillow's own font has digits
        return str(number), font

    def _inside(self, box: Box) -> Box:
        """Return a box whose lines are all on the canvas."""
        width, height = self.size
        left, top, right, bottom = box
        left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
        return left, top, min(max(right, left), width - 1), min(max(bottom, top), height - 1)
