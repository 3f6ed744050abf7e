"""Images that wait for the device are scaled to tiles there.

Shape suffixes: V tiles, S side of a tile, C channels.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from ..models.tiling import TileGrid, fitted_size
from ..models.views import Pictures
from ..ops.triton.image_resize import pillow_is_known, resize_into

logger = logging.getLogger(__name__)


def write_view(pixels_HWC: torch.Tensor, grid: TileGrid, color: tuple[int, ...], tiles_VSSC: torch.Tensor) -> None:
    """Write an image's view as tiles: `deepseek_vl2.models.views.write_view`, of bytes on a device."""
    (height, width), side = pixels_HWC.shape[:2], tiles_VSSC.shape[1]
    field = (grid.across * side, grid.down * side)
    size = fitted_size((width, height), field)
    left, top = round((field[0] - size[0]) * 0.5), round((field[1] - size[1]) * 0.5)
    canvas = tiles_VSSC[0] if grid == (1, 1) else tiles_VSSC.new_empty(field[1], field[0], 3)
    if size != field and len(set(color)) == 1:
        canvas.fill_(color[0])
    elif size != field:
        for channel, value in enumerate(color):
            canvas[..., channel] = value
    resize_into(pixels_HWC, canvas[top : top + size[1], left : left + size[0]])
    if grid != (1, 1):
        cut = canvas.view(grid.down, side, grid.across, side, 3).transpose(1, 2)
        tiles_VSSC.view(grid.down, grid.across, side, side, 3).copy_(cut)


def upload(pixels: Any, device: torch.device) -> torch.Tensor:
    """Return an image's pixels, uint8 [H, W, 3], on a device."""
    staged = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(staged.numpy(), pixels)
    return staged.to(device, non_blocking=True)


def scale(pictures: Pictures, device: torch.device) -> torch.Tensor | None:
    """Return the tiles of pictures, uint8 [B, V, S, S, C]; ``None`` where Pillow would scale them otherwise."""
    if not pillow_is_known():
        logger.debug("Images are scaled on the host: Pillow scales them otherwise than its releases known here.")
        return None
    counts, side = pictures.counts, pictures.side
    with torch.inference_mode(False):
        out = torch.empty(len(counts), max(counts), side, side, 3, dtype=torch.uint8, device=device)
        for row, sample in zip(out, pictures.samples, strict=True):
            start = 0
            for source, grid in sample:
                pixels = upload(source, device)
                whole, local = row[start : start + 1], row[start + 1 : start + grid.views]
                write_view(pixels, TileGrid(1, 1), pictures.color, whole)
                if grid == (1, 1):
                    local.copy_(whole)
                else:
                    write_view(pixels, grid, pictures.color, local)
                start += grid.views
            row[start:] = 0
    return out


def warm_up(side: int, device: torch.device) -> None:
    """Compile what scales images to tiles of a side."""
    picture = upload(np.zeros((side, 2 * side + 1, 3), np.uint8), device)
    tiles_VSSC = torch.empty(2, side, side, 3, dtype=torch.uint8, device=device)
    write_view(picture, TileGrid(2, 1), (127, 127, 127), tiles_VSSC)
