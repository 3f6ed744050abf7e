"""Choosing the next token of each row, every row by its own rules and its own random numbers.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .grammar import Constraint

# What is sorted first, on a CPU: more tokens than almost any nucleus holds.
NUCLEUS_GUESS = 512


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens.

    Attributes:
        temperature: 0 for the most likely token.
        top_p: sample from the most likely tokens that together reach this probability.
        top_k: sample from that many of the most likely tokens; 0 for all.
        min_p: leave out tokens less likely than this share of the likeliest one's probability.
        min_tokens: before the answer has that many tokens, neither one of ``end_ids`` nor a stop word ends it.
        end_ids: what may end the answer.
        seed: of the row's random numbers; ``None`` for a seed nobody knows.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from them once for each time they occur.
        repetition_penalty: divides (or multiplies, below zero) the logits of tokens that prompt or answer have.
        logit_bias: added to the logits of these ids.
        top_logprobs: report the log probability of each token and of this many alternatives; ``None``: nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    end_ids: frozenset[int] = frozenset()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of a chosen token and of the likeliest ones, as the model gave them before any rule."""

    chosen: float
    top: list[tuple[int, float]]


class RowSampler:
    """The rules, the random numbers and the memory of one row.

    Args:
        options: the rules.
        constraint: a grammar that the answer must follow.
        prompt_ids: what a repetition penalty counts beside the answer.
    """

    def __init__(
        self, options: SamplingOptions, constraint: Constraint | None = None, prompt_ids: Sequence[int] = ()
    ) -> None:
        self.options = options
        self.constraint = constraint
        self.generator: torch.Generator | None = None
        self.prompt_ids = prompt_ids
        self.counts: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.generated = 0

    def draw(self, like_V: torch.Tensor) -> torch.Tensor:
        """Return the next random numbers, exponentially distributed, one for each token of the vocabulary."""
        if self.generator is None:
            self.generator = torch.Generator(like_V.device)
            if self.options.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.options.seed)
        # By hand, six times as fast on a CPU as exponential_; and never zero.
        uniform_V = torch.empty_like(like_V).uniform_(generator=self.generator)
        return uniform_V.neg_().log1p_().neg_().clamp_(min=2.0**-25)

    def apply_rules(self, logits_V: torch.Tensor) -> None:
        """Change a row of logits, in place, as bias, penalties and grammar ask.

        Raises:
            GrammarError: the grammar allows no token.
        """
        options = self.options
        if options.logit_bias:
            ids = torch.tensor(list(options.logit_bias), device=logits_V.device)
            logits_V[ids] += torch.tensor(list(options.logit_bias.values()), device=logits_V.device)
        if options.counts_tokens:
            self._apply_penalties(logits_V)
        if self.constraint is not None:
            allowed_V = self.constraint.allowed().to(logits_V.device, non_blocking=True)
            logits_V.masked_fill_(~allowed_V, -torch.inf)
        if self.must_go_on:
            self._forbid_the_end(logits_V)

    @property
    def must_go_on(self) -> bool:
        """Whether the answer is too short to end here."""
        return self.generated < self.options.min_tokens and bool(self.options.end_ids)

    def _forbid_the_end(self, logits_V: torch.Tensor) -> None:
        """Leave out what ends the answer, unless the grammar allows nothing else."""
        ids = torch.tensor(sorted(self.options.end_ids), device=logits_V.device)
        kept = logits_V[ids]
        logits_V[ids] = -torch.inf
        if self.constraint is not None and not bool(torch.isfinite(logits_V).any()):
            logits_V[ids] = kept

    def _apply_penalties(self, logits_V: torch.Tensor) -> None:
        options = self.options
        if self.counts is None or self.seen is None:
            self.counts = torch.zeros_like(logits_V)
            self.seen = torch.zeros_like(logits_V, dtype=torch.bool)
            if self.prompt_ids:
                self.seen[torch.tensor(list(self.prompt_ids), device=logits_V.device)] = True
        if options.repetition_penalty != 1:
            factor = options.repetition_penalty
            weakened = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
            logits_V.copy_(torch.where(self.seen | (self.counts > 0), weakened, logits_V))
        logits_V -= options.frequency_penalty * self.counts + options.presence_penalty * (self.counts > 0)

    def remember(self, token: int) -> None:
        """Count a chosen token."""
        self.generated += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.constraint is not None:
            self.constraint.advance(token)

    @property
    def has_rules(self) -> bool:
        """Whether `apply_rules` changes anything."""
        options = self.options
        return bool(options.logit_bias) or options.counts_tokens or self.constraint is not None or self.must_go_on


