"""Random weights for models that are measured without a checkpoint."""

from __future__ import annotations

import torch
from torch import nn


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
