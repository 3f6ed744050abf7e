"""``deepseek-vl2 list``: the models that are on this machine."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from deepseek_vl2.cli.hub_cache import cached_checkpoints, readable_size
from deepseek_vl2.cli.releases import RELEASES, stored_bytes
from deepseek_vl2.utils.places import DEMO_DONE, DEMO_NAME, NANO_NAME, demo_directory, nano_directory

DESCRIPTION = "List the models on this machine: those of the package, and checkpoints of the family in the hub's cache."
EXAMPLES = """\
examples:
  deepseek-vl2 list
  deepseek-vl2 list --json

`deepseek-vl2 pull MODEL` downloads one more. HF_HOME or HF_HUB_CACHE says where the cache is.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: Namespace) -> int:
    """Look, and print."""
    models = [*bundled_models(), *downloaded_models()]
    there = {model["name"] for model in models}
    elsewhere = [{"name": name, "bytes": stored_bytes(name)} for name in RELEASES if name not in there]
    if args.json:
        print(json.dumps({"models": models, "to_pull": elsewhere}, ensure_ascii=False))
    else:
        print("\n".join(lines(models, elsewhere)))
    return 0


def bundled_models() -> list[dict[str, Any]]:
    """Return the models that the package has, or writes, itself."""
    models = []
    nano, demo = nano_directory(), demo_directory()
    if nano is not None:
        models.append(entry(NANO_NAME, nano, note="a toy that ships with the package: drawn shapes, printed words"))
    written = (demo / DEMO_DONE).is_file()
    note = "random weights: its answers are noise" + ("" if written else "; written at its first use")
    models.append(entry(DEMO_NAME, demo, note=note) | {"there": written})
    return models


def downloaded_models() -> list[dict[str, Any]]:
    """Return the checkpoints in the hub's cache."""
    models = []
    for found in cached_checkpoints():
        note = f"incomplete: `deepseek-vl2 pull {found.name}` goes on" if found.missing else ""
        models.append(entry(found.name, found.path, note, found.size) | {"missing": list(found.missing)})
    return models


def entry(name: str, path: Path, note: str = "", size: int | None = None) -> dict[str, Any]:
    """Return what is told of a model."""
    if size is None:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"name": name, "bytes": size, "path": str(path), "note": note, "there": True}


def lines(models: list[dict[str, Any]], elsewhere: list[dict[str, Any]]) -> list[str]:
    """Return the models as a person reads them."""
    width = max(len(model["name"]) for model in [*models, *elsewhere])
    shown = []
    for model in models:
        size = readable_size(model["bytes"]) if model["there"] else ""
        shown.append(f"{model['name']:{width}} {size:>9}   {model['note'] or model['path']}")
    if elsewhere:
        shown += ["", "to be had with `deepseek-vl2 pull MODEL`:"]
        shown += [f"{model['name']:{width}} {readable_size(model['bytes']):>9}" for model in elsewhere]
    return shown
