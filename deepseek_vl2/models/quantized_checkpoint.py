"""Packed weights in files: compressed-tensors' layouts, DeepSeek's fp8 blocks, and weights packed while they are read.

A layer ``X`` of a file is one of

- ``X.weight_packed`` (int32 words of 4 or 8 bits, each number stored plus 8 or 128), ``X.weight_scale`` and
  ``X.weight_shape``: compressed-tensors' "pack-quantized";
- ``X.weight`` (int8 or float8_e4m3fn) and ``X.weight_scale``: its "int-quantized" and "float-quantized";
- ``X.weight`` (float8_e4m3fn) and ``X.weight_scale_inv`` (float32, one for 128 x 128 weights): DeepSeek's own.

Experts stand under the released names, one by one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .checkpoint import EXPERT_TENSOR, FLOAT_DTYPES, FusedSlices, Shapes, StoredTensors
from .quantization import BLOCK, FP8, PackedWeight, WeightFormat, quantize
from .quantized_config import most_frequent
from .quantized_layers import PackedExperts, PackedLinear, packed_layers

READABLE = ("compressed-tensors", "fp8")
# What a file may hold of a layer and we do not read; each with the words that say so.
UNREADABLE = {
    "weight_zero_point": "asymmetric weights (weight_zero_point)",
    "weight_g_idx": "columns in another order (weight_g_idx)",
    "weight_global_scale": "scales of scales (weight_global_scale)",
    "weight_bitmask": "sparse weights (weight_bitmask)",
}
PARTS = ("packed", "scale")
CODES = {torch.int32: "I32", torch.int8: "I8", FP8: "F8_E4M3", **{dtype: code for code, dtype in FLOAT_DTYPES.items()}}
LAYER_TENSOR = re.compile(r"^(.*)\.(weight_packed|weight_scale_inv|weight_scale|weight_shape|weight)$")
EXPERT_LAYER = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)$")


# ---------------------------------------------------------------- tensors that come when they are asked for


class Packing:
    """A matrix that is packed at the first of its two parts' requests; the other part waits for its own."""

    # One matrix at a time: threads that each packed a layer would hold as many unpacked ones.
    one_at_a_time = threading.Lock()

    def __init__(self, shapes: dict[str, list[int]], dtypes: dict[str, torch.dtype], make: Callable[[], PackedWeight]):
        self.shapes, self.dtypes, self.make = shapes, dtypes, make
        self.waiting: dict[str, torch.Tensor] = {}

    def take(self, part: str) -> torch.Tensor:
        """Return one of the parts, and forget it."""
        with Packing.one_at_a_time:
            if part not in self.waiting:
                self.waiting = dict(zip(PARTS, self.make(), strict=True))
            return self.waiting.pop(part)

    def parts(self, name: str) -> dict[str, PackedPart]:
        """Return both parts as values of a state dict."""
        return {f"{name}_{part}": PackedPart(self, part) for part in PARTS}


class PackedPart:
    """One part of a `Packing`, as what transformers takes for a tensor of a file."""

    def __init__(self, packing: Packing, part: str) -> None:
        self.packing, self.part = packing, part

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return self.packing.shapes[self.part]

    def get_dtype(self) -> str:
        """Return the dtype, as safetensors names it."""
        return CODES[self.packing.dtypes[self.part]]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.packing.take(self.part)[index]


def _packing(shape: list[int], fmt: WeightFormat, dtype: torch.dtype, make: Callable[[], PackedWeight]) -> Packing:
    *experts, rows, columns = shape
    packed = [*experts, rows, fmt.packed_columns(columns)]
    scale = [*experts, *fmt.scale_shape(rows, columns)]
    return Packing({"packed": packed, "scale": scale}, {"packed": fmt.packed_dtype, "scale": dtype}, make)


