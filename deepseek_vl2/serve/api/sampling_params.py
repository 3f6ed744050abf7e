"""How one answer is to be written, whichever endpoint asked for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .grammar import Constraint


@dataclass(frozen=True)
class SamplingParams:
    """How to choose an answer's tokens, and when it ends.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: 0 for the most likely token.
        top_p: sample from the most likely tokens that together reach this probability.
        top_k: sample from that many of the most likely tokens; 0 for all.
        min_p: leave out tokens less likely than this share of the likeliest one's probability.
        min_tokens: neither end tokens nor stop strings end the answer before it has that many tokens.
        seed: of the answer's random numbers; ``None`` for a seed nobody knows.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from them once for each time they occur.
        repetition_penalty: divides (or multiplies, below zero) the logits of tokens that prompt or answer have.
        logit_bias: added to the logits of these ids.
        logprobs: report the log probability of each token and of this many alternatives; ``None``: nothing.
        stop: strings that end the answer, themselves not shown.
        stop_token_ids: tokens that end the answer, themselves not shown, beside the model's own.
        ignore_eos: go on after the model's own end tokens, up to ``max_tokens``.
        grammar: makes the constraint that the answer follows, anew for each answer.
    """

    max_tokens: int
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
    ignore_eos: bool = False
    grammar: Callable[[], Constraint] | None = None
