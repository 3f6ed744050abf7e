"""How the samples of a call are cut, padded and handed over, by the names that transformers' processors take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .batch import OutputWithTiles, VLChatProcessorOutput
from .config_fields import COUNT, FROM_ZERO

GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")
# transformers' names of what becomes of pairs of texts; there is one text.
TRUNCATIONS = {"longest_first": True, "only_first": True, "do_not_truncate": False}
PADDINGS = (True, False, "longest", "max_length", "do_not_pad", "left", "right")
TENSORS = ("pt", "np")
MOST_TOKENS = 10**9  # a tokenizer without a limit of its own names a far greater one


def take_groups(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take transformers' groups of keywords out of ``kwargs`` and return what they hold."""
    found: dict[str, Any] = {}
    for group in GROUPS:
        values = kwargs.pop(group, None)
        check_keywords(group, values)
        found.update(values or {})
    return found


def check_keywords(name: str, values: Any) -> None:
    """Raise ``ValueError`` for what is no dict of keywords; ``None`` stands for an empty one."""
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"{name} is a dict of keywords, got {type(values).__name__}.")


@dataclass(frozen=True)
class BatchOptions:
    """What becomes of a call's samples.

    Fields:
        padding: True or "longest", the default; "max_length"; "left" or "right", which name the side too; False: none,
            see `is_ragged`.
        padding_side: "left" (generation needs it) or "right"; by default the tokenizer's.
        truncation: drop what is behind ``max_length`` tokens; images are never cut. transformers' names of ways to do
            so are known too.
        max_length: in tokens.
        pad_to_multiple_of: pad on to a multiple of so many tokens.
        return_tensors: "pt", the default, or "np".

    Raises:
        ValueError: a value that is none of these, or ``max_length`` that nothing uses.
    """

    padding: bool | str | None = None
    padding_side: str | None = None
    truncation: bool | str = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = None

    def __post_init__(self) -> None:
        if self.padding is not None and self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {self.padding!r}.")
        if self.padding_side not in (None, "left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {self.padding_side!r}.")
        if isinstance(self.truncation, str) and self.truncation in TRUNCATIONS:
            object.__setattr__(self, "truncation", TRUNCATIONS[self.truncation])
        if not isinstance(self.truncation, bool):
            raise ValueError(f"truncation must be True or False, got {self.truncation!r}: ends are cut.")
        if self.return_tensors is not None and self.return_tensors not in TENSORS:
            raise ValueError(f"return_tensors must be 'pt' or 'np', got {self.return_tensors!r}.")
        if self.max_length is not None and not COUNT.allows(self.max_length):
            raise ValueError(f"max_length must be positive, got {self.max_length!r}.")
        if self.pad_to_multiple_of is not None and not FROM_ZERO.allows(self.pad_to_multiple_of):
            raise ValueError(f"pad_to_multiple_of must be {FROM_ZERO}, got {self.pad_to_multiple_of!r}.")
        if self.max_length is not None and not self.truncation and self.padding != "max_length":
            raise ValueError("max_length does nothing alone: give truncation=True, padding='max_length' or both.")

    @classmethod
    def of(cls, options: dict[str, Any]) -> BatchOptions:
        """Return options of which ``None`` stands for the default."""
        return cls(**{name: value for name, value in options.items() if value is not None})

    def is_left(self, tokenizer: Any) -> bool:
        """Whether padding stands on the left."""
        named = self.padding if self.padding in ("left", "right") else None
        return (self.padding_side or named or tokenizer.padding_side) == "left"

    def limit(self, tokenizer: Any) -> int | None:
        """Return the most tokens of a sample, or ``None``.

        Raises:
            ValueError: there is to be one, and neither the call nor the tokenizer names it.
        """
        if self.max_length is not None or not (self.truncation or self.padding == "max_length"):
            return self.max_length
        own = int(tokenizer.model_max_length)
        if own >= MOST_TOKENS:
            raise ValueError("truncation and padding='max_length' need max_length: this tokenizer names none.")
        return own

    def cut(self, samples: Sequence[VLChatProcessorOutput], limit: int | None) -> None:
        """Cut overlong samples in place, where that is asked for.

        Raises:
            ValueError: an image would be cut, or a sample is longer than it is to be padded to.
        """
        for sample in samples:
            length = len(sample)
            if limit is None or length <= limit:
                continue
            if not self.truncation:
                raise ValueError(f"A prompt has {length} tokens, more than max_length={limit}: give truncation=True.")
            if bool(sample["images_seq_mask"][limit:].any()):
                raise ValueError(
                    f"A prompt has {length} tokens, and max_length={limit} would cut its image: raise max_length, or "
                    "give cropping=False for fewer tokens an image."
                )
            for name in ("input_ids", "target_ids", "images_seq_mask", "assistant_mask"):
                if name in sample:
                    sample[name] = sample[name][:limit]

    def is_ragged(self, is_default: bool) -> bool:
        """Whether rows stay as long as they are, as lists; ``is_default``: where nothing else is asked for."""
        if self.return_tensors is not None or self.pad_to_multiple_of is not None:
            return False
        return self.padding in (False, "do_not_pad") or (self.padding is None and is_default)

    def padded_length(self, lengths: Sequence[int], limit: int | None) -> int:
        """Return how long all rows become.

        Raises:
            ValueError: they differ and are not to be padded.
        """
        longest = max(lengths)
        if self.padding in (False, "do_not_pad") and len(set(lengths)) > 1:
            raise ValueError(f"The samples have {', '.join(map(str, lengths))} tokens: a batch needs padding=True.")
        length = limit if self.padding == "max_length" and limit is not None else longest
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    def hand_over(self, out: OutputWithTiles) -> Any:
        """Return an output with its tensors as asked for."""
        if self.return_tensors == "np":
            for name, value in list(out.items()):
                if isinstance(value, torch.Tensor):
                    out[name] = value.numpy()
        return out
