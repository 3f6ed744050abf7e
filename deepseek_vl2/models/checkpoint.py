"""The layout of released checkpoints, and a check that a directory holds what a model needs.

Released files store each expert's three matrices under their own names; the model holds them fused. transformers
converts between the two while loading and saving, by the rules below.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .configuration_deepseek import DeepseekV2Config

Shapes = dict[str, tuple[int, ...]]

# Present in every release and never run: a checkpoint may come with or without them.
OPTIONAL_TENSORS = r"^vision\.attn_pool\."


def register_conversion(model_type: str) -> None:
    """Tell transformers how this model type's experts are fused at loading, and taken apart at saving."""
    converters = [
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
    # Code loaded from a checkpoint directory is a second copy of this file and registers the same rules again.
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)


def released_shapes(model: nn.Module, config: DeepseekV2Config) -> Shapes:
    """Return the name and the shape of every tensor of a model's checkpoint, in the released layout."""
    shapes: Shapes = {}
    tied = "language.lm_head.weight" if config.tie_word_embeddings else None
    for name, tensor in model.state_dict().items():
        if name == tied:
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


def stored_shapes(directory: Path) -> Shapes | None:
    """Return the name and the shape of every tensor in a directory's safetensors files; ``None`` if there are none.

    Only headers are read. Raises ``FileNotFoundError`` for a shard that the index names and that is not there.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (directory / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        return None
    shapes: Shapes = {}
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{index} names the shard {name}, but {directory} does not hold it.")
        with safe_open(directory / name, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - not a dict
                shapes[key] = tuple(shard.get_slice(key).get_shape())
    return shapes


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
