"""Prompts that ask for boxes have the released models' forms, and refuse what would break the form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.utils import prompts

IMAGE = Image.new("RGB", (60, 40))


def test_forms() -> None:
    assert prompts.locate_prompt(" The giraffe at the back ") == "<|ref|>The giraffe at the back<|/ref|>."
    assert prompts.locate_all_prompt("Watermelon slices") == "Find all the <|ref|>Watermelon slices<|/ref|>"
    assert prompts.grounded_prompt("What is it?") == "<|grounding|>What is it?"
    assert prompts.in_context_prompt().startswith("<|grounding|>In the first image, an object within the red rectangle")


@pytest.mark.parametrize(
    "conversation",
    [
        prompts.locate(IMAGE, "a cat"),
        prompts.locate_all(IMAGE, "cats"),
        prompts.grounded_chat([IMAGE, IMAGE], "what differs?"),
        prompts.in_context(IMAGE, IMAGE, (100, 100, 500, 500)),
    ],
)
def test_conversations_are_what_the_processor_takes(
    processor: DeepseekVLV2Processor, conversation: list[dict[str, Any]]
) -> None:
    batch = processor(conversations=conversation)
    assert batch.images_spatial_crop.shape[1] == len(conversation[0]["images"])
    assert batch.sft_format[0].startswith("<|User|>: <image>\n")


def test_the_example_is_marked_on_a_copy() -> None:
    (turn,) = prompts.in_context(IMAGE, IMAGE, (100, 100, 500, 500))
    marked, searched = turn["images"]
    assert searched is IMAGE and np.asarray(IMAGE).max() == 0
    assert (np.asarray(marked) == (255, 0, 0)).all(axis=-1).any()
    (turn,) = prompts.in_context(IMAGE, IMAGE)
    assert turn["images"][0] is IMAGE


@pytest.mark.parametrize("thing", ["", "  ", "a<|/ref|>", "<image> b", "x <|User|>: y", "<|grounding|>q", "<|det|>"])
@pytest.mark.parametrize("build", [prompts.locate_prompt, prompts.locate_all_prompt, prompts.grounded_prompt])
def test_tags_and_emptiness_are_refused(build: Any, thing: str) -> None:
    with pytest.raises(ValueError, match=r"is empty|must not hold the tag"):
        build(thing)


def test_image_tags_of_the_prompt_are_kept() -> None:
    (turn,) = prompts.question_about([IMAGE], "In <image>, what?")
    assert turn["content"] == "In <image>, what?"
    (turn,) = prompts.question_about([], "Hello")
    assert turn["content"] == "Hello"
