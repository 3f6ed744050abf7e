"""What runs the language model for the engine: here by its own modules, on any device.

A pass takes segments: new tokens of several sequences, packed without padding. `triton_runner` has the form for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ref

import torch

from ..models.cache import CACHE_NAME, PackedCache, Segment
from .kv_cache import Extent, KVCache, device_of
from .rows import Rows


@dataclass(frozen=True)
class Part:
    """New tokens of a sequence's prompt in a pass.

    Fields:
        segment: which tokens, and where its extent lies.
        ids: theirs; or
        embeds_TH: their embeddings, [T, H].
    """

    segment: Segment
    ids: Sequence[int] = ()
    embeds_TH: torch.Tensor | None = None


class Runner(Protocol):
    """What the engine asks of a form of the model."""

    max_batch: int

    def prefill(self, parts: Sequence[Part], alone: bool = True) -> torch.Tensor:
        """Read new tokens of prompts; returns the logits of each part's last token, [parts, V], float32.

        Args:
            parts: the tokens.
            alone: whether nobody else waits, or is written to: what later passes gain from may take its time.
        """

    def decode(self, rows: Rows, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read one token of each of the first rows, and advance their positions.

        Returns:
            The logits, [count, V], float32, valid until the next call, and the likeliest ids, where they are known.
        """

    def capture_all(self, rows: Rows, scratch: Extent | None) -> None:
        """Make ready what prompts, and decoding these rows, will need: the first answers need not wait.

        Args:
            rows: those of the engine.
            scratch: a part of the pool that nobody needs; ``None``: there is none.
        """

    def pool_changed(self) -> None:
        """Forget what holds addresses of the KV cache's pool."""


class ModuleRunner:
    """Runs the model's own modules: any device, dtype, adapter or quantization.

    Args:
        language: the language model; not kept alive.
        kv_cache: the pool.
        max_batch: most rows of a decoding step.
    """

    def __init__(self, language: Any, kv_cache: KVCache, max_batch: int) -> None:
        self.language = ref(language)
        self.kv_cache = kv_cache
        self.max_batch = max_batch

    def _run(self, segments: list[Segment], embeds_NH: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        language = self.language()
        assert language is not None
        pools = [self.kv_cache.keys_and_values(layer) for layer in range(len(self.kv_cache.pools))]
        ends, last = [], -1
        for segment in segments:
            last += segment.new
            ends.append(last)
        outputs = language(
            inputs_embeds=embeds_NH[None],
            position_ids=positions_N[None],
            use_cache=True,
            logits_to_keep=torch.tensor(ends, device=embeds_NH.device),
            **{CACHE_NAME: PackedCache(pools, segments)},
        )
        logits: torch.Tensor = outputs.logits[0]
        return logits

    def prefill(self, parts: Sequence[Part], alone: bool = True) -> torch.Tensor:
        """See `Runner.prefill`; nothing is made for later passes."""
        language = self.language()
        assert language is not None
        table = language.get_input_embeddings()
        embeds, positions = [], []
        for part in parts:
            segment = part.segment
            positions.append(torch.arange(segment.past, segment.end))
            if part.embeds_TH is None:
                embeds.append(table(torch.tensor(list(part.ids)).to(device_of(table))))
            else:
                embeds.append(part.embeds_TH)
        together = embeds[0] if len(embeds) == 1 else torch.cat([part.to(embeds[0]) for part in embeds])
        every = torch.cat(positions).to(together.device)
        return self._run([part.segment for part in parts], together, every)

    def decode(self, rows: Rows, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Runner.decode`."""
        language = self.language()
        assert language is not None
        table = language.get_input_embeddings()
        embeds = table(rows.tokens[:count].to(device_of(table)))
        positions = rows.positions[:count].long().to(embeds.device)
        logits = self._run(rows.segments(), embeds, positions)
        rows.positions[:count] += 1
        return logits, None

    def capture_all(self, rows: Rows, scratch: Extent | None) -> None:
        """Nothing: modules run as they are."""

    def pool_changed(self) -> None:
        """Nothing: views of the pool are taken anew in each pass."""
