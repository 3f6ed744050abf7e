"""From tokens to text, as they come, up to a stop sequence."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .attached import attached


class TokenBytes:
    """The bytes that each token of a byte-level tokenizer stands for.

    Args:
        tokenizer: the model's tokenizer.
        hidden: ids that are not shown, such as the one that ends an answer.

    Raises:
        ValueError: the tokenizer is not byte-level.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.hidden = frozenset(hidden)
        self.added = tokenizer.get_added_vocab()
        self.byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
        self.known: dict[int, bytes] = {}
        probe = "Grüße, 世界 1"
        ids = tokenizer.encode(probe, add_special_tokens=False)
        if b"".join(self[i] for i in ids).decode(errors="replace") != probe:
            raise ValueError("The tokenizer is not byte-level, as the ones of DeepSeek-VL2 are.")

    def __getitem__(self, token_id: int) -> bytes:
        """Return a token's bytes; none for ids that the tokenizer does not know."""
        if token_id not in self.known:
            self.known[token_id] = self._read(token_id)
        return self.known[token_id]

    def _read(self, token_id: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if token in self.added or not all(symbol in self.byte_of for symbol in token):
            return token.encode()
        return bytes(self.byte_of[symbol] for symbol in token)

    def longest(self) -> int:
        """Return the length, in bytes, of the longest token."""
        return max(len(self[i]) for i in range(len(self.tokenizer)))


def token_bytes_of(tokenizer: PreTrainedTokenizerBase, hidden: Sequence[int] = ()) -> TokenBytes:
    """Return a tokenizer's table, which is kept with it.

    Raises:
        ValueError: the tokenizer is not byte-level.
    """
    held, key = attached(tokenizer), f"token_bytes {sorted(hidden)}"
    with held.lock:
        if key not in held.values:
            held.values[key] = TokenBytes(tokenizer, hidden)
        table: TokenBytes = held.values[key]
        return table


class StopFilter:
    """Pass a stream of text on up to the first stop sequence, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = [text for text in stop if text]
        self.pending = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence came."""
        return self.found is not None

    def push(self, text: str) -> str:
        """Add text to the stream; return what can be shown."""
        self.pending += text
        found = [(self.pending.index(stop), -len(stop), stop) for stop in self.stop if stop in self.pending]
        if found:
            start, _, self.found = min(found)
            shown, self.pending = self.pending[:start], ""
            return shown
        held = max((self._overlap(stop) for stop in self.stop), default=0)
        cut = len(self.pending) - held
        shown, self.pending = self.pending[:cut], self.pending[cut:]
        return shown

    def flush(self) -> str:
        """Return what was held back, at the end of the stream."""
        shown, self.pending = self.pending, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Return how many characters at the end of the pending text begin ``stop``."""
        longest = min(len(stop) - 1, len(self.pending))
        return next((n for n in range(longest, 0, -1) if self.pending.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of a chosen token and of the most likely ones, as the model gave them before any rule."""

    chosen: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class ShownToken:
    """A token whose text has been shown (or is empty), its log probabilities, and where in the answer it begins."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    start: int = 0


class Detokenizer:
    """Turns tokens into text up to the first stop sequence; nothing is shown that may be the beginning of one.

    Args:
        token_bytes: the tokenizer's table.
        stop: texts that end the answer, themselves not shown.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()) -> None:
        self.token_bytes = token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.filter = StopFilter(stop)
        self.decoded = 0
        self.shown = 0
        self.waiting: list[ShownToken] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence came."""
        return self.filter.stopped

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
        return self._show(self.filter.push(text) if may_stop else text)

    def finish(self) -> str:
        """Return the rest of the text, at the end of the answer."""
        if self.stopped:
            return ""
        text = self.decoder.decode(b"", final=True)
        shown = self.filter.push(text) if text else ""
        return self._show(shown if self.stopped else shown + self.filter.flush())

    def _show(self, text: str) -> str:
        self.shown += len(text)
        return text

    def take_tokens(self, finished: bool = False) -> list[ShownToken]:
        """Return the tokens, not yet taken, whose text begins within what has been shown.

        At the end (``finished``) those go too that show nothing; tokens of a stop sequence never do.
        """
        count = 0
        for token in self.waiting:
            if token.start >= self.shown and not (finished and not self.stopped):
                break
            count += 1
        taken = self.waiting[:count]
        del self.waiting[:count]
        return taken
