"""How much one visitor may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of the demo; what goes beyond is refused with a message that names the bound.

    Attributes:
        images: most pictures in one message.
        file_mb: largest picture file, in megabytes.
        pixels: most pixels of one picture.
        characters: longest message.
        turns: longest conversation, in questions.
        new_tokens: upper end of the answer's length.
        history_tokens: upper end of the prompt's length: conversation, pictures and all.
        waiting: most requests in the line behind the one at work.
    """

    images: int = 8
    file_mb: int = 20
    pixels: int = 50_000_000
    characters: int = 8_000
    turns: int = 100
    new_tokens: int = 4_096
    history_tokens: int = 8_192
    waiting: int = 16
