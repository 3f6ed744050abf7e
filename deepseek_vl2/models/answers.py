"""Answers with boxes: what `model.chat` says and `processor.post_process_grounding` reads."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, overload

from PIL import Image

from .image_loading import read_image

try:  # As a checkpoint's own code this stands alone, and the package need not be installed.
    from deepseek_vl2.utils.grounding import Grounding, parse_grounding
except ImportError:
    HAS_GROUNDING = False
else:
    HAS_GROUNDING = True


def read_boxes(text: str, images: Sequence[Any] | None, image: int = -1) -> Grounding:
    """Return the labelled boxes of an answer; see ``deepseek_vl2.utils.grounding.parse_grounding``.

    Args:
        text: the model's.
        images: the conversation's, as the processor takes them, or (width, height) in pixels of each.
        image: which of them the boxes are on; the last one unless told otherwise.

    Raises:
        ImportError: this runs as a checkpoint's own code, which draws nothing, and the package is not installed.
    """
    if not HAS_GROUNDING:
        raise ImportError("Boxes are read by the package deepseek_vl2, which is not installed.")
    sizes: list[Any] | None = None
    if images is not None:
        sizes = [one if isinstance(one, Image.Image) or _is_size(one) else read_image(one) for one in images]
    return parse_grounding(text, sizes or None, image)


def _is_size(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(side, int) for side in value)


class GroundingProcessor:
    """`post_process_grounding` of `DeepseekVLV2Processor`."""

    @overload
    def post_process_grounding(  # type: ignore[overload-overlap]
        self, text: str, images: Sequence[Any] | None = None, image: int = -1
    ) -> Grounding: ...

    @overload
    def post_process_grounding(
        self, text: Sequence[str], images: Sequence[Any] | None = None, image: int = -1
    ) -> list[Grounding]: ...

    def post_process_grounding(
        self, text: str | Sequence[str], images: Sequence[Any] | None = None, image: int = -1
    ) -> Grounding | list[Grounding]:
        """Return the labels and boxes of an answer, in pixels where images or sizes are given.

        Args:
            text: the answer, decoded with its special tokens, or a list of answers.
            images: the conversation's images, as the processor takes them, or the (width, height) of each, in pixels;
                one alone may be given as it is. For a list of answers, one of these for each.
            image: which of a conversation's images the boxes are on; the last one unless told otherwise.

        Returns:
            A `Grounding`: a sequence of objects with ``label``, ``boxes`` (0 to 999) and ``pixel_boxes``, which a
            notebook shows as the picture with its boxes; or a list of them.

        Raises:
            ValueError: answers and images differ in number, or there is no image of that index.
        """
        if isinstance(text, str):
            return read_boxes(text, _listed(images), image)
        if not isinstance(text, (list, tuple)) or not all(isinstance(each, str) for each in text):
            raise ValueError(f"An answer is a text, or a list of some, got {type(text).__name__}: decode it first.")
        rows = [None] * len(text) if images is None else list(images)
        if len(rows) != len(text):
            raise ValueError(f"{len(text)} answers were given, and images of {len(rows)}.")
        return [read_boxes(one, _listed(row), image) for one, row in zip(text, rows, strict=True)]


def _listed(images: Any) -> list[Any] | None:
    if images is None:
        return None
    return list(images) if isinstance(images, (list, tuple)) and not _is_size(images) else [images]


class ChatAnswer(str):
    """What `model.chat` answered: a text that knows the pictures it speaks of.

    Attributes:
        images: the conversation's, upright and RGB.
    """

    images: list[Image.Image]

    def __new__(cls, text: str, images: Sequence[Image.Image] = ()) -> ChatAnswer:
        answer = super().__new__(cls, text)
        answer.images = list(images)
        return answer

    @property
    def grounding(self) -> Grounding:
        """Its labels and boxes, in pixels of the last picture where there is one."""
        return read_boxes(self, self.images or None)

    def _repr_html_(self) -> str:
        """Return the answer for a notebook: the picture with its boxes below the words, where there are any."""
        return self.grounding._repr_html_() if HAS_GROUNDING else f"<p>{html.escape(self)}</p>"
