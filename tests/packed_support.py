"""What tests of packed weights share: packing a model that is at hand."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from deepseek_vl2.models.quantization import quantize
from deepseek_vl2.models.quantized_layers import PackedModule
from deepseek_vl2.models.quantizer import WeightOnlyConfig, plan_formats, replace_layers

Model = TypeVar("Model", bound=nn.Module)
# Mini models, made smaller: Triton's interpreter computes a row of a packed matrix at a time.
FEW_ROWS = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "intermediate_size": 64,
    "vocab_size": 40,
}


@torch.no_grad()
def pack(model: Model, config: WeightOnlyConfig) -> Model:
    """Pack a model's weights, as loading does, in place."""
    formats = plan_formats(model, config)
    weights = {name: model.get_parameter(name if ".experts." in name else f"{name}.weight") for name in formats}
    replace_layers(model, formats, next(model.parameters()).dtype)
    for name, fmt in formats.items():
        layer, _, part = name.rpartition(".")
        module, part = (
            (model.get_submodule(layer), part) if ".experts." in name else (model.get_submodule(name), "weight")
        )
        assert isinstance(module, PackedModule)
        module.set_packed(part, quantize(weights[name], fmt))
    return model.eval()
