"""The fonts of printed words: freely licensed families that come as packages (extra ``synthetic``)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

FAMILIES: dict[str, tuple[str, ...]] = {
    "font_roboto": ("Roboto-Regular", "Roboto-Medium", "Roboto-Bold"),
    "font_source_sans_pro": ("SourceSansPro-Regular", "SourceSansPro-Bold"),
    "font_source_serif_pro": ("SourceSerifPro-Regular", "SourceSerifPro-Bold"),
    "font_caladea": ("Caladea-Regular", "Caladea-Bold"),
    "font_hanken_grotesk": ("HankenGrotesk-Regular", "HankenGrotesk-Bold"),
    "font_manrope": ("Manrope-Regular", "Manrope-Bold"),
}


@cache
def font_files() -> tuple[Path, ...]:
    """Return the font files, in a fixed order.

    Raises:
        ImportError: a font package is missing. The pictures of a seed depend on the fonts: none is left out silently.
    """
    files = []
    for package, names in FAMILIES.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                f"The synthetic pictures need the fonts of {package.replace('_', '-')}: "
                'pip install "deepseek_vl2[synthetic]".'
            )
        folder = Path(spec.submodule_search_locations[0]) / "files"
        for name in names:
            found = sorted(folder.glob(f"{name}.?tf"))
            if not found:
                raise ImportError(f"{package.replace('_', '-')} holds no font {name}: another version is installed.")
            files.append(found[-1])
    return tuple(files)


@cache
def load_font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    """Return a font at ``size`` pixels an em."""
    return ImageFont.truetype(str(file), size)
