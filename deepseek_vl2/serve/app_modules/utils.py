"""Helpers of the demo, under the names that existing scripts import."""

from __future__ import annotations

from PIL import Image

from deepseek_vl2.utils.grounding import draw_boxes, parse_grounding


def parse_ref_bbox(response: str, image: Image.Image) -> Image.Image | None:
    """Draw the labelled boxes of a response on a copy of the image.

    Args:
        response: the model's text, with ``<|ref|>``, ``<|det|>`` and boxes from 0 to 999.
        image: the image that the boxes speak of.

    Returns:
        The drawn image, or ``None`` when the response holds no labelled box.
    """
    objects = [found for found in parse_grounding(response) if found.boxes and found.label]
    return draw_boxes(image, objects) if objects else None
