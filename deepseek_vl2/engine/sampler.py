"""The sampler: the next token of each row, every row by its own rules and its own random numbers, on the device.

Nothing here waits for the device. A row's random numbers depend neither on the batch nor on what other rows do: see
`noise`.

Shape suffixes: B rows, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .noise import exponential_noise, row_keys
from .sampling_params import Constraint, SamplingParams

# What is sorted first, on a CPU: more tokens than almost any nucleus holds.
NUCLEUS_GUESS = 512
# Dividing by less would leave float32's range, and what is not a number wins every race, whatever a grammar says.
LOWEST_TEMPERATURE, LOWEST_PENALTY, LARGEST_LOGIT = 1e-6, torch.finfo(torch.float32).tiny, 1e30


class RowSampler:
    """What one answer's choices depend on beside its logits.

    Args:
        params: the rules.
        prompt_ids: what a repetition penalty counts beside the answer.
        end_ids: tokens that end the answer.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: frozenset[int]) -> None:
        self.params = params
        self.prompt_ids = prompt_ids
        self.end_ids = end_ids
        self.seed = secrets.randbits(62) if params.seed is None else params.seed
        self.constraint: Constraint | None = None if params.grammar is None else params.grammar()
        self.counts: torch.Tensor | None = None  # of the answer's tokens, [V]
        self.seen: torch.Tensor | None = None  # which tokens prompt or answer have, [V]
        self.chosen = 0  # tokens chosen so far, those on their way to the host included

    def start_counting(self, like_V: torch.Tensor) -> None:
        """Make the counts that penalties need."""
        self.counts = torch.zeros_like(like_V)
        self.seen = torch.zeros_like(like_V, dtype=torch.bool)
        if self.prompt_ids:
            self.seen[torch.tensor(sorted(set(self.prompt_ids)), device=like_V.device)] = True


@dataclass(frozen=True)
class Sampled:
    """The tokens of a step, on the device.

    Fields:
        tokens_B: the ids.
        logprobs: of the rows that asked, [rows, 1 + 2K] in float64: the chosen token's, the K best ones', their ids.
        failures: rows whose rules failed, by index.
    """

    tokens_B: torch.Tensor
    logprobs: torch.Tensor | None
    failures: dict[int, Exception]


def most_likely(scores_BV: torch.Tensor) -> torch.Tensor:
    """Return the index of each row's largest score, [B]."""
    if scores_BV.device.type == "cpu":  # NumPy's search is some ten times as fast as PyTorch's
        return torch.from_numpy(scores_BV.numpy().argmax(axis=-1))
    return scores_BV.argmax(dim=-1)


def smallest_kept(
    sorted_BK: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor, min_p_B: torch.Tensor
) -> torch.Tensor:
    """Return each row's smallest probability that may be drawn, [B, 1], from its largest ones, in order."""
    cumulated_BK = sorted_BK.double().cumsum(dim=-1)
    last_B = torch.where(top_k_B > 0, top_k_B.clamp(max=sorted_BK.shape[1]), sorted_BK.shape[1]) - 1
    mass_B1 = torch.where(top_k_B > 0, cumulated_BK.gather(1, last_B[:, None])[:, 0], 1.0)[:, None]
    within_BK = (cumulated_BK - sorted_BK) < top_p_B[:, None] * mass_B1
    last_B = torch.minimum(last_B, within_BK.sum(dim=-1).clamp(min=1) - 1)
    return torch.maximum(sorted_BK.gather(1, last_B[:, None]), (sorted_BK[:, 0] * min_p_B)[:, None])


def cut_tails(
    probabilities_BV: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor, min_p_B: torch.Tensor
) -> torch.Tensor:
    """Set to zero what top-k, then top-p of what that leaves, or min-p leave out."""
    guess = probabilities_BV.device.type == "cpu" and probabilities_BV.shape[1] > NUCLEUS_GUESS
    if not guess:
        sorted_BV = probabilities_BV.sort(dim=-1, descending=True).values
        return probabilities_BV.masked_fill(probabilities_BV < smallest_kept(sorted_BV, top_k_B, top_p_B, min_p_B), 0.0)
    sorted_BK = probabilities_BV.topk(NUCLEUS_GUESS, dim=-1).values
    least_B1 = smallest_kept(sorted_BK, top_k_B, top_p_B, min_p_B)
    wide_B = (top_k_B > NUCLEUS_GUESS) | ((top_k_B == 0) & (sorted_BK.double().sum(dim=-1) < top_p_B))
    if bool(wide_B.any()):
        everything = probabilities_BV[wide_B].sort(dim=-1, descending=True).values
        least_B1[wide_B] = smallest_kept(everything, top_k_B[wide_B], top_p_B[wide_B], min_p_B[wide_B])
    return probabilities_BV.masked_fill(probabilities_BV < least_B1, 0.0)


