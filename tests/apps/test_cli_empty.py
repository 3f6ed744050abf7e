"""Answers without a word, which is an answer that a model may give: each command says that it is one."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deepseek_vl2.cli import ask as ask_module
from deepseek_vl2.cli import batch as batch_module
from deepseek_vl2.cli import ground as ground_module
from deepseek_vl2.cli.chat import Chat
from deepseek_vl2.cli.main import main
from deepseek_vl2.cli.options import Loaded
from deepseek_vl2.serve.streaming import Answer
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model

EMPTY = "The model gave an empty answer"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded("demo", *load_pretrained_model(write_demo_checkpoint(tmp_path_factory.mktemp("demo")), "cpu"))


@pytest.fixture
def silent(demo: Loaded, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A model whose likeliest first token is its end, whatever it is asked."""
    ends = list(range(demo.model.config.language_config.vocab_size))
    monkeypatch.setattr(demo.model.generation_config, "eos_token_id", ends)
    for module in (ask_module, batch_module, ground_module):
        monkeypatch.setattr(module, "load", lambda args: demo)
    return demo


@pytest.fixture
def strip(tmp_path: Path) -> str:
    """A picture 300 times as wide as high, and transparent."""
    Image.new("LA", (900, 3), (128, 128)).save(tmp_path / "strip.png")
    return str(tmp_path / "strip.png")


def chat_options(**more: Any) -> Namespace:
    options = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return Namespace(**options, seed=None, stop=[], chunk_size=None, system_prompt="", **{"raw": False, **more})


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_ask(form: list[str], silent: Loaded, strip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "What is it?", "-i", strip, *form]) == 0
    out, err = capsys.readouterr()
    assert err == f"{EMPTY}.\n"
    assert json.loads(out)["answer"] == "" if form else out == "\n"


def test_ground(silent: Loaded, strip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--output", str(tmp_path / "d.png"), "--boxes", str(tmp_path / "b.json")]
    assert main(["ground", strip, "a dog", *files]) == 0
    assert EMPTY in capsys.readouterr().err


def test_batch(silent: Loaded, strip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"prompt": "What?", "images": [strip]}) + '\n{"prompt": "And?"}\n', encoding="utf-8"
    )
    assert main(["batch", str(tmp_path / "q.jsonl"), str(tmp_path / "a.jsonl"), "--quiet"]) == 0
    assert "2 of them have no text: the model ended its answer at once" in capsys.readouterr().err


def test_chat(silent: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(silent, chat_options(), [])
    chat.hear("Hello")
    assert capsys.readouterr().err == f"{EMPTY}.\n"


@pytest.mark.parametrize(("raw", "told"), [(False, True), (True, False)])
def test_chat_shows_an_answer_of_tags_alone(
    raw: bool, told: bool, demo: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = "<|det|>[[]]<|/det|>"
    Chat(demo, chat_options(raw=raw), []).tell_rest(Answer(tags, "stop"))
    assert (capsys.readouterr().err == f"The answer holds tags alone: {tags}\n") is told


def test_a_stop_word_that_ends_an_answer_at_once_is_named(
    demo: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ask_module, "load", lambda args: demo)
    assert main(["ask", "Hi", "--max_new_tokens", "4"]) == 0
    first = capsys.readouterr().out[0]
    assert main(["ask", "Hi", "--max_new_tokens", "4", "--stop", first]) == 0
    assert capsys.readouterr().err == f"{EMPTY}: it began with {first!r}, which ends answers (--stop).\n"


def test_an_answer_cut_off_or_stopped_is_not_called_empty(capsys: pytest.CaptureFixture[str]) -> None:
    for reason in ("length", "cancelled"):
        ask_module.tell_empty(Answer("\n", reason))  # type: ignore[arg-type]
    ask_module.tell_empty(Answer("0", "stop"))
    assert capsys.readouterr().err == ""
