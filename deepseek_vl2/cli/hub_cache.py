"""The checkpoints of this family in the Hugging Face hub's cache; read without PyTorch and without the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_vl2.cli.releases import MODEL_TYPE

REPOSITORY = "models--"
INDEX = "model.safetensors.index.json"
NEEDED = ("config.json", "processor_config.json", "tokenizer.json")


class CachedCheckpoint(NamedTuple):
    """A snapshot of a repository.

    Fields:
        name: the repository's id.
        path: the directory.
        size: bytes of its files.
        missing: files that a model cannot do without, and that are not there: a download was interrupted.
    """

    name: str
    path: Path
    size: int
    missing: tuple[str, ...]


def cache_directory() -> Path:
    """Return the hub's cache, as its own library finds it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(name: str) -> Path:
    """Return where the cache keeps a repository."""
    return cache_directory() / (REPOSITORY + name.replace("/", "--"))


def cached_checkpoint(name: str, revision: str = "main") -> CachedCheckpoint | None:
    """Return what the cache holds of a repository's revision, or ``None`` where nothing of it was downloaded."""
    folder = repository_folder(name)
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return read_snapshot(name, snapshot) if snapshot.is_dir() else None


def cached_checkpoints() -> list[CachedCheckpoint]:
    """Return the checkpoints of this family in the cache, by name; other models' are left out."""
    found = []
    for folder in sorted(cache_directory().glob(f"{REPOSITORY}*")):
        name = folder.name.removeprefix(REPOSITORY).replace("--", "/")
        snapshots = sorted(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
        read = [read_snapshot(name, path) for path in snapshots if model_type(path) == MODEL_TYPE]
        found += read[-1:]  # the newest
    return found


def model_type(directory: Path) -> Any:
    """Return the kind of model that a directory's config.json names; ``None`` where it cannot be read."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def read_snapshot(name: str, path: Path) -> CachedCheckpoint:
    """Return a snapshot's size, and what it lacks."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    wanted = [*NEEDED, *weight_files(path)]
    return CachedCheckpoint(name, path, size, tuple(file for file in wanted if not (path / file).is_file()))


def weight_files(path: Path) -> list[str]:
    """Return the names of a checkpoint's safetensors files, those that its index names and are not there included."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        there = sorted(file.name for file in path.glob("*.safetensors"))
        return there or ["model.safetensors"]


def readable_size(size: int) -> str:
    """Return bytes as people say them: 39 MB, 6.74 GB."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
