"""A processor's output under transformers' names, tensors alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .batch import BatchCollateOutput, VLChatProcessorOutput, pad_rows
from .standard_images import grids_of_sizes, rows_of_images, sizes_of_grids
from .tiling import TileGrid
from .views import stack_tiles, tiles_of_images


@dataclass
class OriginalFields:
    """What of a batch the original's names need beside its tensors.

    Fields:
        sft_format: the prompts as a person reads them.
        labels: [B, T].
        counts: images of each row.
        image_token_id: at each of an image's tokens.
        tile_size: in pixels.
    """

    sft_format: list[str]
    labels: Any
    counts: list[int]
    image_token_id: int
    tile_size: int


class StandardBatch(BatchCollateOutput):
    """A batch as transformers' processors return it; ``model(**batch)`` and ``model.generate(**batch)`` take it.

    Fields:
        input_ids (LongTensor [B, T]); lists of ids where neither padding nor tensors were asked for.
        attention_mask ([B, T]): int64 where ``return_tensors`` was given, else bool.
        pixel_values (FloatTensor [images, tiles, 3, S, S]): the images of all rows, in order, each image's global view
            first, zeros behind its tiles. Left out where there are no images.
        image_sizes (LongTensor [images, 2]): height and width, in pixels, that each image's local tiles cover.
        assistant_masks (LongTensor [B, T]): 1 at the tokens of answers, where asked for.

    The fields of `BatchCollateOutput` can be read by name, and are made when they are; they are no part of what
    ``**batch`` and ``batch.items()`` hand on.
    """

    def __getitem__(self, item: str) -> Any:
        original = self.__dict__.get("_original")
        if isinstance(item, str) and original is not None and item not in self.held():
            return self._read_original(item, original)
        return super().__getitem__(item)

    def _read_original(self, item: str, original: OriginalFields) -> Any:
        if item in ("labels", "sft_format"):
            return getattr(original, item)
        if item == "seq_lens":
            return [int(sum(row)) for row in self["attention_mask"]]
        if item not in ("images", "images_spatial_crop", "images_seq_mask"):
            raise KeyError(item)
        ids = torch.as_tensor(self["input_ids"])
        if item == "images_seq_mask":
            return ids == original.image_token_id
        if not any(original.counts):
            side = original.tile_size
            shape = (len(ids), 1, 3, side, side) if item == "images" else (len(ids), 1, 2)
            return torch.zeros(shape, dtype=torch.float32 if item == "images" else torch.long, device=ids.device)
        grids = grids_of_sizes(torch.as_tensor(self["image_sizes"]), original.tile_size)
        images, crops = rows_of_images(torch.as_tensor(self["pixel_values"]), grids, original.counts)
        return images if item == "images" else crops

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_original": self.__dict__.get("_original")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.data = state["data"]
        self._original = state.get("_original")

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """Move the tensors, see `OutputWithTiles.to`."""
        moved = super().to(device, dtype, **kwargs)
        original = self.__dict__.get("_original")
        if original is not None and isinstance(original.labels, torch.Tensor) and not isinstance(device, torch.dtype):
            original.labels = original.labels.to(device=device, **kwargs)
        return moved


def collate_standard(
    samples: Sequence[VLChatProcessorOutput],
    pad_id: int,
    ignore_id: int,
    image_token_id: int,
    tile_size: int,
    left: bool = True,
    length: int | None = None,
    dtype: torch.dtype = torch.long,
) -> StandardBatch:
    """Return samples as a batch under transformers' names.

    Args:
        samples: at least one, with ``assistant_mask`` or all without.
        pad_id, ignore_id: id and label of the padding tokens.
        image_token_id: at each of an image's tokens.
        tile_size: in pixels.
        left: whether padding stands on the left.
        length: of all rows, in tokens; ``None``: rows stay as long as they are, as lists.
        dtype: of the attention mask.
    """
    if not samples:
        raise ValueError("There are no samples to batch.")
    fields: dict[str, Any] = {}
    lengths = [len(sample) for sample in samples]

    def rows(name: str, value: int) -> Any:
        tensors = [sample[name] for sample in samples]
        return [row.tolist() for row in tensors] if length is None else pad_rows(tensors, value, left, length)

    fields["input_ids"] = rows("input_ids", pad_id)
    if length is None:
        fields["attention_mask"] = [[1] * count for count in lengths]
    else:
        fields["attention_mask"] = pad_rows([torch.ones(n, dtype=dtype) for n in lengths], 0, left, length)
    if "assistant_mask" in samples[0]:
        fields["assistant_masks"] = rows("assistant_mask", 0)
    counts = [len(sample["num_image_tokens"]) for sample in samples]
    shown = [sample for sample, count in zip(samples, counts, strict=True) if count]
    if shown:
        images, grids = [], []
        for sample in shown:
            own = [TileGrid(*grid) for grid in sample["images_spatial_crop"].tolist()]
            images += tiles_of_images(sample.held()["images"], [grid.views for grid in own])
            grids += own
        stacked = stack_tiles(images)
        fields["pixel_values"] = pad_rows(images, 0) if stacked is None else stacked
        fields["image_sizes"] = sizes_of_grids(grids, tile_size)
    batch = StandardBatch(fields)
    batch._original = OriginalFields(
        [sample["sft_format"] for sample in samples], rows("target_ids", ignore_id), counts, image_token_id, tile_size
    )
    return batch
