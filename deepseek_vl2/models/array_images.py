"""Images given as arrays: of numpy, or tensors of PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .image_modes import gray_bytes

CHANNELS = (1, 2, 3, 4)


def is_array(source: Any) -> bool:
    """Whether an image, or a batch of images, is given as an array."""
    return isinstance(source, (np.ndarray, torch.Tensor))


def as_images(source: Any) -> list[Any]:
    """Return the images of an array: itself, or each of a batch of four dimensions."""
    return list(source) if source.ndim == 4 else [source]


def _numbers_of(source: torch.Tensor) -> NDArray[Any]:
    """Return what a tensor holds as an array; floats of less than 32 bits become such."""
    if source.is_quantized:
        source = source.dequantize()
    tensor = (source if source.layout == torch.strided else source.to_dense()).detach().cpu()
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


def image_of_array(source: Any) -> Image.Image:
    """Return an array as a PIL image.

    Args:
        source: [H, W], [H, W, C] or, as PyTorch has it, [C, H, W], of 1 to 4 channels: gray, gray and alpha, RGB, RGBA.
            Bytes are taken as they are; other numbers are scaled by their range, as `image_modes.as_rgb` does.

    Raises:
        ValueError: another shape or kind of numbers, or NaN.
    """
    pixels: NDArray[Any]
    if isinstance(source, torch.Tensor):
        if source.is_meta:
            raise ValueError("An image on the device meta has no pixels.")
        pixels = _numbers_of(source)
    else:
        pixels = source
    shape = list(pixels.shape)
    if pixels.ndim == 3 and shape[0] in CHANNELS and (shape[2] not in CHANNELS or isinstance(source, torch.Tensor)):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in CHANNELS):
        raise ValueError(f"An image as an array is [H, W], [H, W, C] or [C, H, W] of 1 to 4 channels, got {shape}.")
    if 0 in pixels.shape:
        raise ValueError(f"An image of the shape {shape} has no pixels.")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind not in "iuf":
            raise ValueError(f"An image as an array holds numbers, not {pixels.dtype}.")
        pixels = gray_bytes(pixels, "I;16" if pixels.dtype == np.uint16 else "F" if pixels.dtype.kind == "f" else "I")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(pixels))
