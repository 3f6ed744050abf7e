"""Geometry of dynamic tiling: which resolution an image is fitted into, and how many tokens it becomes.

Everything here is integer arithmetic on widths and heights in pixels; this is the only place that counts image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Size = tuple[int, int]

# Of one image; the released lists stop at 9. More tokens than any release has positions come of more, and a tile of 384
# pixels is 0.4 MB: a slip in a list would end in a lack of memory.
MAX_TILES = 1_000

# From this many images in a conversation on, no image is cut into tiles.
MAX_TILED_IMAGES = 2


class TileGrid(NamedTuple):
    """How many tiles an image is cut into."""

    across: int
    down: int

    @property
    def views(self) -> int:
        """Number of tile-sized pictures: the global view and the local tiles."""
        return 1 + self.across * self.down


def select_best_resolution(image_size: Size, candidate_resolutions: Sequence[Sequence[int]]) -> Size:
    """Return the candidate (width, height) that keeps most of an image.

    The image is scaled to fit each candidate. The candidate with the largest effective area (the fitted area, but no
    more than the original's) wins; among equals, the one that wastes the least; then the first.

    Args:
        image_size: (width, height) of the image, in pixels.
        candidate_resolutions: (width, height) pairs, in pixels, in order of preference.

    Raises:
        ValueError: there are no candidates, or the image has no area.

    Source: section 3.1 of the DeepSeek-VL2 paper; ``select_best_resolution`` of the original package.
    """
    image_width, image_height = image_size
    if image_width <= 0 or image_height <= 0:
        raise ValueError(f"An image of {image_width}x{image_height} pixels has nothing to show.")
    if not candidate_resolutions:
        raise ValueError("candidate_resolutions is empty: give at least one (width, height).")
    best: Size = (0, 0)
    best_rank = (-1, 0.0)
    for width, height in candidate_resolutions:
        scale = min(width / image_width, height / image_height)
        fitted_area = int(image_width * scale) * int(image_height * scale)
        effective = min(fitted_area, image_width * image_height)
        rank = (effective, -float(width * height - effective))
        if rank > best_rank:
            best, best_rank = (width, height), rank
    return best


def check_tiles(resolution: Size, tile_size: int) -> None:
    """Raise ``ValueError`` for a resolution of more than `MAX_TILES` tiles of side ``tile_size``."""
    width, height = resolution
    tiles = -(-width // tile_size) * -(-height // tile_size)
    if tiles > MAX_TILES:
        raise ValueError(
            f"Resolution {width}x{height} is {tiles:,} tiles of {tile_size}x{tile_size}: an image is cut into "
            f"{MAX_TILES:,} at most."
        )


def tile_grid(resolution: Size, tile_size: int) -> TileGrid:
    """Return how many square tiles of side ``tile_size`` a resolution holds.

    Raises:
        ValueError: the resolution is not a whole number of tiles, or of too many.
    """
    width, height = resolution
    check_tiles(resolution, tile_size)
    if width < tile_size or height < tile_size or width % tile_size or height % tile_size:
        raise ValueError(f"Resolution {width}x{height} is not a whole number of {tile_size}x{tile_size} tiles.")
    return TileGrid(width // tile_size, height // tile_size)


def is_height_first(image_size: Size, size: Size) -> bool:
    """Whether the height is scaled before the width, to whole numbers in between; sizes are (width, height).

    Pillow does so from release 13 on, with which the original's tiles were recorded, and never before.
    """
    shrinks = image_size[1] - size[1]
    return shrinks > 0 and shrinks > 2 * (image_size[0] - size[0])


def fitted_size(image_size: Size, box: Size) -> Size:
    """Return the (width, height) of an image scaled, with its aspect ratio kept, to just fit into ``box``.

    A side is at least one pixel, however long and thin the image.
    """
    (image_width, image_height), (width, height) = image_size, box
    if image_width / image_height > width / height:
        return width, min(height, max(1, round(image_height / image_width * width)))
    if image_width / image_height < width / height:
        return min(width, max(1, round(image_width / image_height * height))), height
    return width, height


def tokens_per_side(tile_size: int, patch_size: int, downsample_ratio: int) -> int:
    """Return how many tokens span one side of a tile."""
    return math.ceil((tile_size // patch_size) / downsample_ratio)


def count_global_tokens(side: int) -> int:
    """Return the tokens of the global view, a newline token after each row included."""
    return side * (side + 1)


def count_local_tokens(grid: TileGrid, side: int) -> int:
    """Return the tokens of the tiles stitched into one grid, a newline token after each row included."""
    return (grid.down * side) * (grid.across * side + 1)


def count_image_tokens(grid: TileGrid, side: int) -> int:
    """Return all tokens of an image: global view, separator and tiles.

    With 14 tokens a side: 421 for 1x1, 1415 for 3 across and 2 down, 2017 for 3x3.
    """
    return count_global_tokens(side) + 1 + count_local_tokens(grid, side)
