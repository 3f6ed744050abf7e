"""Boxes in the model's text: reading them, and passing them on.

The model writes ``<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>``. Coordinates run from 0 to 999 over the
width and the height of the original image. The text comes from a model: it is searched once from front to back, never
evaluated, and nothing in it raises; what is wrong with it is reported beside what is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, overload

from PIL import Image

from deepseek_vl2.utils.drawing import COORDINATE_MAX, Box, Size, draw_boxes, size_of, to_pixels

__all__ = [
    "COORDINATE_MAX",
    "Box",
    "GroundedObject",
    "Grounding",
    "Problem",
    "draw_boxes",
    "parse_grounding",
    "plain_text",
    "to_coco",
    "to_pixels",
]

ProblemKind = Literal[
    "unclosed tag",
    "stray tag",
    "no label",
    "no boxes",
    "brackets",
    "not a box",
    "out of range",
    "reversed",
    "empty box",
]
Span = tuple[int, int]

_TAG = re.compile(r"<\|(/?)(ref|det|grounding)\|>")
_SEGMENT = re.compile(r"[^\[\]]+")
# Longer numbers are none that a model means, and converting them takes more than linear time.
_NUMBER = re.compile(r"[+-]?[0-9]{1,9}(?:\.[0-9]{0,9})?")
_QUOTED = 40  # characters of the model's text in a message


@dataclass(frozen=True)
class Problem:
    """Something wrong in a response.

    Fields:
        kind: which kind of wrong.
        message: what is wrong, for a person.
        span: where, as character offsets into the text.
    """

    kind: ProblemKind
    message: str
    span: Span


@dataclass(frozen=True)
class GroundedObject:
    """A label and where it was found.

    Attributes:
        label: what the model names; empty for boxes without a label.
        boxes: (left, top, right, bottom), 0 to 999, left <= right and top <= bottom.
        span: where label and boxes stand in the text, as character offsets.
        image: which of the conversation's images the boxes are on, counted from 0; ``None`` when no sizes were given.
        pixel_boxes: the boxes in pixels of that image; ``None`` when no sizes were given.
    """

    label: str
    boxes: list[Box] = field(default_factory=list)
    span: Span = (0, 0)
    image: int | None = None
    pixel_boxes: list[Box] | None = None


@dataclass(frozen=True)
class Grounding(Sequence[GroundedObject]):
    """What a response says about places: a sequence of its objects, in order.

    Attributes:
        text: the response.
        objects: labels with their boxes.
        problems: what was wrong, in the order of the text.
    """

    text: str
    objects: list[GroundedObject]
    problems: list[Problem]

    @overload
    def __getitem__(self, index: int) -> GroundedObject: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[GroundedObject]: ...
    def __getitem__(self, index: int | slice) -> GroundedObject | Sequence[GroundedObject]:
        return self.objects[index]

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[GroundedObject]:
        return iter(self.objects)

    def to_dict(self) -> dict[str, Any]:
        """Return text, objects and problems as plain dicts and lists."""
        return {
            "text": self.text,
            "objects": [asdict(found) for found in self.objects],
            "problems": [asdict(problem) for problem in self.problems],
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent)


def parse_grounding(text: str, sizes: Sequence[Size | Image.Image] | None = None, image: int = -1) -> Grounding:
    """Read the labelled boxes of a response, in time linear in its length.

    A label belongs to the list of boxes that follows it. Numbers beyond 0 to 999 are clamped and swapped corners put
    right; what is no box of four numbers is left out. Each of these is reported in ``problems``. A response that was
    cut off gives the boxes that were complete.

    Args:
        text: the model's text.
        sizes: the conversation's images, in order, or (width, height) in pixels of each upright, for boxes in pixels.
        image: which of them the boxes are on. The model does not say; it is trained to locate things in the last one.

    Raises:
        ValueError: ``sizes`` holds no image of that index.
    """
    target: tuple[int, Size] | None = None
    if sizes is not None:
        if not -len(sizes) <= image < len(sizes):
            raise ValueError(f"There is no image {image} among {len(sizes)} sizes.")
        index = image % len(sizes)
        target = index, size_of(sizes[index])
    return _Reader(text, target).read()


class _Reader:
    """One pass over a text: tags are met in order, and each closes what is open as well as it can."""

    def __init__(self, text: str, target: tuple[int, Size] | None) -> None:
        self.text = text
        self.target = target
        self.objects: list[GroundedObject] = []
        self.problems: list[Problem] = []
        self.ref: tuple[int, int] | None = None  # an open <|ref|>: where it starts, where its label starts
        self.det: tuple[int, int] | None = None  # an open <|det|>, likewise
        self.label: tuple[str, Span] | None = None  # a label whose boxes have not come
        self.last_label: str | None = None  # a label that has boxes

    def read(self) -> Grounding:
        for tag in _TAG.finditer(self.text):
            self._meet(tag.group(2), bool(tag.group(1)), tag.start(), tag.end())
        end = len(self.text)
        if self.ref is not None:
            self._report("unclosed tag", "<|ref|> is not closed", self.ref[0], end)
        if self.det is not None:
            self._close_det(end, end, cut_off=True)
        self._drop_label()
        self.problems.sort(key=lambda problem: problem.span)
        return Grounding(self.text, self.objects, self.problems)

    def _meet(self, name: str, closing: bool, start: int, end: int) -> None:
        if name == "grounding":
            return
        if closing and (self.ref if name == "ref" else self.det) is None:
            self._report("stray tag", f"<|/{name}|> closes nothing", start, end)
        elif name == "ref" and closing:
            self._close_ref(start, end)
        elif name == "det" and closing:
            self._close_det(start, end)
        else:
            self._close_open_tags(start, name)
            if name == "ref":
                self._drop_label()
                self.ref = start, end
            else:
                self.det = start, end

    def _close_open_tags(self, start: int, next_tag: str) -> None:
        """Close what a new tag finds open. A label in front of boxes counts; in front of another label it does not."""
        if self.det is not None:
            self._report("unclosed tag", f"<|det|> is not closed before <|{next_tag}|>", self.det[0], start)
            self._close_det(start, start)
        if self.ref is not None:
            self._report("unclosed tag", f"<|ref|> is not closed before <|{next_tag}|>", self.ref[0], start)
            if next_tag == "det":
                self._close_ref(start, start)
            self.ref = None

    def _close_ref(self, start: int, end: int) -> None:
        assert self.ref is not None
        self.label = self.text[self.ref[1] : start].strip(), (self.ref[0], end)
        self.ref = None

    def _drop_label(self) -> None:
        if self.label is not None:
            label, span = self.label
            self._report("no boxes", f"no boxes follow the label {_quote(label)}", *span)
            self.label = None

    def _close_det(self, start: int, end: int, cut_off: bool = False) -> None:
        assert self.det is not None
        opened, inside = self.det
        self.det = None
        if cut_off:
            self._report("unclosed tag", "<|det|> is not closed: the boxes are cut off", opened, end)
        boxes = self._read_boxes(inside, start, cut_off)
        if self.label is not None:
            label, (first, _) = self.label
        elif self.last_label is not None:
            label, first = self.last_label, opened
            self._report("no label", f"these boxes have no label; taken for more of {_quote(label)}", opened, end)
        else:
            label, first = "", opened
            self._report("no label", "these boxes have no label", opened, end)
        self.label, self.last_label = None, label or None
        found = GroundedObject(label, boxes, (first, end))
        if self.target is not None:
            image, size = self.target
            pixels = [to_pixels(box, size) for box in boxes]
            found = GroundedObject(label, boxes, (first, end), image, pixels)
        self.objects.append(found)

    def _read_boxes(self, start: int, end: int, cut_off: bool) -> list[Box]:
        """Read a list of boxes: whatever stands between two brackets and is four numbers."""
        boxes = []
        segments = 0
        for segment in _SEGMENT.finditer(self.text, start, end):
            content = segment.group().strip(" \t\r\n,")
            if not content:
                continue
            segments += 1
            where = segment.span()
            if cut_off and segment.end() == end:
                continue  # the last number may lack its last digits
            box = self._read_box(content, where)
            if box is None:
                continue
            boxes.append(box)
            before, after = self.text[where[0] - 1], self.text[where[1] : where[1] + 1]
            if before != "[" or after != "]":
                self._report("brackets", f"the box {_quote(content)} does not stand between brackets", *where)
        if not segments:
            self._report("no boxes", "the list of boxes is empty", start, end)
        return boxes

    def _read_box(self, content: str, where: Span) -> Box | None:
        items = [item.strip() for item in content.split(",")]
        bad = next((item for item in items if not _NUMBER.fullmatch(item)), None)
        if bad is not None:
            self._report("not a box", f"{_quote(bad)} in {_quote(content)} is not a number", *where)
            return None
        if len(items) != 4:
            self._report("not a box", f"{_quote(content)} has {len(items)} numbers, a box has 4", *where)
            return None
        values = [round(float(item)) for item in items]
        x1, y1, x2, y2 = (min(max(value, 0), COORDINATE_MAX) for value in values)
        if [x1, y1, x2, y2] != values:
            self._report("out of range", f"{_quote(content)} leaves the range 0 to {COORDINATE_MAX}", *where)
        if x1 > x2 or y1 > y2:
            self._report("reversed", f"{_quote(content)} has its corners swapped", *where)
        if x1 == x2 or y1 == y2:
            self._report("empty box", f"{_quote(content)} has no area", *where)
        return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)

    def _report(self, kind: ProblemKind, message: str, start: int, end: int) -> None:
        self.problems.append(Problem(kind, message, (start, end)))


def _quote(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…")


def plain_text(text: str) -> str:
    """Return a response as a person reads it: labels stay, tags and boxes go. Also for a response still being made."""
    parts = []
    position, inside = 0, False
    for tag in _TAG.finditer(text):
        if not inside:
            parts.append(text[position : tag.start()])
        inside = tag.group(2) == "det" and not tag.group(1)
        position = tag.end()
    if not inside:
        parts.append(text[position:])
    return "".join(parts)


def to_coco(responses: Iterable[tuple[Grounding, str, Size | Image.Image]]) -> dict[str, Any]:
    """Return responses in the layout of COCO's annotation files.

    Args:
        responses: for each image the parsed response, the file's name, and the image or its (width, height) upright.

    Returns:
        A dict with ``images``, ``annotations`` (``bbox`` is [left, top, width, height] in pixels) and ``categories``
        (one for each label). Ids count from 1.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: dict[str, int] = {}
    for grounding, file_name, image in responses:
        width, height = size_of(image)
        images.append({"id": len(images) + 1, "file_name": file_name, "width": width, "height": height})
        for found in grounding:
            category = categories.setdefault(found.label, len(categories) + 1)
            for x1, y1, x2, y2 in found.boxes:
                bbox = [
                    round(value / COORDINATE_MAX * side, 2)
                    for value, side in ((x1, width), (y1, height), (x2 - x1, width), (y2 - y1, height))
                ]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": category,
                        "bbox": bbox,
                        "area": round(bbox[2] * bbox[3], 2),
                        "iscrowd": 0,
                    }
                )
    named = [{"id": number, "name": name} for name, number in categories.items()]
    return {"images": images, "annotations": annotations, "categories": named}
