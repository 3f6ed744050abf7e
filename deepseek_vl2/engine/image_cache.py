"""Embeddings of images by their content."""

from __future__ import annotations

from collections import OrderedDict

import torch


class ImageCache:
    """The embeddings of images seen last, at most ``max_bytes`` of them.

    Fields:
        hits: images that were not encoded again.
        misses: images that were.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._held: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: bytes | None) -> torch.Tensor | None:
        """Return an image's embeddings, [tokens, H], or ``None``."""
        found = self._held.get(key) if key is not None else None
        if key is not None and found is not None:
            self._held.move_to_end(key)
            self.hits += 1
            return found
        self.misses += 1
        return None

    def put(self, key: bytes | None, embeds_TH: torch.Tensor) -> None:
        """Hold an image's embeddings, [tokens, H]; those used longest ago go."""
        size = embeds_TH.numel() * embeds_TH.element_size()
        if key is None or key in self._held or size > self.max_bytes:
            return
        self._held[key] = embeds_TH.clone()  # not a view that keeps a whole pass alive
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, old = self._held.popitem(last=False)
            self.bytes -= old.numel() * old.element_size()
