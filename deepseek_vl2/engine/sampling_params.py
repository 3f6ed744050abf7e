"""How the tokens of one answer are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Constraint(Protocol):
    """A grammar that one answer follows, token by token."""

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, [V], bool, on the host."""

    def advance(self, token: int) -> None:
        """Take a token."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one answer are chosen, and what ends it.

    Fields:
        max_tokens: most tokens of the answer.
        temperature: 0 for the most likely token each time.
        top_p: sample among the most likely tokens that together reach this probability.
        top_k: sample among this many most likely tokens; 0 for all.
        min_p: leave out tokens less likely than this share of the most likely one's probability.
        min_tokens: tokens before which neither end tokens nor stop texts end the answer; a grammar may.
        seed: of the answer's random numbers, which depend on nothing else; ``None`` for a seed nobody knows.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from them once for each time they occur.
        repetition_penalty: divides (or multiplies, below zero) the logits of tokens that prompt or answer have.
        logit_bias: added to the logits of these ids.
        logprobs: report the log probability of each token and of this many alternatives; ``None``: nothing.
        stop: texts that end the answer, themselves not shown.
        stop_token_ids: ids that end the answer beside the model's own.
        show_stop_tokens: show the text of the one of them that ended the answer.
        ignore_eos: go on after the model's own end tokens, up to ``max_tokens``.
        grammar: makes the constraint that the answer follows; called once an answer.

    Raises:
        ValueError: a value out of its range.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    show_stop_tokens: bool = False
    ignore_eos: bool = False
    grammar: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "min_tokens": self.min_tokens >= 0,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
        }
        for name, holds in ranges.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} is out of its range.")

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken as the logits stand."""
        plain = not (self.counts_tokens or self.logit_bias or self.min_tokens or self.grammar is not None)
        return plain and self.temperature == 0 and self.logprobs is None