def packing_device() -> torch.device:
    """Return where weights are packed fastest: an accelerator where there is one.

    Not Apple's, which has neither fp8 nor float64, and whose memory is the host's.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type == "mps" else found


def _pack_slice(source: Any, fmt: WeightFormat, dtype: torch.dtype) -> PackedWeight:
    device = packing_device()

    def pack(matrix: torch.Tensor) -> PackedWeight:
        packed = quantize(matrix.to(device), fmt, dtype)
        return PackedWeight(packed.packed.cpu(), packed.scale.cpu())

    if not isinstance(source, FusedSlices):
        return pack(source[...])
    # Expert after expert, into two tensors: the unpacked ones of a layer never exist together.
    experts, rows, columns = source.get_shape()
    out = PackedWeight(
        torch.empty(experts, rows, fmt.packed_columns(columns), dtype=fmt.packed_dtype),
        torch.empty(experts, *fmt.scale_shape(rows, columns), dtype=dtype),
    )
    for expert, parts in enumerate(source.slices):
        for whole, part in zip(out, pack(torch.cat([part[...] for part in parts])), strict=True):
            whole[expert] = part
    return out


def packed_while_read(
    state: Mapping[str, Any],
    formats: Mapping[str, WeightFormat],
    dtype: torch.dtype,
    packed: Mapping[str, PackedWeight] | None = None,
) -> dict[str, Any]:
    """Return a state dict of `StoredTensors.fused` with matrices that pack themselves when they are read.

    Args:
        state: values that read themselves at ``value[...]``, under the model's names.
        formats: the format of each matrix to pack, by its layer's name (experts: and the part's).
        dtype: of the scales.
        packed: matrices that are packed already, by the same names; they are given as they are.
    """
    out: dict[str, Any] = {}
    for name, source in state.items():
        layer = name.removesuffix(".weight")
        if layer not in formats:
            out[name] = source
            continue
        fmt, shape = formats[layer], list(source.get_shape())
        given = None if packed is None else packed.get(layer)

        def make(source: Any = source, fmt: WeightFormat = fmt, given: PackedWeight | None = given) -> PackedWeight:
            return _pack_slice(source, fmt, dtype) if given is None else given

        out.update(_packing(shape, fmt, dtype, make).parts(name))
    return out


# ---------------------------------------------------------------- reading files


class StoredLayer:
    """One packed matrix of a file: what it is, and its two tensors in this package's form."""

    def __init__(self, name: str, tensors: dict[str, Any]) -> None:
        self.name, self.tensors = name, tensors
        self.codes = {part: tensor.get_dtype() for part, tensor in tensors.items()}
        self.scale_name = next(part for part in ("weight_scale", "weight_scale_inv") if part in tensors)
        self.shape = self._shape()
        self.format = self._format()

    def _shape(self) -> tuple[int, int]:
        if "weight_packed" not in self.tensors:
            rows, columns = self.tensors["weight"].get_shape()
        elif "weight_shape" in self.tensors:
            rows, columns = self.tensors["weight_shape"][...].tolist()
        else:
            raise ValueError(f"{self.name}.weight_packed has no weight_shape beside it.")
        return int(rows), int(columns)

    def _bits(self) -> int:
        if "weight_packed" not in self.tensors:
            return 8
        words, columns = self.tensors["weight_packed"].get_shape()[-1], self.shape[1]
        found = [bits for bits in (4, 8) if words == -(-columns * bits // 32)]
        if not found:
            raise ValueError(f"{self.name}.weight_packed holds neither 4 nor 8 bits a weight.")
        return found[0]

    def _format(self) -> WeightFormat:
        rows, columns = self.shape
        scale = list(self.tensors[self.scale_name].get_shape())
        is_fp8 = self.codes.get("weight", "").startswith("F8_E4M3")
        if not is_fp8 and self.codes.get("weight", "I8") != "I8":
            raise ValueError(f"{self.name}.weight is {self.codes['weight']}: it can be int8 or float8_e4m3fn.")
        kind = "fp8" if is_fp8 else "int4" if self._bits() == 4 else "int8"
        if is_fp8 and scale == [-(-rows // BLOCK), -(-columns // BLOCK)] and scale != [rows, 1]:
            return WeightFormat("fp8", block=True)
        if len(scale) < 2 or scale[1] == 1:
            if scale not in ([rows, 1], [1], [], [1, 1], [rows]):
                raise ValueError(f"{self.name}.{self.scale_name} {scale} does not belong to {list(self.shape)}.")
            fmt = WeightFormat(kind, columns if kind == "int4" else 0)  # type: ignore[arg-type]
        elif scale[0] == rows and columns % scale[1] == 0 and not is_fp8:
            fmt = WeightFormat(kind, columns // scale[1])  # type: ignore[arg-type]
        else:
            raise ValueError(f"{self.name}.{self.scale_name} {scale} does not belong to {list(self.shape)}.")
        if kind == "int4" and columns % 8:
            raise ValueError(f"{self.name} has {columns} columns of 4 bits, and words of 32 bits must be filled.")
        return fmt

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of the scales."""
        return FLOAT_DTYPES[self.codes[self.scale_name]]

    def read(self) -> PackedWeight:
        """Return the matrix in this package's form."""
        rows, columns = self.shape
        scale = self.tensors[self.scale_name][...]
        if not self.format.block:
            scale = scale.reshape(-1, scale.shape[-1] if scale.dim() == 2 else 1).expand(rows, -1).contiguous()
        if "weight_packed" not in self.tensors:
            return PackedWeight(self.tensors["weight"][...], scale)
        words = self.tensors["weight_packed"][...]
        if self.format.kind == "int4":
            return PackedWeight(words, scale)
        return PackedWeight((words.view(torch.uint8)[:, :columns] ^ 128).view(torch.int8).contiguous(), scale)


def read_layers(stored: StoredTensors) -> dict[str, StoredLayer]:
    """Return a file's packed matrices by the names of their layers.

    Raises:
        ValueError: they are packed in a way that is not read; the layer is named.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in stored.slices.items():
        layer, _, part = name.rpartition(".")
        if part in UNREADABLE:
            raise ValueError(f"{layer} has {UNREADABLE[part]}, which this package does not read.")
        if LAYER_TENSOR.match(name):
            found.setdefault(layer, {})[part] = tensor
    return {
        layer: StoredLayer(layer, tensors)
        for layer, tensors in found.items()
        if "weight_scale" in tensors or "weight_scale_inv" in tensors
    }


def logical_shapes(stored: StoredTensors, layers: Mapping[str, StoredLayer]) -> Shapes:
    """Return the shapes of a file's tensors as if nothing were packed."""
    shapes: Shapes = {}
    for name, shape in stored.shapes.items():
        match = LAYER_TENSOR.match(name)
        if match is None or match[1] not in layers:
            shapes[name] = shape
        elif match[2] == "weight" or match[2] == "weight_packed":
            shapes[f"{match[1]}.weight"] = layers[match[1]].shape
    return shapes


class PackedFile:
    """The packed matrices of a file, fused as the model has them.

    Raises:
        ValueError: the experts of a layer are packed in different ways, or some are not packed.
    """

    def __init__(self, stored: StoredTensors) -> None:
        self.stored = stored
        self.layers = read_layers(stored)
        self.formats: dict[str, WeightFormat] = {}
        self.state: dict[str, Any] = {}
        experts: dict[str, dict[int, dict[str, StoredLayer]]] = {}
        for name, layer in self.layers.items():
            match = EXPERT_LAYER.match(name)
            if match is None:
                self._add(name, f"{name}.weight", list(layer.shape), [[layer]])
            else:
                prefix, expert, part = match.groups()
                experts.setdefault(prefix, {}).setdefault(int(expert), {})[part] = layer
        for prefix, parts in experts.items():
            self._add_experts(prefix, [parts[expert] for expert in sorted(parts)])
        self.state.update(self._unpacked())

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of the scales: the widest of them."""
        dtypes = {layer.scale_dtype for layer in self.layers.values()}
        return torch.float32 if torch.float32 in dtypes or len(dtypes) > 1 else dtypes.pop()

    @property
    def wanted(self) -> WeightFormat:
        """The format that most matrices have."""
        return most_frequent(self.formats)

    def _add_experts(self, prefix: str, experts: list[dict[str, StoredLayer]]) -> None:
        for target, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            if not all(part in expert for expert in experts for part in parts):
                raise ValueError(f"{prefix}: some of the experts' {' and '.join(parts)} are packed and others are not.")
            rows = [[expert[part] for part in parts] for expert in experts]
            formats = {layer.format for row in rows for layer in row}
            if len(formats) > 1:
                raise ValueError(f"{prefix}.{target}: experts of one layer are packed in different ways.")
            height, width = rows[0][0].shape
            if rows[0][0].format.block and len(parts) > 1 and height % BLOCK:
                raise ValueError(f"{prefix}.{target}: blocks of {BLOCK} rows do not divide {height}.")
            shape = [len(rows), height * len(parts), width]
            self._add(f"{prefix}.{target}", f"{prefix}.{target}", shape, rows)

    def _add(self, name: str, target: str, shape: list[int], rows: list[list[StoredLayer]]) -> None:
        fmt = rows[0][0].format
        self.formats[name] = fmt

        def make() -> PackedWeight:
            experts = []
            for row in rows:
                parts = [layer.read() for layer in row]
                experts.append([torch.cat(part) if len(row) > 1 else part[0] for part in zip(*parts, strict=True)])
            if len(shape) == 2:
                packed, scale = experts[0]
            else:
                packed, scale = (torch.stack(part) for part in zip(*experts, strict=True))
            return PackedWeight(packed, scale.to(self.scale_dtype))

        self.state.update(_packing(shape, fmt, self.scale_dtype, make).parts(target))

    def _unpacked(self) -> dict[str, Any]:
        left = {}
        for name, tensor in self.stored.slices.items():
            match = LAYER_TENSOR.match(name)
            if match is None or match[1] not in self.layers:
                if EXPERT_TENSOR.match(name):
                    raise ValueError(f"{name} is not packed, in a checkpoint that says it is quantized.")
                left[name] = tensor
        return left


# ---------------------------------------------------------------- writing files


def _file_tensors(name: str, weight: PackedWeight, fmt: WeightFormat) -> dict[str, torch.Tensor]:
    """Return a layer's tensors as a file has them."""
    packed, scale = weight
    if fmt.kind == "fp8":
        return {f"{name}.weight": packed, f"{name}.weight_scale": scale}
    shape = torch.tensor([packed.shape[0], fmt.columns(packed)], dtype=torch.int64)
    if fmt.kind == "int8":
        columns = packed.shape[1]
        padded = nn.functional.pad((packed.view(torch.uint8) ^ 128), (0, -columns % 4))
        packed = padded.contiguous().view(torch.int32)
    return {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale, f"{name}.weight_shape": shape}


def file_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's tensors under released names, packed ones in compressed-tensors' layout."""
    layers = dict(packed_layers(model))
    owned = tuple(f"{name}." for name in layers)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(owned)}
    for name, layer in layers.items():
        if isinstance(layer, PackedLinear):
            state.update(_file_tensors(name, layer.packed("weight"), layer.format))
            if layer.bias is not None:
                state[f"{name}.bias"] = layer.bias.data
        elif isinstance(layer, PackedExperts):
            state.update(_expert_tensors(name, layer))
    return state


def _expert_tensors(name: str, layer: PackedExperts) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for target, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        for expert in range(layer.num_experts):
            packed, scale = (part.chunk(len(parts)) for part in layer.expert(target, expert))
            for index, part in enumerate(parts):
                # Copies of their own: files and shards are laid out by the storages of tensors.
                weight = PackedWeight(packed[index].clone(), scale[index].clone())
                state.update(_file_tensors(f"{name}.{expert}.{part}", weight, layer.formats[target]))
    return state
