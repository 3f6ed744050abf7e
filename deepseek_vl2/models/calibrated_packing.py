"""Packing int4 for the inputs that a matrix really gets: rounding errors are made up for by the columns to the right.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.

Shape suffixes: E matrices of one shape (experts), O output channels, I input channels, G columns of a group.
"""

from __future__ import annotations

import torch

from .quantization import PackedWeight, WeightFormat, dequantize, int4_group_scales, pack_int4

# Of the mean square of a column's input, added to all: columns that calibration hardly saw are rounded as they are.
DAMPING = 0.01
# Matrices are packed together up to this many numbers of their second moments (1 GiB).
TOGETHER = 1 << 28


def error_factors(moments_EII: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factors of the inverse second moments, [E, I, I].

    Row i says how much an error of column i is made up for by each column to the right, times its diagonal.
    """
    diagonal_EI = moments_EII.diagonal(dim1=-2, dim2=-1)
    added_E = (DAMPING * diagonal_EI.mean(dim=-1)).clamp_min(1e-12)
    damped = moments_EII + torch.diag_embed(added_E[:, None].expand_as(diagonal_EI))
    # damped = R R^T with R upper, so the inverse is U^T U with U = R^-1, and is never computed itself.
    upper_EII = torch.linalg.cholesky(damped.flip(-2, -1)).flip(-2, -1)
    identity_II = torch.eye(upper_EII.shape[-1], dtype=upper_EII.dtype, device=upper_EII.device)
    return torch.linalg.solve_triangular(upper_EII, identity_II.expand_as(upper_EII), upper=True)


def _pack_group(
    rest_EOG: torch.Tensor, factors_EGG: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a group's columns from left to right; ``rest_EOG`` is changed. Returns integers, scales and errors."""
    own_EG = factors_EGG.diagonal(dim1=-2, dim2=-1)
    # What is left of a column's error once the others have made up for it counts so much.
    scale_EO1 = int4_group_scales(rest_EOG, own_EG.square().reciprocal()[:, None], dtype)
    numbers = torch.empty_like(rest_EOG, dtype=torch.int8)
    errors = torch.empty_like(rest_EOG)
    scale_EO = scale_EO1[..., 0]
    for column in range(rest_EOG.shape[-1]):
        weight_EO = rest_EOG[..., column]
        rounded = (weight_EO / scale_EO.float()).round().clamp(-8, 7)
        error_EO = (weight_EO - (rounded.to(dtype) * scale_EO).float()) / own_EG[:, column, None]
        rest_EOG[..., column:] -= error_EO[..., None] * factors_EGG[:, column, None, column:]
        numbers[..., column], errors[..., column] = rounded.to(torch.int8), error_EO
    return numbers, scale_EO1, errors


def _pack_together(
    weight_EOI: torch.Tensor, moments_EII: torch.Tensor, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    factors_EII = error_factors(moments_EII)
    rest_EOI = weight_EOI.float().clone()
    packed, scales = [], []
    for start in range(0, rest_EOI.shape[-1], group):
        end = start + group
        numbers, scale, errors = _pack_group(rest_EOI[..., start:end], factors_EII[:, start:end, start:end], dtype)
        rest_EOI[..., end:] -= errors @ factors_EII[:, start:end, end:]
        packed.append(numbers)
        scales.append(scale)
    return pack_int4(torch.cat(packed, dim=-1)), torch.cat(scales, dim=-1)


@torch.no_grad()
def quantize_for_inputs(
    weight_EOI: torch.Tensor, moments_EII: torch.Tensor, fmt: WeightFormat, scale_dtype: torch.dtype
) -> PackedWeight:
    """Pack matrices as int4 so that the products with their inputs, rather than the weights, stay near.

    Args:
        weight_EOI: the matrices, of floating point.
        moments_EII: sums of outer products of their inputs, in float32, on the same device.
        fmt: int4; its groups divide I.
        scale_dtype: dtype of the scales.

    Raises:
        ValueError: the format is not int4, or a weight or a moment is not finite.
    """
    if fmt.kind != "int4":
        raise ValueError(f"Calibration is of int4 alone, not of {fmt.kind}.")
    rows, columns = weight_EOI.shape[1:]
    together = max(1, TOGETHER // (columns * max(rows, columns)))
    done = []
    for weight, moments in zip(weight_EOI.split(together), moments_EII.split(together), strict=True):
        if not bool(weight.isfinite().all()) or not bool(moments.isfinite().all()):
            raise ValueError("A weight or an input that is not finite cannot be quantized.")
        done.append(_pack_together(weight, moments, fmt.group_size, scale_dtype))
    packed, scale = (torch.cat(part) for part in zip(*done, strict=True))
    return PackedWeight(packed, scale)


@torch.no_grad()
def product_error(
    weight_EOI: torch.Tensor, packed: PackedWeight, fmt: WeightFormat, moments_EII: torch.Tensor
) -> float:
    """Return the norm of the error that packing makes in the products with the inputs, over the products' own."""
    squares = torch.zeros(2, device=weight_EOI.device, dtype=torch.float64)
    for weight, words, scale, moments in zip(weight_EOI, *packed, moments_EII, strict=True):
        exact = weight.float()
        wrong = dequantize(PackedWeight(words, scale), fmt).float() - exact
        for place, matrix in enumerate((wrong, exact)):
            squares[place] += ((matrix @ moments) * matrix).sum().clamp_min(0)
    wrong_square, square = squares.tolist()
    return float((wrong_square / max(square, 1e-30)) ** 0.5)
