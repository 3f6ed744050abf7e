"""Which packed layers run by compiled code, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..models.cpu import row_kernels
from ..models.moe import is_silu
from ..ops.cpu.quant_rows import Packed, QuantRows, quant_rows


def _in_use() -> QuantRows | None:
    """Return the functions while a model decodes few rows by compiled code, as `models.cpu.row_products` decides."""
    return None if row_kernels() is None else quant_rows()


def _packed(layer: Any, name: str = "weight") -> Packed:
    numbers, scale = layer.packed(name)
    return Packed(numbers, scale, layer.formats[name].group_size)


def run_packed_linear(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Run a `PackedLinear`; ``None`` where it cannot. Called by `models.quantized_layers`."""
    rows = _in_use()
    return None if rows is None else rows.linear(x, _packed(layer), layer.bias)


def run_packed_queries_keys_values(
    layers: Sequence[Any], hidden_BTH: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> Sequence[torch.Tensor] | None:
    """Run the three `PackedLinear` of multi-head attention; ``None`` where it cannot. Called by `models.attention`."""
    if (rows := _in_use()) is None:
        return None
    query, key, value = map(_packed, layers)
    return rows.queries_keys_values(hidden_BTH, query, key, value, *rotation)


def run_packed_mlp(layers: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
    """Run the three `PackedLinear` of an MLP with SiLU; ``None`` where it cannot. Called by `models.moe`."""
    if (rows := _in_use()) is None:
        return None
    gate, up, down = map(_packed, layers)
    return rows.mlp(x, gate, up, down)


def run_packed_experts(
    layer: Any, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor | None:
    """Run `PackedExperts`; ``None`` where it cannot. Called by `models.quantized_layers`."""
    if (rows := _in_use()) is None or not is_silu(layer.act_fn):
        return None
    gate_up, down = _packed(layer, "gate_up_proj"), _packed(layer, "down_proj")
    return rows.experts(hidden_NH, gate_up, down, ids_NK, weights_NK)
