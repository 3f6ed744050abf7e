"""How much memory a model needs in each precision, what a device has, and whether the one fits into the other.

Peak of a conversation = weights + cache + working memory of the vision tower, the prefill and the allocator.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.checkpoint import find_files, released_shapes
from deepseek_vl2.models.quantization import Kind
from deepseek_vl2.models.quantizer import WeightOnlyConfig, matrix_shape, plan_formats

GB = 1e9
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
QUANTIZED: tuple[Kind, ...] = ("int8", "int4", "fp8")
STORED = "stored"
PRECISIONS = ("float32", "bfloat16", *QUANTIZED)
# Measured peaks of a picture and a prompt of 1,450 tokens lie up to this far above weights and cache.
WORKING_MEMORY = 1.3 * GB
CONTEXT = 4096
UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def cache_bytes(language: Any) -> int:
    """Return the cache's bytes a token in 16 bits."""
    if language.use_mla:
        numbers = language.kv_lora_rank + language.qk_rope_head_dim
    else:
        numbers = 2 * language.num_key_value_heads * (language.hidden_size // language.num_attention_heads)
    return int(2 * numbers * language.num_hidden_layers)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model.

    Fields:
        weights: of its weights, by precision: "bfloat16", "int4" (what is not packed: bfloat16) and so on.
        cache: of a token in the cache, in 16 bits.
    """

    weights: dict[str, int]
    cache: int

    def needed(self, precision: str, context: int = CONTEXT) -> int:
        """Return about how much memory a conversation with a picture and that many tokens needs."""
        wide = 2 if precision == "float32" else 1
        return round(self.weights[precision] + self.cache * wide * context + WORKING_MEMORY)


def packed_bytes(model: nn.Module, shapes: dict[str, tuple[int, ...]], config: WeightOnlyConfig) -> int:
    """Return the bytes of a model's weights once they are packed, where the rest has 16 bits."""
    total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    for name, fmt in plan_formats(model, config).items():
        *experts, rows, columns = matrix_shape(model, name)
        saved = (16 - fmt.bits(rows, columns)) * rows * columns / 8
        total -= round(saved * (experts[0] if experts else 1))
    return total


def model_sizes(config: DeepseekVLV2Config, asked: WeightOnlyConfig | None = None) -> Sizes:
    """Return the sizes of the model that a config describes; ``asked`` counts for its own kind of weights."""
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(config)
    shapes = released_shapes(model, config)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    weights = {kind: count * size for kind, size in BYTES.items()}
    for kind in QUANTIZED:
        wanted = asked if asked is not None and asked.weights == kind else WeightOnlyConfig(kind)
        weights[kind] = packed_bytes(model, shapes, wanted)
    return Sizes(weights, cache_bytes(config.language_config))


def stored_sizes(config: DeepseekVLV2Config, source: str | Path) -> Sizes:
    """Return the sizes of a checkpoint that is quantized already: those of its files, under `STORED`."""
    files = find_files(source) or []
    return Sizes({STORED: sum(Path(file).stat().st_size for file in files)}, cache_bytes(config.language_config))


def parse_size(text: str | int) -> int:
    """Return bytes of a size such as 16GB, 12.5GiB or 8000000000.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in UNITS or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no size of memory: write it like 16GB or 12.5GiB.")
    return int(float(match[1]) * UNITS[match[2].lower()])


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a device can still give; ``None`` where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch keeps for itself, and nothing uses, is free for a model.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return None


def check_fits(
    sizes: Sizes, precision: str, device: torch.device, name: str, limit: int | None = None, context: int = CONTEXT
) -> None:
    """Refuse a model that a device cannot hold, with what would fit.

    Args:
        sizes: the model's.
        precision: "float32", "bfloat16" (or another of 16 bits), "int8", "int4" or "fp8".
        device: where to.
        name: of the model, for the message.
        limit: the most bytes it may take there, where that is less than what is free.
        context: tokens of prompt and answer.

    Raises:
        ValueError: weights and cache alone are more; the message names the precisions that would fit.
    """
    free = free_memory(device)
    room = min((size for size in (free, limit) if size is not None), default=None)
    # Working memory is left out of the refusal: how much of it a call takes, the call decides.
    if room is None or sizes.needed(precision, context) - WORKING_MEMORY <= room:
        return
    needs = {kind: sizes.needed(kind, context) for kind in ("bfloat16", *QUANTIZED) if kind in sizes.weights}
    fitting = ", ".join(f"{choice(kind)} ({need / GB:.1f} GB)" for kind, need in needs.items() if need <= room)
    choices = f"What fits: {fitting}." if fitting else "It fits in no precision there: choose a smaller model"
    if not fitting:
        choices += ', or device "auto" to spread it over several GPUs and the host\'s memory.'
    allowed = " allowed" if limit is not None and room == limit else " free"
    wanted = "as it is stored" if precision == STORED else f"in {precision}"
    raise ValueError(
        f"{name} needs about {sizes.needed(precision, context) / GB:.1f} GB {wanted}, with a picture and {context} "
        f"tokens, and {device} has {room / GB:.1f} GB{allowed}. {choices}"
    )


def choice(precision: str) -> str:
    """Return how a precision is asked for."""
    return f"quantize {precision}" if precision in QUANTIZED else f"dtype {precision}"


def max_memory_map(limit: int) -> dict[int | str, int]:
    """Return accelerate's ``max_memory`` for so many bytes on each GPU and what the host has free."""
    devices: dict[int | str, int] = {index: limit for index in range(torch.cuda.device_count())}
    return {**devices, "cpu": free_memory(torch.device("cpu")) or limit}
