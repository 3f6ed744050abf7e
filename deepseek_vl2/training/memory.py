"""Memory that training adapters needs, computed from a model's shapes; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.moe import DeepseekV2Experts
from deepseek_vl2.utils.memory import Sizes, model_sizes

from .lora import DEFAULT_PARTS, target_modules

# An adapter's number, its gradient and AdamW's two moments, all in float32.
BYTES_A_TRAINED_NUMBER = 16


@dataclass(frozen=True)
class AdapterMemory:
    """What training adapters holds, activations aside.

    Fields:
        weights: bytes of the frozen weights, by precision: "bfloat16", "int8", "int4", "fp8" (QLoRA) and "float32".
        numbers: how many numbers the adapters have.
    """

    weights: dict[str, int]
    numbers: int

    def held(self, precision: str) -> int:
        """Return the bytes of weights, adapters, gradients and moments."""
        return self.weights[precision] + BYTES_A_TRAINED_NUMBER * self.numbers


def adapter_numbers(model: DeepseekVLV2ForCausalLM, rank: int = 16, parts: tuple[str, ...] = DEFAULT_PARTS) -> int:
    """Return how many numbers `add_lora` trains; each expert has adapters of its own.

    Args:
        model: the model, which may be on the meta device.
        rank: rank of the adapters.
        parts: as for `add_lora`.
    """
    sides = 0
    for name in target_modules(model, parts):
        rows, columns = model.get_submodule(name).weight.shape  # type: ignore[union-attr,misc]
        sides += int(rows) + int(columns)
    if "experts" in parts:
        for module in model.modules():
            if isinstance(module, DeepseekV2Experts):
                for matrices in (module.gate_up_proj, module.down_proj):
                    experts, rows, columns = matrices.shape
                    sides += experts * (rows + columns)
    return rank * sides


def adapter_memory(config: DeepseekVLV2Config, rank: int = 16, parts: tuple[str, ...] = DEFAULT_PARTS) -> AdapterMemory:
    """Return what training adapters of a model holds; activations come on top.

    Args:
        config: the model's.
        rank: rank of the adapters.
        parts: as for `add_lora`.
    """
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(config)
    sizes: Sizes = model_sizes(config)
    return AdapterMemory(sizes.weights, adapter_numbers(model, rank, parts))
