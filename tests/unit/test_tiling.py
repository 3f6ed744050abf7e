"""Tiling geometry: which resolution, how many tiles, how many tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from support import CHECKPOINTS, pad_as_pillow_13

from deepseek_vl2.models.processing_deepseek_vl_v2 import select_best_resolution as exported
from deepseek_vl2.models.tiling import (
    TileGrid,
    count_global_tokens,
    count_image_tokens,
    count_local_tokens,
    fitted_size,
    select_best_resolution,
    tile_grid,
    tokens_per_side,
)
from deepseek_vl2.models.views import write_view

RESOLUTIONS = [tuple(pair) for pair in CHECKPOINTS.RESOLUTIONS]


@pytest.mark.parametrize(
    ("grid", "tokens"), [((1, 1), 421), ((3, 2), 1415), ((3, 3), 2017), ((2, 1), 617), ((9, 1), 1989)]
)
def test_an_images_tokens_are_counted(grid: tuple[int, int], tokens: int) -> None:
    assert count_image_tokens(TileGrid(*grid), 14) == tokens


@pytest.mark.parametrize("side", [1, 3, 14])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 1)])
def test_the_count_is_that_of_a_layout_written_out(grid: tuple[int, int], side: int) -> None:
    across, down = grid
    view = ["token"] * side + ["newline"]
    row = ["token"] * (across * side) + ["newline"]
    assert count_global_tokens(side) == len(view * side)
    assert count_local_tokens(TileGrid(*grid), side) == len(row * (down * side))
    assert count_image_tokens(TileGrid(*grid), side) == len([*view * side, "separator", *row * (down * side)])


@pytest.mark.parametrize(
    ("tile", "patch", "ratio", "side"),
    [(384, 14, 2, 14), (384, 16, 2, 12), (384, 14, 1, 27), (384, 14, 3, 9), (224, 14, 2, 8)],
)
def test_tokens_along_a_tile(tile: int, patch: int, ratio: int, side: int) -> None:
    assert tokens_per_side(tile, patch, ratio) == side


@pytest.mark.parametrize(("resolution", "grid"), [((384, 384), (1, 1)), ((1152, 768), (3, 2)), ((384, 3456), (1, 9))])
def test_a_resolution_is_a_grid_of_tiles(resolution: tuple[int, int], grid: tuple[int, int]) -> None:
    assert tile_grid(resolution, 384) == grid
    assert tile_grid(resolution, 384).views == 1 + grid[0] * grid[1]


@pytest.mark.parametrize("resolution", [(400, 384), (384, 400), (0, 384), (384, 0), (-384, 384), (192, 384)])
def test_a_resolution_that_is_not_whole_tiles_is_an_error(resolution: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{resolution[0]}x{resolution[1]}"):
        tile_grid(resolution, 384)


# ---------------------------------------------------------------- the best resolution


def brute_force(size: tuple[int, int], candidates: list[tuple[int, int]]) -> tuple[int, int]:
    """Choose by the rule, written as it is stated: largest effective, then smallest wasted, first come first."""
    ranked = []
    for order, (width, height) in enumerate(candidates):
        scale = min(width / size[0], height / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        ranked.append((-effective, width * height - effective, order, (width, height)))
    return min(ranked)[-1]


def sizes() -> list[tuple[int, int]]:
    chosen = random.Random(0)
    small = [(w, h) for w in range(1, 60, 7) for h in range(1, 60, 7)]
    large = [(chosen.randint(1, 6000), chosen.randint(1, 6000)) for _ in range(1500)]
    edges = [(384 * a + i, 384 * b + j) for a in (1, 2, 3) for b in (1, 2, 3) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return small + large + edges


def test_the_best_resolution_is_what_the_rule_says() -> None:
    for size in sizes():
        assert select_best_resolution(size, RESOLUTIONS) == brute_force(size, RESOLUTIONS), size


def test_the_order_of_candidates_breaks_ties() -> None:
    shuffled = list(RESOLUTIONS)
    random.Random(1).shuffle(shuffled)
    for size in sizes()[:600]:
        assert select_best_resolution(size, shuffled) == brute_force(size, shuffled), size
    assert select_best_resolution((100, 100), [(384, 768), (768, 384)]) == (384, 768)
    assert select_best_resolution((100, 100), [(768, 384), (384, 768)]) == (768, 384)


def test_a_small_image_takes_the_resolution_that_wastes_least() -> None:
    assert select_best_resolution((100, 100), RESOLUTIONS) == (384, 384)
    assert select_best_resolution((100, 100), [(768, 768), (384, 384)]) == (384, 384)


@pytest.mark.parametrize(
    ("size", "best"),
    [((800, 600), (1152, 768)), ((384, 384), (384, 384)), ((1152, 1152), (1152, 1152)), ((385, 384), (768, 384))],
)
def test_known_choices(size: tuple[int, int], best: tuple[int, int]) -> None:
    assert brute_force(size, RESOLUTIONS) == best == select_best_resolution(size, RESOLUTIONS)


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (1, 384), (5000, 2), (7, 3456)])
def test_extreme_aspect_ratios_have_a_resolution(size: tuple[int, int]) -> None:
    assert select_best_resolution(size, RESOLUTIONS) == brute_force(size, RESOLUTIONS)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0), (-1, 5)])
def test_an_image_without_area_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        select_best_resolution(size, RESOLUTIONS)


def test_no_candidates_are_an_error() -> None:
    with pytest.raises(ValueError, match="candidate_resolutions"):
        select_best_resolution((5, 5), [])


def test_the_function_has_its_original_import_path() -> None:
    assert exported is select_best_resolution


# ---------------------------------------------------------------- padding and cutting

GRAY = (127, 127, 127)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    data = random.Random(width * 7919 + height).randbytes(width * height * 3)
    return Image.frombytes("RGB", (width, height), data).convert(mode)


def tiles_of(image: Image.Image, grid: TileGrid, side: int) -> NDArray[np.uint8]:
    tiles = np.zeros((grid.across * grid.down, side, side, 3), dtype=np.uint8)
    write_view(image, grid, GRAY, tiles)
    return tiles


def pad_sizes() -> list[tuple[int, int]]:
    chosen = random.Random(2)
    fixed = [(1, 1), (384, 384), (383, 384), (385, 384), (768, 384), (2, 1), (1, 2), (640, 480), (481, 641), (37, 900)]
    return fixed + [(chosen.randint(1, 700), chosen.randint(1, 700)) for _ in range(25)]


@pytest.mark.parametrize("grid", [TileGrid(1, 1), TileGrid(2, 1), TileGrid(1, 3), TileGrid(3, 2)])
def test_views_equal_pillows_padding_and_cutting(grid: TileGrid) -> None:
    box = (grid.across * 384, grid.down * 384)
    for size in pad_sizes():
        fits = min(box[0] / size[0], box[1] / size[1])
        if round(size[0] * fits) < 1 or round(size[1] * fits) < 1:
            continue  # Pillow cannot: see below
        image = noise(*size)
        field = pad_as_pillow_13(image, box, GRAY)
        corners = [(x * 384, y * 384) for y in range(grid.down) for x in range(grid.across)]
        want = np.stack([np.asarray(field.crop((x, y, x + 384, y + 384))) for x, y in corners])
        assert np.array_equal(tiles_of(image, grid, 384), want), size


def test_the_field_may_have_a_colour() -> None:
    tiles = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    write_view(noise(8, 8), TileGrid(2, 1), (0, 122, 255), tiles)
    want = np.asarray(ImageOps.pad(noise(8, 8), (16, 8), color=(0, 122, 255)))
    assert np.array_equal(np.concatenate(list(tiles), axis=1), want)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 4001)])
def test_an_image_too_thin_for_pillow_keeps_one_pixel(size: tuple[int, int]) -> None:
    shown = (tiles_of(noise(*size), TileGrid(1, 1), 384)[0] != GRAY).any(-1)
    lines = (shown.any(0).sum(), shown.any(1).sum())
    assert min(lines) == 1 and max(lines) > 300


def test_a_side_is_at_least_one_pixel_and_never_beyond_the_box() -> None:
    for size in [(w, h) for w in (1, 3, 383, 9000) for h in (1, 2, 385, 9000)]:
        width, height = fitted_size(size, (384, 768))
        assert 1 <= width <= 384 and 1 <= height <= 768
        assert width == 384 or height == 768


def test_tiles_are_cut_row_by_row() -> None:
    image = Image.new("RGB", (6, 4))
    for y in range(4):
        for x in range(6):
            image.putpixel((x, y), (x // 2 + 3 * (y // 2), 0, 0))
    for index, tile in enumerate(tiles_of(image, TileGrid(3, 2), 2)):
        assert (tile == (index, 0, 0)).all()
