"""The process that decodes large images whose decoders hold the interpreter's lock; run with ``python -m``.

Each file is answered by a line of JSON, which says what the pixels are or what is wrong, and by them in bands of rows.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import Image, ImageOps

HEADER_BYTES = 8  # before each file: its size, and its format as Pillow names it
BAND_PIXELS = 1 << 20
NICENESS = 5  # answers under way go first
MAX_REASON = 300  # characters of the decoder's explanation


def bands_of(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield where the bands begin and end, in which an image of (width, height) is handed over."""
    width, height = size
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def header_of(data: bytes, kind: str) -> bytes:
    """Return what stands before a file of a format."""
    return len(data).to_bytes(HEADER_BYTES, "big") + kind.encode().ljust(HEADER_BYTES)


def read_file(source: BinaryIO) -> tuple[bytes, str] | None:
    """Return the next file and its format; ``None`` at the end."""
    header = source.read(2 * HEADER_BYTES)
    size = int.from_bytes(header[:HEADER_BYTES], "big")
    data = source.read(size) if len(header) == 2 * HEADER_BYTES else b""
    return (data, header[HEADER_BYTES:].decode().strip()) if size and len(data) == size else None


def open_file(data: bytes, kind: str) -> Image.Image:
    """Open a file without decoding it."""
    if kind == "HEIF":
        from pillow_heif import HeifImageFile

        return HeifImageFile(io.BytesIO(data))
    return Image.open(io.BytesIO(data), formats=(kind,))


def turn_upright(image: Image.Image) -> None:
    """Turn a decoded image as its EXIF or XMP data say; data that cannot be read, or mean nothing, turn nothing."""
    with contextlib.suppress(OSError, SyntaxError, ValueError, TypeError, struct.error):
        ImageOps.exif_transpose(image, in_place=True)


def write_line(out: BinaryIO, content: dict[str, Any]) -> None:
    """Write a line of JSON."""
    out.write(json.dumps(content).encode() + b"\n")


def answer(data: bytes, kind: str, out: BinaryIO) -> None:
    """Decode a file and write its pixels, upright, or what is wrong with it."""
    try:
        image: Image.Image = open_file(data, kind)
        image.load()
        turn_upright(image)
    except Exception as error:  # Pillow's decoders raise all kinds of errors for damaged files
        write_line(out, {"problem": f"{error}"[:MAX_REASON] or type(error).__name__})
        return
    write_line(out, {"mode": image.mode, "size": image.size})
    for top, bottom in bands_of(image.size):
        out.write(image.crop((0, top, image.width, bottom)).tobytes())


def main() -> None:
    """Decode files until the server closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    Image.MAX_IMAGE_PIXELS = None  # the server has counted them
    while (file := read_file(sys.stdin.buffer)) is not None:
        answer(*file, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
