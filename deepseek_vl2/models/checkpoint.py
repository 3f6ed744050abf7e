"""The layout of released checkpoints, and a check that a directory holds what a model needs.

Released files store each expert's three matrices under their own names; the model holds them fused. transformers
converts between the two while loading and saving, by the rules below.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.utils import cached_file

from .checkpoint_check import HOLDS, broken_link, first_names, read_json_object

Shapes = dict[str, tuple[int, ...]]

# Present in every release and never run: a checkpoint may come with or without them.
OPTIONAL_TENSORS = r"^vision\.attn_pool\."

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EXPERT_TENSOR = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
INTEGER_DTYPES = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = {**FLOAT_DTYPES, **INTEGER_DTYPES, "BOOL": torch.bool}


def conversion_rules() -> list[WeightConverter]:
    """Return how the experts are fused at loading; transformers reverses it at saving."""
    return [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def register_conversion(model_type: str) -> None:
    """Tell transformers of the rules for a model type."""
    # Code loaded from a checkpoint directory is a second copy of this file and registers the same rules again.
    register_checkpoint_conversion_mapping(model_type, conversion_rules(), overwrite=True)


def released_shapes(model: nn.Module, config: PretrainedConfig) -> Shapes:
    """Return the name and the shape of every tensor of a model's checkpoint, in the released layout."""
    shapes: Shapes = {}
    tied = config.get_text_config().tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name.endswith("lm_head.weight"):
            continue
        prefix, is_fused, projection = name.rpartition(".experts.")
        if not is_fused:
            shapes[name] = tuple(tensor.shape)
            continue
        experts, rows, columns = tensor.shape
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[projection]
        for expert in range(experts):
            for part in parts:
                shapes[f"{prefix}.experts.{expert}.{part}.weight"] = (rows // len(parts), columns)
    return shapes


class OpenFile:
    """A file that is open for reading at any place, by any thread, until nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read_into(self, rest: memoryview, at: int) -> None:
        """Fill a buffer with the bytes from ``at`` on.

        Raises:
            ValueError: the file ends before.
        """
        while len(rest):
            read = os.preadv(self.descriptor, [rest], at)
            if read == 0:
                raise ValueError(f"{self.path} ends at byte {at}, in the middle of a tensor.")
            rest, at = rest[read:], at + read


class StoredTensor:
    """A tensor of a safetensors file, read at ``tensor[...]`` without holding the interpreter's lock.

    safetensors' own slices hold it while they read, so that threads would wait for each other: transformers loads with
    several.

    Source: the format, github.com/huggingface/safetensors.
    """

    def __init__(self, file: OpenFile, start: int, entry: dict[str, Any]) -> None:
        self.file = file
        self.start = start + entry["data_offsets"][0]
        self.code: str = entry["dtype"]
        self.shape: list[int] = entry["shape"]

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the stored dtype, as safetensors names it."""
        return self.code

    def read_into(self, out: torch.Tensor) -> None:
        """Read into a contiguous tensor of the stored shape and dtype."""
        if not out.numel():
            return
        numbers: Any = out.view(-1).view(torch.uint8).numpy()
        self.file.read_into(memoryview(numbers), self.start)

    def __getitem__(self, index: Any) -> torch.Tensor:
        out = torch.empty(self.shape, dtype=DTYPES[self.code])
        self.read_into(out)
        return out[index]


def read_slices(path: Path) -> dict[str, Any]:
    """Return what reads each tensor of a safetensors file, by its name.

    Raises:
        safetensors.SafetensorError: the file is truncated or none of its kind.
    """
    shard = safe_open(path, framework="pt", backend="pread")  # checks the header, and the size
    slices: dict[str, Any] = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - not a dict
    if not hasattr(os, "preadv"):
        return slices
    with path.open("rb") as start:
        size = int.from_bytes(start.read(8), "little")
        header = json.loads(start.read(size))
    file = OpenFile(path)
    for name in slices:
        if header[name]["dtype"] in DTYPES:
            slices[name] = StoredTensor(file, 8 + size, header[name])
    return slices


class StoredTensors:
    """The tensors of a checkpoint's safetensors files, known by name and shape and read one by one when asked for.

    Files are read, not memory-mapped: a mapped page counts as the process's memory until its file is closed, and
    loading would seem to take, and on a full machine would take, the checkpoint's size almost twice.

    Raises:
        ValueError: a file is empty, truncated or none of its kind.
    """

    def __init__(self, files: list[Path]) -> None:
        self.slices: dict[str, Any] = {}
        self.files: dict[str, Path] = {}
        for file in files:
            if file.stat().st_size == 0:
                raise ValueError(f"{file} is empty: copy or download it again.")
            try:
                slices = read_slices(file)
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated, or no safetensors file ({error}): copy it again.") from error
            self.slices.update(slices)
            self.files.update(dict.fromkeys(slices, file))
        self.shapes: Shapes = {name: tuple(s.get_shape()) for name, s in self.slices.items()}

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first tensor of floating point."""
        codes = (s.get_dtype() for s in self.slices.values())
        return next((FLOAT_DTYPES[code] for code in codes if code in FLOAT_DTYPES), None)

    def fused(self) -> dict[str, Any]:
        """Return a state dict in the model's own names, whose values read themselves at ``value[...]``."""
        state: dict[str, Any] = {}
        experts: dict[str, dict[int, dict[str, Any]]] = {}
        for name, stored in self.slices.items():
            match = EXPERT_TENSOR.match(name)
            if match is None:
                state[name] = stored
                continue
            prefix, index, part = match.groups()
            experts.setdefault(prefix, {}).setdefault(int(index), {})[part] = stored
        for prefix, parts in experts.items():
            rows = [parts[index] for index in sorted(parts)]
            state[f"{prefix}.gate_up_proj"] = FusedSlices([[row["gate_proj"], row["up_proj"]] for row in rows])
            state[f"{prefix}.down_proj"] = FusedSlices([[row["down_proj"]] for row in rows])
        return state


class FusedSlices:
    """Matrices of all experts that are read straight into one tensor, [experts, rows of all parts, columns]."""

    def __init__(self, slices: list[list[Any]]) -> None:
        self.slices = slices

    def get_shape(self) -> list[int]:
        """Return the fused shape."""
        shapes = [part.get_shape() for part in self.slices[0]]
        return [len(self.slices), sum(shape[0] for shape in shapes), shapes[0][1]]

    def get_dtype(self) -> str:
        """Return the stored dtype, as safetensors names it."""
        return self.slices[0][0].get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        code = self.get_dtype()
        fused = torch.empty(self.get_shape(), dtype=DTYPES[code] if code in DTYPES else self.slices[0][0][...].dtype)
        for expert, parts in enumerate(self.slices):
            start = 0
            for part in parts:
                rows = part.get_shape()[0]
                place = fused[expert, start : start + rows]
                if isinstance(part, StoredTensor) and part.code == code:
                    part.read_into(place)
                else:
                    place.copy_(part[...])
                start += rows
        return fused[index]


def _without_weights(directory: Path) -> str:
    """Return why a directory has no weights to read."""
    for name in (INDEX, SINGLE):
        if broken := broken_link(directory / name):
            return f"{broken}: copy or download the checkpoint again."
    shards = sorted(path.name for path in directory.glob("*.safetensors") if path.is_file())
    if shards:
        return f"{directory} has no {INDEX}, which says what is in {first_names(shards)}: copy or download it too."
    return f"There are no safetensors files in {directory}: {HOLDS}."


def find_files(source: Any, **hub: Any) -> list[Path] | None:
    """Return the safetensors files of a directory or of a hub repository; ``None`` if there are none.

    Args:
        source: a directory, or the id of a repository.
        **hub: ``revision``, ``token``, ``cache_dir`` and the like, as for ``from_pretrained``.

    Raises:
        FileNotFoundError: a shard that the index names is not there, or a directory holds no weights at all.
        ValueError: the index cannot be read.
    """
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    index = cached_file(source, INDEX, **quiet, **hub)
    if index is None:
        single = cached_file(source, SINGLE, **quiet, **hub)
        directory = Path(source) / (hub.get("subfolder") or "")
        if single is None and Path(source).is_dir() and not any(directory.glob("*.bin")):
            raise FileNotFoundError(_without_weights(directory))
        return None if single is None else [Path(single)]
    weight_map = read_json_object(Path(index)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map, which names the shard of each tensor.")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} names a shard by something else than a text.")
    names = sorted(set(weight_map.values()))
    files = {name: cached_file(source, name, **quiet, **hub) for name in names}
    absent = [name for name, file in files.items() if file is None]
    if absent:
        raise FileNotFoundError(f"{source} names these shards in its index but does not hold them: {absent}.")
    return [Path(str(file)) for file in files.values()]


def find_token_id(source: Any, token: str, **hub: Any) -> int | None:
    """Return the id that a checkpoint's tokenizer files give a token, or ``None``.

    Args:
        source, **hub: see `find_files`.
        token: the token's text.
    """
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    for name in ("tokenizer_config.json", "tokenizer.json"):
        file = cached_file(source, name, **quiet, **hub)
        content = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        decoder = content.get("added_tokens_decoder") or {}
        added = [*({**entry, "id": int(key)} for key, entry in decoder.items()), *(content.get("added_tokens") or [])]
        for entry in added:
            if entry.get("content") == token:
                return int(entry["id"])
    return None


def check_float(stored: StoredTensors) -> None:
    """Raise ``ValueError`` for weights stored as other than real numbers, without a word on what they stand for."""
    wrong = [name for name, each in stored.slices.items() if not each.get_dtype().startswith(("F", "BF"))]
    if wrong:
        code = stored.slices[wrong[0]].get_dtype()
        kind = "complex" if code.startswith("C") else "whole"
        raise ValueError(
            f"{stored.files[wrong[0]]} stores {first_names(wrong)} as {kind} numbers ({code}), which are no weights: "
            "its config.json names no quantization that they could be of."
        )


def check_pickles(source: Any) -> None:
    """Raise ``ValueError`` for weights of a directory that PyTorch pickled and cannot read; the file is named."""
    directory = Path(source or "")
    if source is None or not directory.is_dir() or any(directory.glob("*.safetensors")):
        return
    for path in sorted(directory.glob("pytorch_model*.bin")):
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # of pickle, zipfile, struct and PyTorch itself
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise ValueError(f"{path} is truncated, or holds no weights ({reason}): copy it again.") from error


def _listing(title: str, lines: list[str]) -> list[str]:
    return [f"{title} ({len(lines)}):", *(f"  {line}" for line in lines)] if lines else []


def check_shapes(expected: Shapes, stored: Shapes, source: Any) -> None:
    """Compare a checkpoint with what the model needs.

    Raises:
        ValueError: tensors are missing, extra or of another shape; each is named.
    """
    optional = re.compile(OPTIONAL_TENSORS)
    missing = [f"{n} {list(s)}" for n, s in expected.items() if n not in stored and not optional.match(n)]
    extra = [f"{n} {list(s)}" for n, s in stored.items() if n not in expected and not optional.match(n)]
    misshaped = [
        f"{n}: {list(stored[n])} in the checkpoint, {list(s)} in the model"
        for n, s in expected.items()
        if n in stored and stored[n] != s
    ]
    problems = [
        *_listing("missing tensors", missing),
        *_listing("extra tensors", extra),
        *_listing("tensors of another shape", misshaped),
    ]
    if problems:
        raise ValueError("\n".join([f"The checkpoint at {source} does not fit its config.json.", *problems]))
