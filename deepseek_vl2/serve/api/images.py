"""Images of a request: from URL to picture, within limits."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError, features

from deepseek_vl2.models.base64_text import decode_base64, payload_end
from deepseek_vl2.models.heif import NEEDS_PACKAGE, is_heif, open_heif, reads_heif
from deepseek_vl2.models.image_loading import read_image

from .decode_process import Decoders
from .download import DownloadError, download
from .errors import ApiError
from .settings import ImageLimits

# Formats that Pillow decodes by itself; for others it may start programs. MPO files are opened as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
MAX_DATA_HEADER = 1000  # characters of a data URL before its comma


def image_error(place: str, message: str) -> ApiError:
    """Return the error for an image; ``place`` is the field that holds it."""
    return ApiError(400, message, place, "invalid_image")


def payload_of(url: str) -> tuple[int, int] | None:
    """Return where the base64 of a ``data:`` URL begins and where its padding does; ``None`` where there is none."""
    start = url.find(",", 0, MAX_DATA_HEADER) + 1
    if not start or not url[: start - 1].rstrip().lower().endswith(";base64"):
        return None
    return start, payload_end(url, start)


def decode_data_url(url: str, place: str, limits: ImageLimits) -> bytes:
    """Return the bytes of a ``data:`` URL, which is not copied for that: it may have many megabytes.

    Raises:
        ApiError: it is not base64, is empty or too large.
    """
    payload = payload_of(url)
    if payload is None:
        raise image_error(place, "A data URL must look like data:image/png;base64,... with the image in base64.")
    start, end = payload
    if end - start > 2 * limits.max_bytes:  # even with a line break after each character
        raise image_error(place, f"The image has more than the {limits.max_bytes:,} bytes allowed.")
    try:
        data = decode_base64(url, start, end)
    except ValueError as error:
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


def unknown_format(data: bytes) -> str:
    """Return the message for a file that was not recognized."""
    if is_heif(data) and not reads_heif():
        return f"This server reads no HEIC images. It is {NEEDS_PACKAGE}."
    return f"This is not an image of a known format ({', '.join(FORMATS)})."


def open_image(data: bytes) -> Image.Image:
    """Open a file of a stranger, of one of a few formats, without decoding it.

    Raises:
        UnidentifiedImageError: it is of no known format, or of one that is not installed.
        OSError, SyntaxError: it is damaged.
    """
    found = open_heif(data) if is_heif(data) and reads_heif() else None
    return Image.open(io.BytesIO(data), formats=FORMATS) if found is None else found


def read_data_urls(files: list[tuple[str, bytes | str]], limits: ImageLimits) -> list[tuple[str, bytes]]:
    """Return the files of a request's images; errors as `decode_data_url`."""
    return [(place, decode_data_url(file, place, limits) if isinstance(file, str) else file) for place, file in files]


def decode_images(files: list[tuple[str, bytes]], limits: ImageLimits, decoders: Decoders) -> list[Image.Image]:
    """Decode the images of a request as RGB, turned upright.

    Args:
        files: for each image, the field that holds it and the file.
        limits: what is allowed.
        decoders: decode what would hold up everybody else.

    Raises:
        ApiError: a file is not an image or damaged, or there are too many pixels, which is seen before they are
            decoded.
    """
    opened: list[tuple[str, bytes, Image.Image]] = []
    pixels = 0
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
        opened.append((place, data, image))
    return [decode_image(*each, limits, decoders) for each in opened]


def decode_image(place: str, data: bytes, image: Image.Image, limits: ImageLimits, decoders: Decoders) -> Image.Image:
    """Decode one opened image; it is read only from then on.

    Raises:
        ApiError: it is damaged.
    """
    try:
        return read_image(
            decoders.decode(data, str(image.format)) if decoders.wanted(image) else image, limits.max_pixels
        )
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of errors for damaged files
        raise image_error(place, f"The image is damaged: {error}") from error
