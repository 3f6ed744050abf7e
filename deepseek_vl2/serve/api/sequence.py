"""One answer in the making: what was asked, where it stands, what is told about it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .grammar import Constraint
from .prefill import Prompt, Steps
from .sampling import RowSampler, SamplingOptions, TokenLogprobs
from .text import AnswerText, ShownToken
from .token_bytes import TokenBytes

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """What one step added to an answer.

    Attributes:
        text: to be shown.
        tokens: whose text begins in what has been shown so far.
        completion_tokens: of the answer so far, those of stop words and its end included.
        finish_reason: why the answer ended; ``None`` while it goes on.
    """

    text: str
    tokens: list[ShownToken]
    completion_tokens: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Failure:
    """An answer that ended in an error."""

    error: Exception


Event = Delta | Failure
Sink = Callable[[Event], None]


@dataclass(eq=False)
class Job:
    """A request for one answer.

    Attributes:
        prompt: the processed prompt; answers to one question share it.
        sampling: how to choose tokens.
        max_tokens: most tokens of the answer.
        deliver: is told what happens, in the engine's thread; it must neither block nor raise.
        stop_words: what ends the answer, itself not shown.
        constraint: a grammar to follow; it belongs to this job alone.
        stop_token_ids: tokens that end the answer, themselves not shown, beside the model's own.
        ignore_eos: go on after the token that ends an answer, up to ``max_tokens`` (for measuring).
    """

    prompt: Prompt
    sampling: SamplingOptions
    max_tokens: int
    deliver: Sink
    stop_words: tuple[str, ...] = ()
    constraint: Constraint | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    cancelled: bool = field(default=False, init=False)
    submitted: float = field(default_factory=time.monotonic, init=False)


class Sequence:
    """A job that has a row of the cache.

    Args:
        job: the job.
        row: its row.
        token_bytes: the tokenizer's table.
        eos_ids: what ends an answer.
    """

    def __init__(self, job: Job, row: int, token_bytes: TokenBytes, eos_ids: frozenset[int]) -> None:
        self.job = job
        self.row = row
        self.end_ids = (frozenset() if job.ignore_eos else eos_ids) | job.stop_token_ids
        sampling = dataclasses.replace(job.sampling, end_ids=self.end_ids)
        self.sampler = RowSampler(sampling, job.constraint, job.prompt.ids)
        self.stream = AnswerText(token_bytes, job.stop_words)
        self.steps: Steps | None = None
        self.cached = 0
        self.generated = 0
        self.last_token = -1
        self.finished = False
        self.failed = False

    def accept(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """Take the next token, and tell what came of it."""
        self.last_token = token
        self.generated += 1
        self.sampler.remember(token)
        text = ""
        if token not in self.job.stop_token_ids:
            text = self.stream.push(token, logprobs, may_stop=self.generated > self.job.sampling.min_tokens)
        reason = self._finish_reason(token)
        if reason is not None:
            self.finished = True
            text += self.stream.finish()
            if self.stream.stopped:  # a stop word may end in the last, incomplete, character
                reason = "stop"
        tokens = self.stream.take_tokens(finished=self.finished)
        if text or tokens or reason:
            self.job.deliver(Delta(text, tokens, self.generated, reason))

    def _finish_reason(self, token: int) -> FinishReason | None:
        constraint = self.job.constraint
        if token in self.end_ids or self.stream.stopped or (constraint is not None and constraint.finished):
            return "stop"
        return "length" if self.generated >= self.job.max_tokens else None

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self.finished = self.failed = True
        self.job.deliver(Failure(error))
