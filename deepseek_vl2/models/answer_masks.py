"""Which tokens of a rendered conversation are an assistant's, for trainers that take the loss on those alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from .messages import IMAGE_PLACEHOLDER
from .prompt_encoding import PromptEncoder, TokenSequence

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_with_answers(messages: Sequence[Any], template: str, variables: dict[str, Any]) -> tuple[str, bytearray]:
    """Render one conversation, and tell for each character whether it is an answer's.

    Raises:
        ValueError: the template does not mark answers.
    """
    if not MARKS.search(template):
        raise ValueError(
            "return_assistant_tokens_mask needs a chat template that marks answers, as {% generation %} ... "
            "{% endgeneration %}: this one does not."
        )
    texts, spans = render_jinja_template(
        conversations=[[dict(message) for message in messages]],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **variables,
    )
    answered = bytearray(len(texts[0]))
    for start, end in spans[0]:
        answered[start:end] = b"\1" * (end - start)
    return texts[0], answered


def spans_of_tokens(encoder: PromptEncoder, text: str) -> list[tuple[int, int]]:
    """Return where each token of a text stands in it, as ``encoder`` splits it; a tag that is text counts as one."""
    pieces = re.split("(" + "|".join(map(re.escape, encoder.literals)) + ")", text)
    spans: list[tuple[int, int]] = []
    start = 0
    for piece in filter(None, pieces):
        literal = encoder.literals.get(piece)
        if literal is not None:
            spans += [(start, start + len(piece))] * len(literal)
        else:
            found = encoder.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            spans += [(start + first, start + last) for first, last in found["offset_mapping"]]
        start += len(piece)
    return spans


def answer_mask(encoder: PromptEncoder, text: str, answered: bytearray, sequence: TokenSequence) -> list[bool]:
    """Return which tokens of a rendered text are an answer's, in the order of `PromptEncoder.encode_rendered`.

    Args:
        encoder: what encoded it.
        text: as it was rendered.
        answered: of each character, whether it is an answer's.
        sequence: what the text became.
    """
    while (place := text.find(IMAGE_PLACEHOLDER)) >= 0:
        end = place + len(IMAGE_PLACEHOLDER)
        text = text[:place] + encoder.image_token + text[end:]
        answered = answered[:place] + bytes(len(encoder.image_token)) + answered[end:]
    bos = encoder.tokenizer.bos_token
    if text.startswith(bos):
        text, answered = text.removeprefix(bos), answered[len(bos) :]
    mask = [False]
    images = iter(sequence.num_image_tokens)
    position = 0
    for turn in re.split(r"(?<=<\|Assistant\|>:)", text):
        skipped = int(position > 0 and turn.startswith(" "))  # a printed answer's first space
        position += skipped
        for index, piece in enumerate(turn[skipped:].split(encoder.image_token)):
            if index:
                mask += [False] * next(images)
                position += len(encoder.image_token)
            mask += [any(answered[position + a : position + b]) for a, b in spans_of_tokens(encoder, piece)]
            position += len(piece)
    return mask
