"""What a call of the processor was given: one sample or several, and which images belong to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from .image_modes import Background
from .messages import IMAGE_PLACEHOLDER, messages_to_conversation
from .prompt_encoding import check_tags
from .turns import walk_turns


@dataclass(frozen=True)
class ImageOptions:
    """How the images of a call are read and cut.

    Fields:
        cropping: cut images into tiles; ``None``: while there are at most two images.
        candidate_resolutions: (width, height) pairs, in pixels, instead of the processor's own.
        max_pixels: refuse larger images.
        background: the colour under transparent pixels, or ``None`` to drop their alpha; ``...``: the processor's own.
    """

    cropping: bool | None = None
    candidate_resolutions: Sequence[Sequence[int]] | None = None
    max_pixels: int | None = None
    background: Background | EllipsisType = ...


def as_list(text: Any, prompt: Any, conversations: Any) -> tuple[list[Any], bool]:
    """Return the inputs as a list, and whether there was a single one."""
    if conversations is not None:
        single = not conversations or isinstance(conversations[0], Mapping)
        return ([conversations] if single else list(conversations)), single
    source = prompt if text is None else text
    return ([source], True) if isinstance(source, str) else (list(source), False)


def distribute_images(
    images: Any, sources: list[Any], single: bool, template: str, image_token: str
) -> list[Sequence[Any] | None]:
    """Give each input its images: a list of its own, or as many of one flat list as it has tags.

    Raises:
        ValueError: the lists, or images and tags, differ in number.
    """
    if images is None:
        return [None] * len(sources)
    images = list(images)
    nested = bool(images) and all(item is None or isinstance(item, (list, tuple)) for item in images)
    if single:
        return [list(images[0] or []) if nested else images]
    if nested:
        if len(images) != len(sources):
            raise ValueError(f"{len(images)} lists of images were given for {len(sources)} inputs.")
        return [list(item or []) for item in images]
    counts = [_count_tags(source, template, image_token) for source in sources]
    check_tags(sum(counts), len(images), image_token)
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [images[start : start + count] for start, count in zip(starts, counts, strict=True)]


def _count_tags(source: Any, template: str, image_token: str) -> int:
    if isinstance(source, str):
        return source.replace(IMAGE_PLACEHOLDER, image_token).count(image_token)
    conversation = messages_to_conversation(source, image_token, lambda part: None)
    return sum(turn.count_tags(image_token) for turn in walk_turns(conversation, template, image_token))
