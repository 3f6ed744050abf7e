"""Images as people name them in a terminal: paths typed or pasted, addresses, data URLs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic",
    ".heif",
)  # fmt: skip
STDIN = "-"
MOST_SCHEME = 12  # characters of an address's beginning, such as https://

# A word of a line: in quotes, or with its spaces escaped.
_WORD = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s\\])+""")


def is_file_name(text: str) -> bool:
    """Whether there is a file of that name; a text that is too long for one, or holds a zero byte, is none."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def clean_path(text: str) -> str:
    """Return a path as it is in the file system: without quotes, escapes and ``file://``, and with ``~`` expanded.

    Terminals quote or escape what is dropped or pasted into them.
    """
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.startswith("file://"):
        from urllib.request import url2pathname  # which takes half of the time that --help takes

        return url2pathname(urlsplit(text).path)
    if "://" in text[:MOST_SCHEME] or text.startswith("data:") or is_file_name(text):
        return text
    unescaped = re.sub(r"\\(.)", r"\1", text)
    return str(Path(os.path.expanduser(unescaped)))  # pathlib's fails for ~5, which is no user


def download(url: str, **limits: Any) -> bytes:
    """Return what is at an http(s) address; ``limits`` and errors as in `image_download.download`."""
    from deepseek_vl2.models import image_download  # imports torch, which a command's help does not need

    return image_download.download(url, **limits)


def open_image(source: str) -> Image.Image:
    """Read an image named by a path, an http(s) address or a data URL, upright and as RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or cannot be downloaded.
    """
    from deepseek_vl2.models.image_loading import load_image

    path = clean_path(source)
    if not path.startswith(("http://", "https://")):
        return load_image(path)
    try:
        return load_image(download(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") if path not in str(error) else error from error


def open_images(sources: Sequence[str], question_from_stdin: bool = False) -> list[Image.Image]:
    """Read images as `open_image` does; "-" is the standard input's, which one reader alone can have.

    Args:
        sources: paths, addresses, data URLs or "-".
        question_from_stdin: the question is read there.

    Raises:
        FileNotFoundError, ValueError: as `open_image`; or several readers of the standard input.
    """
    if list(sources).count(STDIN) + question_from_stdin > 1:
        raise ValueError("The standard input holds one thing: one image (-i -), or the question (-).")
    return [image_from_stdin() if source == STDIN else open_image(source) for source in sources]


def text_from_stdin() -> str:
    """Return the text that is piped in; raise ``ValueError`` where it is none."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"The standard input is not text in {error.encoding.upper()}.") from error


def image_from_stdin() -> Image.Image:
    """Read an image that is piped in, upright and as RGB.

    Raises:
        ValueError: nothing is piped in, or it is no image.
    """
    from deepseek_vl2.models.image_loading import load_image

    if sys.stdin.isatty():
        raise ValueError("An image named - is read from the standard input: pipe one in (cat photo.jpg | ...).")
    content = sys.stdin.buffer.read()
    if not content:
        raise ValueError("The standard input is empty: there is no image in it.")
    try:
        return load_image(content)
    except ValueError as error:
        raise ValueError(f"The standard input: {error}") from error


def looks_like_image(word: str) -> bool:
    """Whether a word of a message names an image: an existing file, or an address, with an image's ending."""
    path = clean_path(word)
    if path.startswith("data:image/"):
        return True
    if path.startswith(("http://", "https://")):
        return urlsplit(path).path.lower().endswith(SUFFIXES)
    return path.lower().endswith(SUFFIXES) and is_file_name(path)


def split_images(line: str) -> tuple[list[str], str]:
    """Take the images that a line names out of it; return their sources and the rest of the line."""
    if looks_like_image(line):  # a whole pasted path, with bare spaces
        return [clean_path(line)], ""
    sources = []
    rest = []
    end = 0
    for word in _WORD.finditer(line):
        if looks_like_image(word.group()):
            sources.append(clean_path(word.group()))
            rest.append(line[end : word.start()].rstrip())
            end = word.end()
    rest.append(line[end:])
    return sources, "".join(rest).strip()
