"""From tokens to text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deepseek_vl2.serve.streaming import StopWordFilter

from .sampling import TokenLogprobs


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
            raise ValueError("The server needs a byte-level tokenizer, as the ones of DeepSeek-VL2 are.")

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


@dataclass(frozen=True)
class ShownToken:
    """A token whose text has been shown (or is empty), and its log probabilities."""

    token_id: int
    logprobs: TokenLogprobs | None


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
        self.waiting: list[tuple[int, ShownToken]] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop word came."""
        return self.words.stopped

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> str:
        """Add a token; return the text that can be shown."""
        if token_id in self.token_bytes.hidden:
            return ""
        self.waiting.append((self.decoded, ShownToken(token_id, logprobs)))
        text = self.decoder.decode(self.token_bytes[token_id])
        self.decoded += len(text)
        return self._show(self.words.push(text))

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
        for start, _ in self.waiting:
            if start >= self.shown and not (finished and not self.stopped):
                break
            count += 1
        taken = [token for _, token in self.waiting[:count]]
        del self.waiting[:count]
        return taken
