"""From tokens to text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_vl2.serve.streaming import StopWordFilter

from .sampling import TokenLogprobs
from .token_bytes import TokenBytes


@dataclass(frozen=True)
class ShownToken:
    """A token whose text has been shown (or is empty), its log probabilities, and where its text begins."""

    token_id: int
    logprobs: TokenLogprobs | None
    start: int = 0


class AnswerText:
    """Turns tokens into text up to the first stop word; nothing is shown that may be the beginning of one.

    Args:
        token_bytes: the tokenizer's table.
        stop_words: what ends the answer, itself not shown.
    """

    def __init__(self, token_bytes: TokenBytes, stop_words: Sequence[str] = ()) -> None:
        self.token_bytes = token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.words = StopWordFilter(stop_words)
        self.decoded = 0
        self.shown = 0
        self.waiting: list[ShownToken] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop word came."""
        return self.words.stopped

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None, may_stop: bool = True) -> str:
        """Add a token; return the text that can be shown.

        Args:
            token_id: the token.
            logprobs: its log probabilities.
            may_stop: whether its text may end the answer; it does not where the answer is still too short.
        """
        if token_id in self.token_bytes.hidden:
            return ""
        self.waiting.append(ShownToken(token_id, logprobs, self.decoded))
        text = self.decoder.decode(self.token_bytes[token_id])
        self.decoded += len(text)
        return self._show(self.words.push(text) if may_stop else text)

    def finish(self) -> str:
        """Return the rest of the text, at the end of the answer."""
        if self.stopped:
            return ""
        text = self.decoder.decode(b"", final=True)
        shown = self.words.push(text) if text else ""
        return self._show(shown if self.stopped else shown + self.words.flush())

    def _show(self, text: str) -> str:
        self.shown += len(text)
        return text

    def take_tokens(self, finished: bool = False) -> list[ShownToken]:
        """Return the tokens, not yet taken, whose text begins within what has been shown.

        At the end (``finished``) those go too that show nothing; tokens of a stop word never do.
        """
        count = 0
        for token in self.waiting:
            if token.start >= self.shown and not (finished and not self.stopped):
                break
            count += 1
        taken = self.waiting[:count]
        del self.waiting[:count]
        return taken
