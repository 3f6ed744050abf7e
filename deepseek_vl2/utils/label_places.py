"""Where a label is written: beside its box, clear of the other boxes and labels as far as there is room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Rectangle = tuple[int, int, int, int]
Size = tuple[int, int]

# What a place costs, of parts of the label's field from 0 to 1.
ON_LABEL = 100.0
ON_OTHER_BOX = 10.0
ON_OWN_BOX = 4.0
ASTRAY = 30.0  # moved so far to stay on the picture that it no longer touches its box
ORDER = 0.01  # of a place later in the list


def candidates(box: Rectangle, size: Size) -> np.ndarray:
    """Return the corners of a label around a box, [N, 2], those that read best first: above, below, beside, inside."""
    left, top, right, bottom = box
    width, height = size
    middle_x, middle_y = (left + right - width) // 2, (top + bottom - height) // 2
    places = [(x, top - height) for x in (left, right - width, middle_x)]
    places += [(x, bottom) for x in (left, right - width, middle_x)]
    places += [(right, y) for y in (top, bottom - height, middle_y)]
    places += [(left - width, y) for y in (top, bottom - height, middle_y)]
    # Of a box at the picture's edge, or between others: further along its sides.
    places += [
        (x, y) for y in (top - height, bottom) for x in (left - width, right, left - width // 2, right - width // 2)
    ]
    places += [(x, y) for x in (left, right - width) for y in (top, bottom - height)]
    return np.asarray(places, dtype=np.float64)


def rectangles(items: Sequence[Rectangle] | np.ndarray) -> np.ndarray:
    """Return rectangles as an array, [M, 4], also where there are none."""
    return np.asarray(items, dtype=np.float64).reshape(-1, 4)


def covered(fields_N4: np.ndarray, others: Sequence[Rectangle] | np.ndarray) -> np.ndarray:
    """Return which part of each field, 0 to 1, each of other rectangles covers, [N, M]."""
    others_4M, fields_4N1 = rectangles(others).T, fields_N4.T[:, :, None]
    across = np.minimum(fields_4N1[2], others_4M[2]) - np.maximum(fields_4N1[0], others_4M[0])
    down = np.minimum(fields_4N1[3], others_4M[3]) - np.maximum(fields_4N1[1], others_4M[1])
    area = (fields_4N1[2] - fields_4N1[0]) * (fields_4N1[3] - fields_4N1[1])
    result: np.ndarray = np.maximum(across, 0) * np.maximum(down, 0) / np.maximum(area, 1)
    return result


def near(fields_N4: np.ndarray, others: Sequence[Rectangle] | np.ndarray) -> np.ndarray:
    """Return those of other rectangles that some field may touch, [M, 4]: of hundreds a few."""
    others_M4 = rectangles(others)
    lows, highs = fields_N4[:, :2].min(axis=0), fields_N4[:, 2:].max(axis=0)
    found: np.ndarray = others_M4[((others_M4[:, :2] < highs) & (others_M4[:, 2:] > lows)).all(axis=1)]
    return found


def place_label(
    box: Rectangle, size: Size, canvas: Size, boxes: Sequence[Rectangle], labels: Sequence[Rectangle]
) -> tuple[int, int]:
    """Return the corner of a label.

    Args:
        box: what it names, (left, top, right, bottom) in pixels.
        size: (width, height) of the label.
        canvas: (width, height) of the picture, which no part of the label leaves where it fits.
        boxes: all that are drawn, this one included.
        labels: those that are written already.
    """
    wished = candidates(box, size)
    corners = np.clip(wished, 0, np.maximum(np.asarray(canvas) - 1 - np.asarray(size), 0))
    fields = np.concatenate([corners, corners + np.asarray(size)], axis=1)
    moved = np.abs(corners - wished) / np.maximum(np.asarray(size), 1)
    cost = ORDER * np.arange(len(wished)) + ASTRAY * ((moved[:, 0] >= 1) | (moved[:, 1] >= 0.5))
    cost += ON_LABEL * covered(fields, near(fields, labels)).sum(axis=1)
    cost += ON_OTHER_BOX * covered(fields, not_around(near(fields, boxes), box)).sum(axis=1)
    cost += ON_OWN_BOX * covered(fields, [box])[:, 0]
    x, y = corners[int(np.argmin(cost))]
    return int(x), int(y)


def not_around(boxes: Sequence[Rectangle] | np.ndarray, box: Rectangle) -> np.ndarray:
    """Return the boxes that do not contain a box, which itself is left out, [M, 4].

    One around it is covered wherever the label stands.
    """
    others_M4, own = rectangles(boxes), rectangles([box])
    around = (others_M4[:, :2] <= own[:, :2]).all(axis=1) & (others_M4[:, 2:] >= own[:, 2:]).all(axis=1)
    result: np.ndarray = others_M4[~around]
    return result
