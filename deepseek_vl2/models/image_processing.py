"""From image sources to RGB images, and from those to the tiles that the vision tower reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .image_loading import check_image_size, read_image, to_rgb
from .image_modes import WHITE, Background
from .tiling import TileGrid
from .views import ByteTiles, Picture, Pictures, are_kept, map_in_threads


class ImageTransform:
    """Turn RGB images into normalised tensors: value / 255, minus ``mean``, over ``std``.

    Args:
        mean: mean of each channel, 0 to 1.
        std: standard deviation of each channel.
        normalize: when false, only divide by 255.
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
    ) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.normalize = normalize

    @property
    def background(self) -> tuple[int, ...]:
        """Colour, 0 to 255, that pads an image to its resolution."""
        return tuple(int(value * 255) for value in self.mean)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return one RGB image as a float tensor of shape [3, H, W]."""
        return self.batch([image])[0]

    def batch(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return RGB images of one size as a float tensor of shape [N, 3, H, W]."""
        # A table of 256 values, channel by channel: the same bits as arithmetic on each pixel.
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return ByteTiles(pixels, self.values_of_bytes(), (len(images),)).numbers()

    def values_of_bytes(self) -> torch.Tensor:
        """Return what each byte of each channel becomes, [3, 256]."""
        values = torch.arange(256, dtype=torch.float32).repeat(3, 1).div_(255)
        if self.normalize:
            values.sub_(torch.tensor(self.mean)[:, None]).div_(torch.tensor(self.std)[:, None])
        return values


def load_images(
    images: Iterable[Any] | None, max_pixels: int | None = None, background: Background = WHITE
) -> list[Image.Image]:
    """Read images, as `read_image` does; those that are PIL images already are turned upright and converted alone."""
    limit: dict[str, int] = {} if max_pixels is None else {"max_pixels": max_pixels}
    sources = list(images or [])
    if not any(isinstance(source, Image.Image) for source in sources):
        return map_in_threads(lambda source: read_image(source, background=background, **limit), sources)
    # A PIL image may stand in several places, and is not to be decoded in two threads at once.
    loaded = []
    for index, source in enumerate(sources):
        if isinstance(source, Image.Image):
            check_image_size(source, f"Image {index + 1}", **limit)
            loaded.append(to_rgb(source, f"Image {index + 1}", background))
        else:
            loaded.append(read_image(source, background=background, **limit))
    return loaded


def make_tiles(
    images: Sequence[Image.Image], grids: Sequence[TileGrid], side: int, transform: ImageTransform
) -> ByteTiles | Pictures:
    """Return each image's global view followed by its local tiles; one tile of zeros where there is no image."""
    values = transform.values_of_bytes()
    if not images:
        return ByteTiles(torch.zeros(1, side, side, 3, dtype=torch.uint8), values, (0,))
    kept = are_kept(images)
    sources: Sequence[Any] = [np.asarray(image) for image in images] if kept else images
    views = tuple(Picture(source, grid) for source, grid in zip(sources, grids, strict=True))
    pictures = Pictures((views,), side, transform.background, values)
    return pictures if kept else pictures.tiles()
