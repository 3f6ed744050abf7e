"""Which packed layers run by compiled code, and when."""

from __future__ import annotations

from typing import Any

import torch

from ..models.cpu import row_kernels
from ..models.moe import is_silu
from ..ops.cpu.quant_rows import QuantRows, quant_rows


def _in_use() -> QuantRows | None:
    """Return the functions while a model decodes one row by compiled code, as `models.cpu.row_products` decides."""
    return None if row_kernels() is None else quant_rows()


def run_packed_linear(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Run a `PackedLinear`; ``None`` where it cannot. Called by `models.quantized_layers`."""
    if (rows := _in_use()) is None:
        return None
    packed, scale = layer.packed("weight")
    return rows.linear(x, packed, scale, layer.format.group_size, layer.bias)


def run_packed_experts(
    layer: Any, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor | None:
    """Run `PackedExperts`; ``None`` where it cannot. Called by `models.quantized_layers`."""
    if len(hidden_NH) != 1 or (rows := _in_use()) is None or not is_silu(layer.act_fn):
        return None
    up, down = ((*layer.packed(name), layer.formats[name].group_size) for name in ("gate_up_proj", "down_proj"))
    return rows.experts(hidden_NH, up, down, ids_NK, weights_NK)
