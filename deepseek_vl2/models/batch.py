"""What the processor returns: samples, and batches of them padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature

from .views import ByteTiles, Pictures, stack_tiles

HELD = (ByteTiles, Pictures)


class OutputWithTiles(BatchFeature):
    """Fields that are items and attributes; images held as bytes become the tensor that users see when it is read.

    Until then copying to a device, pickling and batching handle a quarter of the memory, and the tensor is made on the
    device that the bytes are on by then. Where there is a GPU that scales images, even that waits until they are moved.
    """

    skip_tensor_conversion = None  # a copy or an unpickled one has it too

    def __init__(self, data: dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__({**(data or {}), **fields})

    @property
    def data(self) -> dict[str, Any]:
        """The fields as a plain dict, the images as a tensor."""
        fields = self.held()
        for name, value in fields.items():
            if isinstance(value, HELD):
                fields[name] = value.numbers()
        return fields

    @data.setter
    def data(self, fields: dict[str, Any]) -> None:
        self.__dict__["data"] = fields

    def held(self) -> dict[str, Any]:
        """Return the fields as they are held, the images perhaps as `ByteTiles` or `Pictures`."""
        return self.__dict__["data"]

    def __getitem__(self, item: str) -> Any:
        if not isinstance(item, str) or isinstance(self.held().get(item), HELD):
            return super().__getitem__(item)
        return self.held()[item]

    def __getattr__(self, item: str) -> Any:
        try:
            return self[item]
        except KeyError:
            raise AttributeError(f"There is no field {item!r}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in ("data", "skip_tensor_conversion"):
            super().__setattr__(name, value)
        elif hasattr(type(self), name):
            raise AttributeError(
                f"{name!r} is a method of {type(self).__name__}: a field of that name is an item only."
            )
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self.held():
            raise AttributeError(f"There is no field {name!r}.")
        del self[name]

    def __setitem__(self, item: str, value: Any) -> None:
        self.held()[item] = value

    def __delitem__(self, item: str) -> None:
        del self.held()[item]

    def __contains__(self, item: object) -> bool:
        return item in self.held()

    def __iter__(self) -> Iterator[str]:
        return iter(self.held())

    def __copy__(self) -> Any:
        assert self.data is not None  # a shallow copy shares the tensors, so they must be there
        return super().__copy__()

    def __getstate__(self) -> dict[str, Any]:
        fields = self.held().items()
        return {"data": {name: value.tiles() if isinstance(value, Pictures) else value for name, value in fields}}

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """Move the tensors to ``device`` in place, cast the images to ``dtype``, and return self.

        Images that nobody has read yet travel as bytes, and are normalised on ``device``: the same bits. Without a
        dtype they keep float32: the model casts them to its own dtype when it looks at them.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"A batch's images are of floating point: they cannot become {dtype}.")

        def move(value: Any) -> Any:
            if isinstance(value, HELD):
                return value.to(device, dtype, **kwargs)
            if isinstance(value, torch.Tensor):
                return value.to(device=device, dtype=dtype if value.is_floating_point() else None, **kwargs)
            if type(value) in (list, tuple):
                return type(value)(move(item) for item in value)
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            return value

        fields = self.held()
        for name, value in fields.items():
            fields[name] = move(value)
        return self


class VLChatProcessorOutput(OutputWithTiles):
    """One processed sample. Fields are read as attributes or as items.

    Fields:
        sft_format (str): the prompt as a person reads it.
        input_ids (LongTensor [T]): token ids, image tokens included.
        target_ids (LongTensor [T]): labels; -100 where no loss is taken.
        images (FloatTensor [tiles, 3, S, S]): normalised tiles, each image's global view first.
        images_seq_mask (BoolTensor [T]): where image tokens stand.
        images_spatial_crop (LongTensor [images, 2]): tiles across and down, for each image.
        num_image_tokens (list[int]): tokens of each image.
    """

    def __len__(self) -> int:
        return len(self["input_ids"])


class BatchCollateOutput(OutputWithTiles):
    """A batch of samples, padded on the left. Fields are read as attributes or as items.

    Fields:
        sft_format (list[str]): the prompts as a person reads them.
        input_ids (LongTensor [B, T]), labels (LongTensor [B, T]), attention_mask (BoolTensor [B, T]).
        images (FloatTensor [B, tiles, 3, S, S]): rows with fewer tiles end in zeros.
        images_seq_mask (BoolTensor [B, T]): where image tokens stand.
        images_spatial_crop (LongTensor [B, images, 2]): rows with fewer images end in [0, 0].
        seq_lens (list[int]): length of each sample before padding.
    """


def pad_rows(rows: Sequence[torch.Tensor], value: float, left: bool = False, length: int | None = None) -> torch.Tensor:
    """Stack tensors that differ in their first dimension, each filled up with ``value`` on one side.

    Args:
        rows: at least one.
        value: of what is filled up.
        left: whether it stands in front.
        length: of all rows; by default that of the longest.
    """
    longest = max(len(row) for row in rows) if length is None else length
    out = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), value)
    for index, row in enumerate(rows):
        start = out.shape[1] - len(row) if left else 0
        out[index, start : start + len(row)] = row
    return out


def collate(
    samples: Sequence[VLChatProcessorOutput], pad_id: int, ignore_id: int, left: bool = True, length: int | None = None
) -> BatchCollateOutput:
    """Pad samples to one length and stack them; the tiles of a single sample are shared with it, not copied.

    Images that nobody has read yet stay bytes.

    Args:
        samples: at least one.
        pad_id: id of the padding tokens.
        ignore_id: their label.
        left: whether they stand on the left; generation needs that.
        length: of all rows, in tokens; by default that of the longest.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("There are no samples to batch.")

    def stack(name: str, value: float, left: bool = False, length: int | None = None) -> torch.Tensor:
        return pad_rows([sample[name] for sample in samples], value, left, length)

    images: Any = stack_tiles([sample.held()["images"] for sample in samples])
    if images is None:
        images = samples[0]["images"][None] if len(samples) == 1 else stack("images", 0)
    lengths = [len(sample["input_ids"]) for sample in samples]
    length = max(lengths) if length is None else length
    positions = torch.arange(length).expand(len(lengths), -1)
    lengths_column = torch.tensor(lengths)[:, None]
    attention_mask = positions >= length - lengths_column if left else positions < lengths_column
    return BatchCollateOutput(
        sft_format=[sample["sft_format"] for sample in samples],
        input_ids=stack("input_ids", pad_id, left, length),
        labels=stack("target_ids", ignore_id, left, length),
        attention_mask=attention_mask,
        images=images,
        images_seq_mask=stack("images_seq_mask", False, left, length),
        images_spatial_crop=stack("images_spatial_crop", 0),
        seq_lens=lengths,
    )
