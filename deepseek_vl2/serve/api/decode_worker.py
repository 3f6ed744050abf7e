"""The process that decodes large images whose decoders hold the interpreter's lock; run with ``python -m``.

Each file is answered by a line of JSON, which says what the pixels are or what is wrong, and by them in bands of rows.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import Image

from deepseek_vl2.serve.api.image_files import open_image

HEADER_BYTES = 8  # before each file: its size
BAND_PIXELS = 1 << 20
NICENESS = 5  # answers under way go first
MAX_REASON = 300  # characters of the decoder's explanation


def bands_of(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield where the bands begin and end, in which an image of (width, height) is handed over."""
    width, height = size
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def read_file(source: BinaryIO) -> bytes | None:
    """Return the next file; ``None`` at the end."""
    header = source.read(HEADER_BYTES)
    size = int.from_bytes(header, "big")
    data = source.read(size) if len(header) == HEADER_BYTES else b""
    return data if size and len(data) == size else None


def write_line(out: BinaryIO, content: dict[str, Any]) -> None:
    """Write a line of JSON."""
    out.write(json.dumps(content).encode() + b"\n")


def answer(data: bytes, out: BinaryIO) -> None:
    """Decode a file and write its pixels, or what is wrong with it."""
    try:
        image: Image.Image = open_image(data)
        image.load()
        exif = image.info.get("exif", b"")
    except Exception as error:  # Pillow's decoders raise all kinds of errors for damaged files
        write_line(out, {"problem": f"{error}"[:MAX_REASON] or type(error).__name__})
        return
    write_line(out, {"mode": image.mode, "size": image.size, "exif": exif.hex() if isinstance(exif, bytes) else ""})
    for top, bottom in bands_of(image.size):
        out.write(image.crop((0, top, image.width, bottom)).tobytes())


def main() -> None:
    """Decode files until the server closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    Image.MAX_IMAGE_PIXELS = None  # the server has counted them
    while (data := read_file(sys.stdin.buffer)) is not None:
        answer(data, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
