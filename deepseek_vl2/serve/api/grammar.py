"""Answers that follow a JSON schema or a regular expression, through llguidance.

That library was chosen among its kind because it refuses what it cannot enforce (others drop parts of a schema in
silence), bounds the work of each step, and installs everywhere, without a GPU and without dependencies. The work of
compiling it does not bound: `grammar_process` does.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance
import numpy as np
import torch

from deepseek_vl2.engine.detokenizer import TokenBytes

from .grammar_rules import MAX_REASON, Kind, build_tokenizer, check_length, compile_matcher


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


class GrammarCompiler:
    """Makes constraints for one tokenizer.

    The tags of boxes are ordinary text here: to the library's own reading of a tokenizer's files they are special, and
    special tokens satisfy no grammar; but a pattern with boxes in it means their tags.

    Args:
        token_bytes: the tokenizer's table; what it hides stays special.
        vocabulary: the number of the model's logits.
        eos_ids: what may end an answer.
    """

    def __init__(self, token_bytes: TokenBytes, vocabulary: int, eos_ids: list[int]) -> None:
        self.vocabulary = vocabulary
        self.eos_ids = eos_ids
        self.tokens = [token_bytes[i] for i in range(vocabulary)]
        self.special = [i for i, raw in enumerate(self.tokens) if not raw or i in token_bytes.hidden]
        encode = token_bytes.tokenizer.encode
        self.tokenizer = build_tokenizer(
            self.tokens,
            self.special,
            eos_ids,
            lambda text: encode(text.decode(errors="replace"), add_special_tokens=False),
        )

    def matcher(self, kind: Kind, text: str) -> llguidance.LLMatcher:
        """Compile a grammar, in this process and however long it takes; see `grammar_process` for strangers' ones.

        Raises:
            ValueError: it is not valid, or asks for what cannot be enforced.
        """
        check_length(kind, text)
        return compile_matcher(self.tokenizer, kind, text)

    def constraint(self, kind: Kind, text: str) -> Constraint:
        """Return a constraint to a grammar, JSON schema or pattern (in the syntax of Rust's regex crate).

        Raises:
            ValueError: it is not valid, or asks for what cannot be enforced (such as look-around, or ``uniqueItems``).
        """
        return Constraint(self.matcher(kind, text), self.vocabulary)

    def json_schema(self, schema: Any) -> Constraint:
        """Return a constraint to JSON of a schema; errors as `constraint`."""
        return self.constraint("json_schema", json.dumps(schema))

    def regex(self, pattern: str) -> Constraint:
        """Return a constraint to a whole answer that matches a pattern; errors as `constraint`."""
        return self.constraint("regex", pattern)
