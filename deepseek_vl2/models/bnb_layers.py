"""Experts in bitsandbytes' formats: it has layers for matrices alone, and the fused experts are stacks of them.

In 4 bits (nf4, fp4) 64 weights in a row share their largest absolute value (absmax), which
is in float32 or, with ``bnb_4bit_use_double_quant``, itself in 8 bits, 256 of which share another one.

Shape suffixes: L rows of one expert, N tokens, K experts of a token, E experts, H hidden size, O output and I input
channels.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .quantization import PackedWeight, WeightFormat, dequantize, packed_linear, quantize
from .quantized_layers import count_weights, packed_experts_forward, set_module
from .quantizer import unpack_experts

BLOCK_4BIT = 64  # weights that share an absmax
NESTED_BLOCK = 256  # absmaxes that share one, where they are in 8 bits
NESTED_CODES = 256


def as_bits(numbers: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers as the integers that their bits are: casting a model leaves those alone."""
    return numbers.float().view(torch.int32)


def as_numbers(bits: torch.Tensor) -> torch.Tensor:
    """Return the float32 numbers of `as_bits`."""
    return bits.view(torch.float32)


def functional() -> Any:
    """Return the module bitsandbytes.functional.

    No statement imports it: transformers takes those for what code that comes with a checkpoint cannot do without.
    """
    return importlib.import_module("bitsandbytes.functional")


def bits_of_4bit(nested: bool) -> float:
    """Return the bits that a weight in 4 bits takes, scales included."""
    scale = 8 + 32 / NESTED_BLOCK if nested else 32
    return 4 + scale / BLOCK_4BIT


def check_blocks(name: str, rows: int, columns: int) -> None:
    """Raise ``ValueError`` for a matrix that is not made up of whole blocks."""
    if rows * columns % BLOCK_4BIT:
        raise ValueError(
            f"bitsandbytes shares a scale among {BLOCK_4BIT} weights, which do not divide the {rows} x {columns} of "
            f'{name}: use quantize="int4".'
        )


def unpack_blocks(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return a matrix of bitsandbytes' 4 bits unpacked, [O, I].

    Its kernel for CPUs takes each row to begin with a block of its own (seen in 0.50.2): so blocks are what it is given
    for rows.
    """
    blocks = copy.copy(state)
    blocks.shape = torch.Size((state.shape.numel() // state.blocksize, state.blocksize))
    weight: torch.Tensor = functional().dequantize_4bit(packed, blocks)
    return weight.view(state.shape)


class UnpackedProduct(torch.autograd.Function):
    """``F.linear`` over a matrix that is unpacked when it is needed, once for each pass; it takes no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, state: Any) -> torch.Tensor:
        ctx.packed, ctx.state = packed, state
        return F.linear(x, unpack_blocks(packed, state).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0] @ unpack_blocks(ctx.packed, ctx.state).to(grads[0].dtype), None, None


