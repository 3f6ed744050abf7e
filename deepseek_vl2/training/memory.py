"""Memory that training needs, computed from a model's shapes; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.bnb_layers import bits_of_4bit
from deepseek_vl2.models.checkpoint import released_shapes
from deepseek_vl2.models.moe import DeepseekV2Experts
from deepseek_vl2.models.quantizer import WeightOnlyConfig, matrix_shape, plan_formats
from deepseek_vl2.utils.memory import STORED, model_sizes

from .lora import DEFAULT_PARTS, target_modules

# A trained number, its gradient and AdamW's two moments, all in float32.
BYTES_A_TRAINED_NUMBER = 16


@dataclass(frozen=True)
class AdapterMemory:
    """What training adapters holds, activations aside.

    Fields:
        weights: bytes of the frozen weights, by precision: "bfloat16", "int8", "int4", "fp8" and "nf4" (QLoRA), and
            "float32".
        numbers: how many numbers the adapters have.
    """

    weights: dict[str, int]
    numbers: int

    def held(self, precision: str) -> int:
        """Return the bytes of weights, adapters, gradients and moments."""
        return self.weights[precision] + BYTES_A_TRAINED_NUMBER * self.numbers

    def methods(self, parameters: int) -> dict[str, int]:
        """Return the bytes of each way to fine-tune: "full", "LoRA bfloat16", "QLoRA int8" and so on.

        Args:
            parameters: of the whole model, all of which "full" trains. A checkpoint that is packed already has adapters
                alone.
        """
        found = {} if STORED in self.weights else {"full": BYTES_A_TRAINED_NUMBER * parameters}
        for precision in (STORED, "bfloat16", "int8", "int4", "nf4"):
            if precision in self.weights:
                name = "LoRA" if precision == "bfloat16" else "QLoRA"
                found[f"{name} {precision}"] = self.held(precision)
        return found


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
    weights = {**model_sizes(config).weights, "nf4": nf4_bytes(model)}
    return AdapterMemory(weights, adapter_numbers(model, rank, parts))


def nf4_bytes(model: DeepseekVLV2ForCausalLM) -> int:
    """Return the bytes of a model whose weights bitsandbytes packs, with scales in 8 bits as this package trains them.

    Args:
        model: the model, which may be on the meta device.
    """
    shapes = released_shapes(model, model.config)
    total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    packed = sum(torch.Size(matrix_shape(model, name)).numel() for name in plan_formats(model, WeightOnlyConfig()))
    return total - round(packed * (16 - bits_of_4bit(nested=True)) / 8)
