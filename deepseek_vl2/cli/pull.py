"""``deepseek-vl2 pull``: download a checkpoint into the Hugging Face hub's cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from deepseek_vl2.cli.hub_cache import cache_directory, cached_checkpoint, readable_size, repository_folder
from deepseek_vl2.cli.options import note
from deepseek_vl2.cli.parser import suggestion
from deepseek_vl2.cli.releases import MODEL_TYPE, RELEASES
from deepseek_vl2.utils.places import DEMO_NAME, NANO_NAME
from deepseek_vl2.utils.progress import Progress

DESCRIPTION = "Download a checkpoint into the Hugging Face hub's cache, where every command finds it."
EXAMPLES = """\
examples:
  deepseek-vl2 pull deepseek-ai/deepseek-vl2-tiny
  deepseek-vl2 pull deepseek-ai/deepseek-vl2-small --revision main

An interrupted download goes on where it was. HF_HOME or HF_HUB_CACHE says where the cache is, HF_TOKEN opens gated
repositories, HF_ENDPOINT names another hub. `deepseek-vl2 list` shows what is there.
"""
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*")
TIMEOUT = 15.0  # seconds for the hub to answer
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", metavar="MODEL", help="id of a hub repository, such as deepseek-ai/deepseek-vl2-tiny")
    parser.add_argument("--revision", default="main", help="branch, tag or commit; default: %(default)s")


def run(args: Namespace) -> int:
    """Download, and say where it is."""
    if args.model in (NANO_NAME, DEMO_NAME):
        note(f"{args.model} needs no download: it is part of the package.")
        return 0
    print(download(args.model, args.revision))
    return 0


def check_id(name: str) -> None:
    """Raise ``ValueError`` for what cannot be a repository's id."""
    if name and os.path.isdir(os.path.expanduser(name)):
        raise ValueError(f"{name} is a directory here: it is used as it is, with --model {name}.")
    if ID.fullmatch(name) is None:
        short = {release.partition("/")[2]: release for release in RELEASES}
        meant = f" Did you mean {short[name]}?" if name in short else suggestion(name, RELEASES)
        raise ValueError(f"{name!r} is no id of a hub repository, which has the form owner/name.{meant}")


def download(name: str, revision: str = "main") -> Path:
    """Download a checkpoint and return its directory in the cache.

    Args:
        name: the repository's id.
        revision: a branch, tag or commit of it.

    Raises:
        ValueError: it is no id, or no checkpoint of this family.
        OSError: the hub cannot be reached or refuses, or the disk is too small.
    """
    check_id(name)
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    with errors_told(name, revision):
        with Progress(f"Asking the hub for {name}", terminal_only=True):
            info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT, files_metadata=True)
            sizes = wanted_files({file.rfilename: int(file.size or 0) for file in info.siblings or []})
            check_files(name, sizes)
            with quiet_bars(True):
                check_family(name, Path(hf_hub_download(name, "config.json", revision=revision)))
        check_space(name, sizes)
        total = sum(sizes.values())
        note(f"Downloading {name}: {len(sizes)} files, {readable_size(total)}, into {cache_directory()}.")
        with quiet_bars(not sys.stderr.isatty()):
            path = Path(snapshot_download(name, revision=revision, allow_patterns=list(sizes)))
    found = cached_checkpoint(name, revision)
    if found is not None and found.missing:
        raise ValueError(f"{name} is not a whole checkpoint: its repository lacks {', '.join(found.missing)}.")
    note(f"{name} is there: --model {name} loads it.")
    return path


def wanted_files(sizes: dict[str, int]) -> dict[str, int]:
    """Return the files of a repository that make up a checkpoint, with their sizes."""
    return {file: size for file, size in sizes.items() if any(fnmatch(file, pattern) for pattern in WANTED)}


def check_files(name: str, sizes: dict[str, int]) -> None:
    """Raise ``ValueError`` for a repository that holds no checkpoint."""
    if "config.json" not in sizes or not any(file.endswith(".safetensors") for file in sizes):
        raise ValueError(f"{name} holds no checkpoint: it needs config.json and safetensors files.")


def check_family(name: str, config: Path) -> None:
    """Raise ``ValueError`` for another kind of model, before gigabytes of it come."""
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        kind = None
    if kind != MODEL_TYPE:
        raise ValueError(f"{name} is not a DeepSeek-VL2 checkpoint: its config.json says model_type {kind!r}.")


def check_space(name: str, sizes: dict[str, int]) -> None:
    """Raise ``OSError`` where the disk of the cache is too small for what is still to come."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    blobs = repository_folder(name) / "blobs"
    there = sum(file.stat().st_size for file in blobs.glob("*")) if blobs.is_dir() else 0
    needed, free = max(0, sum(sizes.values()) - there), shutil.disk_usage(cache).free
    if needed > free:
        raise OSError(f"{name} needs {readable_size(needed)} more, and {cache} has {readable_size(free)} free.")


@contextmanager
def quiet_bars(quiet: bool) -> Iterator[None]:
    """Keep the hub's progress bars away, where nobody looks; or show them, though another part hides them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    (disable_progress_bars if quiet else enable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


@contextmanager
def errors_told(name: str, revision: str) -> Iterator[None]:
    """Turn the hub's errors into one sentence each.

    Raises:
        OSError: with that sentence.
    """
    try:
        yield
    except Exception as error:
        words = words_for(error, name, revision)
        if words is None:
            raise
        raise OSError(words) from error


def words_for(error: BaseException, name: str, revision: str) -> str | None:
    """Return what one of the hub's errors means; ``None`` where it speaks for itself."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: ask for access at {hub}/{name}, then set HF_TOKEN."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no repository {name} at {hub}; if it is a private one, set HF_TOKEN.{suggestion(name, RELEASES)}"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{name} is not downloaded: HF_HUB_OFFLINE is set, which keeps from asking the hub."
    if isinstance(error, errors.HfHubHTTPError) and getattr(error, "response", None) is not None:
        return f"{hub} answered {error.response.status_code} for {name}: try again later."
    return network_words(error, hub)


def network_words(error: BaseException, hub: str) -> str | None:
    """Return what a failed connection means: the library's name for it stands somewhere in the chain of causes."""
    link: BaseException | None = error
    while link is not None:
        if type(link).__module__.partition(".")[0].startswith(("httpx", "httpcore", "requests")):
            late = "Timeout" in type(link).__name__
            reason = (
                "did not answer in time" if late else f"cannot be reached: {str(link).strip() or type(link).__name__}"
            )
            return f"The hub ({hub}) {reason}."
        link = link.__cause__ or link.__context__
    return None
