"""What the demo knows of one visitor: a conversation, and how answers are to be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.serve.web.limits import Limits

IMAGE_TAG = "<image>"


@dataclass(frozen=True)
class Settings:
    """How an answer is made.

    Attributes:
        temperature: 0 for the most likely answer; above, the temperature to sample with.
        top_p: used while sampling.
        repetition_penalty: used while sampling.
        new_tokens: most tokens of the answer.
        history_tokens: most tokens of the prompt; the oldest turns are left out to keep to it.
        seed: of the sampling; ``None`` for another one each time.
    """

    temperature: float = 0.1
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    new_tokens: int = 1_024
    history_tokens: int = 4_096
    seed: int | None = None


@dataclass
class Turn:
    """A question and what came of it.

    Attributes:
        question: the visitor's text.
        images: files of the pictures that came with it.
        answer: the model's text, as far as it is written, tags and all.
        note: what the visitor should know about the answer, such as that it was stopped.
        error: why there is no answer, or no whole one.
        drawing: file of a picture with the answer's boxes.
        boxes: the boxes in pixels, as HTML.
        picture: which of the conversation's pictures, counted from 1, the boxes are drawn on, and how many there are.
        open: nothing has come of it yet.
    """

    question: str
    images: list[str] = field(default_factory=list)
    answer: str = ""
    note: str = ""
    error: str = ""
    drawing: str | None = None
    boxes: str = ""
    picture: tuple[int, int] | None = None
    open: bool = True

    def forget_answer(self) -> None:
        """Go back to the question alone."""
        self.answer = self.note = self.error = self.boxes = ""
        self.drawing, self.picture, self.open = None, None, True


@dataclass
class Chat:
    """One visitor's conversation."""

    turns: list[Turn] = field(default_factory=list)

    def ask(self, question: str, images: Sequence[str], limits: Limits) -> None:
        """Add a question.

        Args:
            question: the text; ``<image>`` marks where a picture stands, others stand in front.
            images: files of the pictures.
            limits: what is accepted.

        Raises:
            ValueError: the question is empty or beyond a limit, or a picture cannot be read; nothing is added.
        """
        question = question.strip()
        _check_text(question, images, limits)
        if len(self.turns) >= limits.turns:
            raise ValueError(f"This conversation has {limits.turns} turns, the most it may have: start a new one.")
        for file in images:
            _check_image(file, limits)
        self.turns.append(Turn(question, list(images)))

    @property
    def open(self) -> bool:
        """Whether a question waits for its answer."""
        return bool(self.turns) and self.turns[-1].open

    def pictures(self) -> list[str]:
        """Return the files of all pictures, in the order shown; boxes speak of the last, unless the visitor says so."""
        return [file for turn in self.turns for file in turn.images]

    def last_image(self) -> str | None:
        """Return the file of the picture shown last."""
        return next(reversed(self.pictures()), None)

    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation for the processor, up to the question that waits for its answer.

        Questions that went without an answer are left out.
        """
        messages: list[dict[str, Any]] = []
        for turn in self.turns[:-1]:
            if turn.answer:
                messages += [_user_message(turn), {"role": "<|Assistant|>", "content": turn.answer}]
        return [*messages, _user_message(self.turns[-1])]


def _user_message(turn: Turn) -> dict[str, Any]:
    missing = len(turn.images) - turn.question.count(IMAGE_TAG)
    return {"role": "<|User|>", "content": f"{IMAGE_TAG}\n" * missing + turn.question, "images": list(turn.images)}


def _check_text(question: str, images: Sequence[str], limits: Limits) -> None:
    if not question:
        wanted = "Ask something about the picture" if images else "Write a question"
        raise ValueError(f"{wanted} first.")
    if len(question) > limits.characters:
        raise ValueError(f"The message has {len(question):,} characters; the limit is {limits.characters:,}.")
    if len(images) > limits.images:
        raise ValueError(f"The message has {len(images)} pictures; the limit is {limits.images} in one message.")
    tags = question.count(IMAGE_TAG)
    if tags > len(images):
        raise ValueError(
            f"The message has {tags} {IMAGE_TAG} tags and {len(images)} pictures: attach the missing pictures, or "
            "remove tags. Pictures without a tag are put in front of the text."
        )


def _check_image(file: str, limits: Limits) -> Image.Image:
    """Read a picture whole, so that a damaged one is refused when it is sent and not when it is used."""
    try:
        return load_image(file, max_pixels=limits.pixels)
    except (ValueError, OSError) as error:
        # the visitor knows the name of the file, not the folder it was put into
        raise ValueError(str(error).replace(str(file), Path(file).name)) from error
