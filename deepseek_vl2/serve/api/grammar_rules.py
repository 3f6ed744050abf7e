"""What a grammar may cost, and how it becomes a matcher.

The server and the process that tries grammars out first (`grammar_worker`) share this module, so that both do exactly
the same work. It imports llguidance and nothing else: that process is to start quickly and to stay small.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import llguidance

Kind = Literal["json_schema", "regex", "lark", "tools"]

MAX_GRAMMAR_CHARACTERS = 100_000
HEADER = struct.Struct("!I")  # before each message between the processes: its length
MAX_REASON = 300  # characters of the library's explanation
# No blanks: they cost tokens, and a model may fall into writing them without end.
JSON_OPTIONS: Any = {"whitespace_flexible": False, "lenient": False}
# These bound a step, which no process can be ended for: measured, the costliest mask takes some 40 ms; with ten times
# as many items, masks of ambiguous grammars take 200. A state of the lexer takes one to two kB, and as many matchers
# may live as there are slots and waiting requests.
LIMITS = llguidance.LLParserLimits(max_lexer_states=20_000, step_max_items=5_000, verbose_errors=False)
REHEARSED, REHEARSAL_SECONDS = 12, 0.3  # tokens that a grammar is followed for, and what they may take of a CPU
# The library's words for a grammar without a first token, and what it appends where it is to say little.
NOTHING, NOT_VERBOSE = "NoExtensionBias", "<non-verbose/>"
NOTHING_FITS = "no text satisfies it."
NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar", "tools": "grammar of tools"}


class VocabularyTokenizer:
    """A tokenizer as llguidance wants to see it.

    Args:
        tokens: the bytes of each token.
        special: ids that satisfy no grammar.
        eos_id: what ends an answer.
        encode: returns the tokens of a text.
    """

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], eos_id: int, encode: Callable[[bytes], list[int]]
    ) -> None:
        self.tokens = list(tokens)
        self.special_token_ids = list(special)
        self.eos_token_id = eos_id
        self.encode = encode

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text."""
        return self.encode(text)


def build_tokenizer(
    tokens: Sequence[bytes], special: Sequence[int], eos_ids: Sequence[int], encode: Callable[[bytes], list[int]]
) -> llguidance.LLTokenizer:
    """Return the library's own form of a vocabulary."""
    wrapper = llguidance.TokenizerWrapper(VocabularyTokenizer(tokens, special, eos_ids[0], encode))
    return llguidance.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=list(eos_ids))


def check_length(kind: Kind, text: str) -> None:
    """Raise ``ValueError`` for a grammar that is too long to look at."""
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise ValueError(
            f"The {NAMES[kind]} has {len(text):,} characters, more than the {MAX_GRAMMAR_CHARACTERS:,} allowed."
        )


def compile_matcher(tokenizer: llguidance.LLTokenizer, kind: Kind, text: str) -> llguidance.LLMatcher:
    """Return a matcher that has computed its first mask: what is too large shows there.

    Raises:
        ValueError: the grammar is not valid, cannot be enforced, or takes more work than its bounds allow.
    """
    try:
        matcher = llguidance.LLMatcher(tokenizer, library_form(kind, text), log_level=0, limits=LIMITS)
        empty = not matcher.is_error() and not any(matcher.compute_bitmask())
    except (ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(unusable(kind, str(error))) from error
    # Warnings are of what is left out; with tools that are not strict, that is as it should be.
    problem = matcher.get_error() or ("" if kind == "tools" else " ".join(matcher.get_grammar_warnings()))
    if problem or empty:
        raise ValueError(unusable(kind, problem or "it leaves no token to begin with"))
    return matcher


def rehearse(matcher: llguidance.LLMatcher, kind: Kind) -> None:
    """Follow a grammar for a few tokens: what is cheap to begin with may take long, or much memory, from then on.

    Raises:
        ValueError: it takes more work than its bounds allow.
    """
    matcher = matcher.deep_copy()
    begin = time.thread_time()
    for _ in range(REHEARSED):
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or matcher.is_stopped() or not bits:
            break
        matcher.consume_token((bits & -bits).bit_length() - 1)  # the first that is allowed
    seconds = time.thread_time() - begin
    if matcher.is_error():
        raise ValueError(unusable(kind, matcher.get_error().split("\n<")[0]))
    if seconds > REHEARSAL_SECONDS:
        raise ValueError(unusable(kind, f"its first {REHEARSED} tokens take {seconds:.1f} seconds. Simplify it."))


def library_form(kind: Kind, text: str) -> str:
    """Return a grammar in the library's own notation."""
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    if kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    return llguidance.LLMatcher.grammar_from_lark(text)


def unusable(kind: Kind, reason: str) -> str:
    """Return the message for a grammar that cannot be used."""
    name = kind if kind in ("json_schema", "regex") else NAMES[kind]  # fields of a request are named as they are
    reason = reason.replace(NOT_VERBOSE, "").strip()
    return f"This {name} cannot be used: {NOTHING_FITS if NOTHING in reason else reason[:MAX_REASON]}"
