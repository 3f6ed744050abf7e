"""A request for one answer: its prompt, its rules, what is told about it, and where it stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..models.tiling import TileGrid, count_image_tokens
from .detokenizer import Detokenizer, ShownToken, TokenBytes, TokenLogprobs
from .kv_cache import Extent
from .prefix_cache import Prefix, block_hashes
from .sampler import RowSampler
from .sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)
class PromptImages:
    """The images of one prompt.

    Fields:
        model: whose vision tower encodes them.
        grids: tiles of each.
        mask_T: which of the prompt's tokens are image tokens, bool, on the host.
        tiles: returns the tiles, [V, 3, S, S], each image's global view first, on a device.
        keys: of each image, what stands for its content; ``None``: they are not cached.
        encoded: returns the embeddings of the tiles, [V, L, H], where something began to make them already.
    """

    model: Any
    grids: list[TileGrid]
    mask_T: torch.Tensor
    tiles: Callable[[torch.device], torch.Tensor]
    keys: list[bytes] | None = None
    encoded: Callable[[], torch.Tensor] | None = None

    @property
    def views(self) -> int:
        """How many tiles there are, global views included."""
        return sum(grid.views for grid in self.grids)

    def tokens(self) -> list[int]:
        """Return how many tokens each image takes."""
        side = self.model.image_token_side
        return [count_image_tokens(grid, side) for grid in self.grids]

    def positions(self) -> list[int]:
        """Return which of the prompt's tokens are image tokens."""
        found: list[int] = self.mask_T.nonzero()[:, 0].tolist()
        return found

    def key(self, index: int) -> bytes | None:
        """Return an image's key, its tiling included."""
        if self.keys is None:
            return None
        grid = self.grids[index]
        return self.keys[index] + bytes((grid.across, grid.down))


@dataclass(eq=False)
class Prompt:
    """A prompt without padding; several answers may share it.

    Fields:
        ids: its token ids; may be empty where embeddings are given.
        images: its images, if any.
        embeds_TH: its embeddings, where given.
        shared: its beginning may be reused by prompts to come, and taken from earlier ones.
        stored: keys and values of its first tokens, where the caller brought them: of each layer two [M, T, D].
    """

    ids: Sequence[int]
    images: PromptImages | None = None
    embeds_TH: torch.Tensor | None = None
    shared: bool = False
    stored: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    _hashes: list[bytes] | None = field(default=None, repr=False)
    _spans: list[tuple[int, int, bytes]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ids) if self.embeds_TH is None else len(self.embeds_TH)

    def hashes(self) -> list[bytes]:
        """Return the hashes of its blocks; none where it is not to be shared."""
        if self._hashes is None:
            self._hashes = block_hashes(self.ids, self._image_spans()) if self._is_hashed() else []
        return self._hashes

    def hashes_with(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the hashes of its blocks with some tokens behind it."""
        if not self._is_hashed():
            return []
        return block_hashes([*self.ids, *tokens], self._image_spans(), known=self.hashes())

    def _is_hashed(self) -> bool:
        without_keys = self.images is not None and self.images.keys is None
        return self.shared and self.embeds_TH is None and not without_keys

    def _image_spans(self) -> list[tuple[int, int, bytes]]:
        if self._spans is None:
            self._spans = self._find_image_spans()
        return self._spans

    def _find_image_spans(self) -> list[tuple[int, int, bytes]]:
        if self.images is None:
            return []
        places = self.images.positions()
        spans, used = [], 0
        for index, count in enumerate(self.images.tokens()):
            key = self.images.key(index)
            assert key is not None
            spans.append((places[used], places[used + count - 1] + 1, key))
            used += count
        return spans


@dataclass(frozen=True)
class Delta:
    """What one step added to an answer.

    Fields:
        text: to be shown; empty without a detokenizer.
        tokens: whose text begins in what has been shown so far; without a detokenizer the new token.
        completion_tokens: of the answer so far, those of stop sequences and its end included.
        finish_reason: why the answer ended; ``None`` while it goes on.
        stop: the stop sequence that ended it.
    """

    text: str
    tokens: list[ShownToken]
    completion_tokens: int
    finish_reason: FinishReason | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Failure:
    """An answer that ended in an error."""

    error: Exception


Event = Delta | Failure


@dataclass(eq=False)
class Request:
    """A request for one answer.

    Fields:
        prompt: the prompt; answers to one question share it.
        params: how tokens are chosen and what ends the answer.
        deliver: is told what happens, in the thread that drives the engine; it must neither block nor raise.
        token_bytes: the tokenizer's table, where text is wanted or ``params.stop`` is used.
        prefill_chunk: most tokens of a pass that reads its prompt, which bounds the memory; ``None``: as the engine's.
        keep_cache: hand keys and values out when the answer ends: see `Sequence.export`.
    """

    prompt: Prompt
    params: SamplingParams
    deliver: Callable[[Event], None]
    token_bytes: TokenBytes | None = None
    prefill_chunk: int | None = None
    on_end: Callable[[Answer], None] | None = None
    cancelled: bool = field(default=False, init=False)
    submitted: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        if self.params.stop and self.token_bytes is None:
            raise ValueError("Stop sequences need a tokenizer's table (token_bytes).")


class Answer:
    """A request that the engine works on.

    Args:
        request: the request.
        eos_ids: the model's own end tokens.
    """

    def __init__(self, request: Request, eos_ids: frozenset[int]) -> None:
        params = request.params
        self.request = request
        self.prompt = request.prompt
        self.params = params
        self.end_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else eos_ids)
        self.sampler = RowSampler(params, request.prompt.ids, self.end_ids)
        self.detokenizer = None if request.token_bytes is None else Detokenizer(request.token_bytes, params.stop)
        self.extent: Extent | None = None
        self.prefix: Prefix | None = None
        self.embeds_TH: torch.Tensor | None = None
        self.cached = 0  # tokens whose keys and values are written, or will be by what is under way
        self.tokens: list[int] = []  # that the host has seen
        self.prefix_tokens = 0  # taken from another sequence's cache
        self.finished = False
        self.failed = False

    @property
    def length(self) -> int:
        """Tokens to cache before the next one can be chosen: the prompt's, and a preempted answer's so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def most(self) -> int:
        """Tokens that the sequence may become."""
        return len(self.prompt) + self.params.max_tokens

    def accept(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """Take the next token, and tell what came of it."""
        self.tokens.append(token)
        constraint, detokenizer = self.sampler.constraint, self.detokenizer
        if constraint is not None:
            constraint.advance(token)
        text = ""
        hidden = token in self.params.stop_token_ids and not self.params.show_stop_tokens
        if detokenizer is not None and not hidden:
            text = detokenizer.push(token, logprobs, may_stop=len(self.tokens) > self.params.min_tokens)
        stopped = token in self.end_ids or (detokenizer is not None and detokenizer.stopped)
        reason: FinishReason | None = None
        if stopped or (constraint is not None and constraint.finished):
            reason = "stop"
        elif len(self.tokens) >= self.params.max_tokens:
            reason = "length"
        if reason is not None:
            self.finished = True
            if detokenizer is not None:
                text += detokenizer.finish()
                reason = "stop" if detokenizer.stopped else reason  # it may end in the last, incomplete, character
        shown = [ShownToken(token, logprobs)]
        if detokenizer is not None:
            shown = detokenizer.take_tokens(finished=self.finished)
        if text or shown or reason:
            stop = None if detokenizer is None else detokenizer.filter.found
            self.request.deliver(Delta(text, shown, len(self.tokens), reason, stop))

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self.finished = self.failed = True
        self.request.deliver(Failure(error))
