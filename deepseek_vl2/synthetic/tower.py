"""What each token of a picture shows, known from the scene, and a model that learns to see it.

The released models start from a tower that was trained before (SigLIP); nano has none to start from. Here the tower and
the projector learn from what the scene says of every token: the thing or sign in it (shape, colour, size, box) and the
letters printed in it. The linear heads that the labels are compared with are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.tiling import TileGrid, fitted_size, select_best_resolution, tile_grid
from deepseek_vl2.models.views import write_view

from .drawing import draw_scene
from .fonts import font_files, load_font
from .samples import HELD_OUT, crowd_scene, easy_scene, mixed_scene, page_scene, words_scene
from .scene import CANDIDATES, TILE, Label, Scene
from .shapes import Box, Point
from .words import COLOURS, SHAPES, SIZES

PATCH = 8
CELL = 2 * PATCH  # side of a token, in pixels of the tile
PATCHES, CELLS = TILE // PATCH, TILE // CELL  # along a side of a tile
COLUMNS = 4  # of a patch, each of which may hold the middle of one letter
LINES, LETTERS = 2, 5  # of a token: lines of text, and letters of a line in it
LEAST_EM = 9.0  # pixels in the tile: letters below are not asked for
LEAST_SHARE = 0.2  # of a token: things that cover less of it are not asked for

IGNORED, NONE = -100, 0
NONE_WEIGHT = 0.1  # of a place where there is nothing, in the loss: there are many
SIGN = 1 + len(SHAPES)
SYMBOLS = " !$%&'+,-./0123456789:;=?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
COLOUR_NAMES, SIZE_NAMES = list(COLOURS), list(SIZES)
# Which pictures are drawn, with their shares.
SCENES = {mixed_scene: 0.35, crowd_scene: 0.1, words_scene: 0.25, page_scene: 0.22, easy_scene: 0.08}


class View(NamedTuple):
    """Where a tile lies: pixel (x, y) of the picture is (x * scale_x + left, y * scale_y + top) of the tile."""

    scale_x: float
    scale_y: float
    left: float
    top: float

    def box(self, box: Box) -> Box:
        """Return a box of the picture in pixels of the tile."""
        left, top, right, bottom = box
        return (
            left * self.scale_x + self.left,
            top * self.scale_y + self.top,
            right * self.scale_x + self.left,
            bottom * self.scale_y + self.top,
        )


class TileLabels(NamedTuple):
    """What a tile shows, all integers but the boxes; `IGNORED` where nothing is asked.

    Fields:
        patches: letters whose middle lies in each column of each patch, [12, 12, COLUMNS], 1 + their place in SYMBOLS.
        letters: letters of each token in reading order, [6, 6, LINES, LETTERS].
        shapes: [6, 6], 1 + place in SHAPES, or `SIGN`.
        colours: [6, 6].
        sizes: [6, 6].
        boxes: box of the thing or sign in tile sides, cut at the tile's borders, [6, 6, 4]; 0 where there is none.
    """

    patches: NDArray[np.int8]
    letters: NDArray[np.int8]
    shapes: NDArray[np.int8]
    colours: NDArray[np.int8]
    sizes: NDArray[np.int8]
    boxes: NDArray[np.float32]


def views_of(size: tuple[int, int]) -> list[View]:
    """Return the views of a picture of (width, height) pixels, in the processor's order: global view, then tiles."""

    def fitted(target: tuple[int, int]) -> View:
        width, height = fitted_size(size, target)
        left, top = round((target[0] - width) * 0.5), round((target[1] - height) * 0.5)
        return View(width / size[0], height / size[1], left, top)

    whole = fitted((TILE, TILE))
    resolution = select_best_resolution(size, CANDIDATES)
    grid = tile_grid(resolution, TILE)
    if grid == (1, 1):
        return [whole]
    cut = fitted(resolution)
    corners = [(i * TILE, j * TILE) for j in range(grid.down) for i in range(grid.across)]
    return [whole, *(View(cut.scale_x, cut.scale_y, cut.left - x, cut.top - y) for x, y in corners)]


def letter_centres(label: Label) -> list[tuple[str, Point]]:
    """Return the letters of a printed text with the middle of each, in pixels of the picture.

    All letters of a line have the same height, that of the line's middle.
    """
    font = load_font(font_files()[label.font], label.em)
    ends = [font.getlength(label.text[:length]) for length in range(len(label.text) + 1)]
    middle = (label.box[1] + label.box[3]) / 2
    return [
        (letter, (label.anchor[0] + (ends[index] + ends[index + 1]) / 2, middle))
        for index, letter in enumerate(label.text)
    ]


