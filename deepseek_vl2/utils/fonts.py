"""A font for a label: one that has all its characters, from Pillow or from the system."""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from typing import NamedTuple

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Where fontconfig is not: names that Pillow looks up in the system's font folders. With Chinese, all free or the
# system's own: Noto, Source Han, WenQuanYi and Droid on Linux, then macOS, then Windows.
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Medium.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "simhei.ttf",
    "simsun.ttc",
    "DejaVuSans.ttf",
)
_PROBE_SIZE = 24
_NO_CHARACTER = "\U0010ffff"  # drawn as every missing glyph is
_MOST_PROBED = 64  # different characters of a label that are looked at


class FontFile(NamedTuple):
    """A font of the system.

    Fields:
        path: its file, or a name that Pillow finds.
        face: which of the file's fonts.
    """

    path: str
    face: int


def font_for(text: str, size: int) -> Font | None:
    """Return a font of ``size`` pixels with all characters of a text, or ``None`` when there is none.

    Pillow's own font serves ASCII, so that it looks alike everywhere; the system's fonts serve the rest.
    """
    wanted = "".join(sorted({character for character in text if character.isprintable() and not character.isspace()}))
    default = ImageFont.load_default(size=size)
    if _covers(None, wanted):
        return default
    file = _system_font(wanted[:_MOST_PROBED])
    return None if file is None else ImageFont.truetype(file.path, size, index=file.face)


@lru_cache(maxsize=256)
def _system_font(characters: str) -> FontFile | None:
    matched = _fontconfig_match(characters)
    candidates = [] if matched is None else [matched]
    candidates += [FontFile(name, 0) for name in SYSTEM_FONTS]
    return next((file for file in candidates if _covers(file, characters)), None)


def _fontconfig_match(characters: str) -> FontFile | None:
    """Ask fontconfig for a sans-serif font with these characters; Chinese forms are preferred to Japanese ones."""
    program = shutil.which("fc-match")
    if program is None:
        return None
    charset = " ".join(f"{ord(character):x}" for character in characters)
    pattern = f"sans:lang=zh-cn:charset={charset}"
    try:
        done = subprocess.run(
            [program, "-f", "%{file}\n%{index}", pattern], capture_output=True, text=True, timeout=10, check=True
        )
        path, index = done.stdout.split("\n")
        return FontFile(path, int(index) & 0xFFFF)  # the upper half counts the instances of a variable font
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


@lru_cache(maxsize=64)
def _probe_font(file: FontFile | None) -> Font | None:
    if file is None:
        return ImageFont.load_default(size=_PROBE_SIZE)
    try:
        return ImageFont.truetype(file.path, _PROBE_SIZE, index=file.face)
    except OSError:  # no such file, or one that FreeType does not scale, such as a colour emoji font
        return None


@lru_cache(maxsize=1024)
def _covers(file: FontFile | None, characters: str) -> bool:
    """Whether a font (``None``: Pillow's own) draws each character as something else than a missing one."""
    font = _probe_font(file)
    if font is None:
        return False
    missing = _drawn(font, _NO_CHARACTER)
    return all(_drawn(font, character) != missing for character in characters)


def _drawn(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)
