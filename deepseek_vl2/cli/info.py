"""``deepseek-vl2 info``: what a model is, what it needs, and what this machine has."""

from __future__ import annotations

import copy
import json
import platform
from argparse import ArgumentParser, Namespace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepseek_vl2.cli.hub_cache import cached_checkpoint
from deepseek_vl2.cli.options import DTYPES, check_reachable, note, whole_number
from deepseek_vl2.cli.releases import RELEASES, release_facts, release_sizes
from deepseek_vl2.utils.progress import Progress

DESCRIPTION = "Sizes of a model, memory that it needs, devices and versions. No weights are loaded."
EXAMPLES = """\
examples:
  deepseek-vl2 info
  deepseek-vl2 info path/to/checkpoint
  deepseek-vl2 info deepseek-ai/deepseek-vl2-tiny --dtype float16 --context 8192 --json
"""
GB = 1e9
PACKAGES = (
    "deepseek_vl2",
    "torch",
    "transformers",
    "timm",
    "pillow",
    "accelerate",
    "triton",
    "xformers",
    "gradio",
    "fastapi",
)
MOST_BYTES_READ = 500_000_000  # weights of larger checkpoints are not looked at for NaN: that would take long
TYPICAL_IMAGES = ((640, 480), (1024, 768), (1920, 1080), (1080, 1920))


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "model", nargs="?", help="directory or hub id of a checkpoint (at most its config is downloaded)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights; default: %(default)s")
    parser.add_argument(
        "--context", type=whole_number(1), default=4096, help="tokens of prompt and answer; default: 4096"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: Namespace) -> int:
    """Gather and print."""
    with Progress(f"Looking at {args.model or 'this machine'}"):
        facts: dict[str, Any] = {"versions": versions(), "devices": devices()}
        if args.model is not None:
            facts["model"] = known_or_read(args.model, args.context)
        facts["fits"] = what_fits(facts.get("model"), facts["devices"], args.dtype, args.context)
        if args.model is not None:
            facts["training"] = what_trains(facts["model"], facts["devices"])
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print("\n\n".join(sections(facts, args)))
    return 0


# ---------------------------------------------------------------- facts


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "deepseek_vl2" not in found:  # run from a checkout
        from deepseek_vl2 import __version__

        found["deepseek_vl2"] = __version__
    return found


def devices() -> list[dict[str, Any]]:
    """Return GPUs and main memory: name, bytes in all and free."""
    import psutil
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index), "total": total, "free": free}
        )
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        found.append({"device": "mps", "name": "Apple GPU", "total": total, "free": total})
    memory = psutil.virtual_memory()
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    found.append({"device": "cpu", "name": name, "total": memory.total, "free": memory.available})
    return found


def known_or_read(name: str, context: int) -> dict[str, Any]:
    """Return a model's facts: of a release from what is known of it, with its files where they are downloaded.

    No network is needed for a release. Another repository's config is downloaded where the cache lacks it.

    Raises:
        OSError, ValueError: there is no such model, or its config is wrong.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    if name not in RELEASES or Path(name).is_dir():
        check_reachable(name)
        return model_facts(name, context)
    found = cached_checkpoint(name)
    if found is None or found.missing:
        return release_facts(name, context)
    return {**model_facts(str(found.path), context), "name": name}


def model_facts(name: str, context: int) -> dict[str, Any]:
    """Return a model's sizes from its config and, where they are at hand, the headers of its weights.

    Raises:
        OSError, ValueError: there is no such model, or its config is wrong.
    """
    import torch

    from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
    from deepseek_vl2.models.checkpoint import released_shapes
    from deepseek_vl2.models.checkpoint_check import check_config
    from deepseek_vl2.training.memory import AdapterMemory, adapter_memory
    from deepseek_vl2.utils.io import resolve_model_path
    from deepseek_vl2.utils.memory import model_sizes, stored_sizes

    source = resolve_model_path(name)
    if isinstance(source, Path):
        check_config(source, DeepseekVLV2Config.model_type)
    config = DeepseekVLV2Config.from_pretrained(source)
    with torch.device("meta"):
        shapes = released_shapes(DeepseekVLV2ForCausalLM(config), config)
    parts = count_parameters(shapes, config.language_config)
    sizes, adapters = model_sizes(config), adapter_memory(config)
    if getattr(config, "quantization_config", None) is not None:
        sizes = stored_sizes(config, source)
        adapters = AdapterMemory(sizes.weights, adapters.numbers)
    return {
        "name": name,
        "parameters": parts,
        "attention": "latent" if config.language_config.use_mla else "multi-head",
        "layers": config.language_config.num_hidden_layers,
        "experts": config.language_config.n_routed_experts or 0,
        "experts_per_token": config.language_config.num_experts_per_tok or 0,
        "max_position_embeddings": config.language_config.max_position_embeddings,
        "image_tokens": image_tokens(config),
        "cache_bytes_per_token": sizes.cache,
        "weights_bytes": sizes.weights,
        "needed_bytes": {kind: sizes.needed(kind, context) for kind in sizes.weights},
        "training_bytes": adapters.methods(parts["total"]),
        **stored_facts(source, shapes, config),
    }


def count_parameters(shapes: dict[str, tuple[int, ...]], language: Any) -> dict[str, int]:
    """Count a model's parameters by part, and those that one token meets: of tables a row, of experts the chosen."""
    counts = {"vision": 0, "projector": 0, "language": 0}
    idle = experts = 0
    for name, shape in shapes.items():
        size = 1
        for side in shape:
            size *= side
        part = name.partition(".")[0]
        counts[part if part in counts else "projector"] += size
        experts += size if ".mlp.experts." in name else 0
        idle += size if name.endswith("embed_tokens.weight") or name.startswith("vision.attn_pool.") else 0
    total = sum(counts.values())
    if language.n_routed_experts:
        idle += round(experts * (1 - language.num_experts_per_tok / language.n_routed_experts))
    return {**counts, "total": total, "activated": total - idle}


