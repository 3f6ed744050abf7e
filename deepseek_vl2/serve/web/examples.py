"""Questions to begin with, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PICTURES = ASSETS / "examples"
LOGO = ASSETS / "logo.svg"


@dataclass(frozen=True)
class Example:
    """A question about pictures.

    Attributes:
        title: what it shows, in a few words.
        question: the text.
        pictures: names of files.
    """

    title: str
    question: str
    pictures: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """Paths of the pictures."""
        return [str(PICTURES / name) for name in self.pictures]


EXAMPLES = (
    Example("Find one thing", "<|ref|>The giraffe at the back.<|/ref|>", ("giraffes.webp",)),
    Example("Find all of a kind", "<|grounding|>Detect all of the red apples.", ("apples.webp",)),
    Example(
        "Point while answering",
        "<|grounding|>I want to throw out the trash now, what should I do?",
        ("kitchen.webp",),
    ),
    Example(
        "Find by example",
        "<|grounding|>In the first image, an object within the red rectangle is marked. Locate the object of the same "
        "category in the second image.",
        ("window.webp", "desk.webp"),
    ),
    Example("Read a chart", "In which month were most books lent, and how many?", ("chart.webp",)),
    Example(
        "Several pictures",
        "This is image_1: <image>\nThis is image_2: <image>\nThis is image_3: <image>\n"
        "Can you tell me what are in the images?",
        ("coffee.webp", "cat.webp", "rocket.webp"),
    ),
    Example("Read a text", "Read all of the text in this picture.", ("receipt.webp",)),
    Example("A table to Markdown", "Convert this table to Markdown.", ("table.webp",)),
)
