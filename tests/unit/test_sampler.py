"""Choosing tokens: the right distribution, the rules, and no row that looks at another."""

from __future__ import annotations

import pytest
import torch

from deepseek_vl2.engine.noise import FIRST, MASK32, SECOND, exponential_noise, mix
from deepseek_vl2.engine.sampler import (
    NUCLEUS_GUESS,
    RowSampler,
    Sampled,
    SamplingBatch,
    cut_tails,
    read_logprobs,
)
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


def unmixed(x: int) -> int:
    """Return what `mix` mixes to a number."""
    for factor in (SECOND, FIRST):
        x ^= (x >> 15) ^ (x >> 30)
        x = x * pow(factor, -1, 2**32) & MASK32
    return x ^ (x >> 16)


@pytest.mark.parametrize("bits", [0, 1, 2**31, MASK32 - 512, MASK32 - 1, MASK32])
def test_no_random_number_is_zero(bits: int) -> None:
    """Divided by zero, a token that must not come would be more likely than any other."""
    assert mix(unmixed(bits)) == bits
    noise = exponential_noise(torch.tensor([unmixed(bits)]), 4)
    assert (noise > 0).all() and noise.isfinite().all()


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


def cut(probabilities: torch.Tensor, **params: list[float]) -> torch.Tensor:
    """Return what is left of each row, whose parameters are given in lists."""
    plain = [0.0] * len(probabilities)
    top_k, min_p = (params.get(name, plain) for name in ("top_k", "min_p"))
    top_p = torch.tensor(params.get("top_p", [1.0] * len(plain)), dtype=torch.float64)
    return cut_tails(probabilities, torch.tensor(top_k).long(), top_p, torch.tensor(min_p))


def test_top_k_and_min_p_by_their_definition() -> None:
    probabilities = random_logits(3).softmax(-1)
    kept = cut(probabilities, top_k=[1, 7, VOCABULARY])
    for index, count in enumerate((1, 7, VOCABULARY)):
        expected = set(probabilities[index].topk(count).indices.tolist())
        assert set(kept[index].nonzero().flatten().tolist()) == expected
    kept = cut(probabilities, min_p=[0.0, 0.2, 1.0])
    for index, share in enumerate((0.0, 0.2, 1.0)):
        assert torch.equal(kept[index] > 0, probabilities[index] >= share * probabilities[index].max())
    tied = torch.tensor([[0.2, 0.3, 0.3, 0.2]])
    assert (cut(tied, top_k=[3]) > 0).all(), "what is as likely as the last one stays, whichever comes first"


def test_cuts_follow_each_other_and_leave_other_rows_alone() -> None:
    """Of 0.4 and 0.3, which top_k=2 leaves, the first is more than 0.55; of 0.96, two are more than half."""
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).repeat(6, 1)
    params = {
        "min_p": [0.0, 0.4, 0.4, 0.4, 0.0, 0.0],
        "top_k": [0, 0, 2, 2, 0, 4],
        "top_p": [1.0, 1.0, 1.0, 0.55, 0.55, 0.5],
    }
    together = cut(probabilities, **params)
    assert (together > 0).sum(1).tolist() == [5, 3, 2, 1, 2, 2]
    for index in range(6):
        alone = cut(probabilities[:1], **{name: values[index : index + 1] for name, values in params.items()})
        assert torch.equal(together[index], alone[0])


def test_no_row_looks_at_another() -> None:
    logits = random_logits(8)
    logits[4] *= 0.1
    params = [
        *({"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.9}),
        {"seed": 3, "temperature": 0.3, "logit_bias": {5: 3.0}, "top_k": 40},
        {"seed": 4, "top_p": 0.7, "presence_penalty": 1.0, "frequency_penalty": 0.5, "min_p": 0.01},
        {"seed": 5, "repetition_penalty": 1.3, "logprobs": 2},
        {"seed": 6, "top_k": 20, "min_p": 0.01},
        {"seed": 7, "top_k": 50, "top_p": 0.9, "min_tokens": 5},
    ]

    def write(chosen: list[int]) -> list[list[int]]:
        rows = [row(**params[i]) for i in chosen]
        written = [sample(logits[chosen].roll(step, 1), rows, step).tokens_B.tolist() for step in range(12)]
        return [list(column) for column in zip(*written, strict=True)]

    everyone = list(range(len(params)))
    together = write(everyone)
    assert together == [write([i])[0] for i in everyone]
    assert together == write(everyone[::-1])[::-1]


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


class Word:
    """A grammar of token 2 and then the end, token 1."""

    def __init__(self) -> None:
        self.finished = False
        self.next = 2

    def allowed(self) -> torch.Tensor:
        return torch.arange(4) == self.next

    def advance(self, token: int) -> None:
        self.finished, self.next = token == 1, 1


def test_a_grammar_may_end_an_answer_before_its_least_number_of_tokens() -> None:
    """The end is left where the grammar leaves nothing else, and to this row alone."""
    rows = [row(temperature=0, min_tokens=5, grammar=Word), row(temperature=0, min_tokens=5)]
    logits, written = torch.tensor([[0.0, 5.0, 1.0, 3.0]] * 2), []
    for _ in range(2):
        tokens = sample(logits, rows).tokens_B.tolist()
        assert rows[0].constraint is not None
        rows[0].constraint.advance(tokens[0])
        written.append(tokens)
    assert written == [[2, 3], [1, 3]]


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


@pytest.mark.parametrize("first", [-1.0, 3.0])
def test_a_repetition_penalty_weakens_logits_of_either_sign(first: float) -> None:
    row = RowSampler(SamplingParams(max_tokens=1, temperature=0, repetition_penalty=2.0), [0], frozenset())
    logits = torch.tensor([[first, first - 0.5, -9.0]])
    found = SamplingBatch([row], 3, logits.device).sample(logits, torch.tensor([1]))
    assert found.tokens_B.tolist() == [1]


@pytest.mark.parametrize("smallest", [5e-324, 1e-45, 1e-38, 1e-30])
@pytest.mark.parametrize("field", ["temperature", "repetition_penalty"])
def test_the_smallest_numbers_leave_the_range_of_no_logit(field: str, smallest: float) -> None:
    """What is not a number would win every race, also against a grammar."""
    logits = random_logits(2)
    logits[:, :2] = -torch.inf
    given = {"temperature": 1.0, "seed": 1, field: smallest}
    rows = [row(tuple(range(0, VOCABULARY, 2)), **given), row((5,), **given)]
    batch = SamplingBatch(rows, VOCABULARY, logits.device)
    ruled, _ = batch._apply_rules(logits)
    assert not ruled.isnan().any() and torch.equal(ruled.isneginf(), logits.isneginf())
    tokens = batch.sample(logits, torch.zeros(2, dtype=torch.long)).tokens_B
    assert not logits[0, tokens[0]].isneginf() and not logits[1, tokens[1]].isneginf()
    if field == "temperature":
        assert torch.equal(tokens, logits.argmax(dim=-1))
