"""Where the model is that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NANO_NAME = "nano"
NO_NAME = 'The model\'s name is empty: give a directory, the id of a hub repository, or "nano".'


def locate_bundled(source: Any) -> Any:
    """Return the directory of the small model for the name "nano", where it is installed; anything else as it is.

    A directory of that name is written "./nano". As remote code these files have no such model beside them.

    Raises:
        ValueError: the name is empty, which as a path would be the working directory.
    """
    if isinstance(source, str) and not source.strip():
        raise ValueError(NO_NAME)
    if not isinstance(source, str) or source != NANO_NAME:
        return source
    directory = Path(__file__).resolve().parents[1] / "assets" / NANO_NAME
    return str(directory) if (directory / "config.json").is_file() else source


def nano_path() -> str:
    """Return the directory of the small model that ships with the package.

    The package's own classes know it as "nano". transformers' Auto classes and pipelines look every name up in the hub,
    and take this: ``AutoProcessor.from_pretrained(nano_path())``.

    Raises:
        FileNotFoundError: it is not part of this installation.
    """
    found = locate_bundled(NANO_NAME)
    if found == NANO_NAME:
        raise FileNotFoundError('This installation lacks the small model "nano": install the package from a release.')
    return str(found)
