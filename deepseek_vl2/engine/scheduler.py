"""The scheduler: which prompts are read next, which answers are written, and whose tokens the KV cache holds."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch

from .kv_cache import Extent, KVCache, OutOfTokens
from .prefix_cache import BLOCK, Prefix, PrefixCache
from .request import Answer

logger = logging.getLogger(__name__)

# Room for this many new tokens is taken at first; a longer answer moves to a larger extent.
FIRST_TOKENS = 1024
# A pool that may grow is of a multiple of this: one request takes hardly more memory than its own tokens.
POOL_STEP = 256
# Of this where prompts are shared: idle prefixes go before a pool grows, and a few are to stay.
SHARED_POOL_STEP = 4096


@dataclass(frozen=True)
class EngineOptions:
    """Bounds of an engine.

    Fields:
        max_batch: answers written at the same time.
        max_length: tokens of a prompt and its answer together; ``None``: as the KV cache allows.
        queue_size: requests that may wait; ``None``: any number.
        kv_cache_tokens: tokens that the KV cache holds; ``None``: it grows as needed.
        prefill_tokens: most tokens of prompts in one pass.
        prefill_chunk: most tokens of one prompt in a pass while answers are being written.
        tiles_a_pass: most image tiles that go through the vision tower at once.
        image_cache_bytes: of image embeddings that are kept; 0 for none.
        share_prefixes: whether prompts reuse what is cached of earlier ones that began alike.
    """

    max_batch: int = 256
    max_length: int | None = None
    queue_size: int | None = None
    kv_cache_tokens: int | None = None
    prefill_tokens: int = 8192
    prefill_chunk: int = 2048
    tiles_a_pass: int = 32
    image_cache_bytes: int = 0
    share_prefixes: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "kv_cache_tokens", "prefill_tokens", "prefill_chunk", "tiles_a_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("queue_size", "image_cache_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")


def first_room(answer: Answer) -> int:
    """Return the tokens that an answer's extent has at first."""
    return min(answer.most, answer.length + FIRST_TOKENS)


