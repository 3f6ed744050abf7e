"""Boxes on pictures: labels in any script stay inside, colours differ, lines grow with the picture."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepseek_vl2.utils import drawing, fonts
from deepseek_vl2.utils.drawing import color_of, draw_boxes, mark_object, text_color
from deepseek_vl2.utils.fonts import font_for
from deepseek_vl2.utils.grounding import GroundedObject
from deepseek_vl2.utils.label_places import covered, place_label

IMAGES = Path(__file__).resolve().parents[2] / "images"

GRAY = (90, 90, 90)


def drawn(size: tuple[int, int], *objects: GroundedObject) -> np.ndarray:
    return np.asarray(draw_boxes(Image.new("RGB", size, GRAY), objects))


def colored(picture: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the pixels of a colour."""
    rows, columns = np.nonzero((picture == color).all(axis=-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (40, 40), (640, 480), (2000, 90), (90, 2000)])
@pytest.mark.parametrize(
    "label", ["", "cat", "a label that is much longer than any picture is wide " * 3, "长颈鹿", "a\nb\t\0c"]
)
@pytest.mark.parametrize("box", [(0, 0, 0, 0), (0, 0, 999, 999), (999, 999, 999, 999), (400, 0, 500, 30)])
def test_any_box_and_label_on_any_picture(size: tuple[int, int], label: str, box: tuple[int, int, int, int]) -> None:
    assert drawn(size, GroundedObject(label, [box])).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("box", [(0, 0, 60, 60), (940, 0, 999, 60), (940, 940, 999, 999), (0, 940, 60, 999)])
def test_a_label_stays_whole_at_every_corner(box: tuple[int, int, int, int]) -> None:
    """The label's field is as large there as in the middle: nothing of it is cut off."""
    middle = drawn((600, 600), GroundedObject("giraffe", [(480, 480, 520, 520)]))
    corner = drawn((600, 600), GroundedObject("giraffe", [box]))
    white = [(picture == (255, 255, 255)).all(axis=-1) for picture in (middle, corner)]
    left, top, right, bottom = colored(middle, color_of(0))
    width, height = right - left, bottom - top
    assert width > 60 and height > 15
    color = (corner == color_of(0)).all(axis=-1) | white[1]
    assert max(run_lengths(color)) >= width


def run_lengths(mask: np.ndarray) -> list[int]:
    """Return the longest run of each row of a mask."""
    return [max((len(run) for run in "".join("x" if m else " " for m in row).split()), default=0) for row in mask]


def test_labels_do_not_cover_each_other() -> None:
    size = (800, 600)
    box = [(300, 300, 700, 700)]
    alone = [drawn(size, GroundedObject(f"thing {index}", box)) for index in range(3)]
    field = (alone[0] == color_of(0)).all(axis=-1).sum()
    together = drawn(size, *(GroundedObject(f"thing {index}", box) for index in range(3)))
    fields = [(together == color_of(index)).all(axis=-1) for index in range(3)]
    letters = 32 * 15  # at least this many pixels of each label's field are seen
    assert field > letters and all(seen.sum() > letters for seen in fields)


@pytest.mark.parametrize("seed", range(6))
def test_labels_stand_beside_their_boxes_and_on_no_other(seed: int) -> None:
    """Boxes of a loose grid leave room for each label: none covers a box, nor another label."""
    rng = np.random.default_rng(seed)
    boxes, labels = [], []
    for row in range(3):
        for column in range(3):
            left, top = 40 + 320 * column + int(rng.integers(0, 60)), 70 + 300 * row + int(rng.integers(0, 60))
            boxes.append((left, top, left + int(rng.integers(60, 200)), top + int(rng.integers(60, 150))))
    for box in boxes:
        size = (int(rng.integers(60, 130)), 24)
        x, y = place_label(box, size, (1000, 1000), boxes, labels)
        labels.append((x, y, x + size[0], y + size[1]))
    fields = np.asarray(labels, dtype=float)
    assert covered(fields, boxes).max() == 0
    for index, label in enumerate(labels):
        assert covered(fields[index : index + 1], labels[:index]).sum() == 0
        box = boxes[index]  # it touches its box
        across = min(label[2], box[2]) - max(label[0], box[0])
        down = min(label[3], box[3]) - max(label[1], box[1])
        assert across >= 0 and down >= 0


