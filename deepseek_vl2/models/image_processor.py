"""Images alone, for what asks a processor for its image processor: tiles and sizes under transformers' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

from .batch import OutputWithTiles, pad_rows
from .bundled import locate_bundled
from .call_inputs import as_image_list
from .config_fields import FieldError, check_sizes
from .image_modes import WHITE, Background, check_background
from .image_processing import ImageTransform, load_images, make_tiles
from .standard_images import sizes_of_grids
from .tiling import MAX_TILED_IMAGES, TileGrid, select_best_resolution, tile_grid
from .views import stack_tiles

SETTINGS = ("candidate_resolutions", "image_mean", "image_std", "normalize", "background")


class DeepseekVLV2ImageProcessor(BaseImageProcessor):
    """Turns images into tiles, as `DeepseekVLV2Processor` does.

    Args:
        candidate_resolutions: (width, height) pairs, in pixels; the first one's width is the tile size.
        image_mean, image_std: normalisation of each channel, 0 to 1.
        normalize: whether to normalise at all.
        background: the colour under transparent pixels; ``None`` drops their alpha.
    """

    model_input_names = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        candidate_resolutions: Sequence[Sequence[int]] = ((384, 384),),
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
        background: Background = WHITE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.candidate_resolutions = check_sizes("candidate_resolutions", candidate_resolutions)
        if not self.candidate_resolutions:
            raise FieldError("candidate_resolutions is empty: give at least one (width, height).")
        for resolution in self.candidate_resolutions:
            tile_grid(resolution, self.candidate_resolutions[0][0])
        self.image_mean, self.image_std, self.normalize = tuple(image_mean), tuple(image_std), normalize
        self.background = check_background(background)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load the settings of a checkpoint's processor, or of "nano"'s; arguments as in transformers."""
        source = locate_bundled(pretrained_model_name_or_path)
        settings, _ = ProcessorMixin.get_processor_dict(source, **kwargs)
        return cls(**{name: settings[name] for name in SETTINGS if name in settings})

    def __call__(
        self,
        images: Any,
        return_tensors: str | None = "pt",
        cropping: bool | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return the tiles of images.

        Args:
            images: one, or a list of a conversation's; or a list of such lists. Each as the processor takes it.
            return_tensors: "pt" or "np".
            cropping: cut images into tiles; by default while a conversation has at most two.
            max_pixels: refuse larger images.

        Returns:
            ``pixel_values`` and ``image_sizes``, see `StandardBatch`.

        Raises:
            ValueError: there are no images, or one is bad.
            TypeError: an unknown keyword.
        """
        if kwargs:
            raise TypeError(f"Unknown arguments: {', '.join(kwargs)}.")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be 'pt' or 'np', got {return_tensors!r}.")
        listed = list(as_image_list(images))
        nested = bool(listed) and all(item is None or isinstance(item, (list, tuple)) for item in listed)
        side = self.candidate_resolutions[0][0]
        transform = ImageTransform(self.image_mean, self.image_std, self.normalize)
        tiles: list[Any] = []
        grids: list[TileGrid] = []
        for row in listed if nested else [listed]:
            for image in (loaded := load_images(row, max_pixels, self.background)):
                grid = TileGrid(1, 1)
                if cropping or (cropping is None and len(loaded) <= MAX_TILED_IMAGES):
                    grid = tile_grid(select_best_resolution(image.size, self.candidate_resolutions), side)
                tiles.append(make_tiles([image], [grid], side, transform))
                grids.append(grid)
        if not tiles:
            raise ValueError("There are no images.")
        stacked = stack_tiles(tiles)
        out = OutputWithTiles(
            pixel_values=pad_rows(tiles, 0) if stacked is None else stacked, image_sizes=sizes_of_grids(grids, side)
        )
        if return_tensors == "np":
            return BatchFeature({name: value.numpy() for name, value in out.items() if isinstance(value, torch.Tensor)})
        return out
