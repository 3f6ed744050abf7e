"""How long an answer took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_vl2.serve.streaming import Answer


@dataclass
class Stats:
    """Tokens and times of one answer; loading the model is not part of them.

    Fields:
        prompt_tokens: tokens of the prompt, those of images included.
        new_tokens: tokens generated, the end token included.
        first_token_seconds: from the question, before its images are cut into tiles, to the first text shown.
        tokens_per_second: of the tokens after that one; ``None`` where there are none.
        seconds: from the question to the end.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None
    seconds: float = 0.0
    _begun: float = 0.0
    _first: tuple[float, int] | None = None

    def begin(self, now: float) -> None:
        """The question is there; ``now`` in seconds of any clock."""
        self._begun, self._first = now, None

    def count(self, now: float, tokens: int) -> None:
        """Text of the answer is there, of which so many tokens are generated."""
        if self._first is None:
            self._first = now, tokens
            self.first_token_seconds = now - self._begun

    def end(self, now: float, answer: Answer) -> None:
        """The answer is complete."""
        self.prompt_tokens, self.new_tokens = answer.prompt_tokens, answer.completion_tokens
        self.seconds = now - self._begun
        if self._first is not None:
            begun, tokens = self._first
            more = answer.completion_tokens - tokens
            self.tokens_per_second = more / (now - begun) if more > 0 and now > begun else None

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` shows."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "first_token_seconds": self.first_token_seconds,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        parts = [f"{self.prompt_tokens} prompt tokens", f"{self.new_tokens} new tokens"]
        if self.first_token_seconds is not None:
            parts.append(f"first token after {self.first_token_seconds:.2f} s")
        if self.tokens_per_second is not None:
            parts.append(f"then {self.tokens_per_second:.1f} tokens/s")
        return f"{', '.join(parts)}; {self.seconds:.2f} s in all"
