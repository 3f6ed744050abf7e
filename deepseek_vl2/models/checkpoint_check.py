"""What can be wrong with a checkpoint directory, each in one sentence that names the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .config_fields import Field, is_whole
from .configuration_deepseek import DeepseekV2Config
from .configuration_deepseek_vl_v2 import DeepseekVLV2Config
from .generate_inputs import check_settings

CONFIGS: dict[str, Any] = {each.model_type: each for each in (DeepseekV2Config, DeepseekVLV2Config)}

SAMPLING = {
    "temperature": Field(0, whole=False, optional=True),
    "top_k": Field(0, optional=True),
    "repetition_penalty": Field(0, whole=False, optional=True, above=True),
}
ADAPTER = "adapter_config.json"
HOLDS = "a checkpoint directory holds config.json, tokenizer.json and model.safetensors"
MOST_NAMED = 3  # tensors in a message


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: the file is empty, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text.") from error
    except json.JSONDecodeError as error:
        where = f"{error.msg} in line {error.lineno}" if path.stat().st_size else "it is empty"
        raise ValueError(f"{path} is not valid JSON: {where}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


def broken_link(path: Path) -> str | None:
    """Return what a symbolic link that leads nowhere should be, or ``None``."""
    if not path.is_symlink() or path.exists():
        return None
    return f"{path} is a link to {os.readlink(path)}, where no file is"


def _without_config(directory: Path) -> str:
    if broken := broken_link(directory / "config.json"):
        return f"{broken}: copy or download the checkpoint again."
    adapter = directory / ADAPTER
    if adapter.is_file():
        base = read_json_object(adapter).get("base_model_name_or_path")
        return (
            f"{directory} holds an adapter ({ADAPTER}) and no model: load the one it was trained over, "
            f"{base}, and add the adapter with load_lora of deepseek_vl2.training.lora, or merge it."
        )
    what = "has no config.json" if any(directory.iterdir()) else "is empty"
    return f"{directory} {what}: {HOLDS}."


def _check_dtype(config: dict[str, Any]) -> None:
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
        if value not in (None, "auto") and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"{name} must be a dtype of floating point, such as 'bfloat16', got {value!r}.")


def _check_attention(config: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a kind of attention that transformers does not know, in the config or a part of it."""
    parts = {"": config, **{f"{name}.": part for name, part in config.items() if isinstance(part, dict)}}
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    for where, part in parts.items():
        for name in ("attn_implementation", "_attn_implementation"):
            value = part.get(name)
            values = list(value.values()) if isinstance(value, dict) else [value]
            for each in values:
                # With a slash: the id of a repository of kernels.
                if each is not None and not (isinstance(each, str) and (each in known or "/" in each)):
                    raise ValueError(f"{where}{name} must be one of {', '.join(sorted(known))}, got {each!r}.")


