"""What a call of the processor was given: one sample or several, and which images belong to which."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType, NoneType
from typing import Any

from PIL import Image

from .array_images import as_images, is_array
from .config_fields import check_sizes, is_whole
from .image_modes import Background
from .messages import IMAGE_PLACEHOLDER, check_messages, messages_to_conversation
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

    def __post_init__(self) -> None:
        if not isinstance(self.cropping, (bool, NoneType)):
            raise ValueError(f"cropping must be True, False or None, got {self.cropping!r}.")
        if self.max_pixels is not None and not is_whole(self.max_pixels):
            raise ValueError(f"max_pixels must be a whole number, got {self.max_pixels!r}.")
        if self.candidate_resolutions is not None:
            check_sizes("candidate_resolutions", self.candidate_resolutions)


def as_image_list(images: Any) -> Any:
    """Return the images of a call as a list: a single one, whatever it is given as, becomes a list of one."""
    if is_array(images):
        return as_images(images)
    if isinstance(images, (Image.Image, str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(images, "read"):
        return [images]
    if images is not None and (isinstance(images, Mapping) or not isinstance(images, Iterable)):
        raise ValueError(f"images is a list of images, got {type(images).__name__}.")
    return images


def as_list(text: Any, prompt: Any, conversations: Any) -> tuple[list[Any], bool]:
    """Return the inputs as a list, and whether there was a single one."""
    if conversations is not None:
        if isinstance(conversations, (str, bytes, Mapping)) or not isinstance(conversations, Sequence):
            check_messages(conversations)  # says what a conversation is
        single = not conversations or isinstance(conversations[0], Mapping)
        return ([conversations] if single else list(conversations)), single
    name, source = ("prompt", prompt) if text is None else ("text", text)
    if isinstance(source, str):
        return [source], True
    if source is None:
        check_messages(source)
    texts = list(source) if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray, Mapping)) else []
    wrong = next((each for each in texts if not isinstance(each, str)), None)
    if not texts or wrong is not None:
        found = f"{source!r:.40}" if wrong is None else type(wrong).__name__
        raise ValueError(f"{name} must be a text, or a list of some, got {found}.")
    return texts, False


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
    if nested:
        if len(images) != len(sources):
            raise ValueError(f"{len(images)} lists of images were given for {len(sources)} inputs.")
        return [list(item or []) for item in images]
    if single:
        return [images]
    counts = [_count_tags(source, template, image_token) for source in sources]
    check_tags(sum(counts), len(images), image_token)
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [images[start : start + count] for start, count in zip(starts, counts, strict=True)]


def _count_tags(source: Any, template: str, image_token: str) -> int:
    if isinstance(source, str):
        return source.replace(IMAGE_PLACEHOLDER, image_token).count(image_token)
    conversation = messages_to_conversation(source, image_token, lambda part: None)
    return sum(turn.count_tags(image_token) for turn in walk_turns(conversation, template, image_token))