def test_a_label_leaves_the_thing_to_be_seen_where_there_is_room_beside_it() -> None:
    """A box at the top of the picture has its label below; one that fills the picture has it inside."""
    assert place_label((100, 0, 300, 200), (80, 20), (400, 400), [(100, 0, 300, 200)], []) == (100, 200)
    assert place_label((0, 0, 399, 399), (80, 20), (400, 400), [(0, 0, 399, 399)], []) == (0, 0)
    around = [(0, 0, 399, 399), (100, 100, 200, 200)]  # of a thing within another, above it as ever
    assert place_label(around[1], (80, 20), (400, 400), around, []) == (100, 80)
    neighbour = [(100, 100, 200, 200), (90, 40, 230, 98)]
    assert place_label(neighbour[0], (80, 20), (400, 400), neighbour, []) == (100, 200)


def test_the_picture_of_the_readme_is_what_the_package_draws() -> None:
    """Its labels cover no shape: each shape's own colour is as much of the picture with them as without."""
    with Image.open(IMAGES / "shapes.png") as plain, Image.open(IMAGES / "shapes_found.png") as found:
        before, after = np.asarray(plain.convert("RGB")), np.asarray(found.convert("RGB"))
        assert found.mode == "RGBA" and found.getpixel((0, 0))[3] == 0  # round corners, for dark pages
    assert before.shape == after.shape and min(before.shape[:2]) >= 800
    for colour in ((50, 172, 85), (28, 161, 61), (29, 102, 200), (221, 33, 51), (55, 89, 227)):
        count = [(np.abs(picture.astype(int) - colour).max(axis=-1) < 12).sum() for picture in (before, after)]
        assert count[0] > 2000 and count[1] > 0.9 * count[0], colour


def test_a_label_has_one_colour_and_others_have_others() -> None:
    colors = [color_of(index) for index in range(60)]
    assert len(set(colors)) == 60
    for color in colors:
        difference = abs(sum(c * w for c, w in zip(color, (0.299, 0.587, 0.114), strict=True)) - text_color(color)[0])
        assert difference > 100  # of 255 steps of brightness: legible
    picture = drawn((400, 400), GroundedObject("a", [(0, 500, 200, 900)]), GroundedObject("a", [(700, 500, 900, 900)]))
    assert (picture == color_of(0)).all(axis=-1).any() and not (picture == color_of(1)).all(axis=-1).any()


def test_lines_and_letters_grow_with_the_picture() -> None:
    thick = []
    for side in (200, 2000):
        picture = drawn((side, side), GroundedObject("", [(100, 100, 900, 900)]))
        row = (picture[side // 2] == color_of(0)).all(axis=-1)
        thick.append(int(row[: side // 2].sum()))
    assert thick[0] == 2 and thick[1] >= 6


def test_english_needs_no_font_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_system_font", lambda characters: None)
    assert font_for("The giraffe at the back…", 20) is not None


def test_chinese_is_drawn_with_a_font_that_has_it() -> None:
    font = font_for("前面的长颈鹿 abc", 24)
    if font is None:
        pytest.skip("no font with Chinese is installed here")
    drawings = {bytes(font.getmask(character)) for character in "前面的长颈鹿"}
    assert len(drawings) == 6  # missing characters would all look alike


def test_without_fontconfig_the_known_names_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts.shutil, "which", lambda program: None)
    fonts._system_font.cache_clear()
    file = fonts._system_font("长颈鹿")
    fonts._system_font.cache_clear()
    assert file is None or file.path in fonts.SYSTEM_FONTS


def test_a_label_that_no_font_has_is_drawn_as_its_number(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drawing, "font_for", lambda text, size: font_for(text, size) if text.isascii() else None)
    with caplog.at_level(logging.WARNING):
        picture = drawn((300, 300), GroundedObject("狗", [(300, 300, 600, 600), (10, 10, 20, 20)]))
    assert (picture == color_of(0)).all(axis=-1).any()
    assert len(caplog.records) == 1 and "fonts-noto-cjk" in caplog.text


def test_symbols_that_no_font_has_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    if font_for("\U0001f992", 20) is not None:
        pytest.skip("a font here has that giraffe")
    with caplog.at_level(logging.WARNING):
        with_symbol = drawn((300, 300), GroundedObject("cat \U0001f992", [(300, 300, 600, 600)]))
    assert (with_symbol == drawn((300, 300), GroundedObject("cat", [(300, 300, 600, 600)]))).all()
    assert not caplog.records


def test_the_mark_of_an_example_is_a_red_rectangle_on_a_copy() -> None:
    image = Image.new("RGB", (100, 100), GRAY)
    marked = np.asarray(mark_object(image, (200, 200, 800, 600)))
    assert colored(marked, (255, 0, 0)) == (20, 20, 80, 60)
    assert image.getcolors() == [(10_000, GRAY)]
