"""Reading images, with an error that a person understands for everything that can be wrong with one."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, UnidentifiedImageError

from .array_images import image_of_array, is_array
from .base64_text import decode_base64, payload_end
from .heif import open_heif
from .image_download import is_address, shortened
from .image_modes import WHITE, Background, as_rgb, decode

# Pillow warns from here on that a file may be a decompression bomb; we refuse it.
MAX_IMAGE_PIXELS = 89_478_485
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+=*\s*")
OTHER_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
MOST_PIPED = 1_000_000_000  # bytes of a pipe; files are bounded by their pixels
LEAST_BASE64 = 200  # shorter, it may be a path that was misspelt


def check_image_size(image: Image.Image, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Raise ``ValueError`` for an image with no area, or with more than ``max_pixels`` pixels."""
    width, height = image.size
    if width <= 0 or height <= 0:
        raise ValueError(f"{name} has a size of {width}x{height} pixels: there is nothing to show.")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width}x{height} pixels, more than the limit of {max_pixels:,}: "
            "scale it down, or raise max_pixels if you trust its source."
        )


def to_rgb(image: Image.Image, name: str, background: Background = WHITE) -> Image.Image:
    """Decode a PIL image as upright RGB, to be read only.

    Raises:
        ValueError: its file turns out to be damaged, or a pixel is no number.
    """
    if getattr(image, "tile", None) and getattr(image, "fp", image) is None:
        raise ValueError(f"{name} has pixels in a file that was closed: open it again, or load() it before closing.")
    try:
        decode(image)
        return as_rgb(image, background)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is truncated or damaged and cannot be decoded: {error}.") from error
    except ValueError as error:  # of Pillow, or of a pixel
        raise ValueError(f"{name} cannot be read as RGB: {error}.") from error


def is_data_url(source: str) -> bool:
    """Whether a text is a ``data:`` URL, however it is written."""
    return source[:5].lower() == "data:"


def _decode_data_url(url: str) -> bytes:
    start = url.find(",") + 1
    if not start:
        raise ValueError("A data URL needs a comma between its header and its data.")
    if not url[: start - 1].rstrip().lower().endswith(";base64"):
        return unquote_to_bytes(url[start:])
    try:
        return decode_base64(url, start, payload_end(url, start))
    except ValueError as error:
        raise ValueError(f"The data URL is not valid base64: {error}.") from error


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte, is none of a file
        return False


def _read_file(file: Any) -> bytes:
    """Return what an open file holds, from its beginning, as Pillow reads one: it may have been read before."""
    if getattr(file, "closed", False):
        raise ValueError("The open file of an image was closed: open it again, or read it before.")
    if hasattr(file, "seekable") and file.seekable():
        file.seek(0)
    data = file.read()
    if not isinstance(data, bytes):
        raise ValueError("The open file of an image gives text: open it with mode 'rb'.")
    return data


def _read_pipe(path: Path) -> bytes:
    """Return what is written into a pipe, until it is closed there; it can be read once."""
    with path.open("rb") as pipe:
        data = pipe.read(MOST_PIPED + 1)
    if not data:
        raise ValueError(f"{path} is a pipe that holds nothing.")
    if len(data) > MOST_PIPED:
        raise ValueError(f"{path} is a pipe that holds more than {MOST_PIPED // 1_000_000} MB.")
    return data


def _open_file(file: Path | bytes) -> Image.Image:
    """Open an image's file, of a format that Pillow knows or HEIC, without decoding it."""
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except UnidentifiedImageError:
        found = open_heif(file)
        if found is None:
            raise
        return found


def _open(source: Any) -> tuple[Image.Image, str]:
    """Open without decoding; returns the image and a name for error messages."""
    if isinstance(source, Image.Image):
        return source, "The image"
    if is_array(source):
        return image_of_array(source), "The image"
    if hasattr(source, "read") and not isinstance(source, os.PathLike):
        return _open_file(_read_file(source)), "The image in the open file"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_file(bytes(source)), "The image"
    if isinstance(source, str) and is_data_url(source):
        return _open_file(_decode_data_url(source)), "The image in the data URL"
    if isinstance(source, str) and is_address(source):
        raise ValueError(f"{source} is an address: download the image first and pass the file or the PIL image.")
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"Cannot read an image from {type(source).__name__}: pass a path, bytes, a file, a PIL image or pixels."
        )
    if not str(source).strip():
        raise ValueError("The path of an image is empty.")
    path = Path(source)
    if not _is_there(path):
        text = str(source)
        if len(text) >= LEAST_BASE64 and BASE64.fullmatch(text):
            raise ValueError(f"{shortened(text)} looks like base64: write 'data:;base64,' in front of it.")
        if scheme := OTHER_SCHEME.match(text):
            raise ValueError(f"{shortened(text)} is an address of {scheme[1]!r}, which is not read: pass the file.")
        raise FileNotFoundError(f"There is no image file at {shortened(text)}.")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not an image file.")
    if path.is_fifo():  # such as a shell's <(...)
        return _open_file(_read_pipe(path)), str(path)
    if not path.is_file():
        raise ValueError(f"{path} is a device, not an image file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is an empty file, not an image.")
    return _open_file(path), str(path)


def load_image(source: Any, max_pixels: int = MAX_IMAGE_PIXELS, background: Background = WHITE) -> Image.Image:
    """Read one image and return it as a new RGB image, turned upright as its EXIF orientation says.

    Args:
        source: a path, the bytes of a file, a file opened for bytes, a ``data:`` URL, a PIL image, or an array or
            tensor of pixels (see `image_of_array`).
        max_pixels: refuse an image with more pixels than this, before it is decoded.
        background: the colour under transparent pixels; ``None`` drops their alpha, as the original package does.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the file is empty, truncated, not an image, has no area or has too many pixels.
    """
    image = read_image(source, max_pixels, background)
    # The file's own image would keep its class and its file name.
    return image.copy() if image is source or type(image) is not Image.Image else image


def read_image(source: Any, max_pixels: int = MAX_IMAGE_PIXELS, background: Background = WHITE) -> Image.Image:
    """Do what `load_image` does, errors included, without its last copy: the image may be of a file format's class."""
    is_path = isinstance(source, (str, os.PathLike)) and not is_data_url(str(source))
    name = shortened(str(source)) if is_path else "The data"
    try:
        image, name = _open(source)
        check_image_size(image, name, max_pixels)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} has too many pixels for Pillow ({error}): raise PIL.Image.MAX_IMAGE_PIXELS as well as max_pixels "
            "if you trust its source."
        ) from error
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is truncated or damaged and cannot be decoded: {error}.") from error
    return to_rgb(image, name, background)
