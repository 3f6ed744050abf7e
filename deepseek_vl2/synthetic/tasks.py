"""The names of the suite's tasks, for command lines: without PyTorch and without the fonts."""

from __future__ import annotations

TASK_NAMES = (
    "locate",
    "locate_all",
    "absent",
    "describe",
    "read",
    "read_fine",
    "count",
    "attributes",
    "which_image",
)
# The same questions with the global view alone: tiles must matter for fine print, and less for the rest.
UNTILED = {"read (no tiles)": "read", "read_fine (no tiles)": "read_fine"}
EVERY_TASK = (*TASK_NAMES, *UNTILED)
