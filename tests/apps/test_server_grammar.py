"""Grammars: what is refused, what is bounded, and following one."""

from __future__ import annotations

import contextlib
import time

import pytest
import server_support  # noqa: F401  (skips where the extra is missing)

from deepseek_vl2.engine.detokenizer import TokenBytes
from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.serve.api.grammar import GrammarCompiler, GrammarError


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
