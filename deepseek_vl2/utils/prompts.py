"""Prompts that ask for boxes, in the forms that the released models were trained on.

The texts come without image tags; the builders of conversations put the images in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.models.messages import CHAT_TOKENS, GROUNDING_TOKENS, IMAGE_PLACEHOLDER
from deepseek_vl2.utils.drawing import Box, mark_object

IMAGE_TAG = "<image>"
IN_CONTEXT_QUESTION = (
    "In the first image, an object within the red rectangle is marked. "
    "Locate the object of the same category in the second image."
)


def _check(text: str, what: str) -> str:
    """Return a user's text, stripped.

    Raises:
        ValueError: it is empty or holds a tag, which would change the prompt's form.
    """
    text = text.strip()
    if not text:
        raise ValueError(f"{what} is empty: say what to look for.")
    tag = next((t for t in (*GROUNDING_TOKENS, *CHAT_TOKENS, IMAGE_TAG, IMAGE_PLACEHOLDER) if t in text), None)
    if tag is not None:
        raise ValueError(f"{what} must not hold the tag {tag}: {text!r}.")
    return text


def locate_prompt(thing: str) -> str:
    """Return the question where one thing is: "the giraffe at the back"."""
    return f"<|ref|>{_check(thing, 'The thing to locate')}<|/ref|>."


def locate_all_prompt(things: str) -> str:
    """Return the question where all things of a kind are: "watermelon slices"."""
    return f"Find all the <|ref|>{_check(things, 'The things to locate')}<|/ref|>"


def grounded_prompt(question: str) -> str:
    """Return a question whose answer names and locates what it speaks of."""
    return f"<|grounding|>{_check(question, 'The question')}"


def in_context_prompt(question: str = IN_CONTEXT_QUESTION) -> str:
    """Return the question for the thing in a second image that is like the marked one in the first."""
    return grounded_prompt(question)


def question_about(images: Sequence[Any], prompt: str) -> list[dict[str, Any]]:
    """Return a conversation of one question, its images in front unless the prompt says where they stand."""
    if IMAGE_TAG not in prompt and IMAGE_PLACEHOLDER not in prompt:
        prompt = f"{IMAGE_TAG}\n" * len(images) + prompt
    return [{"role": CHAT_TOKENS[0], "content": prompt, "images": list(images)}]


def locate(image: Any, thing: str) -> list[dict[str, Any]]:
    """Return the conversation that asks where one thing is; the image is a path, bytes, data URL or PIL image."""
    return question_about([image], locate_prompt(thing))


def locate_all(image: Any, things: str) -> list[dict[str, Any]]:
    """Return the conversation that asks where all things of a kind are."""
    return question_about([image], locate_all_prompt(things))


def grounded_chat(images: Sequence[Any], question: str) -> list[dict[str, Any]]:
    """Return the conversation of a question whose answer names and locates what it speaks of."""
    return question_about(images, grounded_prompt(question))


def in_context(
    example: Any, image: Any, box: Box | None = None, question: str = IN_CONTEXT_QUESTION
) -> list[dict[str, Any]]:
    """Return the conversation that shows a marked example and asks for its like in another image.

    Args:
        example: the first image.
        image: the second image, in which to look.
        box: (left, top, right, bottom), 0 to 999, of the example's object; it is marked with a red rectangle. ``None``
            when the example is marked already.
        question: another question than the released models' own.
    """
    shown: Any = example
    if box is not None:
        loaded = example if isinstance(example, Image.Image) else load_image(example)
        shown = mark_object(loaded, box)
    return question_about([shown, image], in_context_prompt(question))
