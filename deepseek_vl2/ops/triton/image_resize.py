"""Images scaled on the device, to the bit as Pillow scales them.

Pillow scales bytes with integers: along one side and then along the other, each pixel a sum of bytes times weights of
22 bits, rounded to a byte again. The order of adding cannot change such a sum, so that a GPU gives the same. Which side
comes first is Pillow 13's choice, whichever release is installed; where that one gives a side other pixels than these,
nothing is scaled here. The plain form is `resize_plain`, or Pillow's `Image.resize`, bicubic, for each side.

Source: Pillow's documentation of its filters ("Concepts"); Keys, "Cubic convolution interpolation for digital image
processing" (1981), with a = -0.5.

Shape suffixes: A rows of pixels before the side that is scaled, N its length, M its length scaled, R what lies behind
it; C channels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]  # width, height

BITS: tl.constexpr = tl.constexpr(22)
HALF: tl.constexpr = tl.constexpr(1 << 21)
BLOCK = 1024


@lru_cache(maxsize=64)
def filter_weights(size: int, scaled: int) -> NDArray[np.int32]:
    """Return how each pixel of a scaled side is made: the first pixel that it is made of, and then their weights.

    Args:
        size: length of the side, in pixels.
        scaled: its length when scaled.

    Returns:
        [scaled, 1 + weights], the weights in units of 2 ** -22.
    """
    step = size / scaled
    stretch = max(step, 1.0)
    reach = 2.0 * stretch
    most = math.ceil(reach) * 2 + 1
    centers = (np.arange(scaled) + 0.5) * step
    first = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + reach + 0.5).astype(np.int64), size)
    taps = np.arange(most)
    x = np.abs((taps + first[:, None] - centers[:, None] + 0.5) * (1.0 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights[taps >= (end - first)[:, None]] = 0
    weights /= weights.cumsum(axis=1)[:, -1:]  # summed one after the other, as Pillow does
    units = weights * (1 << BITS.value)
    rounded = np.where(units < 0, units - 0.5, units + 0.5).astype(np.int64)
    return np.concatenate((first[:, None], rounded), axis=1).astype(np.int32)


def resize_plain(pixels: NDArray[np.uint8], size: Size, height_first: bool) -> NDArray[np.uint8]:
    """Scale an image, uint8 [H, W, C], to (width, height) in NumPy: what the kernel does, slowly."""
    for axis in (0, 1) if height_first else (1, 0):
        scaled = size[1 - axis]
        if scaled == pixels.shape[axis]:
            continue
        table = filter_weights(pixels.shape[axis], scaled)
        places = np.minimum(table[:, :1] + np.arange(table.shape[1] - 1), pixels.shape[axis] - 1)
        taken = pixels.take(places, axis=axis).astype(np.int32)
        weights = table[:, 1:].reshape(*table[:, 1:].shape, *[1] * (pixels.ndim - 1 - axis))
        total = (taken * weights).sum(axis=axis + 1) + HALF.value
        pixels = (total >> BITS.value).clip(0, 255).astype(np.uint8)
    return pixels


@lru_cache(maxsize=1)
def pillow_is_known() -> bool:
    """Return whether the Pillow installed scales a side to the bytes that `resize_plain` gives."""
    noise = np.random.default_rng(0).integers(0, 256, (29, 17, 3), dtype=np.uint8)

    def matches(size: Size) -> bool:
        scaled = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        return np.array_equal(np.asarray(scaled), resize_plain(noise, size, height_first=False))

    return all(matches(size) for size in ((7, 29), (23, 29), (17, 11), (17, 40)))


def is_height_first(image_size: Size, size: Size) -> bool:
    """Whether the height is scaled before the width, as Pillow does from release 13 on; sizes are (width, height)."""
    shrinks = image_size[1] - size[1]
    return shrinks > 0 and shrinks > 2 * (image_size[0] - size[0])


@triton.jit(do_not_specialize=["numbers", "N", "M", "R", "taps", "out_row", "out_step"])
def _resize_kernel(
    pixels_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    numbers: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    R: tl.tensor,
    taps: tl.tensor,
    out_row: tl.tensor,
    out_step: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < numbers
    r, m, a = number % R, number // R % M, number // R // M
    line = table_ptr + m * (taps + 1)
    first = tl.load(line, mask=inside, other=0)
    total = tl.full([BLOCK], HALF, tl.int32)
    for tap in range(taps):
        weight = tl.load(line + 1 + tap, mask=inside, other=0)
        place = (a * N + tl.minimum(first + tap, N - 1)) * R + r
        total += weight * tl.load(pixels_ptr + place, mask=inside, other=0).to(tl.int32)
    byte = tl.minimum(tl.maximum(total >> BITS, 0), 255)
    tl.store(out_ptr + a * out_row + m * out_step + r, byte.to(tl.uint8), mask=inside)


@lru_cache(maxsize=64)
def _table(size: int, scaled: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # kept for calls of any mode
        table = torch.from_numpy(filter_weights(size, scaled))
        return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def resize_axis(pixels_ANR: torch.Tensor, out_AMR: torch.Tensor) -> None:
    """Scale the middle dimension of bytes, laid out without gaps, to the length that it has in ``out_AMR``."""
    (rows, size, rest), scaled = pixels_ANR.shape, out_AMR.shape[1]
    if not pixels_ANR.is_contiguous() or out_AMR.stride(2) != 1:
        raise ValueError(f"Bytes with gaps cannot be scaled: {pixels_ANR.stride()}, {out_AMR.stride()}.")
    table, numbers = _table(size, scaled, pixels_ANR.device), rows * scaled * rest
    _resize_kernel[(triton.cdiv(numbers, BLOCK),)](
        pixels_ANR, table, out_AMR, numbers, size, scaled, rest, table.shape[1] - 1, *out_AMR.stride()[:2],
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def resize_into(pixels_HWC: torch.Tensor, out_HWC: torch.Tensor) -> None:
    """Scale an image of bytes to the size of ``out_HWC``, whose rows may have gaps between them."""
    (height, width, channels), (new_height, new_width) = pixels_HWC.shape, out_HWC.shape[:2]
    sides = [side for side, changes in (("width", new_width != width), ("height", new_height != height)) if changes]
    if is_height_first((width, height), (new_width, new_height)):
        sides.reverse()
    if not sides:
        out_HWC.copy_(pixels_HWC)
    for side in sides:
        height, width = pixels_HWC.shape[:2]
        shape = (new_height, width) if side == "height" else (height, new_width)
        out = out_HWC if side == sides[-1] else pixels_HWC.new_empty(*shape, channels)
        if side == "height":
            resize_axis(pixels_HWC.flatten(1)[None], out.flatten(1)[None])
        else:
            resize_axis(pixels_HWC, out)
        pixels_HWC = out
