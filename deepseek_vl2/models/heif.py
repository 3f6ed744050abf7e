"""HEIC images, as telephones write them: Pillow reads none, the package ``pillow-heif`` does, where it is installed."""

from __future__ import annotations

import io
import os
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

# What the boxes of HEIF files say they hold, in bytes 8 to 12.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
BEGINNING = 64  # bytes that are looked at
NEEDS_PACKAGE = 'a HEIC image, which needs a package: pip install "deepseek_vl2[heif]", or save it as JPEG'


def is_heif(data: bytes) -> bool:
    """Whether a file, of which the beginning is enough, says that it holds a HEIF image."""
    return data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and b"avif" not in data[16:BEGINNING]


def reads_heif() -> bool:
    """Whether the package is there."""
    return find_spec("pillow_heif") is not None


def open_heif(source: Path | bytes) -> Image.Image | None:
    """Open a HEIF image without decoding it; ``None`` for a file that is none.

    The package turns such images upright itself.

    Raises:
        ValueError: the package is not installed.
        OSError, SyntaxError: the file is damaged.
    """
    if isinstance(source, bytes):
        beginning = source[:BEGINNING]
    else:
        with source.open("rb") as file:
            beginning = file.read(BEGINNING)
    if not is_heif(beginning):
        return None
    if not reads_heif():
        raise ValueError(f"{'The data' if isinstance(source, bytes) else os.fspath(source)} is {NEEDS_PACKAGE}.")
    from pillow_heif import HeifImageFile

    try:
        return HeifImageFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (ValueError, RuntimeError, EOFError) as error:  # libheif's
        raise OSError(str(error)) from error
