"""Images under transformers' names: one row of ``pixel_values`` for each image, and what its tiles cover.

Shape suffixes: B batch, T sequence, N images of the whole batch, V tiles of the largest of them, S side of a tile in
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .generate_inputs import describe
from .tiling import TileGrid, count_image_tokens

# Trainers know this beginning, and say that their limit of tokens cuts images.
MISMATCH = "Image features and image tokens do not match"


class ImageInputs(NamedTuple):
    """The images of a batch under the original's names; see ``DeepseekVLV2ForCausalLM.prepare_inputs_embeds``."""

    images: torch.Tensor | None = None
    images_seq_mask: torch.Tensor | None = None
    images_spatial_crop: torch.Tensor | None = None


def sizes_of_grids(grids: Sequence[Sequence[int]], tile_size: int) -> torch.Tensor:
    """Return ``image_sizes``, [N, 2]: height and width, in pixels, of what each image's local tiles cover."""
    return torch.tensor([(down * tile_size, across * tile_size) for across, down in grids], dtype=torch.long)


def grids_of_sizes(image_sizes: torch.Tensor, tile_size: int) -> list[TileGrid]:
    """Return the tile grids that ``image_sizes`` stand for.

    Raises:
        ValueError: a size that is not of whole tiles.
    """
    grids = []
    for height, width in image_sizes.tolist():
        if height < tile_size or width < tile_size or height % tile_size or width % tile_size:
            raise ValueError(
                f"image_sizes holds [{height}, {width}], and must hold the height and width that an image's tiles of "
                f"{tile_size} pixels cover, as the processor returns them."
            )
        grids.append(TileGrid(width // tile_size, height // tile_size))
    return grids


def images_of_rows(marked: Sequence[int], grids: Sequence[TileGrid], side: int) -> list[int]:
    """Return how many images each row of a batch shows: the next ones, until they take all its image tokens.

    Args:
        marked: image tokens of each row.
        grids: of all images, in order.
        side: tokens along a tile's side.

    Raises:
        ValueError: tokens and images do not come out even; the row is named.
    """
    counts, used = [], 0
    for row, tokens in enumerate(marked):
        first, left = used, tokens
        while left > 0 and used < len(grids):
            left -= count_image_tokens(grids[used], side)
            used += 1
        if left:
            raise ValueError(
                f"{MISMATCH}: row {row} has {tokens} image tokens, and the {used - first} images that are left for it "
                f"(pixel_values) take {tokens - left}."
            )
        counts.append(used - first)
    if used != len(grids):
        raise ValueError(f"{MISMATCH}: the prompts show {used} images, and pixel_values holds {len(grids)}.")
    return counts


def rows_of_images(
    pixel_values: torch.Tensor, grids: Sequence[TileGrid], counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay images out by rows, as the original does.

    Args:
        pixel_values: [N, V, 3, S, S]; an image's tiles, and behind them anything.
        grids: of each image.
        counts: how many images each row shows, B numbers.

    Returns:
        ``images`` [B, tiles, 3, S, S], behind a row's own tiles zeros, and ``images_spatial_crop`` [B, images, 2].
    """
    crops = torch.zeros(len(counts), max(*counts, 1), 2, dtype=torch.long)
    if all(count == 1 for count in counts):
        crops[:, 0] = torch.tensor(grids)
        return pixel_values, crops.to(pixel_values.device)
    most = pixel_values.shape[1]
    places: list[list[int]] = []
    number = 0
    for row, count in enumerate(counts):
        places.append([])
        for index, grid in enumerate(grids[number : number + count]):
            crops[row, index] = torch.tensor(grid)
            first = (number + index) * most
            places[-1] += range(first, first + grid.views)
        number += count
    longest = max(len(row) for row in places)
    table = torch.tensor([row + [0] * (longest - len(row)) for row in places], device=pixel_values.device)
    images = pixel_values.flatten(0, 1).index_select(0, table.flatten()).unflatten(0, table.shape)
    for tiles, own in zip(images, places, strict=True):
        tiles[len(own) :] = 0
    return images, crops.to(pixel_values.device)


def original_inputs(
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    image_sizes: torch.Tensor | None,
    image_token_id: int | None,
    side: int,
    tile_size: int,
) -> ImageInputs:
    """Return images that were given under transformers' names under the original's.

    Args:
        input_ids: [B, T], with the id of the image token at each of an image's tokens.
        pixel_values: tiles, [N, V, 3, S, S], each image's global view first; the images of all rows, in order.
        image_sizes: [N, 2], height and width in pixels that the local tiles cover.
        image_token_id: of the model.
        side: tokens along a tile's side.
        tile_size: side of a tile, in pixels.

    Raises:
        TypeError: one of the two is missing.
        ValueError: a shape is wrong, or tokens and images do not belong together.
    """
    if pixel_values is None or image_sizes is None:
        missing = "pixel_values" if pixel_values is None else "image_sizes"
        raise TypeError(
            f"{missing} is missing: images come as pixel_values and image_sizes together, or as "
            "images, images_seq_mask and images_spatial_crop, as the processor returns them."
        )
    if image_token_id is None:
        raise ValueError("pixel_values needs the id of the image token: set model.config.image_token_id.")
    for name, value in (("pixel_values", pixel_values), ("image_sizes", image_sizes)):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor as the processor returns it, got {describe(value)}.")
    if pixel_values.dim() != 5 or tuple(pixel_values.shape[2:]) != (3, tile_size, tile_size):
        raise ValueError(
            f"pixel_values must be [images, tiles, 3, {tile_size}, {tile_size}], got {list(pixel_values.shape)}."
        )
    if tuple(image_sizes.shape) != (len(pixel_values), 2):
        raise ValueError(f"image_sizes must be [{len(pixel_values)}, 2], got {list(image_sizes.shape)}.")
    mask = input_ids == image_token_id
    grids = grids_of_sizes(image_sizes, tile_size)
    most = max(grid.views for grid in grids)
    if most > pixel_values.shape[1]:
        raise ValueError(f"image_sizes asks for {most} tiles of an image, pixel_values holds {pixel_values.shape[1]}.")
    counts = images_of_rows(mask.sum(dim=1).tolist(), grids, side)
    images, crops = rows_of_images(pixel_values, grids, counts)
    return ImageInputs(images, mask, crops)