def image_tokens(config: Any) -> dict[str, int]:
    """Return how many tokens images of usual sizes take."""
    from deepseek_vl2.models.tiling import count_image_tokens, select_best_resolution, tile_grid, tokens_per_side

    resolutions = [(int(width), int(height)) for width, height in config.candidate_resolutions]
    tile = resolutions[0][0]
    side = tokens_per_side(tile, config.vision_config.patch_size, config.projector_config.downsample_ratio)
    counts = {}
    for width, height in TYPICAL_IMAGES:
        grid = tile_grid(select_best_resolution((width, height), resolutions), tile)
        counts[f"{width}x{height}"] = count_image_tokens(grid, side)
    return counts


def stored_facts(source: str | Path, shapes: dict[str, tuple[int, ...]], config: Any) -> dict[str, Any]:
    """Return what the files of a directory hold and what is wrong with them, from their headers or, if small, whole."""
    from deepseek_vl2.models.bnb_quantizer import METHODS
    from deepseek_vl2.models.checkpoint import StoredTensors, check_shapes, find_files
    from deepseek_vl2.models.checkpoint_check import check_tokenizer, find_not_finite, read_json_object
    from deepseek_vl2.models.loading import quantized_by
    from deepseek_vl2.models.quantized_checkpoint import logical_shapes, read_layers

    if not Path(source).is_dir():
        return {}
    try:
        files = find_files(source)
        if files is None:
            return {"problem": f"There are no safetensors files in {source}."}
        stored = StoredTensors(files)
        facts: dict[str, Any] = {
            "files": len(files),
            "file_bytes": sum(file.stat().st_size for file in files),
            "dtype": str(stored.dtype).removeprefix("torch."),
        }
        if any(name.endswith(("weight_scale", "weight_scale_inv")) for name in stored.shapes):
            facts["dtype"] = f"packed, {facts['dtype']}"
            check_shapes(shapes, logical_shapes(stored, read_layers(stored)), source)
        elif quantized_by(config) in METHODS.values():
            facts["dtype"] = f"packed by bitsandbytes, {facts['dtype']}"
            check_packed_by_bnb(config, stored, source)
        else:
            check_shapes(shapes, stored.shapes, source)
        if facts["file_bytes"] <= MOST_BYTES_READ:
            wrong = find_not_finite((name, tensor[...]) for name, tensor in stored.slices.items())
            if wrong:
                raise ValueError(f"{stored.files[wrong[0]]} has weights that are NaN or infinite: it is damaged.")
        check_tokenizer(Path(source), read_json_object(Path(source) / "config.json"))
    except (ValueError, OSError) as error:
        return {"problem": str(error)}
    return facts


def check_packed_by_bnb(config: Any, stored: Any, source: str | Path) -> None:
    """Check the tensors of a file that bitsandbytes packed, where that package is there to say what they are.

    Raises:
        ValueError: some are missing, extra or of another shape.
    """
    import torch

    from deepseek_vl2.models import DeepseekVLV2ForCausalLM
    from deepseek_vl2.models.bnb_quantizer import prepare_packed

    if find_spec("bitsandbytes") is None:
        return
    described = config.quantization_config
    plain = copy.deepcopy(config)
    del plain.quantization_config
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(plain)
    prepare_packed(model, described, stored, source)


