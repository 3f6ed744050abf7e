"""Answers that follow a JSON schema or a regular expression, through llguidance.

That library was chosen among its kind because it refuses what it cannot enforce (others drop parts of a schema in
silence), bounds the work of each step, and installs everywhere, without a GPU and without dependencies. The work of
compiling it does not bound: `grammar_process` does.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import llguidance
import numpy as np
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from deepseek_vl2.engine.detokenizer import TokenBytes

from .grammar_rules import MAX_REASON, Kind, build_tokenizer, check_length, compile_matcher


class GrammarError(RuntimeError):
    """A grammar that cannot be followed any further; the request's own fault."""


# Seconds of a CPU that following a grammar may take. All answers wait for each other's steps, and those of an ambiguous
# grammar take longer and longer; those of 400 properties, 1024 choices or 300 alternatives take less than half a
# millisecond. First masks, of lexers with many states, take some 40 ms.
FIRST_SECONDS, TOKEN_SECONDS = 0.5, 0.004


class Constraint:
    """Where one answer stands in its grammar.

    Args:
        matcher: the library's.
        vocabulary: the number of the model's logits.

    Attributes:
        seconds: of a CPU, spent so far.
        tokens: taken so far.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self.matcher = matcher
        self.vocabulary = vocabulary
        self._bits = allocate_token_bitmask(1, vocabulary)
        self.seconds = 0.0
        self.tokens = 0

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [vocabulary].

        Raises:
            GrammarError: none may, or the grammar takes more work than its bounds allow.
        """
        with self._timed():
            fill_next_token_bitmask(self.matcher, self._bits)  # other threads run meanwhile
        allowed = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little", count=self.vocabulary).astype(bool)
        if not allowed.any():
            raise GrammarError("The grammar leaves no token to go on with.")
        return torch.from_numpy(allowed)

    def advance(self, token: int) -> None:
        """Go on by one token.

        Raises:
            GrammarError: the token is not allowed, or the grammar takes more work than its bounds allow.
        """
        self.tokens += 1
        with self._timed():
            self.matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return self.matcher.is_stopped()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.thread_time()
        yield
        self.seconds += time.thread_time() - begin
        if self.matcher.is_error():
            reason = self.matcher.get_error().split("\n<")[0][:MAX_REASON]
            raise GrammarError(f"The grammar could not be followed: {reason}")
        if self.seconds > FIRST_SECONDS + self.tokens * TOKEN_SECONDS:
            raise GrammarError(
                f"The grammar could not be followed: {self.tokens} tokens took {self.seconds:.1f} seconds. It can be "
                "read in too many ways; make it less ambiguous."
            )


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
