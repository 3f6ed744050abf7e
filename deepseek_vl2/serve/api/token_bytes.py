"""The bytes behind each token of a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


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
