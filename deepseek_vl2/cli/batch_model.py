"""Which model a run of ``deepseek-vl2 batch`` asks, as a text that tells it from others; no weights are loaded."""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from pathlib import Path

from deepseek_vl2.cli.options import default_model
from deepseek_vl2.utils.places import NANO_NAME, is_nano, nano_directory

BLOCK_BYTES = 1 << 16  # read at the beginning, the middle and the end of a file of weights
DIGITS = 12


def model_identity(args: Namespace) -> str:
    """Return a fingerprint of the model's name or path, its files, its dtype and how it is quantized.

    A repository of the hub, and a directory that only the nodes of a cluster have, count by name.
    """
    name = args.model or default_model()
    path = Path(os.path.expanduser(name))
    directory = nano_directory() if is_nano(name) else path if path.is_dir() else None
    digest = hashlib.sha256(repr([args.dtype, args.quantize, args.quantize_head]).encode())
    if directory is None or is_nano(name):
        digest.update((NANO_NAME if is_nano(name) else name).encode(errors="backslashreplace"))
    else:
        digest.update(os.path.realpath(directory).encode(errors="backslashreplace"))
    if directory is not None:
        for file in sorted((*directory.glob("*.json"), *directory.glob("*.safetensors"), *directory.glob("*.bin"))):
            if file.is_file():
                digest.update(file.name.encode(errors="backslashreplace") + sample_of(file))
    return digest.hexdigest()[:DIGITS]


def sample_of(file: Path) -> bytes:
    """Return a file's size and blocks of it: whole files of weights would take minutes to read."""
    size = file.stat().st_size
    found = [str(size).encode()]
    with open(file, "rb") as stream:
        for offset in (0, size // 2, max(0, size - BLOCK_BYTES)):
            stream.seek(offset)
            found.append(stream.read(BLOCK_BYTES))
    return b"".join(found)
