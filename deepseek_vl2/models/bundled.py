"""Where the model is that ships with the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

NANO_NAME = "nano"
NO_NAME = 'The model\'s name is empty: give a directory, the id of a hub repository, or "nano".'


def locate_bundled(source: Any) -> Any:
    """Return the directory of the small model for the name "nano", where it is installed; anything else as it is.

    A directory of that name is written "./nano". As remote code these files have no such model beside them.

    Raises:
        FileNotFoundError: what looks like a directory is not there, or is a file.
        ValueError: the name is empty, which as a path would be the working directory.
    """
    if not isinstance(source, str) or source != NANO_NAME:
        return _checked(source)
    directory = Path(__file__).resolve().parents[1] / "assets" / NANO_NAME
    return str(directory) if (directory / "config.json").is_file() else source


def _checked(source: Any) -> Any:
    """Return a model's directory, or the id of a repository, which the hub would otherwise be asked for by a path."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    name = os.fspath(source)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(NO_NAME)
    path = Path(os.path.expanduser(name))  # that of pathlib fails where there is no such user
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file: name the checkpoint directory that holds it.")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no checkpoint directory at {path}.")
    return str(path) if name.startswith("~") else source


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
