"""From images to the bytes of their tiles, and from bytes to the numbers that the vision tower takes.

Shape suffixes: V tiles, S side of a tile in pixels, C the three channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .backend import backend
from .tiling import Size, TileGrid, fitted_size, is_height_first

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 8
# A larger image is scaled at once: as it is, it would take more memory than its tiles, and longer to the device.
MAX_PIXELS_KEPT = 16_000_000


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Map over items in threads, in order; in the caller's own where PyTorch may use no other.

    Pillow decodes and scales without holding the interpreter's lock. The threads end with the call: those of a pool
    that lives on would be missing in a process forked later. PyTorch has one thread in a loader's worker, where the
    other cores are busy with other workers.
    """
    threads = min(len(items), torch.get_num_threads(), MAX_THREADS)
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def scale_image(image: Image.Image, size: Size) -> Image.Image:
    """Scale an image (bicubic) to (width, height), to the same bits with every release of Pillow.

    One side is scaled after the other, as Pillow does by itself; which comes first is not left to its release.
    """
    width, height = image.size
    between = (width, size[1]) if is_height_first(image.size, size) else (size[0], height)
    for target in (between, size):
        if image.size != target:
            image = image.resize(target, Image.Resampling.BICUBIC)
    return image


def write_view(
    image: Image.Image,
    grid: TileGrid,
    color: tuple[int, ...],
    tiles_VSSC: NDArray[np.uint8],
) -> None:
    """Scale an image (bicubic, aspect ratio kept) to fit a grid of tiles, centre it on ``color``, cut it into tiles.

    The pixels are those of Pillow 13's `ImageOps.pad`, but an image however long and thin keeps at least one.

    Args:
        image: an RGB image, loaded.
        grid: tiles across and down.
        color: what surrounds the image, 0 to 255 for each channel.
        tiles_VSSC: where the tiles are written, row by row, uint8.
    """
    side = tiles_VSSC.shape[1]
    field = (grid.across * side, grid.down * side)
    size = fitted_size(image.size, field)
    pixels = np.asarray(scale_image(image, size))
    height, width = pixels.shape[:2]
    left, top = round((field[0] - width) * 0.5), round((field[1] - height) * 0.5)
    for index, tile in enumerate(tiles_VSSC):
        # The tile's corner, and the stretch of it that the image covers, in pixels of the scaled image.
        x, y = index % grid.across * side - left, index // grid.across * side - top
        x0, x1, y0, y1 = max(x, 0), min(x + side, width), max(y, 0), min(y + side, height)
        if x1 - x0 < side or y1 - y0 < side:
            tile[...] = color[0] if len(set(color)) == 1 else color
        if x0 < x1 and y0 < y1:
            tile[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[y0:y1, x0:x1, :3]


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a small tensor on a device, without waiting for what a GPU has been given to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Picture(NamedTuple):
    """An image before it is scaled, RGB, and the tiles across and down of its local view.

    One that waits is an array of its own, uint8 [H, W, 3]: the caller may change or close theirs.
    """

    pixels: NDArray[np.uint8] | Image.Image
    grid: TileGrid


class Pictures(NamedTuple):
    """Images that become tiles when they are read, or when they go to a device that scales them itself.

    Fields:
        samples: the pictures of each sample.
        side: of a tile, in pixels.
        color: what surrounds an image.
        values: see `ByteTiles`.
        batched: whether the tiles have a dimension for the samples.
    """

    samples: tuple[tuple[Picture, ...], ...]
    side: int
    color: tuple[int, ...]
    values: torch.Tensor
    batched: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tiles each sample has."""
        return tuple(sum(picture.grid.views for picture in sample) for sample in self.samples)

    def like(self, other: Any) -> bool:
        """Whether the tiles of both can stand in one batch."""
        if not isinstance(other, Pictures) or (self.side, self.color) != (other.side, other.color):
            return False
        return self.values is other.values or torch.equal(self.values, other.values)

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Pictures | ByteTiles:
        """Return the tiles on a device, scaled there where the backend can, or here."""
        if device is None or torch.device(device).type == "cpu":
            return self._replace(values=self.values.to(dtype=dtype))
        engine = backend()
        tiles = None if engine is None else engine.scale(self, torch.device(device))
        if tiles is not None:
            values = send(self.values.to(dtype=dtype), tiles.device)
            return ByteTiles(tiles if self.batched else tiles[0], values, self.counts)
        return self.tiles().to(device, dtype, **kwargs)

    def tiles(self) -> ByteTiles:
        """Return the tiles, each image's global view followed by its local ones; behind a sample's own are zeros."""
        counts, side = self.counts, self.side
        tiles_BVSSC = np.empty((len(counts), max(counts), side, side, 3), dtype=np.uint8)
        views: list[tuple[Image.Image, TileGrid, NDArray[np.uint8]]] = []
        twice: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        for row, sample in zip(tiles_BVSSC, self.samples, strict=True):
            start = 0
            for pixels, grid in sample:
                image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
                whole, local = row[start : start + 1], row[start + 1 : start + grid.views]
                views.append((image, TileGrid(1, 1), whole))
                if grid == (1, 1):
                    twice.append((local, whole))
                else:
                    views.append((image, grid, local))
                start += grid.views
            row[start:] = 0
        map_in_threads(lambda view: write_view(view[0], view[1], self.color, view[2]), views)
        for local, whole in twice:
            local[...] = whole
        tiles = torch.from_numpy(tiles_BVSSC)
        return ByteTiles(tiles if self.batched else tiles[0], self.values, counts)

    def numbers(self) -> torch.Tensor:
        """Return the numbers, see `ByteTiles`."""
        return self.tiles().numbers()


def are_kept(images: Sequence[Image.Image]) -> bool:
    """Whether images wait for the device that their tiles go to, instead of being scaled at once.

    Not in a loader's worker: the process that it works for would have the work. Nor without a device that scales.
    """
    if not images or torch.utils.data.get_worker_info() is not None:
        return False
    small = all(image.width * image.height <= MAX_PIXELS_KEPT for image in images)
    engine = backend()
    return small and engine is not None and bool(engine.may_scale())


class ByteTiles(NamedTuple):
    """Tiles as bytes, with the number that each byte of each channel stands for: a quarter of float32, until read.

    Fields:
        bytes: uint8, [V, S, S, 3] for a sample, [B, V, S, S, 3] for a batch.
        values: [3, 256], in the dtype of the numbers. Casting them is casting the tiles, so bits do not depend on when.
        counts: for each sample how many tiles are real; behind them are zeros.
    """

    bytes: torch.Tensor
    values: torch.Tensor
    counts: tuple[int, ...]

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> ByteTiles:
        """Return the tiles on another device, as bytes still, and their numbers in another dtype."""
        return self._replace(
            bytes=self.bytes.to(device=device, **kwargs), values=self.values.to(device=device, dtype=dtype, **kwargs)
        )

    def numbers(self) -> torch.Tensor:
        """Return the numbers, [V, 3, S, S] or [B, V, 3, S, S], made on the device where the bytes are."""
        with torch.inference_mode(False):  # who reads them first must not decide what they can be used for
            *rows, height, width, _ = self.bytes.shape
            shape = (*rows, len(self.values), height, width)
            out = torch.empty(shape, dtype=self.values.dtype, device=self.bytes.device)
            bytes_VSSC, out_VCSS = self.bytes.flatten(0, -4), out.flatten(0, -4)
            # A CPU takes one tile after the other, which stays in its cache; a GPU takes few operations.
            step = 1 if out.device.type == "cpu" else max(len(out_VCSS), 1)
            for source, target in zip(bytes_VSSC.split(step), out_VCSS.split(step), strict=True):
                for channel, values in enumerate(self.values):
                    numbers = values.index_select(0, source[..., channel].flatten().int())
                    target[:, channel] = numbers.view(-1, height, width)
            for tiles, count in zip(out if len(rows) > 1 else out[None], self.counts, strict=True):
                tiles[count:] = 0
            return out


def tiles_of_images(tiles: Any, views: Sequence[int]) -> list[Any]:
    """Return a sample's tiles image by image, held as they are.

    Args:
        tiles: of one sample: `ByteTiles`, `Pictures` or a tensor [V, 3, S, S].
        views: how many tiles each image has.
    """
    if isinstance(tiles, Pictures):
        return [tiles._replace(samples=((picture,),)) for picture in tiles.samples[0]]
    if isinstance(tiles, ByteTiles):
        parts = tiles.bytes.split(list(views))
        return [ByteTiles(part, tiles.values, (len(part),)) for part in parts]
    return list(tiles.split(list(views)))


def stack_tiles(samples: Sequence[Any]) -> ByteTiles | Pictures | None:
    """Return the tiles of samples as those of a batch, or None where not all are bytes that stand for the same."""
    first = samples[0]
    if isinstance(first, Pictures) and all(first.like(sample) for sample in samples):
        return first._replace(samples=tuple(row for sample in samples for row in sample.samples), batched=True)
    samples = [sample.tiles() if isinstance(sample, Pictures) else sample for sample in samples]
    first = samples[0]
    for sample in samples:
        if not isinstance(sample, ByteTiles) or sample.bytes.shape[1:] != first.bytes.shape[1:]:
            return None
        if sample.values is not first.values and not torch.equal(sample.values, first.values):
            return None
    if len(samples) == 1:
        return ByteTiles(first.bytes[None], first.values, first.counts)
    most = max(len(sample.bytes) for sample in samples)
    bytes_ = first.bytes.new_zeros((len(samples), most, *first.bytes.shape[1:]))
    for row, sample in zip(bytes_, samples, strict=True):
        row[: len(sample.bytes)] = sample.bytes
    return ByteTiles(bytes_, first.values, tuple(count for sample in samples for count in sample.counts))
