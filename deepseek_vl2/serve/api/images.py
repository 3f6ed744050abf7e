"""Images of a request: from URL to picture, within limits."""

from __future__ import annotations

import base64
import binascii
import io
from importlib.util import find_spec

from PIL import Image, UnidentifiedImageError, features

from deepseek_vl2.models.image_loading import load_image

from .download import DownloadError, download
from .errors import ApiError
from .settings import ImageLimits

# Formats that Pillow decodes by itself; for others it may start programs. MPO files are opened as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
# What the boxes of HEIF files say they hold, in bytes 8 to 12.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
BASE64_BLOCK = 1 << 20
# Base64 as it is found: with line breaks, and with the two characters that URLs need.
BASE64_FORMS = str.maketrans({"-": "+", "_": "/", "\n": None, "\r": None, "\t": None, " ": None})


def image_error(place: str, message: str) -> ApiError:
    """Return the error for an image; ``place`` is the field that holds it."""
    return ApiError(400, message, place, "invalid_image")


def decode_base64(payload: str) -> bytes:
    """Return what a text without its padding means; it is read in blocks, between which other threads run.

    Raises:
        ValueError: it is not base64.
    """
    if "=" in payload:
        raise ValueError("there is padding before its end")
    decoded, rest = bytearray(), ""
    for start in range(0, len(payload), BASE64_BLOCK):
        text = rest + payload[start : start + BASE64_BLOCK].translate(BASE64_FORMS)
        whole = len(text) - len(text) % 4
        decoded += base64.b64decode(text[:whole], validate=True)
        rest = text[whole:]
    decoded += base64.b64decode(rest + "=" * (-len(rest) % 4), validate=True)
    return bytes(decoded)


def decode_data_url(url: str, place: str, limits: ImageLimits) -> bytes:
    """Return the bytes of a ``data:`` URL.

    Raises:
        ApiError: it is not base64, is empty or too large.
    """
    header, comma, payload = url.partition(",")
    if not comma or not header.rstrip().lower().endswith(";base64"):
        raise image_error(place, "A data URL must look like data:image/png;base64,... with the image in base64.")
    payload = payload.rstrip(" \t\r\n=")
    if len(payload) > 2 * limits.max_bytes:  # even with a line break after each character
        raise image_error(place, f"The image has more than the {limits.max_bytes:,} bytes allowed.")
    try:
        data = decode_base64(payload)
    except (binascii.Error, ValueError) as error:
        raise image_error(place, f"The data URL is not valid base64: {error}.") from error
    if len(data) > limits.max_bytes:
        raise image_error(place, f"The image has more than the {limits.max_bytes:,} bytes allowed.")
    if not data:
        raise image_error(place, "The data URL holds no image.")
    return data


async def fetch_image(url: str, place: str, limits: ImageLimits) -> bytes | str:
    """Return the file that a URL of a request means; a ``data:`` URL as it is, for `read_data_urls`.

    Raises:
        ApiError: the URL is of a kind that is not allowed, or its image cannot be had.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return url
    if scheme not in ("http", "https"):
        raise image_error(place, "An image must be a data URL (data:image/png;base64,...) or an http(s) address.")
    if not limits.allow_urls:
        raise image_error(
            place, "This server fetches no images: send a data URL, or start the server with --allow-image-urls."
        )
    try:
        return await download(url, limits)
    except DownloadError as error:
        raise image_error(place, str(error)) from error


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


def unknown_format(data: bytes) -> str:
    """Return the message for a file that was not recognized."""
    if is_heif(data):
        return 'This server reads no HEIC images: send a JPEG, or install it with pip install "deepseek_vl2[heif]".'
    return f"This is not an image of a known format ({', '.join(FORMATS)})."


def read_data_urls(files: list[tuple[str, bytes | str]], limits: ImageLimits) -> list[tuple[str, bytes]]:
    """Return the files of a request's images; errors as `decode_data_url`."""
    return [(place, decode_data_url(file, place, limits) if isinstance(file, str) else file) for place, file in files]


def decode_images(files: list[tuple[str, bytes]], limits: ImageLimits) -> list[Image.Image]:
    """Decode the images of a request as RGB, turned upright.

    Args:
        files: for each image, the field that holds it and the file.
        limits: what is allowed.

    Raises:
        ApiError: a file is not an image or damaged, or there are too many pixels, which is seen before they are
            decoded.
    """
    opened, pixels = [], 0
    for place, data in files:
        try:
            image = open_image(data)
        except UnidentifiedImageError as error:
            raise image_error(place, unknown_format(data)) from error
        except Image.DecompressionBombError as error:
            raise image_error(place, f"The image has too many pixels: {error}") from error
        except Exception as error:  # Pillow's readers raise all kinds of errors for damaged headers
            raise image_error(place, f"The image is damaged: {error}") from error
        pixels += image.width * image.height
        if pixels > limits.max_pixels:
            raise image_error(
                place,
                f"The image has {image.width}x{image.height} pixels; all images of a request together may have "
                f"{limits.max_pixels:,}.",
            )
        opened.append((place, image))
    return [decode_image(place, image, limits) for place, image in opened]


def decode_image(place: str, image: Image.Image, limits: ImageLimits) -> Image.Image:
    """Decode one opened image.

    Raises:
        ApiError: it is damaged.
    """
    try:
        return load_image(image, limits.max_pixels)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of errors for damaged files
        raise image_error(place, f"The image is damaged: {error}") from error
