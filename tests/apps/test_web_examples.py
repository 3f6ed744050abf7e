"""What the demo offers to begin with: shapes and words when nano answers, pictures otherwise."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deepseek_vl2.serve.web.backend import ModelBackend
from deepseek_vl2.serve.web.examples import DRAWN, EXAMPLES, NANO_EXAMPLES, Example, examples_for
from deepseek_vl2.serve.web.limits import Limits
from deepseek_vl2.serve.web.state import Chat, Settings
from deepseek_vl2.synthetic.samples import Sample, held_out_question
from deepseek_vl2.synthetic.suite import judge
from deepseek_vl2.utils.places import nano_directory

IMAGES = Path(__file__).resolve().parents[2] / "images"


@pytest.fixture(scope="module")
def backend() -> Iterator[ModelBackend]:
    backend = ModelBackend("nano", {"device": "cpu"})
    backend.start()
    assert backend.wait(120)
    yield backend


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    """The script that draws the pictures, and which question of the suite each belongs to."""
    sys.path.insert(0, str(IMAGES))
    try:
        return runpy.run_path(str(IMAGES / "nano_examples.py"))["DRAWN"]
    finally:
        sys.path.remove(str(IMAGES))


def test_each_model_is_asked_what_it_can_know() -> None:
    assert examples_for("nano") == examples_for(str(nano_directory())) == NANO_EXAMPLES
    for name in ("demo", "deepseek-ai/deepseek-vl2-tiny", "./nano", ""):
        assert examples_for(name) == EXAMPLES


def test_the_header_says_that_nano_is_a_toy(backend: ModelBackend) -> None:
    assert "a toy: it knows drawn shapes and printed words alone" in backend.status().text


@pytest.mark.parametrize("example", NANO_EXAMPLES, ids=lambda example: example.title)
def test_nano_gets_its_examples_right(example: Example, backend: ModelBackend, drawn: dict[str, Any]) -> None:
    """Asked as the page asks, with the settings that the page begins with."""
    task, index, _ = drawn[example.pictures[0]]
    turn = held_out_question(task, index).turn
    if task != "describe":  # which has one answer in many words
        assert turn.question.rpartition("\n")[2] == example.question
    chat = Chat()
    chat.ask(example.question, example.files, Limits())
    settings = Settings(seed=0)
    with Image.open(example.files[0]) as picture:
        sample = Sample([picture.convert("RGB")], [turn])
    prompt = backend.prepare(chat.messages(), settings.history_tokens)
    answer = "".join(backend.stream(prompt, settings)).partition("<｜end")[0]
    assert min(judge(task, sample, answer).scores.values()) == 1, answer


def test_its_pictures_ship_and_are_drawn_by_the_script(drawn: dict[str, Any]) -> None:
    shown = {name for example in NANO_EXAMPLES for name in example.pictures}
    assert shown == {path.name for path in DRAWN.iterdir()} == set(drawn)
    assert sum(path.stat().st_size for path in DRAWN.iterdir()) < 200_000
    for name, (task, index, number) in drawn.items():
        scene = held_out_question(task, index).scenes[number]
        with Image.open(DRAWN / name) as picture:
            assert picture.width / picture.height == pytest.approx(scene.width / scene.height, abs=0.01)


def test_the_page_takes_the_examples_of_its_model(backend: ModelBackend) -> None:
    gr = pytest.importorskip("gradio", reason='needs Gradio: pip install "deepseek_vl2[gradio]"')
    from deepseek_vl2.serve.web.events import DemoEvents
    from deepseek_vl2.serve.web.jobs import JobLine

    events = DemoEvents(backend, JobLine(backend, 1), Limits())
    for index, example in enumerate(NANO_EXAMPLES):
        taken = events.take_example(gr.SelectData(None, {"index": index, "value": {}}))
        assert taken == {"text": example.question, "files": example.files}
