"""The one thing around these files that they know of: what computes faster, or runs the engine."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

PACKAGE = "deepseek_vl2.models"


@cache
def backend() -> ModuleType | None:
    """Return `deepseek_vl2.engine.backend`; ``None`` where these files run as remote code, without the package.

    Each of its functions may decline, by returning ``None``: then what stands here is computed as it is written.
    """
    return importlib.import_module("deepseek_vl2.engine.backend") if __package__ == PACKAGE else None
