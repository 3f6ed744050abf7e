"""Questions to begin with, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepseek_vl2.utils.places import is_nano

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PICTURES = ASSETS / "examples"
DRAWN = ASSETS / "shapes"
LOGO = ASSETS / "logo.svg"


@dataclass(frozen=True)
class Example:
    """A question about pictures.

    Attributes:
        title: what it shows, in a few words.
        question: the text.
        pictures: names of files.
        folder: where they are.
    """

    title: str
    question: str
    pictures: tuple[str, ...]
    folder: Path = PICTURES

    @property
    def files(self) -> list[str]:
        """Paths of the pictures."""
        return [str(self.folder / name) for name in self.pictures]


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
# nano knows drawn shapes and printed words alone; the questions are worded as those it was trained on.
NANO_EXAMPLES = (
    Example("Describe and point", "<|grounding|>Describe the image.", ("five_shapes.webp",), DRAWN),
    Example("Find one thing", "<|ref|>the small yellow shape<|/ref|>.", ("moons.webp",), DRAWN),
    Example("Find all of a kind", "Locate <|ref|>all diamonds<|/ref|> in the given image.", ("diamonds.webp",), DRAWN),
    Example("Count", "Count the yellow shapes.", ("stars.webp",), DRAWN),
    Example("Ask about a thing", "What colour is the square?", ("square.webp",), DRAWN),
    Example("Read a sign", "Read the green sign.", ("signs.webp",), DRAWN),
    Example("Read fine print", "What is written on the purple sign?", ("codes.webp",), DRAWN),
    Example("Two pictures", "Which image has a red square?", ("red_square.webp", "no_red_square.webp"), DRAWN),
)


def examples_for(model: str) -> tuple[Example, ...]:
    """Return the questions that a model can answer: about shapes and words for nano, about pictures for the others.

    Args:
        model: its name or path.
    """
    return NANO_EXAMPLES if is_nano(model) else EXAMPLES
