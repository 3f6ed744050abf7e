"""Boxes in a model's text: what is right is read, what is wrong is left out, nothing raises."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from deepseek_vl2.serve.app_modules.utils import parse_ref_bbox
from deepseek_vl2.utils.grounding import draw_boxes, parse_grounding, to_pixels


def boxes_of(det: str) -> list[tuple[int, int, int, int]]:
    (found,) = parse_grounding(f"<|ref|>a thing<|/ref|><|det|>{det}<|/det|>")
    return found.boxes


@pytest.mark.parametrize(
    ("det", "expected"),
    [
        ("[[1, 2, 3, 4]]", [(1, 2, 3, 4)]),
        ("[[1,2,3,4],[5, 6, 7, 8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("[1, 2, 3, 4]", [(1, 2, 3, 4)]),
        ("[[[1, 2, 3, 4]]]", [(1, 2, 3, 4)]),
        ("[[1, 2, 3]]", []),
        ("[[1, 2, 3, four]]", []),
        ("[[1, 2, 3, 4], [5, 6", [(1, 2, 3, 4)]),
        ("[[30, 40, 10, 20]]", [(10, 20, 30, 40)]),
        ("[[-5, 0, 1200, 999]]", [(0, 0, 999, 999)]),
        ("[[1.4, 2.6, 3.0, 4]]", [(1, 3, 3, 4)]),
        ("[[99999999999999999999, 1, 2, 3]]", []),
        ("__import__('os').abort()", []),
        ("", []),
    ],
)
def test_lists_of_boxes(det: str, expected: list[tuple[int, int, int, int]]) -> None:
    assert boxes_of(det) == expected


def test_several_labels_keep_their_own_boxes() -> None:
    text = (
        "A <|ref|>cat<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|> and <|ref|>no box<|/ref|> "
        "and <|ref|>狗<|/ref|><|det|>[[5, 6, 7, 8]]<|/det|>"
    )
    assert [(found.label, found.boxes) for found in parse_grounding(text)] == [
        ("cat", [(1, 2, 3, 4)]),
        ("狗", [(5, 6, 7, 8)]),
    ]


@pytest.mark.parametrize(
    "text", ["", "plain", "<|ref|>open", "<|det|>[[1,2,3,4]]<|/det|>", "<|ref|>a<|/ref|><|det|>[["]
)
def test_text_without_a_whole_box_gives_none(text: str) -> None:
    assert parse_ref_bbox(text, Image.new("RGB", (10, 10))) is None


def test_pixels_are_of_the_original_image() -> None:
    assert to_pixels((0, 0, 999, 999), (640, 480)) == (0, 0, 640, 480)
    assert to_pixels((500, 250, 750, 500), (999, 999)) == (500, 250, 750, 500)


def test_drawing_is_a_copy_with_the_box_on_it() -> None:
    image = Image.new("RGB", (200, 100), "white")
    drawn = parse_ref_bbox("<|ref|>box<|/ref|><|det|>[[250, 500, 500, 900]]<|/det|>", image)
    assert drawn is not None and drawn.size == image.size
    assert image.getcolors() == [(200 * 100, (255, 255, 255))]
    assert drawn.getpixel((50, 70)) != (255, 255, 255)
    assert drawn.getpixel((150, 90)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_drawing_takes_images_of_any_mode(mode: str) -> None:
    drawn = parse_ref_bbox("<|ref|>长长的标签<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>", Image.new(mode, (64, 64)))
    assert drawn is not None and drawn.mode == "RGB"


def test_a_notebook_shows_the_answer_and_the_picture_with_its_boxes() -> None:
    answer = "See <|ref|>a <b> cat<|/ref|><|det|>[[100, 100, 500, 500]]<|/det|>"
    image = Image.new("RGB", (200, 100), "white")
    shown = parse_grounding(answer, [image])._repr_html_()
    assert "<p>See a &lt;b&gt; cat</p>" in shown and 'alt="a &lt;b&gt; cat"' in shown
    data = base64.b64decode(shown.split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(data)).tobytes() == draw_boxes(image, parse_grounding(answer)).tobytes()
    for without in (
        parse_grounding(answer),
        parse_grounding(answer, [image.size]),
        parse_grounding("no boxes", [image]),
    ):
        assert "<img" not in without._repr_html_()
    assert parse_grounding(answer, [image]) == parse_grounding(answer, [image.size])
