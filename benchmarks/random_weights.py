"""Random weights, plain or packed, for models that are measured without a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from deepseek_vl2.models.quantization import WeightFormat
from deepseek_vl2.models.quantized_layers import packed_layers
from deepseek_vl2.models.quantizer import WeightOnlyConfig, plan_formats, replace_layers

# Standard deviations of uniform numbers from -7 to 7 and from -127 to 127, and of those that fp8 gets. Numbers that are
# not 0 on the average would give all outputs a part in common, of which the softmax of some rows is all or nothing.
SPREAD = {"int4": 4.32, "int8": 73.3, "fp8": 32.0}


@torch.no_grad()
def fill_randomly(model: nn.Module, device: torch.device) -> None:
    """Draw the weights from a normal distribution scaled to keep activations even; buffers become 0."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.8 * parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    for buffer in model.buffers():
        buffer.zero_()


def pack_shapes(model: nn.Module, config: WeightOnlyConfig, dtype: torch.dtype) -> None:
    """Put packed layers in the places of a model's own, on no device: nothing is quantized."""
    with torch.device("meta"):
        replace_layers(model, plan_formats(model, config), dtype)


def draw_numbers(part: torch.Tensor, fmt: WeightFormat, generator: torch.Generator) -> None:
    """Draw a packed matrix's numbers."""
    if fmt.kind == "int4":
        pairs = part.view(torch.uint8)
        pairs.random_(1, 16, generator=generator)
        pairs.add_(torch.empty_like(pairs).random_(1, 16, generator=generator), alpha=16)
    elif fmt.kind == "int8":
        part.random_(-127, 128, generator=generator)
    else:
        wide = torch.randn(part.shape, device=part.device, dtype=torch.bfloat16, generator=generator)
        part.copy_((wide * SPREAD["fp8"]).clamp_(-448, 448))


@torch.no_grad()
def fill_packed_randomly(model: nn.Module, device: torch.device) -> None:
    """Draw packed numbers, and scales for weights as even as those of `fill_randomly`; the rest is drawn by that.

    Expert by expert: no matrix of 16 bits is in memory but of one expert.
    """
    packed = {id(p) for _, layer in packed_layers(model) for p in layer.parameters()}
    plain = nn.Module()
    plain.parts = nn.ParameterDict(  # type: ignore[assignment]
        {name.replace(".", "/"): p for name, p in model.named_parameters() if id(p) not in packed}
    )
    fill_randomly(plain, device)
    for buffer in model.buffers():
        buffer.zero_()
    generator = torch.Generator(device).manual_seed(1)
    for _, layer in packed_layers(model):
        for name, fmt in layer.formats.items():
            numbers, scale = layer.packed(name)
            for part in numbers.flatten(0, -3) if numbers.dim() > 2 else [numbers]:
                draw_numbers(part, fmt, generator)
            scale.fill_(0.8 * fmt.columns(numbers) ** -0.5 / SPREAD[fmt.kind])
