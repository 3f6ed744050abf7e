"""Products of one row with packed weights on x86 CPUs, compiled from `quant_rows.c` as `bindings` compiles its own.

The row is quantized to int8, with a scale for 32 columns: what that adds to the error of a product, about half a
percent, is less than what 8 bits of weights cost and far less than what 4 do. The plain forms are `packed_linear` and
`PackedExperts.run_expert` of `deepseek_vl2.models`.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

from .bindings import Unavailable, is_plain, load

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
POINTER, INTEGER, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
ARGUMENTS: dict[str, list[type]] = {
    "packed_linear": [POINTER] * 5 + [INTEGER] * 2 + [NUMBER] * 3,
    "packed_experts": [POINTER] * 8 + [INTEGER] * 3 + [NUMBER] * 5,
}
GROUPS = (16, 32, 64, 128)


def _bits_and_shift(packed: torch.Tensor, scale: torch.Tensor, group_size: int) -> tuple[int, int] | None:
    """Return the bits of a weight and log2 of the words that share a scale; ``None``: other formats."""
    if not packed.is_cpu or not packed.is_contiguous() or not is_plain(scale):
        return None
    if packed.dtype == torch.int32 and group_size in GROUPS:
        return 4, (group_size // 8).bit_length() - 1
    if packed.dtype == torch.int8 and group_size == 0 and packed.shape[-1] % 4 == 0:
        return 8, 0
    return None


def _columns(packed: torch.Tensor) -> int:
    return packed.shape[-1] * (8 if packed.dtype == torch.int32 else 1)


class QuantRows:
    """The compiled functions. Each returns ``None`` where tensors or formats are others than those it knows.

    Raises:
        Unavailable: the library cannot be had here.
    """

    def __init__(self) -> None:
        self._library = load(SOURCE, ARGUMENTS)

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._library, name)(*arguments):
            raise MemoryError(f"There is no memory for {name} of one row.")

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        scale: torch.Tensor,
        group_size: int,
        bias_O: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Return the product of a single row in bfloat16, [..., I] to [..., O].

        Args:
            x: the row.
            packed: int32 [O, I / 8] or int8 [O, I].
            scale: bfloat16, [O, I / group_size] or [O, 1].
            group_size: columns that share a scale; 0: all.
            bias_O: added, where given.
        """
        form, rows, width = _bits_and_shift(packed, scale, group_size), packed.shape[0], _columns(packed)
        if form is None or not is_plain(x) or x.numel() != width or x.shape[-1] != width:
            return None
        if bias_O is not None and not is_plain(bias_O):
            return None
        out = x.new_empty(*x.shape[:-1], rows)
        bias = None if bias_O is None else bias_O.data_ptr()
        pointers = (x.data_ptr(), packed.data_ptr(), scale.data_ptr(), bias, out.data_ptr())
        self._call("packed_linear", *pointers, rows, width, *form, torch.get_num_threads())
        return out

    def experts(
        self,
        x_1H: torch.Tensor,
        gate_up: tuple[torch.Tensor, torch.Tensor, int],
        down: tuple[torch.Tensor, torch.Tensor, int],
        ids_1K: torch.Tensor,
        weights_1K: torch.Tensor,
    ) -> torch.Tensor | None:
        """Return the weighted sum of the chosen experts, with SiLU, of a single row in bfloat16, [1, H] in and out.

        Args:
            x_1H: the row.
            gate_up: packed weights of [E, 2I, H], their scales and their group size.
            down: the same of [E, H, I].
            ids_1K: the chosen experts.
            weights_1K: their weights, float32.
        """
        up_form, down_form = _bits_and_shift(*gate_up), _bits_and_shift(*down)
        experts, hidden = down[0].shape[:2]
        inner = _columns(down[0])
        if up_form is None or down_form is None or not is_plain(x_1H) or x_1H.shape != (1, hidden):
            return None
        if weights_1K.dtype != torch.float32 or len(ids_1K) != 1 or ids_1K.dtype != torch.int64:
            return None
        if gate_up[0].shape[:2] != (experts, 2 * inner) or _columns(gate_up[0]) != hidden:
            return None
        ids, weights = ids_1K.contiguous(), weights_1K.contiguous()
        if not all(0 <= expert < experts for expert in ids[0].tolist()):
            return None
        out = torch.empty_like(x_1H)
        tensors = (x_1H, gate_up[0], gate_up[1], down[0], down[1], ids, weights, out)
        numbers = (ids.shape[1], inner, hidden, *up_form, *down_form, torch.get_num_threads())
        self._call("packed_experts", *(tensor.data_ptr() for tensor in tensors), *numbers)
        return out


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