def product_4bit(x: torch.Tensor, packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return ``F.linear``, [..., I] to [..., O], over a matrix in 4 bits; gradients reach ``x``."""
    if state.shape[1] % state.blocksize:
        odd: torch.Tensor = UnpackedProduct.apply(x, packed, state)
        return odd
    out: torch.Tensor = importlib.import_module("bitsandbytes").matmul_4bit(x, packed, quant_state=state)
    return out


@cache
def linear_of_odd_rows() -> type[nn.Linear]:
    """Return bitsandbytes' linear layer for matrices whose rows are not whole blocks; see `unpack_blocks`."""
    linear: Any = importlib.import_module("bitsandbytes.nn").Linear4bit

    class OddRowsLinear4bit(linear):  # type: ignore[misc]
        """A linear layer in 4 bits, [..., I] to [..., O]."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return the product, plus the bias where there is one."""
            out = product_4bit(x.to(self.compute_dtype), self.weight.data, self.weight.quant_state)
            return (out if self.bias is None else out + self.bias.to(out.dtype)).to(x.dtype)

    return OddRowsLinear4bit  # type: ignore[no-any-return]


class BnbExperts(nn.Module):
    """All routed experts of a layer, for bitsandbytes: gate_up_proj [E, 2I, H] and down_proj [E, H, I]; frozen.

    Each is a parameter of packed numbers under its own name, and buffers of scales; a subclass says how it is packed.

    Args:
        experts: in whose place these stand; `DeepseekV2Experts`.
        options: transformers' ``BitsAndBytesConfig``.
        dtype: of the weights where they are unpacked.
    """

    def __init__(self, experts: Any, options: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts: int = experts.num_experts
        self.hidden_size: int = experts.hidden_size
        self.intermediate_size: int = experts.inner_size
        self.act_fn: nn.Module = experts.act_fn
        self.config: Any = experts.config
        self.weight_dtype = dtype
        self.shapes = {
            "gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }
        for part, shape in self.shapes.items():  # as they are read: transformers casts to a parameter's dtype first
            unpacked = torch.empty(self.num_experts, *shape, dtype=dtype)
            self.register_parameter(part, nn.Parameter(unpacked, requires_grad=False))

    def quantized(self, part: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors, by their names here, that hold a part's weights, [E, O, I]."""
        raise NotImplementedError

    def packed_shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a part's packed numbers."""
        raise NotImplementedError

    def product(self, part: str, rows_LI: torch.Tensor, expert: int) -> torch.Tensor:
        """Return rows times one expert's matrix, [L, O]; gradients reach the rows, and unpack the matrix again."""
        raise NotImplementedError

    def matrix(self, part: str, expert: int) -> torch.Tensor:
        """Return one expert's matrix unpacked, [O, I]."""
        raise NotImplementedError

    def dequantized(self, part: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a part's weights, [E, O, I]."""
        device = getattr(self, part).device
        out = torch.empty(self.num_experts, *self.shapes[part], dtype=dtype or self.weight_dtype, device=device)
        for expert in range(self.num_experts):
            out[expert] = self.matrix(part, expert)
        return out

    def run_expert(self, rows_LH: torch.Tensor, expert: int) -> torch.Tensor:
        """Return one expert's output for some rows, [L, H] in and out."""
        gate, up = self.product("gate_up_proj", rows_LH, expert).chunk(2, dim=-1)
        return self.product("down_proj", self.act_fn(gate) * up, expert)

    def forward(self, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's experts, [N, H]; summed in float32."""
        return packed_experts_forward(self.run_expert, self.num_experts, hidden_NH, ids_NK, weights_NK)

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=dtype))


class Bnb4bitExperts(BnbExperts):
    """Experts in bitsandbytes' 4 bits (nf4 or fp4): bytes of two weights each, [E, O * I / 2].

    Raises:
        ValueError: a matrix has an odd size, of which 64 is no divisor.
    """

    def __init__(self, experts: Any, options: Any, dtype: torch.dtype) -> None:
        super().__init__(experts, options, dtype)
        self.quant_type: str = options.bnb_4bit_quant_type
        self.nested: bool = options.bnb_4bit_use_double_quant
        self.compute_dtype: torch.dtype = options.bnb_4bit_compute_dtype
        for part, (rows, columns) in self.shapes.items():
            check_blocks("an expert", rows, columns)
            blocks = rows * columns // BLOCK_4BIT
            absmax_dtype = torch.uint8 if self.nested else torch.int32
            self._declare(f"{part}_absmax", (self.num_experts, blocks), absmax_dtype)
            if self.nested:
                shared = -(-self.num_experts * blocks // NESTED_BLOCK)
                self._declare(f"{part}_nested_absmax", (shared,), torch.int32)
                self._declare(f"{part}_nested_code", (NESTED_CODES,), torch.int32)
                self._declare(f"{part}_offset", (), torch.int32)

    def quantized(self, part: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors, by their names here, that hold a part's weights, [E, O, I]."""
        packed, state = functional().quantize_4bit(
            weight.contiguous(), blocksize=BLOCK_4BIT, compress_statistics=self.nested, quant_type=self.quant_type
        )
        absmax = state.absmax.view(self.num_experts, -1)
        tensors = {part: packed.view(self.num_experts, -1)}
        if not self.nested:
            return {**tensors, f"{part}_absmax": as_bits(absmax)}
        return {
            **tensors,
            f"{part}_absmax": absmax,
            f"{part}_nested_absmax": as_bits(state.state2.absmax),
            f"{part}_nested_code": as_bits(state.state2.code),
            f"{part}_offset": as_bits(state.offset),
        }

    def packed_shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a part's packed numbers."""
        rows, columns = self.shapes[part]
        return self.num_experts, rows * columns // 2

    def absmax(self, part: str, expert: int) -> torch.Tensor:
        """Return the largest absolute value of each block of an expert's matrix, in float32."""
        held: torch.Tensor = getattr(self, f"{part}_absmax")[expert]
        if not self.nested:
            return as_numbers(held)
        shared, code, offset = (
            as_numbers(getattr(self, f"{part}_{name}")) for name in ("nested_absmax", "nested_code", "offset")
        )
        places = torch.arange(expert * len(held), (expert + 1) * len(held), device=held.device) // NESTED_BLOCK
        return code[held.int()] * shared[places] + offset

    def _packed(self, part: str, expert: int) -> tuple[torch.Tensor, Any]:
        """Return one expert's matrix as bitsandbytes' functions take it: bytes, [O * I / 2, 1], and their state."""
        state = functional().QuantState(
            self.absmax(part, expert),
            shape=torch.Size(self.shapes[part]),
            blocksize=BLOCK_4BIT,
            quant_type=self.quant_type,
            dtype=self.weight_dtype,
        )
        return getattr(self, part)[expert].unsqueeze(-1), state

    def product(self, part: str, rows_LI: torch.Tensor, expert: int) -> torch.Tensor:
        """Return rows times one expert's matrix, [L, O]; gradients reach the rows, and unpack the matrix again."""
        return product_4bit(rows_LI.to(self.compute_dtype), *self._packed(part, expert)).to(rows_LI.dtype)

    def matrix(self, part: str, expert: int) -> torch.Tensor:
        """Return one expert's matrix unpacked, [O, I]."""
        return unpack_blocks(*self._packed(part, expert))

    def extra_repr(self) -> str:
        """Return what is printed of the experts."""
        nested = ", scales in 8 bits" if self.nested else ""
        return f"{self.num_experts} experts, {self.quant_type} in blocks of {BLOCK_4BIT}{nested}"


class Bnb8bitExperts(BnbExperts):
    """Experts in int8 with a scale for each row, as bitsandbytes packs a linear layer; their inputs are not rounded."""

    FORMAT = WeightFormat("int8")

    def __init__(self, experts: Any, options: Any, dtype: torch.dtype) -> None:
        super().__init__(experts, options, dtype)
        for part, (rows, _) in self.shapes.items():
            self._declare(f"{part}_scale", (self.num_experts, rows, 1), torch.int32)

    def quantized(self, part: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors, by their names here, that hold a part's weights, [E, O, I]."""
        packed, scale = quantize(weight, self.FORMAT, torch.float32)
        return {part: packed, f"{part}_scale": as_bits(scale)}

    def packed_shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a part's packed numbers."""
        return self.num_experts, *self.shapes[part]

    def _packed(self, part: str, expert: int) -> PackedWeight:
        return PackedWeight(getattr(self, part)[expert], as_numbers(getattr(self, f"{part}_scale")[expert]))

    def product(self, part: str, rows_LI: torch.Tensor, expert: int) -> torch.Tensor:
        """Return rows times one expert's matrix, [L, O]; gradients reach the rows, and unpack the matrix again."""
        return packed_linear(rows_LI, self._packed(part, expert), self.FORMAT)

    def matrix(self, part: str, expert: int) -> torch.Tensor:
        """Return one expert's matrix unpacked, [O, I]."""
        return dequantize(self._packed(part, expert), self.FORMAT)

    def extra_repr(self) -> str:
        """Return what is printed of the experts."""
        return f"{self.num_experts} experts, {self.FORMAT}"


def bnb_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a model's linear layers of bitsandbytes and their names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(
            b.__module__.startswith("bitsandbytes.") for b in type(module).__mro__
        ):
            yield name, module


def count_unpacked(model: nn.Module) -> int:
    """Return how many weights a model has, as `count_weights` does, where bitsandbytes may hold some."""
    count = count_weights(model)
    for module in model.modules():
        if isinstance(module, BnbExperts):
            numbers = sum(rows * columns for rows, columns in module.shapes.values())
            count += module.num_experts * numbers - sum(held.numel() for held in module.parameters())
    return count + sum(layer.in_features * layer.out_features - layer.weight.numel() for _, layer in bnb_linears(model))


def dense_linear(layer: Any, dtype: torch.dtype | None = None) -> nn.Linear:
    """Return one of bitsandbytes' linear layers with its weight unpacked, by default to the dtype it had before."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    if (state := getattr(layer.weight, "quant_state", None)) is not None:
        weight = unpack_blocks(layer.weight.data, state)
    else:
        weight = dequantize_bnb_weight(layer.weight, layer.state)
    dense.weight = nn.Parameter(weight.to(dtype or layer.plain_dtype), requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dense.weight.dtype), requires_grad=False)
    return dense.train(layer.training)


def unpack_bnb(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put plain layers, with weights of that dtype, in the places of all that bitsandbytes quantized."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BnbExperts):
            set_module(model, name, unpack_experts(module, dtype))
    for name, linear in list(bnb_linears(model)):
        set_module(model, name, dense_linear(linear, dtype))
