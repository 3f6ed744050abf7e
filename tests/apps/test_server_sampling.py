"""Choosing tokens: the right distribution, the rules, and no row that looks at another."""

from __future__ import annotations

import contextlib
import time

import pytest
import server_support  # noqa: F401  (skips where the extra is missing)
import torch

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.serve.api.grammar import GrammarCompiler, GrammarError
from deepseek_vl2.serve.api.sampling import (
    NUCLEUS_GUESS,
    RowSampler,
    SamplingOptions,
    choose_tokens,
    cut_probabilities,
    cut_to_min_p,
    cut_to_nucleus,
    cut_to_top_k,
    sample,
)
from deepseek_vl2.serve.api.token_bytes import TokenBytes

VOCABULARY = 3000
assert VOCABULARY > NUCLEUS_GUESS


def rows(count: int, **options: object) -> list[RowSampler]:
    return [RowSampler(SamplingOptions(**{"seed": seed, **options})) for seed in range(count)]


def random_logits(count: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(0)) * spread


def reference_nucleus(probabilities: torch.Tensor, top_p: float) -> set[int]:
    """Return the nucleus by its definition: take the likeliest until their sum reaches ``top_p``."""
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
    (row,) = rows(1, temperature=temperature)
    count = 10_000
    found = torch.cat([choose_tokens(logits[None], [row]) for _ in range(count)]).bincount(minlength=5) / count
    # Five standard deviations of a share of 10,000 draws are at most 0.025.
    torch.testing.assert_close(found, (logits / temperature).softmax(0), atol=0.025, rtol=0)
    assert found[4] == 0


@pytest.mark.parametrize("spread", [0.3, 3.0])  # flat: the nucleus is wider than the first guess
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.95])
def test_the_nucleus(spread: float, top_p: float) -> None:
    probabilities = random_logits(3, spread).softmax(-1)
    kept = cut_to_nucleus(probabilities, torch.full((3,), top_p))
    for row in range(3):
        expected = reference_nucleus(probabilities[row].double(), top_p)
        found = set(kept[row].nonzero().flatten().tolist())
        assert len(found ^ expected) <= 1, "sums may round differently at the edge"
        assert torch.equal(kept[row][list(found)], probabilities[row][list(found)])


def test_top_k_and_min_p_by_their_definition() -> None:
    probabilities = random_logits(3).softmax(-1)
    kept = cut_to_top_k(probabilities, [1, 7, VOCABULARY + 5])
    for row, count in enumerate((1, 7, VOCABULARY)):
        expected = set(probabilities[row].topk(count).indices.tolist())
        assert set(kept[row].nonzero().flatten().tolist()) == expected
    kept = cut_to_min_p(probabilities, torch.tensor([0.0, 0.2, 1.0]))
    for row, share in enumerate((0.0, 0.2, 1.0)):
        assert torch.equal(kept[row] > 0, probabilities[row] >= share * probabilities[row].max())
    tied = torch.tensor([[0.2, 0.3, 0.3, 0.2]])
    assert (cut_to_top_k(tied, [3]) > 0).all(), "what is as likely as the last one stays, whichever comes first"


def test_cuts_follow_each_other_and_leave_other_rows_alone() -> None:
    """min_p leaves 0.4, 0.3, 0.2; top_k two of them; of their sum, top_p=0.5 is reached by the first one."""
    row = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    options = [
        SamplingOptions(),
        SamplingOptions(min_p=0.4),
        SamplingOptions(min_p=0.4, top_k=2),
        SamplingOptions(min_p=0.4, top_k=2, top_p=0.55),
        SamplingOptions(top_p=0.55),
        SamplingOptions(top_k=4, top_p=0.5),
    ]
    together = row.repeat(len(options), 1)
    cut_probabilities(together, options)
    assert (together > 0).sum(1).tolist() == [5, 3, 2, 1, 2, 2]
    for index, option in enumerate(options):
        alone = row[None].clone()
        cut_probabilities(alone, [option])
        assert torch.equal(together[index] > 0, alone[0] > 0)
        torch.testing.assert_close(together[index] / together[index].sum(), alone[0] / alone[0].sum())


def test_an_answer_goes_on_until_it_has_its_least_number_of_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, 4.0]])
    row = RowSampler(SamplingOptions(temperature=0, min_tokens=2, end_ids=frozenset({2, 3})))
    chosen = []
    for _ in range(4):
        ((token,), _) = sample(logits, [row])
        assert isinstance(token, int)
        row.remember(token)
        chosen.append(token)
    assert chosen == [1, 1, 2, 2]


def test_a_grammar_may_end_an_answer_before_its_least_number_of_tokens(processor: DeepseekVLV2Processor) -> None:
    compiler = GrammarCompiler(TokenBytes(processor.tokenizer, [0, 1]), 129_280, [1])
    options = SamplingOptions(temperature=0, min_tokens=5, end_ids=frozenset({1}))
    row = RowSampler(options, compiler.regex("a?"))
    logits = torch.zeros(1, 129_280)
    written = []
    for _ in range(2):
        ((token,), _) = sample(logits, [row])
        assert isinstance(token, int)
        row.remember(token)
        written.append(token)
    assert written == [processor.encode("a", bos=False)[0], 1], "the end where the grammar leaves nothing else"


