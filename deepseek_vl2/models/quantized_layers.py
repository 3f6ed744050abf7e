"""Layers over packed weights, which take the places of `nn.Linear` and of the fused experts in a model.

Shape suffixes: as in `moe`; O output and I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .backend import backend
from .cpu import is_untouched
from .quantization import PackedWeight, WeightFormat, dequantize, packed_linear, quantize


class PackedModule(nn.Module):
    """A module whose packed tensors and scales move between devices and keep their dtypes, whatever it is cast to."""

    def __init__(self) -> None:
        super().__init__()
        self.formats: dict[str, WeightFormat] = {}

    def add_packed(
        self, name: str, shape: tuple[int, ...], fmt: WeightFormat, scale_dtype: torch.dtype | None = None
    ) -> None:
        """Declare a packed matrix, or one for each expert, of that unpacked shape; its values are still to come."""
        *experts, rows, columns = shape
        packed = torch.empty(*experts, rows, fmt.packed_columns(columns), dtype=fmt.packed_dtype)
        scale = torch.empty(*experts, *fmt.scale_shape(rows, columns), dtype=scale_dtype)
        self.formats[name] = fmt
        self.register_parameter(f"{name}_packed", nn.Parameter(packed, requires_grad=False))
        self.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))

    def packed(self, name: str) -> PackedWeight:
        """Return a packed matrix."""
        numbers: torch.Tensor = getattr(self, f"{name}_packed")
        if numbers.dtype != self.formats[name].packed_dtype:  # held as floats
            numbers = numbers.view(self.formats[name].packed_dtype)
        return PackedWeight(numbers, getattr(self, f"{name}_scale"))

    def hold_as_floats(self) -> None:
        """Let parameters of integers and of 8 bits have a dtype that FSDP 2 shards, with the same bits.

        Before torch 2.14 it makes every sharded parameter one that may take a gradient, which integers may not.
        """
        for name in self.formats:
            numbers = self.packed(name).packed
            carrier = torch.float32 if numbers.element_size() == 4 else torch.bfloat16
            if numbers.shape[-1] * numbers.element_size() % carrier.itemsize == 0:
                held = nn.Parameter(numbers.detach().view(carrier), requires_grad=False)
                setattr(self, f"{name}_packed", held)

    def set_packed(self, name: str, weight: PackedWeight) -> None:
        """Give a packed matrix its values."""
        for part, value in zip(("packed", "scale"), weight, strict=True):
            setattr(self, f"{name}_{part}", nn.Parameter(value, requires_grad=False))

    def dequantized(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a matrix unpacked."""
        return dequantize(self.packed(name), self.formats[name], dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedModule:
        kept = {f"{name}_{part}" for name in self.formats for part in ("packed", "scale")}

        def keeping_dtype(tensor: torch.Tensor) -> torch.Tensor:
            if not any(tensor is self._parameters[name] for name in kept):
                return fn(tensor)
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        super()._apply(keeping_dtype, recurse)
        return self


class PackedLinear(PackedModule):
    """A linear layer over a packed weight, [..., I] to [..., O]; the weight is frozen."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: WeightFormat,
        bias: bool = False,
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.add_packed("weight", (out_features, in_features), fmt, scale_dtype)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @classmethod
    def of(cls, layer: nn.Linear, fmt: WeightFormat, importance_I: torch.Tensor | None = None) -> PackedLinear:
        """Return a linear layer with its weight packed."""
        packed = cls(layer.in_features, layer.out_features, fmt, layer.bias is not None)
        packed.set_packed("weight", quantize(layer.weight, fmt, importance_I=importance_I))
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return packed

    @property
    def format(self) -> WeightFormat:
        """How the weight is packed."""
        return self.formats["weight"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product, plus the bias where there is one."""
        if not torch.is_grad_enabled():
            engine = backend()
            out: torch.Tensor | None = None if engine is None else engine.run_packed_linear(self, x)
            if out is not None:
                return out
        return packed_linear(x, self.packed("weight"), self.format, self.bias)

    def dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return the same layer with its weight unpacked."""
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.dequantized("weight", dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.to(layer.weight.dtype), requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        """Return what is printed of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"


def is_bare_packed(layer: nn.Module) -> bool:
    """Whether a layer is no more than a product with a packed weight: no bias, adapter or hook."""
    return type(layer) is PackedLinear and layer.bias is None and is_untouched(layer)


class PackedExperts(PackedModule):
    """All routed experts of a layer over packed weights, gate_up_proj [E, 2I, H] and down_proj [E, H, I]; frozen."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act_fn: nn.Module,
        formats: Mapping[str, WeightFormat],
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.act_fn = act_fn
        self.config: Any = None  # of the experts in whose place these stand
        up_shape = (num_experts, 2 * intermediate_size, hidden_size)
        self.add_packed("gate_up_proj", up_shape, formats["gate_up_proj"], scale_dtype)
        down_shape = (num_experts, hidden_size, intermediate_size)
        self.add_packed("down_proj", down_shape, formats["down_proj"], scale_dtype)

    def expert(self, name: str, expert: int) -> PackedWeight:
        """Return one expert's packed matrix."""
        packed, scale = self.packed(name)
        return PackedWeight(packed[expert], scale[expert])

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights where they are unpacked."""
        return self.packed("gate_up_proj").scale.dtype

    def product(self, name: str, rows_LI: torch.Tensor, expert: int) -> torch.Tensor:
        """Return rows times one expert's matrix, [L, O]."""
        return packed_linear(rows_LI, self.expert(name, expert), self.formats[name])

    def run_expert(self, rows_LH: torch.Tensor, expert: int) -> torch.Tensor:
        """Return one expert's output for some rows, [L, H] in and out."""
        gate, up = self.product("gate_up_proj", rows_LH, expert).chunk(2, dim=-1)
        return self.product("down_proj", self.act_fn(gate) * up, expert)

    def forward(self, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's experts, [N, H]; summed in float32."""
        if not torch.is_grad_enabled():
            engine = backend()
            out: torch.Tensor | None = (
                None if engine is None else engine.run_packed_experts(self, hidden_NH, ids_NK, weights_NK)
            )
            if out is not None:
                return out
        return packed_experts_forward(self.run_expert, self.num_experts, hidden_NH, ids_NK, weights_NK)

    def extra_repr(self) -> str:
        """Return what is printed of the experts."""
        return f"{self.num_experts} experts, gate_up_proj {self.formats['gate_up_proj']}, down_proj " + str(
            self.formats["down_proj"]
        )


def packed_experts_forward(
    run_expert: Callable[[torch.Tensor, int], torch.Tensor],
    num_experts: int,
    hidden_NH: torch.Tensor,
    ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Run expert after expert: the plain definition; [N, H], summed in float32. Only chosen experts are unpacked."""
    tokens, top_k = ids_NK.shape
    sorted_ids, order = ids_NK.reshape(-1).sort(stable=True)
    counts = torch.bincount(sorted_ids, minlength=num_experts).tolist()
    rows = hidden_NH.index_select(0, order // top_k)
    outputs = [run_expert(part, expert) for expert, part in enumerate(rows.split(counts)) if len(part)]
    if not outputs:
        return torch.zeros_like(hidden_NH)
    restored = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    sorted_outputs = torch.cat(outputs).index_select(0, restored).view(tokens, top_k, -1)
    return (sorted_outputs.float() * weights_NK.unsqueeze(-1)).sum(dim=1).to(hidden_NH.dtype)


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return a linear layer's weight, [O, I]; a packed one is unpacked."""
    if isinstance(layer, PackedLinear):
        return layer.dequantized("weight", dtype)
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return weight


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """Yield a model's packed layers and their names."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module


def count_weights(model: nn.Module) -> int:
    """Return how many weights a model has: packed ones are counted one by one, and scales not."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for _, layer in packed_layers(model):
        for name, fmt in layer.formats.items():
            packed, scale = layer.packed(name)
            count += packed.numel() // packed.shape[-1] * fmt.columns(packed) - packed.numel() - scale.numel()
    return count


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
