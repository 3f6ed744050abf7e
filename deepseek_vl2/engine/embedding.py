"""Prompts to embeddings: text by the table, images by the vision tower, those of several prompts together.

Shape suffixes: T tokens, H hidden size, V tiles, L tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .image_cache import ImageCache
from .kv_cache import device_of
from .request import Answer, PromptImages
from .rows import upload


def encode_images(
    prompts: Sequence[PromptImages], cache: ImageCache | None, tiles_a_pass: int
) -> list[list[torch.Tensor]]:
    """Return the embeddings of the images of several prompts; their tiles go through the tower together.

    Args:
        prompts: the images of each, all for one model.
        cache: of images seen before.
        tiles_a_pass: most tiles that go through the tower at once.
    """
    found: list[list[torch.Tensor | None]] = [
        [None if cache is None else cache.get(images.key(i)) for i in range(len(images.grids))] for images in prompts
    ]
    todo = [images for images, known in zip(prompts, found, strict=True) if any(part is None for part in known)]
    views = dict(zip(map(id, todo), encode_tiles(todo, tiles_a_pass), strict=True))
    results = []
    for images, known in zip(prompts, found, strict=True):
        if id(images) in views:
            known = place_views(images, views[id(images)])
            for index, part in enumerate(known):
                if cache is not None and part is not None:
                    cache.put(images.key(index), part)
        results.append([part for part in known if part is not None])
    return results


def encode_tiles(prompts: Sequence[PromptImages], tiles_a_pass: int) -> list[torch.Tensor]:
    """Return the embeddings of each prompt's tiles, [V, L, H]."""
    fresh = [images for images in prompts if images.encoded is None]
    tiles = [images.tiles(images.model.vision_device)[: images.views] for images in fresh]
    encoded: list[torch.Tensor] = []
    if tiles:
        together = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        parts = [fresh[0].model.encode_tiles(piece) for piece in together.split(tiles_a_pass)]
        views = parts[0] if len(parts) == 1 else torch.cat(parts)
        encoded = list(views.split([images.views for images in fresh]))
    rest = iter(encoded)
    return [next(rest) if images.encoded is None else images.encoded() for images in prompts]


def place_views(images: PromptImages, views_VLH: torch.Tensor) -> list[torch.Tensor | None]:
    """Return each image's embeddings, [tokens, H], from those of its tiles."""
    embeds: torch.Tensor = images.model.arrange_views(views_VLH, images.grids)
    return list(embeds.split(images.tokens()))


class Embedder:
    """Embeds prompts, as far as they are not cached.

    Args:
        table: the token embedding.
        cache: of images seen before; ``None``: none are kept.
        tiles_a_pass: most tiles that go through the vision tower at once.
    """

    def __init__(self, table: nn.Module, cache: ImageCache | None, tiles_a_pass: int) -> None:
        self.table = table
        self.cache = cache
        self.tiles_a_pass = tiles_a_pass

    def prepare(self, answers: Sequence[Answer]) -> None:
        """Set ``embeds_TH``, of what is not cached on, of those answers whose prompts are more than text."""
        shown = [a for a in answers if self._needs_images(a)]
        pictures = {id(a.prompt.images): a.prompt.images for a in shown if a.prompt.images is not None}
        encoded = encode_images(list(pictures.values()), self.cache, self.tiles_a_pass) if pictures else []
        by_prompt = dict(zip(pictures, encoded, strict=True))
        for answer in answers:
            images, given = answer.prompt.images, answer.prompt.embeds_TH
            if answer in shown and images is not None:
                embeds = self.embed(answer.prompt.ids)
                positions = upload([images.positions()], embeds.device)[0]
                embeds = embeds.index_copy(0, positions, torch.cat(by_prompt[id(images)]).to(embeds))
            elif given is not None:
                embeds = given
            else:
                continue
            if answer.tokens:  # a preempted answer: what it wrote is read again
                embeds = torch.cat((embeds, self.embed(answer.tokens).to(embeds)))
            answer.embeds_TH = embeds

    def _needs_images(self, answer: Answer) -> bool:
        images = answer.prompt.images
        return images is not None and bool(images.mask_T[answer.cached :].any())

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the embeddings of ids, [T, H]."""
        embeds: torch.Tensor = self.table(upload([list(ids)], device_of(self.table))[0])
        return embeds
