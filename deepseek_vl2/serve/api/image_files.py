"""Opening the images that strangers send, as files of a few formats.

The server and the process that decodes some of them (`decode_worker`) share this module, which imports Pillow alone.
"""

from __future__ import annotations

import io
from importlib.util import find_spec

from PIL import Image, features

# Formats that Pillow decodes by itself; for others it may start programs. MPO files are opened as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
# What the boxes of HEIF files say they hold, in bytes 8 to 12.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def is_heif(data: bytes) -> bool:
    """Whether a file says that it holds a HEIF image, as telephones write them."""
    return data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and b"avif" not in data[16:64]


def open_image(data: bytes) -> Image.Image:
    """Open an image's file without decoding it; HEIF needs the package ``pillow-heif``.

    Raises:
        UnidentifiedImageError: it is of no known format, or of one that is not installed.
    """
    if is_heif(data) and find_spec("pillow_heif") is not None:
        from pillow_heif import HeifImageFile

        return HeifImageFile(io.BytesIO(data))
    return Image.open(io.BytesIO(data), formats=FORMATS)
