"""Boxes on pictures: labels in any script stay inside, colours differ, lines grow with the picture."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from deepseek_vl2.utils import drawing, fonts
from deepseek_vl2.utils.drawing import color_of, draw_boxes, mark_object, text_color
from deepseek_vl2.utils.fonts import font_for
from deepseek_vl2.utils.grounding import GroundedObject

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