def test_no_row_looks_at_another() -> None:
    logits = random_logits(8)
    logits[4] *= 0.1
    options = [
        *(SamplingOptions(temperature=0), SamplingOptions(seed=1), SamplingOptions(seed=2, top_p=0.9)),
        SamplingOptions(seed=3, temperature=0.3, logit_bias={5: 3.0}),
        SamplingOptions(seed=4, top_p=0.7, presence_penalty=1.0, frequency_penalty=0.5),
        SamplingOptions(seed=5, repetition_penalty=1.3, top_logprobs=2),
        SamplingOptions(seed=6, top_k=20, min_p=0.01),
        SamplingOptions(seed=7, top_k=50, top_p=0.9, min_tokens=5, end_ids=frozenset(range(100))),
    ]

    def write(chosen: list[int]) -> list[list[int]]:
        samplers, written = [RowSampler(options[i]) for i in chosen], []
        for step in range(12):
            tokens, _ = sample(logits[chosen].roll(step, dims=1), samplers)
            for sampler, token in zip(samplers, tokens, strict=True):
                assert isinstance(token, int)
                sampler.remember(token)
            written.append(tokens)
        return [list(column) for column in zip(*written, strict=True)]

    everyone = list(range(len(options)))
    together = write(everyone)
    assert together == [write([i])[0] for i in everyone]
    assert together == write(everyone[::-1])[::-1]


def test_greedy_takes_the_likeliest() -> None:
    logits = random_logits(4)
    tokens, logprobs = sample(logits, rows(4, temperature=0))
    assert tokens == logits.argmax(-1).tolist() and logprobs == [None] * 4


def test_bias_and_penalties() -> None:
    row = RowSampler(
        SamplingOptions(
            temperature=0, logit_bias={3: 4.0}, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0
        ),
        prompt_ids=[1, 2],
    )
    logits = torch.tensor([1.0, 2.0, -2.0, 0.0, 8.0])
    expected = torch.tensor([1.0, 1.0, -4.0, 4.0, 8.0])
    first = logits.clone()
    row.apply_rules(first)
    torch.testing.assert_close(first, expected)
    row.remember(4)
    row.remember(4)
    second = logits.clone()
    row.apply_rules(second)
    torch.testing.assert_close(second, torch.tensor([1.0, 1.0, -4.0, 4.0, 8.0 / 2 - 0.5 - 2 * 0.25]))
    assert sample(logits[None], [row])[0] == [3]
    assert logits.tolist() == [1.0, 2.0, -2.0, 0.0, 8.0], "the model's logits stay as they are"


def test_log_probabilities_are_the_models() -> None:
    logits = random_logits(3)
    samplers = rows(2, temperature=0, top_logprobs=4, logit_bias={7: 100.0}) + rows(1, temperature=0)
    tokens, found = sample(logits, samplers)
    assert tokens[:2] == [7, 7] and found[2] is None
    expected = logits.log_softmax(-1)
    for row in range(2):
        assert found[row] is not None
        assert found[row].chosen == pytest.approx(float(expected[row, 7]))
        values, ids = expected[row].topk(4)
        assert [i for i, _ in found[row].top] == ids.tolist()
        assert [value for _, value in found[row].top] == pytest.approx(values.tolist())


@pytest.fixture(scope="module")
def compiler(processor: DeepseekVLV2Processor) -> GrammarCompiler:
    """Return a compiler for the golden tokenizer."""
    return GrammarCompiler(TokenBytes(processor.tokenizer, [0, 1]), 129_280, [1])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True},
        {"not": {"type": "string"}},
        {"type": "string", "format": "no such format"},
        {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True},
        {"$ref": "#"},
        False,
    ],
)
def test_what_a_grammar_cannot_enforce_is_refused(compiler: GrammarCompiler, schema: object) -> None:
    with pytest.raises(ValueError, match="This json_schema cannot be used"):
        compiler.json_schema(schema)


@pytest.mark.parametrize("pattern", ["(", "a{3,1}", "(?=a)b", r"(a)\1", "(" * 3000, "x" * 200_000, "\ud800"])
def test_patterns_that_are_refused(compiler: GrammarCompiler, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regular expression|This regex") as caught:
        compiler.regex(pattern)
    assert len(str(caught.value)) < 500


def test_a_constraint_follows_its_pattern(compiler: GrammarCompiler, processor: DeepseekVLV2Processor) -> None:
    constraint = compiler.regex(r"<\|ref\|>cat<\|/ref\|>[0-9]{1,2}")
    for token in processor.encode("<|ref|>cat<|/ref|>7", bos=False):
        assert constraint.allowed()[token]
        constraint.advance(token)
    assert not constraint.finished and constraint.allowed()[1], "it may end here"
    with pytest.raises(GrammarError):
        constraint.advance(processor.encode("x", bos=False)[0])


@pytest.mark.parametrize("pattern", ["(a{1,1000}){1,1000}", "(.{1,500}a){1,500}", "[ab]*a[ab]{40}", ".*" * 300])
def test_heavy_patterns_are_bounded(compiler: GrammarCompiler, processor: DeepseekVLV2Processor, pattern: str) -> None:
    """They may work or be given up, but neither takes long nor takes the process down."""
    start = time.process_time()
    token = processor.encode("a", bos=False)[0]
    with contextlib.suppress(GrammarError, ValueError):
        constraint = compiler.regex(pattern)
        for _ in range(30):
            constraint.allowed()
            constraint.advance(token)
    assert time.process_time() - start < 10
