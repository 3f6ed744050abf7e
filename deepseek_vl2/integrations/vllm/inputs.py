"""From images to the bytes of their tiles and from messages to ids, by this package's processor; knows nothing of vLLM.

Shape suffixes: V tiles, S side of a tile in pixels, C the three channels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from PIL import Image

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.image_modes import orientation_of
from deepseek_vl2.models.tiling import MAX_TILED_IMAGES, TileGrid, count_image_tokens, tile_grid, tokens_per_side
from deepseek_vl2.models.views import Pictures

# What a decoder gives as it is, whoever decodes; other kinds are scaled or laid over white, see `image_loading`.
PLAIN_MODES = ("RGB", "L")


class EncodedImages(NamedTuple):
    """Images as they go to the model.

    Fields:
        tiles_VSSC: uint8, each image's global view followed by its local tiles.
        grids: of each image.
        values: [3, 256], what each byte of each channel becomes.
    """

    tiles_VSSC: torch.Tensor
    grids: list[TileGrid]
    values: torch.Tensor


@lru_cache(maxsize=8)
def load_processor(path: str, revision: str | None = None) -> DeepseekVLV2Processor:
    """Return the processor of a checkpoint directory or repository, one a process."""
    return DeepseekVLV2Processor.from_pretrained(path, revision=revision or "main")


def is_tiled(images: int) -> bool:
    """Whether a prompt with that many images has them cut into tiles."""
    return images <= MAX_TILED_IMAGES


def encode_images(
    processor: DeepseekVLV2Processor,
    images: Sequence[Any],
    cropping: bool,
    candidate_resolutions: Sequence[Sequence[int]] | None = None,
) -> EncodedImages:
    """Cut images into tiles as the processor does for a prompt.

    Args:
        processor: the checkpoint's.
        images: at least one, whatever the processor takes.
        cropping: cut them, rather than take one local view of each.
        candidate_resolutions: (width, height) pairs, in pixels, instead of the processor's own.

    Raises:
        ValueError: a bad image, or resolutions that are not whole tiles.
    """
    sample = processor.process_one(
        prompt=processor.image_token * len(images),
        images=list(images),
        cropping=cropping,
        candidate_resolutions=candidate_resolutions,
    )
    held = sample.held()["images"]
    tiles = held.tiles() if isinstance(held, Pictures) else held  # a device that scales is not asked here
    grids = [TileGrid(int(across), int(down)) for across, down in sample["images_spatial_crop"].tolist()]
    return EncodedImages(tiles.bytes, grids, tiles.values)


def tokens_of_image(processor: DeepseekVLV2Processor, grid: TileGrid) -> int:
    """Return how many tokens an image of that grid takes."""
    return count_image_tokens(
        grid, tokens_per_side(processor.image_size, processor.patch_size, processor.downsample_ratio)
    )


def largest_resolution(
    processor: DeepseekVLV2Processor, candidate_resolutions: Sequence[Sequence[int]] | None = None
) -> tuple[tuple[int, int], int]:
    """Return the (width, height) in pixels that takes most tokens, and how many those are."""
    resolutions = [(int(width), int(height)) for width, height in candidate_resolutions or []]

    def tokens(resolution: tuple[int, int]) -> int:
        return tokens_of_image(processor, tile_grid(resolution, processor.image_size))

    best = max(resolutions or processor.candidate_resolutions, key=tokens)
    return best, tokens(best)


def decode_odd_image(data: bytes) -> bytes | None:
    """Return an image file's bytes where the processor must decode it itself, ``None`` where any decoder will do."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return None if image.mode in PLAIN_MODES and orientation_of(image) == 1 else data
    except OSError:
        return None  # whoever decoded it knows its format


def prompt_ids(
    processor: DeepseekVLV2Processor,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """Return a conversation's ids, with one image token for each image part, whatever the image.

    Args:
        processor: the checkpoint's.
        messages: OpenAI-style; an image part needs no source.
        add_generation_prompt, continue_final_message: see `DeepseekVLV2Processor.apply_chat_template`.

    Raises:
        ValueError: an unknown role, a system message that is not first, an image outside a user turn.
    """
    blank = Image.new("RGB", (1, 1))
    batch = processor.apply_chat_template(
        [{**message, "content": _with_images(message.get("content"), blank)} for message in messages],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tokenize=True,
        return_dict=True,
        cropping=False,
    )
    ids, marked = batch["input_ids"][0].tolist(), batch["images_seq_mask"][0].tolist()
    length = tokens_of_image(processor, TileGrid(1, 1))
    kept, position = [], 0
    while position < len(ids):
        kept.append(ids[position])
        position += length if marked[position] else 1
    return kept


def _with_images(content: Any, image: Image.Image) -> Any:
    if content is None or isinstance(content, str):
        return content or ""
    return [{"type": "image", "image": image} if part.get("type") == "image" else part for part in content]