def tile_labels(scene: Scene, view: View, centres: Sequence[list[tuple[str, Point]]]) -> TileLabels:
    """Return what one view of a scene shows.

    Args:
        scene: the scene.
        view: one of `views_of` its size.
        centres: `letter_centres` of each of the scene's labels.
    """
    labels = TileLabels(
        np.full((PATCHES, PATCHES, COLUMNS), NONE, dtype=np.int8),
        np.full((CELLS, CELLS, LINES, LETTERS), NONE, dtype=np.int8),
        np.full((CELLS, CELLS), NONE, dtype=np.int8),
        np.full((CELLS, CELLS), IGNORED, dtype=np.int8),
        np.full((CELLS, CELLS), IGNORED, dtype=np.int8),
        np.zeros((CELLS, CELLS, 4), dtype=np.float32),
    )
    _label_things(scene, view, labels)
    for label, letters in zip(scene.labels, centres, strict=True):
        _label_text(label, letters, view, labels)
    return labels


def _label_things(scene: Scene, view: View, labels: TileLabels) -> None:
    things = [
        (1 + SHAPES.index(t.kind.shape), t.kind.colour, SIZE_NAMES.index(t.kind.size), t.box) for t in scene.things
    ]
    things += [(SIGN, sign.plate, IGNORED, sign.box) for sign in scene.labels if sign.plate is not None]
    edges = np.arange(CELLS) * CELL
    most = np.full((CELLS, CELLS), LEAST_SHARE * CELL**2)
    for shape, colour, size, box in things:
        left, top, right, bottom = view.box(box)
        across = (np.minimum(right, edges + CELL) - np.maximum(left, edges)).clip(0)
        down = (np.minimum(bottom, edges + CELL) - np.maximum(top, edges)).clip(0)
        area = down[:, None] * across[None, :]
        # A thing smaller than a token belongs to the one that holds its middle, however little that is.
        x, y = int((left + right) / 2 // CELL), int((top + bottom) / 2 // CELL)
        if 0 <= x < CELLS and 0 <= y < CELLS and area[y, x] > 0:
            area[y, x] += CELL**2
        won = area > most
        most[won] = area[won]
        labels.shapes[won], labels.colours[won], labels.sizes[won] = shape, COLOUR_NAMES.index(colour), size
        labels.boxes[won] = np.array([left, top, right, bottom], dtype=np.float32).clip(0, TILE) / TILE


def _label_text(label: Label, letters: list[tuple[str, Point]], view: View, labels: TileLabels) -> None:
    legible = label.em * view.scale_y >= LEAST_EM
    filled: dict[tuple[int, int, int], int] = {}
    for letter, (x, y) in letters:
        x, y = x * view.scale_x + view.left, y * view.scale_y + view.top
        if not (0 <= x < TILE and 0 <= y < TILE):
            continue
        row, column = int(y // PATCH), int(x // PATCH)
        symbol = 1 + SYMBOLS.index(letter)
        cell = (row // 2, column // 2, row % LINES)
        if not legible:
            labels.patches[row, column] = labels.letters[cell] = IGNORED
            continue
        labels.patches[row, column, int(x % PATCH * COLUMNS // PATCH)] = symbol
        place = filled.get(cell, 0)
        if place < LETTERS:
            labels.letters[cell][place] = symbol
        filled[cell] = place + 1


def labelled_picture(seed: int) -> tuple[Any, list[TileLabels]]:
    """Return the picture of a seed and what its views show."""
    rng = Random(seed)
    scene = rng.choices(list(SCENES), list(SCENES.values()))[0](rng)
    centres = [letter_centres(label) for label in scene.labels]
    return draw_scene(scene, rng), [tile_labels(scene, view, centres) for view in views_of((scene.width, scene.height))]


class LabelledTiles(Dataset):
    """The tiles of the pictures of seeds ``first`` to ``first + length - 1``, with `TileLabels`.

    Items are ``{"tiles": uint8 [V, 96, 96, 3], "patches": [V, ...], ...}``.
    """

    def __init__(self, length: int, first: int, processor: DeepseekVLV2Processor) -> None:
        self.length, self.first = length, first
        self.background = processor.image_transform.background

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """Return the views of one picture."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        image, labels = labelled_picture(self.first + index)
        tiles = np.empty((len(labels), TILE, TILE, 3), dtype=np.uint8)
        write_view(image, TileGrid(1, 1), self.background, tiles[:1])
        if len(labels) > 1:
            resolution = select_best_resolution(image.size, CANDIDATES)
            write_view(image, tile_grid(resolution, TILE), self.background, tiles[1:])
        fields = {name: np.stack([getattr(label, name) for label in labels]) for name in TileLabels._fields}
        return {"tiles": tiles, **fields}


def collate_tiles(samples: Sequence[dict[str, NDArray[Any]]]) -> dict[str, torch.Tensor]:
    """Return the tiles of several pictures in one batch."""
    return {name: torch.from_numpy(np.concatenate([sample[name] for sample in samples])) for name in samples[0]}


def _loss_where_seen(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the weighted cross-entropy in all, over the number of places where there is something to see."""
    seen = (labels > NONE).sum().clamp(min=1)
    weights = torch.ones(logits.shape[-1], device=logits.device)
    weights[NONE] = NONE_WEIGHT
    flat = logits.flatten(0, -2).float()
    return F.cross_entropy(flat, labels.flatten(), weights, ignore_index=IGNORED, reduction="sum") / seen


class SeeingTower(nn.Module):
    """The vision tower and the projector of a model with linear heads that say what each token shows.

    Args:
        model: nano; its tower and its projector are trained in place.
    """

    def __init__(self, model: DeepseekVLV2ForCausalLM) -> None:
        super().__init__()
        self.vision, self.projector = model.vision, model.projector
        width = model.config.vision_config.width
        hidden = model.config.projector_config.n_embed
        symbols = 1 + len(SYMBOLS)
        self.patches = nn.Linear(width, COLUMNS * symbols)
        self.letters = nn.Linear(hidden, LINES * LETTERS * symbols)
        self.shapes = nn.Linear(hidden, 1 + SIGN)
        self.colours = nn.Linear(hidden, len(COLOURS))
        self.sizes = nn.Linear(hidden, len(SIZES))
        self.boxes = nn.Linear(hidden, 4)
        with torch.no_grad():
            # Nearly everywhere there is no letter: start from there.
            self.patches.bias.view(COLUMNS, symbols)[:, NONE] = 6.0
            self.letters.bias.view(LINES * LETTERS, symbols)[:, NONE] = 6.0

    def forward(self, tiles: torch.Tensor, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the losses of each kind of label, their sum as ``loss``, and shares of right answers.

        Args:
            tiles: uint8, [V, 96, 96, 3].
            **labels: the fields of `TileLabels`, [V, ...].
        """
        pixels = (tiles.permute(0, 3, 1, 2).to(self.patches.weight.dtype) / 255 - 0.5) / 0.5
        seen = self.vision(pixels)
        tokens = self.projector(seen)
        symbols = 1 + len(SYMBOLS)
        logits = {
            "patches": self.patches(seen).unflatten(-1, (COLUMNS, symbols)),
            "letters": self.letters(tokens).unflatten(-1, (LINES * LETTERS, symbols)),
            "shapes": self.shapes(tokens),
        }
        out: dict[str, torch.Tensor] = {}
        for name, values in logits.items():
            wanted = labels[name].reshape(values.shape[:-1]).long()
            out[name] = _loss_where_seen(values, wanted)
            there = wanted > NONE
            out[f"{name}_right"] = ((values.argmax(-1) == wanted) & there).sum() / there.sum().clamp(min=1)
        for name, head in (("colours", self.colours), ("sizes", self.sizes)):
            wanted = labels[name].flatten(1).long()
            out[name] = F.cross_entropy(head(tokens).flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)
        there = labels["shapes"].flatten(1) > NONE
        error = (self.boxes(tokens).float() - labels["boxes"].flatten(1, 2)).abs().mean(-1)
        out["boxes"] = (error * there).sum() / there.sum().clamp(min=1)
        weights = {"boxes": 10.0}
        losses = [weights.get(name, 1.0) * out[name] for name in TileLabels._fields]
        return {"loss": torch.stack(losses).sum(), **out}


class TilePool:
    """Tiles and labels of the pictures drawn last, on the training device: each is learned from several times.

    Args:
        size: number of tiles kept.
        device: where.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.fields: dict[str, torch.Tensor] = {}
        self.filled = self.place = 0

    def add(self, batch: dict[str, torch.Tensor]) -> None:
        """Take tiles in, in place of the oldest."""
        number = len(batch["tiles"])
        if not self.fields:
            self.fields = {
                name: torch.empty(self.size, *value.shape[1:], dtype=value.dtype, device=self.device)
                for name, value in batch.items()
            }
        if self.place + number > self.size:
            self.place = 0
        for name, value in batch.items():
            self.fields[name][self.place : self.place + number].copy_(value, non_blocking=True)
        self.place += number
        self.filled = max(self.filled, self.place)

    def sample(self, number: int) -> dict[str, torch.Tensor]:
        """Return random tiles, with repetition."""
        chosen = torch.randint(self.filled, (number,), device=self.device)
        return {name: value[chosen] for name, value in self.fields.items()}


def check_seeds(first: int, length: int) -> None:
    """Raise ValueError where training pictures would be held-out ones."""
    if first < 0 or first + length > HELD_OUT:
        raise ValueError(f"Training seeds lie from 0 to {HELD_OUT - 1}: {first} to {first + length - 1} were asked.")
