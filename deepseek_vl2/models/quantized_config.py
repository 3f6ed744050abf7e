"""What a saved config.json says of packed weights, in compressed-tensors' terms, as vLLM reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .quantization import BLOCK, GROUP_SIZES, WeightFormat

HEAD = "lm_head"
ABSORBED = "kv_b_proj"
# vLLM looks for the name of a fused layer before it looks for its parts' names.
FUSED_IN_VLLM = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def _scheme(fmt: WeightFormat, targets: list[str]) -> dict[str, Any]:
    """Return a group of compressed-tensors' config."""
    strategy = "block" if fmt.block else "group" if fmt.group_size else "channel"
    weights = {
        "num_bits": 4 if fmt.kind == "int4" else 8,
        "type": "float" if fmt.kind == "fp8" else "int",
        "symmetric": True,
        "strategy": strategy,
        # vLLM's experts ask for the -1 of whole rows.
        "group_size": fmt.group_size or (-1 if fmt.kind == "int8" else None),
        "block_structure": [BLOCK, BLOCK] if fmt.block else None,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": _activations(fmt),
        "output_activations": None,
        "format": "float-quantized" if fmt.kind == "fp8" else "pack-quantized",
    }


def _activations(fmt: WeightFormat) -> dict[str, Any] | None:
    """Return what a file says of the inputs of products.

    vLLM has no experts with fp8 weights and 16-bit inputs. It loads fp8 files that ask for inputs in fp8 with scales
    found at run time, which change no stored tensor; this package keeps the inputs as they are.
    """
    if fmt.kind != "fp8":
        return None
    scales = {"strategy": "group", "group_size": BLOCK} if fmt.block else {"strategy": "token"}
    return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, **scales}


def _target(name: str) -> str:
    """Return a pattern of all layers that a packed matrix of the model is in a file, or is part of in vLLM."""
    prefix, is_experts, part = name.rpartition(".experts.")
    if is_experts:
        parts = "(gate|up)_proj" if part == "gate_up_proj" else re.escape(part)
        return f"re:{re.escape(prefix)}\\.experts\\.(routed_experts\\.)?\\d+\\.{parts}$"
    prefix, _, part = name.rpartition(".")
    fused = next((whole for whole, parts in FUSED_IN_VLLM.items() if part in parts), None)
    return f"re:{re.escape(prefix)}\\.{f'({part}|{fused})' if fused else re.escape(part)}$"


def most_frequent(formats: Mapping[str, WeightFormat]) -> WeightFormat:
    """Return the format that most matrices have."""
    found = list(formats.values())
    return max(set(found), key=lambda fmt: (found.count(fmt), str(fmt)))


def file_config(formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a config.json, as compressed-tensors and vLLM read it.

    Args:
        formats: the format of each packed matrix; those that are not of the most frequent one are named.
    """
    wanted = most_frequent(formats)
    groups = {"group_0": _scheme(wanted, ["Linear"])}
    others: dict[WeightFormat, list[str]] = {}
    for name, fmt in formats.items():
        # vLLM's head is no "Linear" and must be named.
        if fmt != wanted or name.endswith(HEAD):
            others.setdefault(fmt, []).append(_target(name))
    for index, fmt in enumerate(sorted(others, key=str), start=1):
        groups[f"group_{index}"] = _scheme(fmt, sorted(others[fmt]))
    layouts = {group["format"] for group in groups.values()}
    ignore = ["re:vision\\..*", "re:projector\\..*", "re:.*\\.mlp\\.gate$"]
    for plain in (HEAD, ABSORBED):
        if not any(name.endswith(plain) for name in formats):
            ignore.append(f"re:.*{plain}$")
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def holds_fp8(described: Mapping[str, Any] | None) -> bool:
    """Whether the ``quantization_config`` of a config.json speaks of weights in fp8."""
    if described is None:
        return False
    groups = described.get("config_groups") or {}
    return described.get("quant_method") == "fp8" or any(
        (group.get("weights") or {}).get("type") == "float" for group in groups.values()
    )


def refused_by_vllm(formats: Mapping[str, WeightFormat]) -> list[str]:
    """Return, as sentences, what vLLM does not load of matrices packed so; those of released sizes it all loads."""
    found = []
    small = sorted(name for name, fmt in formats.items() if 0 < fmt.group_size < min(GROUP_SIZES))
    if small:
        found.append(
            f"vLLM's kernels take groups of {', '.join(map(str, GROUP_SIZES))} columns: {small[0]} has groups of "
            f"{formats[small[0]].group_size}; int8 has none, and both read it."
        )
    experts: dict[str, set[WeightFormat]] = {}
    for name, fmt in formats.items():
        layer, is_expert, _ = name.rpartition(".experts.")
        if is_expert:
            experts.setdefault(f"{layer}.experts", set()).add(fmt)
    mixed = [name for name, found_formats in experts.items() if len(found_formats) > 1]
    if mixed:
        found.append(f"vLLM's experts have one format: {mixed[0]} has two; int8 gives them one, and both read it.")
    return found
