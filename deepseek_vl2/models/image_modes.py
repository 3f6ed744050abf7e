"""Upright RGB of a decoded image, whatever its EXIF orientation, its mode and its transparency."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from .config_fields import FieldError

ORIENTATION = 0x0112  # the EXIF tag
WHITE = "white"
# What lies under transparent pixels: a colour as Pillow names it or as (red, green, blue), 0 to 255; None: nothing,
# and their alpha is dropped.
Background = str | tuple[int, int, int] | None

MAX_UINT16 = 65_535
BLOCK_PIXELS = 1 << 18  # laid over a colour at a time: about 5 ms
# A TIFF or PNG of 16 bits is opened in one of these; PNGs of before Pillow 11 are "I".
MODES_OF_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def check_background(background: Background) -> Background:
    """Return a background; raise ``ValueError`` where it is no colour."""
    if background is None:
        return None
    if isinstance(background, str):
        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            raise FieldError(f"background must be a colour or None, got {background!r}: {error}.") from error
        return background
    values: tuple[Any, ...] = tuple(background) if isinstance(background, (tuple, list)) else ()
    if len(values) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in values):
        raise FieldError(f"background must be a colour or None, got {background!r}: 'white', or (red, green, blue).")
    return values[0], values[1], values[2]


def decode(image: Image.Image) -> None:
    """Decode an opened image.

    Pillow (13 and before) maps an uncompressed TIFF of a path into memory with the sides that it has upright, where its
    rows have those of the turned one: noise. Without a path it reads the rows one by one.
    """
    path = getattr(image, "filename", "")
    if image.format != "TIFF" or not path:
        image.load()
        return
    image.filename = ""  # type: ignore[attr-defined]
    try:
        image.load()
    finally:
        image.filename = path  # type: ignore[attr-defined]


def orientation_of(image: Image.Image) -> int:
    """Return a decoded image's EXIF orientation, 1 to 8; 1, upright, where its EXIF data cannot be read."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
        return orientation if isinstance(orientation, int) else 1  # a text, or several: Pillow turns nothing then
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return 1


def upright(image: Image.Image) -> Image.Image:
    """Return a decoded image turned as its EXIF orientation says; itself where it is upright."""
    return ImageOps.exif_transpose(image) if orientation_of(image) in range(2, 9) else image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height), in pixels, of an image turned as its EXIF orientation says; it is decoded for that."""
    decode(image)
    width, height = image.size
    return (height, width) if orientation_of(image) in range(5, 9) else (width, height)


def as_rgb(image: Image.Image, background: Background = WHITE) -> Image.Image:
    """Return a decoded image upright and as RGB; itself where it is that already.

    Gray of more than 8 bits is scaled by its range: 16 bits by 65,535; floats of at most 1 by 1; other floats, and
    integers of 32 bits, by the first of 255, 65,535 and their maximum that no value exceeds. Negative values stretch
    the range downwards.

    Args:
        image: of any mode that Pillow converts.
        background: what lies under transparent pixels; ``None`` drops their alpha.

    Raises:
        ValueError: a pixel that is no number, or a mode that has no conversion.
    """
    image = upright(image)
    if image.mode in (*MODES_OF_16_BITS, "I", "F"):
        return _gray_to_rgb(image, background)
    if background is not None and image.has_transparency_data:
        return _over(image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA"), background)
    if image.mode == "RGB":
        return image
    if image.mode in ("La", "RGBa"):  # alpha is multiplied in, and Pillow converts them to one mode alone
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image.convert("RGB")


def _blocks(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes (left, top, right, bottom) of a few pixels each that cover an image of (width, height)."""
    width, height = size
    across = min(width, BLOCK_PIXELS)
    down = max(1, BLOCK_PIXELS // across)
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _over(image: Image.Image, background: Background) -> Image.Image:
    """Lay an RGBA image over a colour.

    Pillow holds the interpreter's lock while it does: a second for a large picture, in which a server says nothing to
    anybody. So it is done block by block, between which other threads run.
    """
    assert background is not None
    out = Image.new("RGB", image.size)
    for box in _blocks(image.size):
        block = image.crop(box)
        canvas = Image.new("RGBA", block.size, background)
        canvas.alpha_composite(block)
        out.paste(canvas.convert("RGB"), box[:2])
    return out


def _gray_to_rgb(image: Image.Image, background: Background) -> Image.Image:
    pixels = np.asarray(image)
    gray = Image.fromarray(gray_bytes(pixels, image.mode, image.format))
    transparent = image.info.get("transparency")
    if background is None or not isinstance(transparent, (int, float)):
        return gray.convert("RGB")
    alpha = Image.fromarray(np.where(pixels == transparent, np.uint8(0), np.uint8(255)))
    return _over(Image.merge("RGBA", (gray, gray, gray, alpha)), background)


def gray_bytes(pixels: NDArray[Any], mode: str, file_format: str | None = None) -> NDArray[np.uint8]:
    """Return values scaled to 0 to 255, as `as_rgb` says of gray.

    Args:
        pixels: of any shape.
        mode: Pillow's, of 16 bits, "I" or "F".
        file_format: of the file that they were read from.

    Raises:
        ValueError: some are no finite numbers.
    """
    if mode in MODES_OF_16_BITS:
        table = np.rint(np.arange(MAX_UINT16 + 1) * (255 / MAX_UINT16)).astype(np.uint8)
        return table[pixels]
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite(low) or not np.isfinite(high):
        wrong = int(np.count_nonzero(~np.isfinite(pixels)))
        raise ValueError(f"{wrong:,} pixels are not finite numbers: replace NaN and infinity first")
    if mode == "F" and high <= 1:
        high = 1.0
    elif mode == "I" and file_format == "PNG":
        high = MAX_UINT16
    else:
        high = next((limit for limit in (255, MAX_UINT16) if high <= limit), high)
    low = min(low, 0.0)
    scaled = (pixels.astype(np.float64 if mode == "I" else np.float32) - low) * (255 / (high - low))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)
