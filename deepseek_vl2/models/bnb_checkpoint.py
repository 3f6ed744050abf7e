"""Files of a model that bitsandbytes packed: what they hold, and how they are read back.

A linear layer ``X`` is stored as bitsandbytes itself does: ``X.weight`` in bytes beside ``X.weight.absmax``,
``X.weight.quant_map`` and ``X.weight.quant_state.bitsandbytes__nf4`` (or fp4) and, with scales in 8 bits,
``X.weight.nested_absmax`` and ``X.weight.nested_quant_map``; in int8 as ``X.weight``, ``X.SCB`` and
``X.weight_format``. The experts of a layer are stacks that bitsandbytes has no files for: they are stored under the
names of `bnb_layers.BnbExperts`, their scales in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import get_module_from_name

from .bnb_layers import BLOCK_4BIT, NESTED_BLOCK, NESTED_CODES, BnbExperts, as_bits, as_numbers, bnb_linears
from .checkpoint import FLOAT_DTYPES, OPTIONAL_TENSORS, Shapes, StoredTensors

LEVELS_4BIT = 16
DESCRIPTION = "weight.quant_state.bitsandbytes__"


class Unread:
    """What stands for a packed tensor where transformers wants to read one: the quantizer reads the file itself.

    transformers would cast the bytes to the dtype of the model.
    """

    def __init__(self, source: Any) -> None:
        self.source = source

    def get_shape(self) -> list[int]:
        """Return the stored shape."""
        shape: list[int] = self.source.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Return a dtype of floating point, as safetensors names it: that of what will be read."""
        return next(iter(FLOAT_DTYPES))

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.empty(0)


class PackedTensors:
    """The stored tensors of packed layers, for the quantizer; a copy of it is itself."""

    def __init__(self, slices: Mapping[str, Any]) -> None:
        self.slices = slices

    def __deepcopy__(self, memo: Any) -> PackedTensors:
        return self

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """Return a stored tensor on a device."""
        tensor: torch.Tensor = self.slices[name][...]
        return tensor.to(device)

    def beside(self, prefix: str) -> list[str]:
        """Return the names that begin so."""
        return [name for name in self.slices if name.startswith(prefix)]

    def not_finite(self, name: str) -> bool:
        """Whether a scale of a packed weight is NaN or infinite."""
        scales = [self.slices[each] for each in self.beside(name.removesuffix("weight")) if each != name]
        return any(not bool(scale[...].isfinite().all()) for scale in scales if scale.get_dtype() in FLOAT_DTYPES)


def packed_names(model: nn.Module) -> list[str]:
    """Return the names of a model's packed parameters."""
    names = [f"{name}.weight" for name, _ in bnb_linears(model)]
    for name, module in model.named_modules():
        if isinstance(module, BnbExperts):
            names += [f"{name}.{part}" for part in module.shapes]
    return names


def file_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a packed model's file; scales as numbers."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, BnbExperts):
            for own, buffer in module.named_buffers():
                if buffer.dtype == torch.int32:
                    state[f"{name}.{own}"] = as_numbers(buffer)
    # bitsandbytes holds one table of values for all layers, and a file has no tensors that share memory.
    tables = [name for name in state if name.endswith("quant_map")]
    return {**state, **{name: state[name].clone() for name in tables}}


def file_shapes(model: nn.Module, stored: StoredTensors) -> Shapes:
    """Return the name and the shape of every tensor that a file must hold.

    Args:
        model: with bitsandbytes' layers, on the meta device.
        stored: the file's own; it tells how long each layer's description in bytes is.
    """
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config: Any = model.config
    if config.get_text_config().tie_word_embeddings:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("lm_head.weight")}
    for name, linear in bnb_linears(model):
        rows, columns = linear.out_features, linear.in_features
        if hasattr(linear.weight, "SCB") or type(linear.weight).__name__ == "Int8Params":
            shapes.update({f"{name}.weight": (rows, columns), f"{name}.SCB": (rows,), f"{name}.weight_format": ()})
            continue
        described = f"{name}.{DESCRIPTION}{linear.weight.quant_type}"
        blocks = rows * columns // BLOCK_4BIT
        shapes[f"{name}.weight"] = (rows * columns // 2, 1)
        shapes[f"{name}.weight.absmax"] = (blocks,)
        shapes[f"{name}.weight.quant_map"] = (LEVELS_4BIT,)
        shapes[described] = stored.shapes.get(described, (0,))
        if linear.weight.compress_statistics:
            shapes[f"{name}.weight.nested_absmax"] = (-(-blocks // NESTED_BLOCK),)
            shapes[f"{name}.weight.nested_quant_map"] = (NESTED_CODES,)
    for name, module in model.named_modules():
        if isinstance(module, BnbExperts):
            shapes.update({f"{name}.{part}": module.packed_shape(part) for part in module.shapes})
    return shapes


def read_packed(
    name: str, model: nn.Module, packed: PackedTensors, device: torch.device, layers: Any
) -> dict[str, torch.Tensor]:
    """Return the tensors of one packed parameter, by their full names.

    Args:
        name: the parameter's.
        model: of bitsandbytes' layers.
        packed: the file's tensors.
        device: where to.
        layers: transformers' operation that makes a linear layer's weight of what is stored.
    """
    module, part = get_module_from_name(model, name)
    if isinstance(module, BnbExperts):
        prefix = name.removesuffix(part)
        found = {name: packed.read(name, device)}
        for own, buffer in module.named_buffers():
            if own.startswith(f"{part}_"):
                value = packed.read(prefix + own, device)
                found[prefix + own] = as_bits(value) if buffer.dtype == torch.int32 else value
        return found
    prefix = name.removesuffix("weight")
    stored = {each.removeprefix(prefix): packed.read(each, device) for each in packed.beside(prefix)}
    weight: torch.Tensor = layers.convert(stored, model=model, full_layer_name=name)["weight"]
    return {name: weight}


def split_state(model: nn.Module, stored: StoredTensors) -> tuple[dict[str, Any], PackedTensors]:
    """Return a file's tensors as the model's state dict, packed ones to be read by the quantizer, and for that these.

    Args:
        model: with bitsandbytes' layers, on the meta device.
        stored: the file's, see `file_shapes`.
    """
    packed = packed_names(model)
    experts = [name for name, module in model.named_modules() if isinstance(module, BnbExperts)]
    plain = {name for name in model.state_dict() if name.rpartition(".")[0] not in experts}.difference(packed)
    state: dict[str, Any] = {}
    for name, each in stored.slices.items():
        if name in plain or re.match(OPTIONAL_TENSORS, name):
            state[name] = each
        elif name in packed:
            state[name] = Unread(each)
    return state, PackedTensors({name: each for name, each in stored.slices.items() if name not in plain})
