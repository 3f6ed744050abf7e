"""Responses with something wrong in them: what is right is read, what is wrong is named, and it takes linear time."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_vl2.models.messages import GROUNDING_TOKENS
from deepseek_vl2.utils.grounding import parse_grounding, plain_text, to_coco

Expected = list[tuple[str, list[tuple[int, int, int, int]]]]


@pytest.mark.parametrize(
    ("text", "objects", "kinds"),
    [
        ("<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>", [("a", [(1, 2, 3, 4)])], []),
        ("<|ref|>a<|/ref|><|det|>[[1,2,3,4]", [("a", [(1, 2, 3, 4)])], ["unclosed tag"]),
        ("<|ref|>a<|/ref|><|det|>[[1,2,3,4],[5,6,7,8", [("a", [(1, 2, 3, 4)])], ["unclosed tag"]),
        ("<|ref|>a<|det|>[[1,2,3,4]]<|/det|>", [("a", [(1, 2, 3, 4)])], ["unclosed tag"]),
        ("<|ref|>a<|ref|>b<|/ref|><|det|>[[1,2,3,4]]<|/det|>", [("b", [(1, 2, 3, 4)])], ["unclosed tag"]),
        (
            "<|ref|>a<|/ref|><|det|>[[1,2,3,4]]<|ref|>b<|/ref|><|det|>[[5,6,7,8]]<|/det|>",
            [("a", [(1, 2, 3, 4)]), ("b", [(5, 6, 7, 8)])],
            ["unclosed tag"],
        ),
        ("<|ref|>a<|/ref|> and no more", [], ["no boxes"]),
        ("<|ref|>a<|/ref|><|det|><|/det|>", [("a", [])], ["no boxes"]),
        ("<|det|>[[1,2,3,4]]<|/det|>", [("", [(1, 2, 3, 4)])], ["no label"]),
        (
            "<|ref|>a<|/ref|><|det|>[[1,2,3,4]]<|/det|><|det|>[[5,6,7,8]]<|/det|>",
            [("a", [(1, 2, 3, 4)]), ("a", [(5, 6, 7, 8)])],
            ["no label"],
        ),
        ("a<|/ref|> b<|/det|>", [], ["stray tag", "stray tag"]),
        ("<|ref|>open", [], ["unclosed tag"]),
        ("<|ref|>a<|/ref|><|det|>1, 2, 3, 4<|/det|>", [("a", [(1, 2, 3, 4)])], ["brackets"]),
        ("<|ref|>a<|/ref|><|det|>[1,2,3,4,[5,6,7,8]]<|/det|>", [("a", [(1, 2, 3, 4), (5, 6, 7, 8)])], ["brackets"]),
        ("<|ref|>a<|/ref|><|det|>[[1,2],[3,4]]<|/det|>", [("a", [])], ["not a box", "not a box"]),
        ("<|ref|>a<|/ref|><|det|>[[1,2,3,4,5,6,7,8]]<|/det|>", [("a", [])], ["not a box"]),
        ("<|ref|>a<|/ref|><|det|>[[1e3,nan,inf,0x1]]<|/det|>", [("a", [])], ["not a box"]),
        ("<|ref|>a<|/ref|><|det|>[[-5,0,1200,999]]<|/det|>", [("a", [(0, 0, 999, 999)])], ["out of range"]),
        ("<|ref|>a<|/ref|><|det|>[[30,40,10,20]]<|/det|>", [("a", [(10, 20, 30, 40)])], ["reversed"]),
        ("<|ref|>a<|/ref|><|det|>[[10,20,10,40]]<|/det|>", [("a", [(10, 20, 10, 40)])], ["empty box"]),
        ("<|grounding|>The <|ref|>cat<|/ref|><|det|>[[1,2,3,4]]<|/det|>.", [("cat", [(1, 2, 3, 4)])], []),
    ],
)
def test_what_is_wrong_is_reported_beside_what_is_right(text: str, objects: Expected, kinds: list[str]) -> None:
    found = parse_grounding(text)
    assert [(thing.label, thing.boxes) for thing in found] == objects
    assert [problem.kind for problem in found.problems] == kinds


def test_problems_say_where_and_what() -> None:
    text = "A <|ref|>cat<|/ref|><|det|>[[1, 2, three, 4]]<|/det|>"
    (problem,) = parse_grounding(text).problems
    assert text[slice(*problem.span)] == "1, 2, three, 4"
    assert "'three'" in problem.message and "not a number" in problem.message


def test_spans_cover_label_and_boxes() -> None:
    text = "I see <|ref|>cats<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|> here"
    (found,) = parse_grounding(text)
    assert text[slice(*found.span)] == "<|ref|>cats<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"


def test_pixels_are_of_the_image_that_the_boxes_are_on() -> None:
    text = "<|ref|>a<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|>"
    sizes = [(100, 50), (2000, 1000)]
    (last,), (first,) = parse_grounding(text, sizes), parse_grounding(text, sizes, image=0)
    assert (last.image, last.pixel_boxes) == (1, [(0, 0, 2000, 500)])
    assert (first.image, first.pixel_boxes) == (0, [(0, 0, 100, 25)])
    (unknown,) = parse_grounding(text)
    assert (unknown.image, unknown.pixel_boxes) == (None, None)
    with pytest.raises(ValueError, match="no image 2 among 2"):
        parse_grounding(text, sizes, image=2)


PIECES = st.sampled_from(
    [*GROUNDING_TOKENS, "[", "]", "[[", "]]", ",", " ", "1, 2, 3, 4", "-1", "[12, 34, 560, 780]", "9" * 30, "1.5",
     "nan", "猫", "__import__('os')", "\n", "<|", "|>", "٣", "1e400"]
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=40).map("".join))
@example("<|det|>" * 3 + "[" * 5)
def test_any_text_is_read_without_raising(text: str) -> None:
    found = parse_grounding(text, [(640, 480)])
    for thing in found:
        assert 0 <= thing.span[0] < thing.span[1] <= len(text)
        assert thing.pixel_boxes is not None and len(thing.pixel_boxes) == len(thing.boxes)
        for left, top, right, bottom in thing.boxes:
            assert 0 <= left <= right <= 999 and 0 <= top <= bottom <= 999
    for problem in found.problems:
        assert 0 <= problem.span[0] <= problem.span[1] <= len(text) and problem.message
    assert json.loads(found.to_json())["text"] == text
    to_coco([(found, "a.jpg", (640, 480))])


LABELS = st.text(st.characters(exclude_characters="<|>", exclude_categories=["Cs"]), max_size=12).map(str.strip)
SIDES = st.integers(0, 998).flatmap(lambda first: st.tuples(st.just(first), st.integers(first + 1, 999)))
BOXES = st.tuples(SIDES, SIDES).map(lambda pair: (pair[0][0], pair[1][0], pair[0][1], pair[1][1]))


@settings(deadline=None)
@given(st.lists(st.tuples(LABELS, st.lists(BOXES, min_size=1, max_size=4)), max_size=5))
def test_what_a_model_writes_is_read_back(objects: Expected) -> None:
    text = " and ".join(
        f"<|ref|>{label}<|/ref|><|det|>[{', '.join(str(list(box)) for box in boxes)}]<|/det|>"
        for label, boxes in objects
    )
    found = parse_grounding(text)
    assert [(thing.label, thing.boxes) for thing in found] == objects
    assert found.problems == []
    assert plain_text(text) == " and ".join(label for label, _ in objects)


@pytest.mark.parametrize(
    "text",
    ["<|ref|>", "<|ref|>a<|/ref|><|det|>", "[", "<|det|>[[1,", "<|det|>" + "[1", ",", "<|ref|>x<|/ref|>", "9", "<|"],
    ids=str,
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    """A quadratic step would take minutes on half a megabyte; a linear one takes about a second."""
    hostile = "<|ref|>a<|/ref|><|det|>" + text * (500_000 // len(text))
    begin = time.perf_counter()
    parse_grounding(hostile)
    plain_text(hostile)
    assert time.perf_counter() - begin < 15


def test_plain_text_of_an_unfinished_answer() -> None:
    whole = "The <|ref|>red cat<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|> sits."
    assert plain_text(whole) == "The red cat sits."
    assert plain_text(whole[:38]) == "The red cat"


def test_coco_export() -> None:
    cats = parse_grounding("<|ref|>cat<|/ref|><|det|>[[0, 0, 999, 999], [333, 0, 666, 500]]<|/det|>")
    both = parse_grounding(
        "<|ref|>狗<|/ref|><|det|>[[0, 0, 1, 1]]<|/det|> <|ref|>cat<|/ref|><|det|>[[9, 9, 99, 99]]<|/det|>"
    )
    coco = to_coco([(cats, "a.jpg", (999, 333)), (both, "b.jpg", (999, 999))])
    assert coco["images"][1] == {"id": 2, "file_name": "b.jpg", "width": 999, "height": 999}
    assert coco["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "狗"}]
    assert [(a["id"], a["image_id"], a["category_id"]) for a in coco["annotations"]] == [
        (1, 1, 1),
        (2, 1, 1),
        (3, 2, 2),
        (4, 2, 1),
    ]
    assert coco["annotations"][1]["bbox"] == [333.0, 0.0, 333.0, 166.67]
    assert coco["annotations"][0]["area"] == 999 * 333