class Scheduler:
    """Decides the order of work. One thread at a time calls it.

    Args:
        kv_cache: the pool.
        options: the bounds.
        max_batch: rows that the runner takes.

    Attributes:
        waiting: answers without an extent.
        prefilling: answers whose prompts are being read.
        running: answers being written.
        preempted: how often an answer gave its extent up and began again.
    """

    def __init__(self, kv_cache: KVCache, options: EngineOptions, max_batch: int) -> None:
        self.kv_cache = kv_cache
        self.options = options
        self.max_batch = min(options.max_batch, max_batch)
        self.prefixes = PrefixCache()
        self.waiting: deque[Answer] = deque()
        self.prefilling: list[Answer] = []
        self.running: list[Answer] = []
        self.preempted = 0
        self.grew = False  # the pool's tensors are new

    @property
    def busy(self) -> int:
        """Answers that hold an extent."""
        return len(self.prefilling) + len(self.running)

    # ---------------------------------------------------------------- memory

    def _allocate(self, tokens: int, behind: Iterable[Answer] = ()) -> Extent | None:
        """Return an extent; prefixes that nobody uses go, and a pool that may grow does, for those behind it too."""
        while True:
            try:
                return self.kv_cache.allocate(tokens)
            except OutOfTokens:
                evicted = self.prefixes.evict()
                if evicted is not None:
                    self.kv_cache.free(evicted.extent)
                elif self.options.kv_cache_tokens is None:
                    self._grow(tokens, tokens + sum(map(first_room, behind)))
                else:
                    return None

    def _grow(self, tokens: int, wanted: int) -> None:
        """Enlarge the pool for an extent and others that are wanted too, and to twice its size, where memory allows.

        So growth is rare: each time all of the pool is copied, and what was captured is void.
        """
        held, self.grew = self.kv_cache.tokens, True
        step = SHARED_POOL_STEP if self.options.share_prefixes else POOL_STEP
        used = held - self.kv_cache.free_at_end
        needed, wanted, doubled = (-(-size // step) * step for size in (used + tokens, used + wanted, 2 * held))
        for size in sorted({max(doubled, wanted), wanted} - {needed}, reverse=True):
            try:
                return self.kv_cache.grow(size)
            except torch.OutOfMemoryError:
                logger.info("The KV cache does not grow to %d tokens: there is no memory for them.", size)
        self.kv_cache.grow(needed)

    def _give_back(self, answer: Answer) -> None:
        """Free an answer's extent, or leave it to prompts to come."""
        extent, prefix = answer.extent, answer.prefix
        answer.extent = answer.prefix = None
        if extent is None:
            return
        # The last token's keys and values may not be written yet.
        written = min(answer.cached, answer.length - 1)
        if prefix is not None and not answer.failed and written >= BLOCK:
            prefix.hashes = answer.prompt.hashes_with(answer.tokens[: max(written - len(answer.prompt), 0)])
            prefix.hashes = prefix.hashes[: written // BLOCK]
            self.prefixes.add(prefix)  # the next turn of a conversation begins with this one's answer
            if self.prefixes.retire(prefix):
                self.kv_cache.trim(extent, written)
                return
        if prefix is not None:
            self.prefixes.forget(prefix)
        self.kv_cache.free(extent)

    def make_room(self) -> None:
        """See that each answer being written has room for its next token; one that gets none begins again later."""
        for answer in list(self.running):
            extent = answer.extent
            if extent is None or answer.cached < extent.capacity or answer not in self.running:
                continue
            larger = self._allocate(min(2 * extent.capacity, answer.most))
            while larger is None and len(self.running) > 1 and self.running[-1] is not answer:
                self.preempt(self.running[-1])
                larger = self._allocate(min(2 * extent.capacity, answer.most))
            if larger is None:
                self.preempt(answer)
                continue
            self.kv_cache.copy(extent, larger, answer.cached)
            self.kv_cache.free(Extent(extent.start, extent.capacity))
            # In place: a prefix that others match knows this object.
            extent.start, extent.capacity = larger.start, larger.capacity

    def preempt(self, answer: Answer) -> None:
        """Take an answer's extent away; prompt and answer so far are read again when there is room."""
        self.running.remove(answer)
        answer.failed, failed = True, answer.failed  # its prefix is of no use: nothing may be retired
        self._give_back(answer)
        answer.failed = failed
        answer.cached, answer.embeds_TH = 0, None
        self.waiting.appendleft(answer)
        self.preempted += 1
        logger.info("An answer gave its KV cache up and is read again: the cache is full.")

    # ---------------------------------------------------------------- prompts

    def admit(self) -> list[Answer]:
        """Give extents to waiting answers, first come first served; returns those."""
        admitted: list[Answer] = []
        pending = {block for a in self.prefilling if a.prefix is not None for block in a.prefix.hashes}
        while self.waiting and self.busy < self.max_batch:
            answer = self.waiting[0]
            hashes = answer.prompt.hashes() if self.options.share_prefixes and not answer.tokens else []
            match = self.prefixes.match(hashes)
            known = match[1] // BLOCK if match is not None else 0
            if known < len(hashes) and hashes[known] in pending:
                break  # a prompt that begins alike is being read: its cache will serve this one
            room = first_room(answer)
            idle = match[0] if match is not None and match[0].idle else None
            if idle is not None:
                self.prefixes.hold(idle)
            extent = self._allocate(room, islice(self.waiting, 1, self.max_batch - self.busy))
            if idle is not None:
                self.prefixes.let_go(idle)
                if extent is None and self.busy == 0 and not admitted:
                    match, extent = None, self._allocate(room)  # there is room without what it would reuse
            if extent is None:
                if self.busy == 0 and not admitted:
                    self.waiting.popleft()
                    answer.fail(OutOfTokens(f"The KV cache has no {room} tokens: raise kv_cache_tokens."))
                    continue
                break
            self.waiting.popleft()
            answer.extent = extent
            if match is not None:
                self._reuse(answer, *match)
            if hashes:
                answer.prefix = Prefix(extent, hashes)
                pending.update(hashes)
            self.prefilling.append(answer)
            admitted.append(answer)
        return admitted

    def _reuse(self, answer: Answer, prefix: Prefix, tokens: int) -> None:
        """Copy the beginning of a prompt from a sequence that shares it; the last token is always read."""
        assert answer.extent is not None
        tokens = min(tokens, answer.length - 1)
        self.kv_cache.copy(prefix.extent, answer.extent, tokens)
        answer.cached = answer.prefix_tokens = tokens
        self.prefixes.hits += 1
        self.prefixes.tokens_saved += tokens

    def next_pass(self) -> list[tuple[Answer, int]]:
        """Return whose prompts are read in the next pass, and how many tokens of each.

        What fits whole into a later pass is not split: a pass of whole prompts can be replayed, and attention behind
        cached tokens costs more. The first prompt is always read, at least a chunk of it, so none starves.
        """
        budget, parts = self.options.prefill_tokens, []
        chunk = self.options.prefill_chunk if self.running else budget
        read = 0
        for answer in self.prefilling:
            budget = min(budget, answer.request.prefill_chunk or budget)
            rest, bound = answer.length - answer.cached, min(chunk, budget)
            tokens = min(rest, bound, budget - read)
            if tokens <= 0 or tokens < rest <= bound:
                break
            parts.append((answer, tokens))
            read += tokens
        return parts

    def read(self, answer: Answer, tokens: int) -> bool:
        """Note that tokens of a prompt are cached; returns whether all of it is, and the answer may be written."""
        answer.cached += tokens
        if answer.cached < answer.length:
            return False
        self.prefilling.remove(answer)
        answer.embeds_TH = None
        if answer.prefix is not None:
            self.prefixes.add(answer.prefix)
        self.running.append(answer)
        return True

    def drop(self, answer: Answer) -> None:
        """Let go of an answer that ended, failed or was cancelled."""
        for place in (self.running, self.prefilling, self.waiting):
            if answer in place:
                place.remove(answer)
        answer.embeds_TH = None
        self._give_back(answer)