def kept_from(sorted_BK: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """Return each row's smallest probability that belongs to its nucleus, [B, 1], from its largest ones, in order."""
    before_BK = sorted_BK.double().cumsum(dim=-1) - sorted_BK
    last_B1 = (before_BK < top_p_B[:, None]).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    return sorted_BK.gather(1, last_B1)


def cut_to_nucleus(probabilities_BV: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """Set to zero what is outside of the likeliest tokens of each row that together reach ``top_p``."""
    guess = probabilities_BV.device.type == "cpu" and probabilities_BV.shape[1] > NUCLEUS_GUESS
    count = NUCLEUS_GUESS if guess else probabilities_BV.shape[1]
    sorted_BK = probabilities_BV.topk(count, dim=-1).values
    least_B1 = kept_from(sorted_BK, top_p_B)
    if guess:
        wide_B = sorted_BK.double().sum(dim=-1) < top_p_B
        if bool(wide_B.any()):
            everything = probabilities_BV[wide_B].sort(dim=-1, descending=True).values
            least_B1[wide_B] = kept_from(everything, top_p_B[wide_B])
    return probabilities_BV.masked_fill(probabilities_BV < least_B1, 0.0)


def cut_to_top_k(probabilities_BV: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Set to zero what is less likely than each row's ``count`` likeliest tokens; what equals the last one stays."""
    kept = torch.tensor([min(count, probabilities_BV.shape[1]) for count in counts]).to(probabilities_BV.device)
    sorted_BK = probabilities_BV.topk(int(kept.max()), dim=-1).values
    return probabilities_BV.masked_fill(probabilities_BV < sorted_BK.gather(1, kept[:, None] - 1), 0.0)


def cut_to_min_p(probabilities_BV: torch.Tensor, min_p_B: torch.Tensor) -> torch.Tensor:
    """Set to zero what is less likely than a share of each row's likeliest token."""
    least_B1 = probabilities_BV.amax(dim=-1, keepdim=True) * min_p_B[:, None]
    return probabilities_BV.masked_fill(probabilities_BV < least_B1, 0.0)


def cut_probabilities(probabilities_BV: torch.Tensor, options: Sequence[SamplingOptions]) -> None:
    """Set to zero, in place, what each row's ``min_p``, ``top_k`` and ``top_p`` leave out, in this order.

    ``top_p`` counts from what the other two leave, which is scaled to a sum of one.
    """
    device = probabilities_BV.device

    def rows(wanted: Sequence[bool]) -> torch.Tensor:
        return torch.tensor([k for k, is_wanted in enumerate(wanted) if is_wanted]).to(device, non_blocking=True)

    shares = [o.min_p for o in options if o.min_p > 0]
    if shares:
        index = rows([o.min_p > 0 for o in options])
        probabilities_BV[index] = cut_to_min_p(probabilities_BV[index], torch.tensor(shares).to(device))
    counts = [o.top_k for o in options if o.top_k > 0]
    if counts:
        index = rows([o.top_k > 0 for o in options])
        probabilities_BV[index] = cut_to_top_k(probabilities_BV[index], counts)
    nuclei = [o.top_p for o in options if o.top_p < 1]
    if nuclei:
        index = rows([o.top_p < 1 for o in options])
        found = probabilities_BV[index]
        if shares or counts:
            scaled = torch.tensor([o.min_p > 0 or o.top_k > 0 for o in options if o.top_p < 1]).to(device)
            found = torch.where(scaled[:, None], found / found.sum(dim=-1, keepdim=True), found)
        probabilities_BV[index] = cut_to_nucleus(found, torch.tensor(nuclei).to(device))


def most_likely(logits_BV: torch.Tensor) -> torch.Tensor:
    """Return the index of each row's largest logit, [B]."""
    if logits_BV.device.type == "cpu":  # NumPy's search is some ten times as fast as PyTorch's
        return torch.from_numpy(logits_BV.numpy().argmax(axis=-1))
    return logits_BV.argmax(dim=-1)


def choose_tokens(logits_BV: torch.Tensor, rows: Sequence[RowSampler]) -> torch.Tensor:
    """Return each row's next token, [B]; a row's choice depends on its own logits, options and random numbers.

    A token wins with its probability by a race: the probabilities divided by exponentially distributed numbers, of
    which the largest is taken. Looking a single number up in the cumulated probabilities would be cheaper; but there
    the last bit of any logit may decide between neighbours in the vocabulary, and those bits depend on the batch.
    """
    tokens_B = most_likely(logits_BV)
    sampled = [i for i, row in enumerate(rows) if row.options.temperature > 0]
    if not sampled:
        return tokens_B
    options = [rows[i].options for i in sampled]
    temperature_B = torch.tensor([o.temperature for o in options]).to(logits_BV.device, non_blocking=True)
    index = torch.tensor(sampled).to(logits_BV.device, non_blocking=True)
    probabilities = (logits_BV[index] / temperature_B[:, None]).softmax(dim=-1)
    cut_probabilities(probabilities, options)
    for k, i in enumerate(sampled):
        probabilities[k] /= rows[i].draw(probabilities[k])
    tokens_B[index] = most_likely(probabilities)
    return tokens_B


def log_probabilities(
    logits_BV: torch.Tensor, tokens_B: torch.Tensor, rows: Sequence[RowSampler]
) -> list[TokenLogprobs | None]:
    """Return the log probabilities of the chosen tokens for the rows that want them, from the untouched logits."""
    wanted = [i for i, row in enumerate(rows) if row.options.top_logprobs is not None]
    found: list[TokenLogprobs | None] = [None] * len(rows)
    if not wanted:
        return found
    index = torch.tensor(wanted).to(logits_BV.device)
    logprobs = logits_BV[index].log_softmax(dim=-1)
    most = max(rows[i].options.top_logprobs or 0 for i in wanted)
    values, ids = logprobs.topk(max(most, 1), dim=-1)
    chosen = logprobs.gather(1, tokens_B[index, None])
    # Ids are below 2^53: one transfer brings everything.
    for i, numbers in zip(wanted, torch.cat((chosen.double(), values.double(), ids.double()), 1).tolist(), strict=True):
        count = rows[i].options.top_logprobs or 0
        half = (len(numbers) - 1) // 2
        top = [(int(numbers[1 + half + k]), numbers[1 + k]) for k in range(count)]
        found[i] = TokenLogprobs(numbers[0], top)
    return found


def sample(
    logits_BV: torch.Tensor, rows: Sequence[RowSampler]
) -> tuple[list[int | Exception], list[TokenLogprobs | None]]:
    """Choose the next token of each row.

    Returns:
        The tokens, with an exception instead where a row's rules failed, and the log probabilities asked for.
    """
    failures: dict[int, Exception] = {}
    raw_BV = logits_BV
    if any(row.has_rules for row in rows):
        logits_BV = logits_BV.clone()
    for i, row in enumerate(rows):
        if row.has_rules:
            try:
                row.apply_rules(logits_BV[i])
            except Exception as error:  # of this row's rules; the others go on
                failures[i] = error
                logits_BV[i] = raw_BV[i]
    tokens_B = choose_tokens(logits_BV, rows)
    tokens: list[int | Exception] = [failures.get(i, token) for i, token in enumerate(tokens_B.tolist())]
    return tokens, log_probabilities(raw_BV, tokens_B, rows)
