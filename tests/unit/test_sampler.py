"""Choosing tokens: the right distribution, the rules, and no row that looks at another."""

from __future__ import annotations

import pytest
import torch

from deepseek_vl2.engine.sampler import NUCLEUS_GUESS, RowSampler, Sampled, SamplingBatch, cut_tails, read_logprobs
from deepseek_vl2.engine.sampling_params import SamplingParams

VOCABULARY = 3000
assert VOCABULARY > NUCLEUS_GUESS


def row(prompt_ids: tuple[int, ...] = (), **params: object) -> RowSampler:
    return RowSampler(SamplingParams(**params), list(prompt_ids), frozenset([1]))


def sample(logits: torch.Tensor, rows: list[RowSampler], position: int = 0) -> Sampled:
    batch = SamplingBatch(rows, logits.shape[1], logits.device)
    return batch.sample(logits, torch.full((len(rows),), position))


def random_logits(count: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(0)) * spread


def reference_nucleus(probabilities: torch.Tensor, top_p: float) -> set[int]:
    """Return the nucleus by its definition: take the most likely until their sum reaches ``top_p``."""
    kept, total = set(), 0.0
    for index in probabilities.argsort(descending=True).tolist():
        kept.add(index)
        total += float(probabilities[index])
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_come_with_their_probabilities(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    count = 10_000
    rows = [row(temperature=temperature, seed=seed) for seed in range(count // 10)]
    batch = SamplingBatch(rows, 5, logits.device)
    drawn = [batch.sample(logits.expand(len(rows), -1), torch.full((len(rows),), i)).tokens_B for i in range(10)]
    found = torch.cat(drawn).bincount(minlength=5) / count
    # Five standard deviations of a share of 10,000 draws are at most 0.025.
    torch.testing.assert_close(found, (logits / temperature).softmax(0), atol=0.025, rtol=0)
    assert found[4] == 0


@pytest.mark.parametrize("spread", [0.3, 3.0])  # flat: the nucleus is wider than the first guess
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.95])
def test_the_nucleus(spread: float, top_p: float) -> None:
    probabilities = random_logits(3, spread).softmax(-1)
    none = torch.zeros(3)
    kept = cut_tails(probabilities, none.long(), torch.full((3,), top_p, dtype=torch.float64), none)
    for row in range(3):
        expected = reference_nucleus(probabilities[row].double(), top_p)
        found = set(kept[row].nonzero().flatten().tolist())
        assert len(found ^ expected) <= 1, "sums may round differently at the edge"
        assert torch.equal(kept[row][list(found)], probabilities[row][list(found)])


def test_no_row_looks_at_another() -> None:
    logits = random_logits(6)
    logits[4] *= 0.1
    params = [
        *({"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.9}),
        {"seed": 3, "temperature": 0.3, "logit_bias": {5: 3.0}, "top_k": 40},
        {"seed": 4, "top_p": 0.7, "presence_penalty": 1.0, "frequency_penalty": 0.5, "min_p": 0.01},
        {"seed": 5, "repetition_penalty": 1.3, "logprobs": 2},
    ]

    def write(chosen: list[int]) -> list[list[int]]:
        rows = [row(**params[i]) for i in chosen]
        written = [sample(logits[chosen].roll(step, 1), rows, step).tokens_B.tolist() for step in range(12)]
        return [list(column) for column in zip(*written, strict=True)]

    together = write([0, 1, 2, 3, 4, 5])
    assert together == [write([i])[0] for i in range(6)]
    assert together == write([5, 4, 3, 2, 1, 0])[::-1]


def test_greedy_takes_the_likeliest() -> None:
    logits = random_logits(4)
    sampled = sample(logits, [row(temperature=0) for _ in range(4)])
    assert sampled.tokens_B.tolist() == logits.argmax(-1).tolist() and sampled.logprobs is None


def test_bias_and_penalties() -> None:
    """The same logits three times: what was chosen weighs the less the oftener."""
    given = {"logit_bias": {3: 5.0}, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 2.0}
    penalised = row((1, 2), temperature=0, **given)
    logits = torch.tensor([[1.0, 2.0, -2.0, 0.0, 8.0]])
    # Token 4: 8, then 8 / 2 - 0.75 = 3.25; token 3: 5, then 5 / 2 - 0.75 = 1.75.
    found = [sample(logits, [penalised]).tokens_B.item() for _ in range(4)]
    assert found == [4, 3, 4, 4]  # 8; 5 > 3.25; 3.25 > 1.75; 3 > 1.75
    assert logits.tolist() == [[1.0, 2.0, -2.0, 0.0, 8.0]], "the model's logits stay as they are"


def test_an_answer_may_not_end_too_early() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    one = row(temperature=0, min_tokens=2)
    assert [sample(logits, [one]).tokens_B.item() for _ in range(3)] == [2, 2, 1]


def test_log_probabilities_are_the_models() -> None:
    logits = random_logits(3)
    rows = [row(temperature=0, logprobs=4, logit_bias={7: 100.0}) for _ in range(2)] + [row(temperature=0)]
    sampled = sample(logits, rows)
    assert sampled.tokens_B[:2].tolist() == [7, 7] and sampled.logprobs is not None and len(sampled.logprobs) == 2
    expected = logits.log_softmax(-1)
    for index, line in enumerate(sampled.logprobs.tolist()):
        chosen, top = read_logprobs(line, 4)
        assert chosen == pytest.approx(float(expected[index, 7]))
        values, ids = expected[index].topk(4)
        assert [i for i, _ in top] == ids.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist())
