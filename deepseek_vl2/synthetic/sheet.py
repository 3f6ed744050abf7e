"""A picture sheet of answers, for a person to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from deepseek_vl2.utils.grounding import parse_grounding

from .questions import reference
from .suite import Judged, TaskResult, side_by_side

CELL = (300, 330)
PICTURE = 220
TRUE_COLOUR, FOUND_COLOUR, WRONG_COLOUR = "#808080", "#e01050", "#c00000"


def _boxed(image: Image.Image, text: str, colour: str, width: int) -> None:
    draw = ImageDraw.Draw(image)
    across, down = image.width / 999, image.height / 999
    for found in parse_grounding(text):
        for left, top, right, bottom in found.boxes:
            draw.rectangle((left * across, top * down, right * across, bottom * down), outline=colour, width=width)


def _picture(item: Judged) -> Image.Image:
    scale = PICTURE / max(max(image.size) for image in item.sample.images)
    if len(item.sample.images) > 1:
        scale *= 0.6
    images = [image.resize((round(image.width * scale), round(image.height * scale))) for image in item.sample.images]
    turn = item.sample.turns[0]
    if turn.truth.get("boxes"):
        _boxed(images[0], reference("", turn.truth["boxes"]), TRUE_COLOUR, 3)
    _boxed(images[0], item.answer, FOUND_COLOUR, 1)
    return side_by_side(images)


def _cell(item: Judged) -> Image.Image:
    cell = Image.new("RGB", CELL, "white")
    cell.paste(_picture(item), (8, 8))
    draw = ImageDraw.Draw(cell)
    font = ImageFont.load_default(size=12)
    right = all(value >= 1 for value in item.scores.values())
    question, answer = item.sample.turns[0].question, item.answer or "(nothing)"
    lines = textwrap.wrap(f"Q: {question}", 46)[:3]
    draw.text((8, PICTURE + 12), "\n".join(lines), fill="black", font=font)
    below = PICTURE + 14 + 15 * len(lines)
    colour = "#106020" if right else WRONG_COLOUR
    draw.text((8, below), "\n".join(textwrap.wrap(f"A: {answer}", 46)[:4]), fill=colour, font=font)
    return cell


def picture_sheet(results: Sequence[TaskResult], across: int = 6, each: int = 6) -> Image.Image:
    """Return a sheet with the first answers of every task: true boxes grey, found ones red, wrong answers red."""
    cells = [_cell(item) for result in results for item in result.judged[:each]]
    rows = -(-len(cells) // across)
    sheet = Image.new("RGB", (across * CELL[0], max(1, rows) * CELL[1]), "#dddddd")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (index % across * CELL[0], index // across * CELL[1]))
    return sheet
