"""Where the embeddings of images stand among those of the text, and whether ids, mask and images belong together.

Shape suffixes: H width of the language model, N images of one grid, V tiles of all images, L image tokens of a tile, W
image tokens along a tile's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .generate_inputs import check_image_numbers
from .tiling import TileGrid, count_image_tokens


def real_grids(crops: list[list[list[int]]]) -> list[list[TileGrid]]:
    """Return the tile grids of each row of a batch; a row of ``images_spatial_crop`` ends at its first [0, 0]."""
    rows = []
    for row in crops:
        grids = []
        for across, down in row:
            if across == 0 or down == 0:
                break
            grids.append(TileGrid(across, down))
        rows.append(grids)
    return rows


def arrange_images(
    views_NVLH: torch.Tensor,
    grid: TileGrid,
    newline_H: torch.Tensor,
    separator_H: torch.Tensor,
    global_first: bool,
) -> torch.Tensor:
    """Lay the views of N images of one grid out as the sequences that the language model reads.

    Args:
        views_NVLH: of each image the global view and then the local tiles, row by row.
        grid: how many tiles there are.
        newline_H: embedding that ends each row of tokens.
        separator_H: embedding between the global view and the tiles.
        global_first: whether the global view comes first.

    Returns:
        [N, tokens of an image, H].
    """
    images, side = views_NVLH.shape[0], int(views_NVLH.shape[2] ** 0.5)
    global_NWWH = views_NVLH[:, 0].unflatten(1, (side, side))
    tiles = views_NVLH[:, 1:].unflatten(2, (side, side)).unflatten(1, (grid.down, grid.across))
    local = tiles.transpose(2, 3).reshape(images, grid.down * side, grid.across * side, -1)

    def end_rows(rows: torch.Tensor) -> torch.Tensor:
        newlines = newline_H.expand(*rows.shape[:2], 1, -1)
        return torch.cat((rows, newlines), dim=2).flatten(1, 2)

    parts = [end_rows(global_NWWH), separator_H.expand(images, 1, -1), end_rows(local)]
    return torch.cat(parts if global_first else parts[::-1], dim=1)


class ImageLayout(NamedTuple):
    """Where the embeddings of images stand among the image tokens, all counted from 0; numpy's, for the host alone.

    Fields:
        views: of each token of each view, in the views' order.
        newlines: of each `image_newline`.
        separators: of each `view_seperator`.
    """

    views: NDArray[np.int64]
    newlines: NDArray[np.int64]
    separators: NDArray[np.int64]


@lru_cache(maxsize=256)
def layout_of_image(grid: TileGrid, tokens: int, global_first: bool) -> ImageLayout:
    """Return the layout of a single image, whose views are of ``tokens`` tokens each.

    It is what `arrange_images` does to numbers, so there is one definition of the order.
    """
    numbers = torch.arange(grid.views * tokens, device="cpu").view(1, grid.views, tokens, 1)
    newline, separator = numbers.new_full((1,), -1), numbers.new_full((1,), -2)
    arranged = arrange_images(numbers, grid, newline, separator, global_first).flatten().numpy()
    order = arranged.argsort(kind="stable")  # the one separator's -2, all newlines' -1, then the views' tokens
    separators, newlines, views = np.split(order, [1, len(order) - numbers.numel()])
    return ImageLayout(views, newlines, separators)


def layout_of_images(grids: Sequence[TileGrid], tokens: int, global_first: bool) -> ImageLayout:
    """Return the layout of several images, one after the other."""
    parts: list[ImageLayout] = []
    start = 0
    for grid in grids:
        layout = layout_of_image(grid, tokens, global_first)
        parts.append(ImageLayout(*(places + start for places in layout)))
        start += sum(len(places) for places in layout)
    return ImageLayout(*(np.concatenate(places) for places in zip(*parts, strict=True)))


def check_image_shapes(
    input_ids: torch.Tensor, images: torch.Tensor, images_seq_mask: torch.Tensor | None, tile_size: int
) -> None:
    """Raise ``ValueError`` where ids, mask and images cannot belong together by their shapes."""
    if images_seq_mask is None:
        raise ValueError("images need images_seq_mask: the processor returns it beside input_ids.")
    if images_seq_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids {list(input_ids.shape)} and images_seq_mask {list(images_seq_mask.shape)} differ in shape."
        )
    if images.dim() != 5 or images.shape[0] != len(input_ids) or tuple(images.shape[2:]) != (3, tile_size, tile_size):
        raise ValueError(
            f"images must be [batch, tiles, 3, {tile_size}, {tile_size}] with a batch of {input_ids.shape[0]}, "
            f"got {list(images.shape)}."
        )


def check_image_tokens(marked: list[int], consistent: bool, grids: list[list[TileGrid]], side: int, tiles: int) -> None:
    """Check that ids, mask and images describe the same images.

    Args:
        marked: how many tokens the mask marks in each row.
        consistent: whether all marked tokens are one id, which stands nowhere else.
        grids: the images of each row.
        side: tokens along a tile's side.
        tiles: tiles that a row holds.

    Raises:
        ValueError: they do not; the row and both numbers are named.
    """
    if len(grids) != len(marked):
        raise ValueError(f"images_spatial_crop has {len(grids)} rows, input_ids {len(marked)}.")
    for row, row_grids in enumerate(grids):
        expected = sum(count_image_tokens(grid, side) for grid in row_grids)
        if marked[row] != expected:
            raise ValueError(
                f"Row {row}: images_seq_mask marks {marked[row]} tokens, but its {len(row_grids)} images "
                f"(images_spatial_crop) take {expected}."
            )
        needed = sum(grid.views for grid in row_grids)
        if needed > tiles:
            raise ValueError(f"Row {row}: images_spatial_crop asks for {needed} tiles, images holds {tiles}.")
    if not consistent:
        raise ValueError("input_ids and images_seq_mask disagree: image tokens stand where the mask is false, or not.")


def read_image_mask(
    input_ids: torch.Tensor, images_seq_mask: torch.Tensor, image_token_id: int | None
) -> tuple[list[int], bool]:
    """Return how many tokens the mask marks in each row, and whether they are the image id and it stands nowhere else.

    Where the id is not known, it is the one that the mask marks. All numbers come from the device at once: each
    transfer on its own would wait for the device again.
    """
    mask = images_seq_mask.bool()
    image_id: torch.Tensor | int | None = image_token_id
    if image_id is None:
        image_id = input_ids.masked_fill(~mask, torch.iinfo(input_ids.dtype).max).amin()
    consistent = ((input_ids == image_id) == mask).all()
    *marked, agrees = torch.cat((mask.sum(dim=1), consistent[None])).tolist()
    return marked, bool(agrees)


def count_prompt_image_tokens(
    input_ids: torch.Tensor, images_seq_mask: torch.Tensor | None, image_token_id: int | None
) -> int:
    """Return how many image tokens a prompt has, by its ids or its mask, whichever knows of more; 0 where none can."""
    if input_ids.device.type == "meta" or torch.compiler.is_compiling():
        return 0  # there are no numbers to look at
    counts = [] if images_seq_mask is None else [images_seq_mask.bool().sum().to(input_ids.device)]
    if image_token_id is not None:
        counts.append((input_ids == image_token_id).sum())
    return int(torch.stack(counts).amax()) if counts else 0


def _listed(names: list[str]) -> str:
    return " and ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def check_image_inputs(
    input_ids: torch.Tensor,
    images: torch.Tensor | None,
    images_seq_mask: torch.Tensor | None,
    images_spatial_crop: torch.Tensor | None,
    image_token_id: int | None,
) -> None:
    """Check that a prompt with image tokens comes with all that describes its images.

    Args:
        input_ids: [B, T]; without those whose images a cache holds.
        image_token_id: id of the image tokens, where it is known.
        others: see ``DeepseekVLV2ForCausalLM.prepare_inputs_embeds``.

    Raises:
        ValueError: a part of the three is missing, or all, or one is of another kind; it is named.
    """
    check_image_numbers(images, images_seq_mask, images_spatial_crop)
    given = {
        "images": images,
        "images_seq_mask": images_seq_mask,
        "images_spatial_crop": images_spatial_crop,
    }
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        return
    tokens = count_prompt_image_tokens(input_ids, images_seq_mask, image_token_id)
    if tokens:
        found = f"The prompt has {tokens} image tokens"
    elif images is not None and images_spatial_crop is None:
        found = "images were given"
    elif images is None and images_spatial_crop is not None and bool(images_spatial_crop.any()):
        found = "images_spatial_crop was given"
    else:
        return
    raise ValueError(
        f"{found}, but {_listed(missing)} {'are' if len(missing) > 1 else 'is'} missing: pass images, "
        "images_seq_mask and images_spatial_crop together, as the processor returns them."
    )


def check_no_images(given: dict[str, Any], *standard: Any) -> None:
    """Raise ``ValueError`` for images without a prompt that shows them."""
    crops = given.get("images_spatial_crop")
    shown = given.get("images") is not None and (crops is None or bool(crops.any()))
    if shown or any(value is not None for value in standard):
        raise ValueError(
            "images were given without input_ids: pass all that the processor returns, generate(**inputs)."
        )


def check_no_image_tokens(
    input_ids: torch.Tensor, images_seq_mask: torch.Tensor | None, image_token_id: int | None
) -> None:
    """Raise ``ValueError`` for a prompt with image tokens where there are no images."""
    tokens = count_prompt_image_tokens(input_ids, images_seq_mask, image_token_id)
    if tokens:
        raise ValueError(f"The prompt has {tokens} image tokens, but there are no images (images_spatial_crop).")


def select_tiles(images: torch.Tensor, grids: list[list[TileGrid]]) -> torch.Tensor:
    """Return the tiles of a batch, [V, 3, S, S], without those that fill up its rows."""
    used = [sum(grid.views for grid in row_grids) for row_grids in grids]
    if len(grids) == 1:
        return images[0, : used[0]]
    first = range(0, len(grids) * images.shape[1], images.shape[1])
    numbers = np.concatenate([np.arange(start, start + n) for start, n in zip(first, used, strict=True)])
    return images.flatten(0, 1).index_select(0, torch.from_numpy(numbers).to(images.device))