def check_config(directory: Path, model_type: str) -> dict[str, Any]:
    """Return the content of a checkpoint's config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, is another model's, or holds what is impossible.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(_without_config(directory))
    config = read_json_object(path)
    found = config.get("model_type")
    if found != model_type:
        whose = "names no model_type" if found is None else f"is of a model of type {found!r}"
        raise ValueError(f"{path} {whose}, not {model_type!r}: it is no checkpoint of DeepSeek-VL2.")
    try:
        _check_dtype(config)
        _check_attention(config)
        whole = CONFIGS[model_type].from_dict(dict(config))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    except (TypeError, AttributeError) as error:  # of transformers, for fields that are not ours
        raise ValueError(f"{path} cannot be read: {error}.") from error
    check_generation_config(directory / "generation_config.json", whole.get_text_config().vocab_size)
    return config


def check_generation_config(path: Path, vocab_size: int) -> None:
    """Check a checkpoint's generation_config.json, where there is one.

    Raises:
        ValueError: it cannot be read, or names what is no token, or no setting.
    """
    if not path.is_file():
        return
    content = read_json_object(path)
    try:
        check_settings(content.get, None)
        for name, field in SAMPLING.items():
            if not field.allows(content.get(name)):
                raise ValueError(f"{name} must be {field}, got {content[name]!r}.")
        GenerationConfig.from_dict(content).validate()
    except (ValueError, TypeError, AttributeError) as error:  # the last two of transformers
        raise ValueError(f"{path} cannot be used: {error}") from error
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = content.get(name)
        for each in ids if isinstance(ids, list) else [ids]:
            if each is not None and not 0 <= each < vocab_size:
                raise ValueError(f"{path} is another model's: {name} is {each}, and the ids are 0 to {vocab_size - 1}.")


def _token_ids(path: Path) -> dict[str, int]:
    """Return the ids of a tokenizer.json by their tokens."""
    content = read_json_object(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids = dict(vocabulary)
    elif isinstance(vocabulary, list):  # of a unigram model: pairs of token and score
        ids = {str(pair[0]): index for index, pair in enumerate(vocabulary)}
    else:
        raise ValueError(f"{path} is no tokenizer: it has no vocabulary.")
    added = content.get("added_tokens") or []
    entries = added if isinstance(added, list) else [added]
    if not all(isinstance(each, dict) and {"content", "id"} <= set(each) for each in entries):
        raise ValueError(f"{path} is no tokenizer: its added_tokens are no list of tokens with ids.")
    ids.update({token["content"]: token["id"] for token in entries})
    wrong = next((token for token, id_ in ids.items() if not is_whole(id_)), None)
    if wrong is not None:
        raise ValueError(f"{path} is no tokenizer: the id of {wrong!r} is {ids[wrong]!r}.")
    return ids


def check_tokenizer(directory: Path, config: dict[str, Any]) -> None:
    """Check that a checkpoint's tokenizer belongs to its model.

    Args:
        directory: the checkpoint's.
        config: the content of its config.json.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        ValueError: it cannot be read, or its ids are not those of the config.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no tokenizer.json: {HOLDS}.")
    ids = _token_ids(path)
    language = DeepseekV2Config(**(config.get("language_config") or {}))
    highest = max(ids.values(), default=-1)
    if highest >= language.vocab_size:
        raise ValueError(
            f"{path} is another model's tokenizer: it has ids up to {highest}, the model embeds {language.vocab_size}."
        )
    settings = directory / "tokenizer_config.json"
    named = read_json_object(settings) if settings.is_file() else {}
    length = named.get("model_max_length", 1)
    if not Field(whole=False).allows(length):
        raise ValueError(f"{settings} cannot be used: model_max_length must be {Field(whole=False)}, got {length!r}.")
    wanted = {"bos_token": language.bos_token_id, "eos_token": language.eos_token_id}
    for name, expected in wanted.items():
        if name not in named:
            continue
        token = named[name]
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            raise ValueError(f"{settings} cannot be used: it names no {name}, a text, but {token!r}.")
        allowed = expected if isinstance(expected, (list, tuple)) else [expected]
        if ids.get(token) not in allowed:
            raise ValueError(
                f"{path} is another model's tokenizer: its {name} {token!r} has the id {ids.get(token)}, in "
                f"config.json it has {expected}."
            )
    image_id = config.get("image_token_id")
    if image_id is not None and ids.get("<image>", image_id) != image_id:
        raise ValueError(
            f"{path} is another model's tokenizer: its <image> has the id {ids['<image>']}, in config.json it has "
            f"{image_id}."
        )


def first_names(names: list[str]) -> str:
    """Return names as a message lists them: a few, and how many more."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


@torch.no_grad()
def find_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity; those without numbers at hand are left out.

    A sum tells: one pass over memory, and one transfer from each device.
    """
    sums: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.device.type != "meta":
            sums.setdefault(tensor.device, []).append((name, tensor.sum(dtype=torch.float32)))
    return [
        name
        for pairs in sums.values()
        for (name, _), finite in zip(pairs, torch.stack([s for _, s in pairs]).isfinite().tolist(), strict=True)
        if not finite
    ]


def check_finite(model: nn.Module, files: dict[str, Path], source: Any, optional: str) -> None:
    """Check that all weights of a loaded model are numbers.

    Args:
        model: the model.
        files: the file of each stored tensor.
        source: where it was loaded from.
        optional: pattern of names that a checkpoint may lack: their memory then holds anything.

    Raises:
        ValueError: some are NaN or infinite; the file is named.
    """
    named = model.named_parameters()
    wrong = find_not_finite((name, each) for name, each in named if name in files or not re.match(optional, name))
    if wrong:
        stem = wrong[0].removesuffix("gate_up_proj").removesuffix("down_proj")
        file = next((path for name, path in files.items() if name.startswith(stem)), source)
        raise ValueError(f"{file} has weights that are NaN or infinite, in {first_names(wrong)}: it is damaged.")
