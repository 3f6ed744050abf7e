"""Packed weights: int8, int4 and fp8 matrices with their scales, and the plain products that define them.

A packed matrix is two tensors whose rows are output channels; leading dimensions (experts) are kept:

- int4: ``packed`` int32 [..., O, I / 8], eight columns a word, the first in the lowest four bits, each stored plus 8;
  ``scale`` [..., O, I / group_size];
- int8: ``packed`` int8 [..., O, I]; ``scale`` [..., O, 1], or [..., O, I / group_size];
- fp8: ``packed`` float8_e4m3fn [..., O, I]; ``scale`` [..., O, 1], or [..., ceil(O / 128), ceil(I / 128)] of blocks.

A weight is its packed number times its scale, in the scale's dtype. int4's words are those of compressed-tensors'
"pack-quantized" files, so that nothing is reordered between a file and the memory.

Shape suffixes: O output channels, I input channels, G groups of columns, E experts, N tokens, K experts of a token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

Kind = Literal["int4", "int8", "fp8"]
KINDS: tuple[Kind, ...] = ("int4", "int8", "fp8")
GROUP_SIZES = (32, 64, 128)
SMALLEST_GROUP = 16
BLOCK = 128  # rows and columns of a block of fp8
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
PER_WORD = 8  # numbers of four bits in an int32
# The largest weight of a group becomes -8 where it is divided by eight of these; below, it leaves a level unused, and
# above, it is clipped so that the others are finer.
CLIP_LEVELS = (7.0, 7.5, 8.0, 8.6, 9.3, 10.1)
# Rows are quantized this many numbers at a time: all steps then stay in the cache of a CPU.
CHUNK = 1 << 18
CHUNK_ON_DEVICE = 1 << 26


@dataclass(frozen=True)
class WeightFormat:
    """How a matrix is packed.

    Fields:
        kind: "int4", "int8" or "fp8".
        group_size: columns that share a scale; 0: a whole row does.
        block: fp8 has one scale for 128 x 128 weights.
    """

    kind: Kind
    group_size: int = 0
    block: bool = False

    def __str__(self) -> str:
        if self.block:
            return f"{self.kind}, blocks of {BLOCK} x {BLOCK}"
        return f"{self.kind}, groups of {self.group_size}" if self.group_size else f"{self.kind}, a scale a channel"

    @property
    def packed_dtype(self) -> torch.dtype:
        """The dtype of the packed tensor."""
        return {"int4": torch.int32, "int8": torch.int8, "fp8": FP8}[self.kind]

    def packed_columns(self, columns: int) -> int:
        """Return how many columns the packed tensor has."""
        return columns // PER_WORD if self.kind == "int4" else columns

    def columns(self, packed: torch.Tensor) -> int:
        """Return how many weights a row of the packed tensor holds."""
        return packed.shape[-1] * (PER_WORD if self.kind == "int4" else 1)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of a matrix's scales."""
        if self.block:
            return -(-rows // BLOCK), -(-columns // BLOCK)
        return rows, (columns // self.group_size if self.group_size else 1)

    def bits(self, rows: int, columns: int, scale_bits: int = 16) -> float:
        """Return the bits that a weight of such a matrix takes, scales included."""
        scales = self.scale_shape(rows, columns)
        return (4 if self.kind == "int4" else 8) + scales[0] * scales[1] * scale_bits / (rows * columns)


def fit_format(wanted: WeightFormat, columns: int) -> WeightFormat:
    """Return the format for a matrix of that many columns: where groups do not divide them, smaller ones or int8."""
    if wanted.kind != "int4":
        return wanted
    group = wanted.group_size
    while group > SMALLEST_GROUP and columns % group:
        group //= 2
    return WeightFormat("int4", group) if columns % group == 0 else WeightFormat("int8")


class PackedWeight(NamedTuple):
    """A packed matrix, or one for each expert."""

    packed: torch.Tensor
    scale: torch.Tensor


# ---------------------------------------------------------------- packing


def pack_int4(numbers: torch.Tensor) -> torch.Tensor:
    """Pack integers from -8 to 7, [..., I], into int32 words, [..., I / 8]."""
    nibbles = (numbers + 8).to(torch.uint8)
    pairs = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    if sys.byteorder == "big":
        pairs = pairs.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    return pairs.contiguous().view(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Return the integers from -8 to 7, int8 [..., I], of int32 words, [..., I / 8]."""
    if sys.byteorder == "big" or packed.device.type == "mps":  # a word's bytes are elsewhere, or have not been seen
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
        return ((packed.unsqueeze(-1) >> shifts) & 15).flatten(-2).to(torch.int8) - 8
    pairs = packed.contiguous().view(torch.uint8)
    return (torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)).view(torch.int8) - 8


def expand_scale(scale: torch.Tensor, fmt: WeightFormat, rows: int, columns: int) -> torch.Tensor:
    """Return scales as something that multiplies [..., rows, columns] element by element."""
    if fmt.block:
        return scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return scale.repeat_interleave(fmt.group_size, -1) if fmt.group_size else scale


def dequantize(weight: PackedWeight, fmt: WeightFormat, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the weights, [..., O, I]: products in the scale's dtype, as compressed-tensors has them."""
    packed, scale = weight
    numbers = unpack_int4(packed) if fmt.kind == "int4" else packed
    numbers = numbers.to(scale.dtype)
    rows, columns = numbers.shape[-2:]
    if fmt.group_size:
        out = (numbers.unflatten(-1, (-1, fmt.group_size)) * scale.unsqueeze(-1)).flatten(-2)
    else:
        out = numbers * expand_scale(scale, fmt, rows, columns)
    return out if dtype is None else out.to(dtype)


# ---------------------------------------------------------------- quantizing


def _not_zero(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return scales rounded to a dtype; those that vanish become its smallest normal number."""
    smallest = torch.finfo(dtype).tiny
    scale = torch.where(scale.abs() < smallest, smallest, scale)
    return scale.to(dtype)


def int4_group_scales(groups: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the scales, [R, G, 1], that minimise the squared error of [R, G, group_size] in float32.

    For given integers q the best scale of weights w is <w, q> / <q, q>, and it leaves <w, w> - <w, q>^2 / <q, q>: so
    among several clipped ranges the one with the largest <w, q>^2 / <q, q> is taken. Scales may be negative: there is
    one more integer below zero than above, and the group's largest weight gets it.
    """
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    weighted = groups if importance is None else groups * importance
    best_gain = torch.full_like(largest, -1.0)
    best_scale = torch.ones_like(largest)
    for level in CLIP_LEVELS:
        scale = _not_zero(largest / -level, torch.float32)
        numbers = (groups / scale).round_().clamp_(-8, 7)
        product = (weighted * numbers).sum(dim=-1, keepdim=True)
        norm = (numbers * numbers if importance is None else numbers * numbers * importance).sum(dim=-1, keepdim=True)
        norm = norm.clamp_min_(1e-30)
        gain = product * product / norm
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, product / norm, best_scale)
    return _not_zero(best_scale, dtype)


def _quantize_int4(rows: torch.Tensor, group: int, importance: torch.Tensor | None, dtype: torch.dtype) -> PackedWeight:
    groups = rows.unflatten(-1, (-1, group))
    weights = None if importance is None else importance.view(-1, group)
    scale = int4_group_scales(groups, weights, dtype)
    numbers = (groups / scale.float()).round_().clamp_(-8, 7).to(torch.int8)
    return PackedWeight(pack_int4(numbers.flatten(-2)), scale.squeeze(-1))


def _quantize_int8(rows: torch.Tensor, group: int, dtype: torch.dtype) -> PackedWeight:
    groups = rows.unflatten(-1, (-1, group or rows.shape[-1]))
    scale = _not_zero(groups.abs().amax(dim=-1, keepdim=True) / 127, dtype)
    numbers = (groups / scale.float()).round_().clamp_(-128, 127).to(torch.int8)
    return PackedWeight(numbers.flatten(-2), scale.squeeze(-1))


def _quantize_fp8(rows: torch.Tensor, block: bool, dtype: torch.dtype) -> PackedWeight:
    if not block:
        scale = _not_zero(rows.abs().amax(dim=-1, keepdim=True) / FP8_LARGEST, dtype)
        return PackedWeight((rows / scale.float()).clamp_(-FP8_LARGEST, FP8_LARGEST).to(FP8), scale)
    height, width = rows.shape
    padded = F.pad(rows, (0, -width % BLOCK, 0, -height % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = _not_zero(blocks.abs().amax(dim=(1, 3), keepdim=True) / FP8_LARGEST, dtype)
    numbers = (blocks / scale.float()).clamp_(-FP8_LARGEST, FP8_LARGEST).flatten(2).flatten(0, 1)
    return PackedWeight(numbers[:height, :width].to(FP8).contiguous(), scale[:, 0, :, 0])


def _chunks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a matrix in blocks of rows, in float32; rows of a block of fp8 stay together."""
    most = CHUNK if matrix.device.type == "cpu" else CHUNK_ON_DEVICE
    rows = max(BLOCK, most // max(1, matrix.shape[1]) // BLOCK * BLOCK)
    for part in matrix.split(rows):
        yield part.float()


@torch.no_grad()
def quantize(
    weight: torch.Tensor,
    fmt: WeightFormat,
    scale_dtype: torch.dtype | None = None,
    importance_I: torch.Tensor | None = None,
) -> PackedWeight:
    """Pack a matrix, or one for each expert.

    Args:
        weight: [..., O, I], of floating point.
        fmt: the format; its groups divide I.
        scale_dtype: dtype of the scales; by default the weight's.
        importance_I: how much the squared error of a column counts (the mean square of its input): int4 alone uses it.

    Raises:
        ValueError: groups do not divide the columns, or a weight is not finite.
    """
    columns = weight.shape[-1]
    dtype = scale_dtype or weight.dtype
    if fmt.group_size and columns % fmt.group_size:
        raise ValueError(f"Groups of {fmt.group_size} do not divide {columns} columns.")
    if weight.dim() > 2:
        parts = [quantize(part, fmt, dtype, importance_I) for part in weight]
        return PackedWeight(torch.stack([p.packed for p in parts]), torch.stack([p.scale for p in parts]))
    packed, scales = [], []
    importance = None if importance_I is None else importance_I.to(weight.device).float().clamp_min(1e-12)
    for part in _chunks(weight):
        if not bool(part.isfinite().all()):
            raise ValueError("A weight that is not finite cannot be quantized.")
        if fmt.kind == "int4":
            done = _quantize_int4(part, fmt.group_size, importance, dtype)
        elif fmt.kind == "int8":
            done = _quantize_int8(part, fmt.group_size, dtype)
        else:
            done = _quantize_fp8(part, fmt.block, dtype)
        packed.append(done.packed)
        scales.append(done.scale)
    return PackedWeight(torch.cat(packed), torch.cat(scales))


def relative_error(weight: torch.Tensor, packed: PackedWeight, fmt: WeightFormat) -> float:
    """Return the norm of the error that packing made over the weight's own."""
    exact = weight.float()
    return float((dequantize(packed, fmt).float() - exact).norm() / exact.norm().clamp_min(1e-30))


# ---------------------------------------------------------------- products


class PackedProduct(torch.autograd.Function):
    """``F.linear`` over a packed matrix that takes no gradient; it is unpacked again for the backward pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        packed: torch.Tensor,
        scale: torch.Tensor,
        fmt: WeightFormat,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.fmt = fmt  # type: ignore[attr-defined]
        return F.linear(x, dequantize(PackedWeight(packed, scale), fmt, x.dtype))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        packed, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        weight = dequantize(PackedWeight(packed, scale), ctx.fmt, grad.dtype)  # type: ignore[attr-defined]
        return grad @ weight, None, None, None


def packed_linear(
    x: torch.Tensor, weight: PackedWeight, fmt: WeightFormat, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``F.linear``, [..., I] to [..., O], over a packed matrix; gradients reach ``x`` and the bias."""
    if torch.is_grad_enabled() and x.requires_grad:
        out: torch.Tensor = PackedProduct.apply(x, *weight, fmt)
    else:
        out = F.linear(x, dequantize(weight, fmt, x.dtype))
    return out if bias_O is None else out + bias_O.to(out.dtype)
