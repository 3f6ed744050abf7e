"""Where the models are that need no download; found without PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

NANO_NAME = "nano"
DEMO_NAME = "demo"
DEMO_VERSION = 2  # part of the directory's name: raise it when what is written changes
DEMO_DONE = "complete.json"  # written last
NANO_IS_A_TOY = (
    "nano is a toy: it knows drawn shapes and printed words, and nothing else. For real answers name a released "
    "checkpoint, such as --model deepseek-ai/deepseek-vl2-tiny."
)


def nano_directory() -> Path | None:
    """Return the directory of nano, the small model that ships with the package; ``None`` where it is not installed."""
    directory = Path(__file__).resolve().parents[1] / "assets" / NANO_NAME
    return directory if (directory / "config.json").is_file() else None


def is_nano(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name or path is nano's."""
    if str(name) == NANO_NAME:
        return True
    directory, path = nano_directory(), Path(name)
    return directory is not None and path.is_dir() and path.samefile(directory)


def demo_directory() -> Path:
    """Return where the demo checkpoint, with random weights, is written at its first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "deepseek_vl2" / f"{DEMO_NAME}-{DEMO_VERSION}"
