"""From what the processor returned to the prompt that the engine takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from ..models.batch import HELD, OutputWithTiles
from ..models.image_merge import check_image_inputs, check_image_tokens, read_image_mask, real_grids
from ..models.tiling import TileGrid
from ..models.views import ByteTiles, Pictures
from .request import Prompt, PromptImages

NAMES = ("input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop")


def content_key(kind: str, shape: Sequence[int], data: Any) -> bytes:
    """Return what stands for some pixels: a hash of them and of how they lie."""
    # Processors have instructions for this one: with them it takes a third of BLAKE2's time.
    digest = sha256(f"{kind} {tuple(shape)} ".encode())
    digest.update(data)
    return digest.digest()


def image_keys(images: Any, grids: Sequence[TileGrid]) -> list[bytes] | None:
    """Return a key of each image's content, or ``None`` where reading it would wait for a device.

    Args:
        images: of one sample: tiles, [V, 3, S, S], or what stands for them, see `models.views`.
        grids: tiles of each image.
    """
    if isinstance(images, Pictures):
        pixels = [np.ascontiguousarray(picture.pixels) for picture in images.samples[0]]
        return [content_key("pixels", each.shape, each.data) for each in pixels]
    tiles = images.bytes if isinstance(images, ByteTiles) else images
    if tiles.device.type != "cpu":
        return None
    tiles = tiles[0] if tiles.dim() == 5 else tiles
    parts = tiles[: sum(grid.views for grid in grids)].contiguous().split([grid.views for grid in grids])
    return [content_key(str(part.dtype), part.shape, part.view(torch.uint8).numpy().data) for part in parts]


def tiles_on_device(images: Any) -> Callable[[torch.device], torch.Tensor]:
    """Return what brings a sample's tiles, [V, 3, S, S], to a device: images that wait are scaled there."""

    def read(device: torch.device) -> torch.Tensor:
        moved = images.to(device)
        tiles: torch.Tensor = moved.numbers() if isinstance(moved, HELD) else moved
        return tiles[0] if tiles.dim() == 5 else tiles

    return read


def prompt_of(model: Any, inputs: Mapping[str, Any], shared: bool = True, keys: list[bytes] | None = None) -> Prompt:
    """Return the prompt of one conversation.

    Args:
        model: the whole model.
        inputs: what the processor returned: a sample, or a batch of one. Images that nobody has read yet stay as they
            are, and go to the device when the prompt is read.
        shared: see `Prompt`.
        keys: of each image, what stands for its content, where the caller knows; by default a hash of its pixels.

    Raises:
        ValueError: ids, mask and images disagree, or a part of them is missing.
    """
    held: Mapping[str, Any] = inputs.held() if isinstance(inputs, OutputWithTiles) else inputs
    ids, mask, images, marked, crops = (held.get(name) for name in NAMES)
    assert isinstance(ids, torch.Tensor)
    if ids.dim() == 1:  # a sample
        ids, mask = ids[None], None
        marked, crops = (None if part is None else part[None] for part in (marked, crops))
    image_id = model.config.image_token_id
    check_image_inputs(ids, images, marked, crops, image_id)
    row, real = ids[0].cpu(), slice(None) if mask is None else mask[0].bool().cpu()
    grids = [] if images is None or crops is None else real_grids(crops.tolist())[0]
    if marked is None or images is None:
        return Prompt(row[real].tolist(), shared=shared)
    if not grids:
        check_image_tokens(marked.sum(dim=1).tolist(), True, [[]], model.image_token_side, 0)
        return Prompt(row[real].tolist(), shared=shared)
    marks, consistent = read_image_mask(ids, marked.to(ids.device), image_id)
    tiles = max(images.counts) if isinstance(images, HELD) else images.shape[-4]
    check_image_tokens(marks, consistent, [grids], model.image_token_side, tiles)
    keys = image_keys(images, grids) if keys is None else keys
    seen = PromptImages(model, grids, marked[0].bool().cpu()[real], tiles_on_device(images), keys)
    return Prompt(row[real].tolist(), seen, shared=shared)
