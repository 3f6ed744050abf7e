"""Fields of config files: of which kind they are, and within which range."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# More is a slip, which would be built for hours, or for which there is no memory.
MOST_LAYERS = MOST_EXPERTS = 10_000
MOST_PIXELS = 100_000  # of a side
MOST_MERGED = 1_000  # features of a side that become one


class FieldError(ValueError):
    """A field of a config has an impossible value."""


class Field(NamedTuple):
    """What a number may be.

    Fields:
        least: the smallest value.
        most: the largest value.
        whole: whether it has no fraction.
        optional: whether ``None`` is allowed.
        above: whether ``least`` itself is too small.
    """

    least: float = 1
    most: float = math.inf
    whole: bool = True
    optional: bool = False
    above: bool = False

    def allows(self, value: Any) -> bool:
        """Whether a value is of this kind and within the range."""
        if value is None:
            return self.optional
        if is_whole(value):
            number = float(value)
        elif self.whole or not isinstance(value, numbers.Real) or not math.isfinite(value):
            return False
        else:
            number = float(value)
        return (number > self.least if self.above else number >= self.least) and number <= self.most

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        bound = f" above {self.least:g}" if self.above else f" of at least {self.least:g}"
        bound = "" if self.least == -math.inf else bound
        most = "" if self.most == math.inf else f" and at most {self.most:g}"
        return f"{kind}{bound}{most}{' or null' if self.optional else ''}"


COUNT = Field()
OPTIONAL_COUNT = Field(optional=True)
OPTIONAL_FROM_ZERO = Field(0, optional=True)
FROM_ZERO = Field(0)
LAYERS = Field(1, MOST_LAYERS)
EXPERTS = Field(1, MOST_EXPERTS, optional=True)
PIXELS = Field(1, MOST_PIXELS)
MERGED = Field(1, MOST_MERGED)
DEPTH = Field(-math.inf, MOST_LAYERS)  # its least depends on the projector's type
POSITIVE = Field(0, whole=False, above=True)
SHARE = Field(0, 1, whole=False)
ANY_NUMBER = Field(-math.inf, whole=False)
ANY_WHOLE = Field(-math.inf)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or of NumPy."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def check_fields(values: Any, fields: Mapping[str, Field]) -> None:
    """Raise `FieldError` for the first attribute of a config that is not what its `Field` allows."""
    for name, field in fields.items():
        value = getattr(values, name)
        if not field.allows(value):
            raise FieldError(f"{name} must be {field}, got {value!r}.")


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a part of a config as a dict, an empty one for ``None``; raise `FieldError` for what is none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FieldError(f"{name} must be an object, got {value!r}.")
    return dict(value)


def check_texts(**values: Any) -> None:
    """Raise `FieldError` for the first of these fields that is no text, or an empty one."""
    for name, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise FieldError(f"{name} must be a text, got {value!r}.")


def check_switches(**values: Any) -> None:
    """Raise `FieldError` for the first of these fields that is neither true nor false."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise FieldError(f"{name} must be true or false, got {value!r}.")


def check_sizes(name: str, value: Any) -> list[tuple[int, int]]:
    """Return (width, height) pairs in pixels; raise `FieldError` for what are none."""
    pairs = value if isinstance(value, Sequence) and not isinstance(value, str) else None
    for pair in [None] if pairs is None else pairs:
        right = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not right or not all(is_whole(side) and side > 0 for side in pair):  # type: ignore[union-attr]
            raise FieldError(f"{name} must be a list of [width, height] in pixels, got {value!r}.")
    return [(int(width), int(height)) for width, height in pairs or []]


def check_channels(name: str, value: Any, above: float = -math.inf) -> tuple[float, ...]:
    """Return a number for each of the three channels; raise `FieldError` for what are none."""
    allowed = Field(above, whole=False, above=True)
    channels = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if len(channels) != 3 or not all(allowed.allows(each) for each in channels):
        bound = "" if above == -math.inf else f" above {above:g}"
        raise FieldError(f"{name} must be three numbers{bound}, got {value!r}.")
    return channels