def what_fits(
    model: dict[str, Any] | None, machine: list[dict[str, Any]], dtype: str, context: int
) -> list[dict[str, Any]]:
    """Return, for the model and for the releases, the memory needed in each precision and where it is."""
    needs = {} if model is None else {model["name"]: model["needed_bytes"]}
    for name in RELEASES:
        sizes = release_sizes(name)
        needs.setdefault(name, {kind: sizes.needed(kind, context) for kind in sizes.weights})
    rows = []
    for name, kinds in needs.items():
        for kind in shown_precisions(kinds, dtype):
            places = find_places(kinds[kind], machine)
            rows.append({"model": name, "precision": kind, "needed": kinds[kind], "fits": places})
    return rows


def what_trains(model: dict[str, Any], machine: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the memory that each way to fine-tune a model holds, activations aside, and where it is."""
    return [
        {"method": method, "needed": needed, "fits": [entry["device"] for entry in machine if entry["free"] >= needed]}
        for method, needed in model["training_bytes"].items()
    ]


def shown_precisions(known: dict[str, int], dtype: str) -> list[str]:
    """Return in which precisions a model is shown: of those that are not packed, the one that was asked for."""
    return [kind for kind in known if kind not in DTYPES or kind == dtype]


def find_places(needed: int, machine: list[dict[str, Any]]) -> list[str]:
    """Return where on a machine that many bytes are free."""
    gpus = [entry for entry in machine if entry["device"] != "cpu"]
    places = [entry["device"] for entry in machine if entry["free"] >= needed]
    together = sum(entry["free"] for entry in gpus)
    if len(gpus) > 1 and together >= needed * 1.1 and not any(place != "cpu" for place in places):
        places.insert(0, f"{len(gpus)} GPUs together")
    return places


# ---------------------------------------------------------------- text


def sections(facts: dict[str, Any], args: Namespace) -> list[str]:
    """Return the facts as a person reads them."""
    parts = [model_section(facts["model"], args)] if "model" in facts else []
    lines = [f"memory for a picture and {args.context} tokens, about"]
    for row in facts["fits"]:
        places = ", ".join(row["fits"]) or "not on this machine"
        lines.append(f"  {row['model']:34} {row['precision']:9} {row['needed'] / GB:6.1f} GB   {places}")
    parts.append("\n".join(lines))
    if "training" in facts:
        lines = ["fine-tuning, about (adapters of rank 16, experts too); activations come on top"]
        for row in facts["training"]:
            places = ", ".join(row["fits"]) or "not on one device of this machine"
            lines.append(f"  {row['method']:44} {row['needed'] / GB:6.1f} GB   {places}")
        parts.append("\n".join(lines))
    lines = ["devices"]
    for entry in facts["devices"]:
        lines.append(
            f"  {entry['device']:8} {entry['free'] / GB:6.1f} of {entry['total'] / GB:.1f} GB free   {entry['name']}"
        )
    parts.append("\n".join(lines))
    parts.append("versions\n" + "\n".join(f"  {name:14} {value}" for name, value in facts["versions"].items()))
    return parts


def model_section(model: dict[str, Any], args: Namespace) -> str:
    """Return a model's facts as a person reads them."""
    counts = model["parameters"]
    parts = ", ".join(f"{part} {people_count(counts[part])}" for part in ("vision", "projector", "language"))
    images = ", ".join(f"{size}: {count}" for size, count in model["image_tokens"].items())
    weights = ", ".join(f"{kind} {size / GB:.2f} GB" for kind, size in model["weights_bytes"].items())
    rows = {
        "parameters": f"{people_count(counts['total'])} ({parts})",
        "for one token": people_count(counts["activated"]),
        "language": f"{model['layers']} layers, {model['attention']} attention, "
        f"{model['experts_per_token']} of {model['experts']} experts a token",
        "longest": f"{model['max_position_embeddings']} tokens",
        "an image": f"tokens: {images}",
        "weights": weights,
        "cache": f"{model['cache_bytes_per_token'] / 1000:.1f} kB a token in 16 bits",
    }
    if "files" in model:
        rows["stored"] = f"{model['files']} files, {model['file_bytes'] / GB:.2f} GB, {model['dtype']}"
    if "problem" in model:
        note(model["problem"])
    return f"{model['name']}\n" + "\n".join(f"  {name:14} {value}" for name, value in rows.items())


def people_count(number: int) -> str:
    """Return a number as people say it: 3.4 B, 12.3 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
