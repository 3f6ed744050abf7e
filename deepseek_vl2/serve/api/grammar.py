"""Answers that follow a JSON schema or a regular expression, through llguidance.

That library was chosen among its kind because it refuses what it cannot enforce (others drop parts of a schema in
silence), bounds the work that a grammar may cause, and installs everywhere, without a GPU and without dependencies.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance
import numpy as np
import torch

from .structured import Kind
from .token_bytes import TokenBytes

MAX_GRAMMAR_CHARACTERS = 100_000
# No blanks: they cost tokens, and a model may fall into writing them without end.
JSON_OPTIONS: Any = {"whitespace_flexible": False, "lenient": False}
NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar", "tools": "grammar of tools"}
# One to two kB each, and as many matchers may live as there are slots and waiting requests.
MAX_LEXER_STATES = 20_000
MAX_REASON = 300  # characters of the library's explanation


class GrammarError(RuntimeError):
    """A grammar that cannot be followed any further; the request's own fault."""


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self.matcher = matcher
        self.vocabulary = vocabulary

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [vocabulary].

        Raises:
            GrammarError: none may, or the grammar takes more work than its bounds allow.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little", count=self.vocabulary).astype(bool)
        if not allowed.any():
            raise GrammarError("The grammar leaves no token to go on with.")
        return torch.from_numpy(allowed)

    def advance(self, token: int) -> None:
        """Go on by one token.

        Raises:
            GrammarError: the token is not allowed.
        """
        self.matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return self.matcher.is_stopped()

    def _check(self) -> None:
        if self.matcher.is_error():
            reason = self.matcher.get_error().split("\n<")[0][:MAX_REASON]
            raise GrammarError(f"The grammar could not be followed: {reason}")


class GrammarTokenizer:
    """A tokenizer as llguidance wants to see it.

    The tags of boxes are ordinary text here: to the library's own reading of a tokenizer's files they are special, and
    special tokens satisfy no grammar; but a pattern with boxes in it means their tags.

    Args:
        token_bytes: the tokenizer's table; what it hides stays special.
        vocabulary: the number of the model's logits.
        eos_id: what ends an answer.
    """

    bos_token_id = None

    def __init__(self, token_bytes: TokenBytes, vocabulary: int, eos_id: int) -> None:
        self.tokenizer = token_bytes.tokenizer
        self.eos_token_id = eos_id
        self.tokens = [token_bytes[i] for i in range(vocabulary)]
        self.special_token_ids = [i for i, raw in enumerate(self.tokens) if not raw or i in token_bytes.hidden]

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text."""
        return self.tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)


class GrammarCompiler:
    """Makes constraints for one tokenizer.

    Args:
        token_bytes: the tokenizer's table.
        vocabulary: the number of the model's logits.
        eos_ids: what may end an answer.
    """

    def __init__(self, token_bytes: TokenBytes, vocabulary: int, eos_ids: list[int]) -> None:
        self.vocabulary = vocabulary
        wrapper = llguidance.TokenizerWrapper(GrammarTokenizer(token_bytes, vocabulary, eos_ids[0]))
        self.tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=vocabulary, eos_token=eos_ids)

    def constraint(self, kind: Kind, text: str) -> Constraint:
        """Return a constraint to a grammar, JSON schema or pattern (in the syntax of Rust's regex crate).

        Raises:
            ValueError: it is not valid, or asks for what cannot be enforced (such as look-around, or ``uniqueItems``).
        """
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            raise ValueError(
                f"The {NAMES[kind]} has {len(text):,} characters, more than the {MAX_GRAMMAR_CHARACTERS:,} allowed."
            )
        try:
            grammar = self._write(kind, text)
            problem = llguidance.LLMatcher.validate_grammar(grammar, self.tokenizer)
            if problem and not (kind == "tools" and problem.startswith("WARNING")):  # of tools that are not strict
                raise ValueError(problem)
            limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
            matcher = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits)
            constraint = Constraint(matcher, self.vocabulary)
            constraint.allowed()  # what is too large shows when the first mask is computed
        except (ValueError, RuntimeError, RecursionError) as error:
            raise ValueError(f"This {kind} cannot be used: {str(error)[:MAX_REASON]}") from error
        return constraint

    @staticmethod
    def _write(kind: Kind, text: str) -> str:
        if kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(text)
        if kind == "json_schema":
            return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
        return llguidance.LLMatcher.grammar_from_lark(text)

    def json_schema(self, schema: Any) -> Constraint:
        """Return a constraint to JSON of a schema; errors as `constraint`."""
        return self.constraint("json_schema", json.dumps(schema))

    def regex(self, pattern: str) -> Constraint:
        """Return a constraint to a whole answer that matches a pattern; errors as `constraint`."""
        return self.constraint("regex", pattern)
