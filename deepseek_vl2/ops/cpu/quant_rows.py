"""Products of few rows with packed weights on x86 CPUs, compiled from `quant_rows.c` as `bindings` compiles its own.

Rows are quantized to int8, with a scale for 32 columns: what that adds to the error of a product, about half a percent,
is less than what 8 bits of weights cost and far less than what 4 do. What a row gets does not depend on the others. The
plain forms are `packed_linear`, `DeepseekV2MLP` and `PackedExperts.run_expert` of `deepseek_vl2.models`.

Shape suffixes: N rows, H hidden size, I input channels or inner width, O output channels, E experts, K experts of a
row, D head size.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .bindings import NO_MEMORY, OK, Unavailable, is_plain, load, threads_for

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
POINTER, INTEGER, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
ARGUMENTS: dict[str, list[type]] = {
    "packed_linear": [POINTER] * 5 + [INTEGER] * 3 + [NUMBER] * 2,
    "packed_queries_keys_values": [POINTER] * 10 + [INTEGER] * 5 + [NUMBER] * 2,
    "packed_mlp": [POINTER] * 8 + [INTEGER] * 3 + [NUMBER] * 3,
    "packed_experts": [POINTER] * 8 + [INTEGER] * 5 + [NUMBER] * 3,
}
# Most rows of a call, as in the C file.
MOST_ROWS = 32
# What stands in the C file for int8 with a scale a row; groups of int4 are of 8 << shift columns.
INT8 = 0
SHIFTS = {16: 1, 32: 2, 64: 3, 128: 4}


class Packed(NamedTuple):
    """A packed matrix, or one for each expert.

    Fields:
        numbers: int32 [..., O, I / 8], eight numbers of four bits a word, or int8 [..., O, I].
        scale: bfloat16, [..., O, I / group_size] or [..., O, 1].
        group_size: columns that share a scale; 0: all.
    """

    numbers: torch.Tensor
    scale: torch.Tensor
    group_size: int

    def shift(self) -> int | None:
        """Return how the C file names the format; ``None``: it does not know it."""
        numbers, dtype = self.numbers, self.numbers.dtype
        if not numbers.is_cpu or not numbers.is_contiguous() or not is_plain(self.scale):
            return None
        if dtype is torch.int32:
            return SHIFTS.get(self.group_size)
        return INT8 if dtype is torch.int8 and self.group_size == 0 and numbers.shape[-1] % 4 == 0 else None

    def columns(self) -> int:
        """Return I."""
        return self.numbers.shape[-1] * (8 if self.numbers.dtype is torch.int32 else 1)

    def pointers(self) -> tuple[int, int]:
        """Return the addresses of numbers and scales."""
        return self.numbers.data_ptr(), self.scale.data_ptr()


def _rows(x: torch.Tensor, width: int) -> int | None:
    """Return how many rows [..., I] holds; ``None``: too many, none, or of another width or kind."""
    if x.shape[-1] != width or not is_plain(x):
        return None
    rows = x.numel() // width
    return rows if 0 < rows <= MOST_ROWS else None


class QuantRows:
    """The compiled functions. Each returns ``None`` where tensors or formats are others than those it knows.

    Raises:
        Unavailable: the library cannot be had here.
    """

    def __init__(self) -> None:
        self._library = load(SOURCE, ARGUMENTS)

    def _call(self, name: str, *arguments: object) -> bool:
        status = getattr(self._library, name)(*arguments)
        if status == NO_MEMORY:
            raise MemoryError(f"There is no memory for {name} of few rows.")
        return bool(status == OK)

    def linear(self, x: torch.Tensor, weight: Packed, bias_O: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the products of a few rows in bfloat16, [..., I] to [..., O], plus a bias where one is given."""
        shift, outputs, width = weight.shift(), weight.numbers.shape[0], weight.columns()
        rows = _rows(x, width)
        if shift is None or rows is None or (bias_O is not None and not is_plain(bias_O)):
            return None
        out = x.new_empty(*x.shape[:-1], outputs)
        bias = None if bias_O is None else bias_O.data_ptr()
        pointers = (x.data_ptr(), *weight.pointers(), bias, out.data_ptr())
        self._call("packed_linear", *pointers, rows, outputs, width, shift, threads_for(outputs * width))
        return out

    def queries_keys_values(
        self,
        x_1NH: torch.Tensor,
        query: Packed,
        key: Packed,
        value: Packed,
        cos_1ND: torch.Tensor,
        sin_1ND: torch.Tensor,
    ) -> tuple[torch.Tensor, ...] | None:
        """Return rotated queries, [1, heads, N, D], rotated keys and values, of a few rows in bfloat16."""
        shift, width, size = query.shift(), query.columns(), cos_1ND.shape[-1]
        queries, keys = query.numbers.shape[0], key.numbers.shape[0]
        rows = _rows(x_1NH, width)
        if shift is None or rows is None or x_1NH.dim() != 3 or len(x_1NH) != 1 or not is_plain(cos_1ND, sin_1ND):
            return None
        if cos_1ND.shape != (1, rows, size) or sin_1ND.shape != cos_1ND.shape:
            return None
        if not all(part.shift() == shift and part.columns() == width for part in (key, value)):
            return None
        if value.numbers.shape[0] != keys or size % 2 or queries % size or keys % size:
            return None
        out = x_1NH.new_empty(1, rows, (queries + 2 * keys) // size, size)
        pointers = (x_1NH.data_ptr(), *query.pointers(), *key.pointers(), *value.pointers())
        threads = threads_for((queries + 2 * keys) * width)
        tables = (cos_1ND.data_ptr(), sin_1ND.data_ptr(), out.data_ptr())
        self._call("packed_queries_keys_values", *pointers, *tables, rows, queries, keys, width, size, shift, threads)
        return out.transpose(1, 2).split([queries // size, keys // size, keys // size], dim=1)

    def mlp(self, x: torch.Tensor, gate: Packed, up: Packed, down: Packed) -> torch.Tensor | None:
        """Return a SwiGLU MLP of a few rows in bfloat16, [..., H] in and out."""
        shift, down_shift, (inner, hidden) = gate.shift(), down.shift(), (gate.numbers.shape[0], gate.columns())
        rows = _rows(x, hidden)
        if shift is None or down_shift is None or rows is None or up.shift() != shift:
            return None
        if up.numbers.shape != gate.numbers.shape or (down.numbers.shape[0], down.columns()) != (hidden, inner):
            return None
        out = torch.empty_like(x)
        pointers = (x.data_ptr(), *gate.pointers(), *up.pointers(), *down.pointers(), out.data_ptr())
        numbers = (rows, inner, hidden, shift, down_shift, threads_for(3 * inner * hidden))
        self._call("packed_mlp", *pointers, *numbers)
        return out

    def experts(
        self, x_NH: torch.Tensor, gate_up: Packed, down: Packed, ids_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the weighted sum of the chosen experts, with SiLU, of a few rows in bfloat16, [N, H] in and out.

        Args:
            x_NH: the rows.
            gate_up: packed weights of [E, 2I, H].
            down: of [E, H, I].
            ids_NK: the chosen experts.
            weights_NK: their weights, float32.
        """
        shift, down_shift, (experts, hidden) = gate_up.shift(), down.shift(), down.numbers.shape[:2]
        inner, rows = down.columns(), _rows(x_NH, hidden)
        if shift is None or down_shift is None or rows is None or x_NH.dim() != 2:
            return None
        if weights_NK.dtype is not torch.float32 or ids_NK.dtype is not torch.int64 or ids_NK.shape[0] != rows:
            return None
        if weights_NK.shape != ids_NK.shape or gate_up.numbers.shape[:2] != (experts, 2 * inner):
            return None
        if gate_up.columns() != hidden or not ids_NK.numel():
            return None
        ids, weights, out = ids_NK.contiguous(), weights_NK.contiguous(), torch.empty_like(x_NH)
        pointers = (x_NH.data_ptr(), *gate_up.pointers(), *down.pointers())
        tables = (ids.data_ptr(), weights.data_ptr(), out.data_ptr())
        numbers = (rows, ids.shape[1], experts, inner, hidden, shift, down_shift, threads_for(3 * inner * hidden))
        return out if self._call("packed_experts", *pointers, *tables, *numbers) else None


_reason: list[str] = []


@cache
def quant_rows() -> QuantRows | None:
    """Return the compiled functions, or ``None`` where they cannot be had; `unavailable_reason` then says why."""
    try:
        return QuantRows()
    except Unavailable as error:
        _reason[:] = [str(error)]
        logger.debug("Packed rows are multiplied by PyTorch: %s", error)
        return None


def unavailable_reason() -> str | None:
    """Return why there are no compiled functions here, in a few words; ``None`` where there are."""
    return None if quant_rows() is not None else _reason[0]
