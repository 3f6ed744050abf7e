"""What the engine keeps with a model, so that it goes when the model goes and no table of models is needed."""

from __future__ import annotations

import threading
from typing import Any

NAME = "_engine_state"


class Attached:
    """What is kept with a module. Copies of the module, and what is pickled of it, begin without.

    Attributes:
        lock: for whoever looks or changes.
        values: by what they are for.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.values: dict[str, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        return Attached()

    def __copy__(self) -> Attached:
        return Attached()

    def __reduce__(self) -> tuple[type[Attached], tuple[()]]:
        return Attached, ()


def attached(module: Any) -> Attached:
    """Return what is kept with a module."""
    held: Attached | None = vars(module).get(NAME)
    if held is None:
        held = vars(module).setdefault(NAME, Attached())
    return held


def release(module: Any) -> None:
    """Let go of what is kept with a module."""
    vars(module).pop(NAME, None)