class SamplingBatch:
    """The rules of the rows of a batch, as tensors on the device; made anew when rows come or go.

    Args:
        rows: the rows, in order.
        vocabulary: the number of logits.
        device: where the logits are.
    """

    def __init__(self, rows: Sequence[RowSampler], vocabulary: int, device: torch.device) -> None:
        self.rows = list(rows)
        self.vocabulary = vocabulary
        # Apple's GPUs have no float64, which sums of many probabilities need: there the host draws.
        self.device = device if device.type == "cuda" else torch.device("cpu")
        params = [row.params for row in rows]
        self.sampled = [i for i, p in enumerate(params) if p.temperature > 0]
        self.cut = [k for k, i in enumerate(self.sampled) if params[i].top_p < 1 or params[i].top_k or params[i].min_p]
        self.counting = [i for i, p in enumerate(params) if p.counts_tokens]
        self.logged = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.constrained = [i for i, row in enumerate(rows) if row.constraint is not None]
        self.is_greedy = all(p.is_greedy for p in params)
        self._upload_sampled(params)
        self._upload_bias(params)
        self._gather_counts(params)

    def _put(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        held = torch.tensor(values, dtype=dtype)
        return held.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else held

    def _upload_sampled(self, params: list[SamplingParams]) -> None:
        chosen = [params[i] for i in self.sampled]
        self.sampled_rows = self._put(self.sampled, torch.long)
        self.temperature = self._put([max(p.temperature, LOWEST_TEMPERATURE) for p in chosen], torch.float32)
        seeds = [(self.rows[i].seed + 2**63) % 2**64 - 2**63 for i in self.sampled]
        self.seeds = self._put(seeds, torch.long)
        cut = [chosen[k] for k in self.cut]
        self.cut_rows = self._put(self.cut, torch.long)
        self.top_k = self._put([min(p.top_k, self.vocabulary) for p in cut], torch.long)
        self.top_p = self._put([p.top_p for p in cut], torch.float64)
        self.min_p = self._put([p.min_p for p in cut], torch.float32)

    def _upload_bias(self, params: list[SamplingParams]) -> None:
        entries = [(i, token, bias) for i, p in enumerate(params) for token, bias in p.logit_bias.items()]
        self.biased = bool(entries)
        if entries:
            rows, tokens, values = zip(*entries, strict=True)
            self.bias_index = (self._put(rows, torch.long), self._put(tokens, torch.long))
            self.bias_values = self._put(values, torch.float32)

    def _gather_counts(self, params: list[SamplingParams]) -> None:
        if not self.counting:
            return
        like = torch.zeros(self.vocabulary, device=self.device)
        rows = [self.rows[i] for i in self.counting]
        for row in rows:
            if row.counts is None:
                row.start_counting(like)
        self.counts = torch.stack([row.counts for row in rows if row.counts is not None])
        self.seen = torch.stack([row.seen for row in rows if row.seen is not None])
        for row, counts, seen in zip(rows, self.counts, self.seen, strict=True):
            row.counts, row.seen = counts, seen
        self.counting_rows = self._put(self.counting, torch.long)
        chosen = [params[i] for i in self.counting]
        self.repetition = self._put([[max(p.repetition_penalty, LOWEST_PENALTY)] for p in chosen], torch.float32)
        self.frequency = self._put([[p.frequency_penalty] for p in chosen], torch.float32)
        self.presence = self._put([[p.presence_penalty] for p in chosen], torch.float32)

    # ---------------------------------------------------------------- rules

    def _penalised(self, logits_NV: torch.Tensor) -> torch.Tensor:
        larger_NV = (logits_NV / self.repetition).clamp(max=LARGEST_LOGIT)
        weakened = torch.where(logits_NV > 0, larger_NV, logits_NV * self.repetition)
        logits_NV = torch.where(self.seen, weakened, logits_NV)
        return logits_NV - self.frequency * self.counts - self.presence * (self.counts > 0)

    def _forbid_ends(self, logits_BV: torch.Tensor) -> None:
        early = [(i, row.end_ids) for i, row in enumerate(self.rows) if row.chosen < row.params.min_tokens]
        pairs = [(i, token) for i, ends in early for token in ends]
        if pairs:
            rows, tokens = (self._put(each, torch.long) for each in zip(*pairs, strict=True))
            allowed = logits_BV[rows, tokens]
            logits_BV[rows, tokens] = -torch.inf
            if self.constrained:
                stuck = torch.isneginf(logits_BV.amax(dim=-1))[rows]  # the grammar leaves the end alone
                logits_BV[rows, tokens] = torch.where(stuck, allowed, -torch.inf)

    def _apply_grammars(self, logits_BV: torch.Tensor) -> dict[int, Exception]:
        masks, kept, failures = [], [], {}
        for i in self.constrained:
            constraint = self.rows[i].constraint
            assert constraint is not None
            try:
                if not constraint.finished:
                    masks.append(constraint.allowed())
                    kept.append(i)
            except Exception as error:  # of this row's grammar; the others go on
                failures[i] = error
        if kept:
            allowed = torch.stack(masks)
            if self.device.type == "cuda":
                allowed = allowed.pin_memory()
            rows = self._put(kept, torch.long)
            banned = ~allowed.to(self.device, non_blocking=True)
            logits_BV[rows] = logits_BV[rows].masked_fill_(banned, -torch.inf)
        return failures

    def _apply_rules(self, logits_BV: torch.Tensor) -> tuple[torch.Tensor, dict[int, Exception]]:
        """Return the logits as bias, penalties, minimum lengths and grammars want them."""
        ends_matter = any(row.chosen < row.params.min_tokens for row in self.rows)
        if not (self.biased or self.counting or self.constrained or ends_matter):
            return logits_BV, {}
        logits_BV = logits_BV.clone()
        if self.biased:
            logits_BV.index_put_(self.bias_index, self.bias_values, accumulate=True)
        if self.counting:
            logits_BV[self.counting_rows] = self._penalised(logits_BV[self.counting_rows])
        failures = self._apply_grammars(logits_BV)
        self._forbid_ends(logits_BV)
        return logits_BV, failures

    # ---------------------------------------------------------------- choice

    def _draw(self, logits_BV: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        """Return the drawn tokens of the rows that are sampled.

        A token wins with its probability by a race: the probabilities divided by exponentially distributed numbers, of
        which the largest is taken. Looking a single number up in the cumulated probabilities would be cheaper; but
        there the last bit of any logit may decide between neighbours in the vocabulary, and those bits depend on the
        batch.
        """
        rows = self.sampled_rows
        probabilities = (logits_BV[rows] / self.temperature[:, None]).softmax(dim=-1)
        if self.cut:
            kept = cut_tails(probabilities[self.cut_rows], self.top_k, self.top_p, self.min_p)
            probabilities[self.cut_rows] = kept
        keys = row_keys(self.seeds, positions_B[rows])
        return most_likely(probabilities / exponential_noise(keys, self.vocabulary))

    def _log_probabilities(self, logits_BV: torch.Tensor, tokens_B: torch.Tensor) -> torch.Tensor | None:
        """Return log probabilities as the model gave them before any rule; see `Sampled`."""
        if not self.logged:
            return None
        index = self._put(self.logged, torch.long)
        logprobs = logits_BV[index].log_softmax(dim=-1)
        most = max(self.rows[i].params.logprobs or 0 for i in self.logged)
        values, ids = logprobs.topk(min(max(most, 1), self.vocabulary), dim=-1)
        chosen = logprobs.gather(1, tokens_B[index, None])
        # Ids are below 2^53: one transfer brings everything.
        return torch.cat((chosen.double(), values.double(), ids.double()), dim=1)

    def sample(
        self, logits_BV: torch.Tensor, positions_B: torch.Tensor, likeliest_B: torch.Tensor | None = None
    ) -> Sampled:
        """Choose the next token of each row.

        Args:
            logits_BV: float32; not changed.
            positions_B: of the tokens to come.
            likeliest_B: the most likely tokens, where the step found them already.
        """
        home = logits_BV.device
        logits_BV, positions_B = logits_BV.to(self.device), positions_B.to(self.device)
        likeliest_B = None if likeliest_B is None else likeliest_B.to(self.device)
        ruled_BV, failures = self._apply_rules(logits_BV)
        tokens_B = likeliest_B if likeliest_B is not None and ruled_BV is logits_BV else most_likely(ruled_BV)
        if self.sampled:
            drawn = self._draw(ruled_BV, positions_B)
            tokens_B = tokens_B.index_copy(0, self.sampled_rows, drawn)
        if self.counting:
            new = tokens_B[self.counting_rows, None]
            self.counts.scatter_add_(1, new, torch.ones_like(new, dtype=self.counts.dtype))
            self.seen.scatter_(1, new, True)
        for row in self.rows:
            row.chosen += 1
        return Sampled(tokens_B.to(home), self._log_probabilities(logits_BV, tokens_B), failures)


def read_logprobs(line: Sequence[float], count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the chosen token's log probability and the best ids with theirs, from a row of `Sampled.logprobs`."""
    half = (len(line) - 1) // 2
    return line[0], [(int(line[1 + half + k]), line[1 + k]) for k in range(min(count, half))]
