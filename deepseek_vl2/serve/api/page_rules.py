"""What fields say of each other, in JSON Schema, for readers of the OpenAPI page; the requests check it themselves."""

from __future__ import annotations

from typing import Any

Rule = dict[str, Any]


def _absent(*names: str) -> Rule:
    return {"properties": {name: {"type": "null"} for name in names}}


def needs(name: str, other: str) -> Rule:
    """Return that a field may be given only where another one is true."""
    return {"anyOf": [_absent(name), {"properties": {other: {"const": True}}, "required": [other]}]}


def not_together(name: str, *others: str) -> Rule:
    """Return that a field may not be given together with some others."""
    return {"anyOf": [_absent(name), _absent(*others)]}


def all_of(*rules: Rule) -> Rule:
    """Return that all of some rules hold; readers of pages multiply them out, so there can be few."""
    return {"allOf": list(rules)}
