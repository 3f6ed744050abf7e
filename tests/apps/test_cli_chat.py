"""The conversation in the terminal, spoken to through its input."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deepseek_vl2.cli import chat as chat_module
from deepseek_vl2.cli.chat import Chat, add_arguments
from deepseek_vl2.cli.options import Loaded
from deepseek_vl2.engine.holder import engine_of
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> Loaded:
    return Loaded("demo", *load_pretrained_model(model_path, device="cpu"))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red one.png")
    return str(tmp_path / "red one.png")


def options(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--max_new_tokens", "6", *arguments])


@pytest.fixture
def chat(loaded: Loaded) -> Chat:
    return Chat(loaded, options(), [])


def contents(chat: Chat) -> list[tuple[str, int]]:
    return [(turn.question, len(turn.images)) for turn in chat.turns]


def test_turns_build_on_each_other(chat: Chat, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat.hear(f"What is this? '{picture}'")
    chat.hear("And its colour?")
    assert contents(chat) == [("What is this?", 1), ("And its colour?", 0)]
    messages = chat.messages(chat.turns)
    assert [message["role"] for message in messages] == ["<|User|>", "<|Assistant|>"] * 2
    assert messages[0]["content"] == "<image>\nWhat is this?" and messages[1]["content"] == chat.turns[0].answer
    assert capsys.readouterr().out == "".join(turn.answer + "\n" for turn in chat.turns)


def test_the_answer_is_the_one_of_ask(chat: Chat, loaded: Loaded) -> None:
    chat.hear("Hello there")
    inputs = loaded.processor(conversations=[{"role": "user", "content": "Hello there"}])
    ids = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert chat.turns[0].answer == loaded.tokenizer.decode(ids)


def test_images_wait_for_a_question(chat: Chat, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat.hear(picture)  # dropped into the terminal, nothing typed
    chat.hear(f"/image {picture}")
    assert "red one.png, red one.png" in capsys.readouterr().err
    chat.hear("What differs?")
    assert contents(chat) == [("What differs?", 2)] and chat.pending == []


def test_undo_clear_and_retry(chat: Chat, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat.hear("/undo")
    chat.hear("/retry")
    assert capsys.readouterr().err.count("Nothing has been asked yet.") == 2
    chat.hear("one")
    chat.hear(f"two '{picture}'")
    first = chat.turns[1].answer
    chat.hear("/retry")
    assert contents(chat) == [("one", 0), ("two", 1)] and chat.turns[1].answer == first
    chat.hear("/undo")
    assert contents(chat) == [("one", 0)]
    chat.hear("/clear")
    assert chat.turns == []


def test_sampling_from_within(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("/temperature 1", "/top-p 0.95", "/seed 3", "/max_new_tokens 12", "Hello"):
        chat.hear(line)
    first = chat.turns[0].answer
    chat.hear("/retry")
    assert chat.args.seed == 4 and chat.turns[0].answer != first
    chat.hear("/seed 3")
    chat.hear("/clear")
    chat.hear("Hello")
    assert chat.turns[0].answer == first
    chat.hear("/seed")
    assert chat.args.seed is None


def test_a_system_prompt_stands_in_front(chat: Chat) -> None:
    chat.hear("/system Be brief.")
    chat.hear("Hello")
    assert chat.messages(chat.turns)[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/bogus", "no command /bogus"),
        ("/image", "Name an image"),
        ("/image no_such.png", "no_such.png"),
        ("/image README.md", "not an image"),
        ("/temperature hot", "not a number"),
        ("/temperature -1", "at least 0"),
        ("/top_p 2", "at most 1"),
        ("/seed x", "not a whole number"),
        ("/max_new_tokens 0", "positive"),
        ("/save", "Name a file"),
        ("/save no/such/dir.md", "No such file"),
        ("/boxes", "Nothing has been asked yet"),
        ("<image> what?", "1 <image> tags for 0 images"),
        ("x" * 5000, "tokens; the model knows 4,096"),
    ],
)
def test_mistakes_are_told_and_the_conversation_goes_on(
    chat: Chat, line: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    chat.hear(line)
    assert words in capsys.readouterr().err
    assert chat.turns == []


def test_a_failed_answer_leaves_no_turn(chat: Chat, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ValueError("it broke")

    monkeypatch.setattr(engine_of(loaded.model).runner, "decode", fail)
    chat.hear("Hello")
    assert chat.turns == []


def test_interrupting_an_answer_keeps_what_was_said(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat.args, "max_new_tokens", 3000)
    shown = Chat.shown_pieces

    def interrupted(self: Chat, stream: Any) -> Any:
        for index, piece in enumerate(shown(self, stream)):
            yield piece
            if index == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "shown_pieces", interrupted)
    chat.hear("Hello")
    assert 0 < len(chat.turns[0].answer) < 3000
    assert "(stopped)" in capsys.readouterr().err


def test_grounded_answers_are_shown_without_their_tags(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = ["The ", "<|ref|>", "cat", "<|/ref|>", "<|det|>", "[[1, 2,", " 3, 4]]", "<|/det|>", " sits."]
    assert "".join(chat.shown_pieces(iter(pieces))) == "The cat sits."
    chat.args.raw = True
    assert "".join(chat.shown_pieces(iter(pieces))) == "".join(pieces)


def test_boxes_are_drawn_on_the_last_image(chat: Chat, picture: str, tmp_path: Path) -> None:
    chat.hear(f"Where? '{picture}'")
    chat.hear("And now?")
    chat.turns[-1].answer = "<|ref|>it<|/ref|><|det|>[[0, 0, 500, 500]]<|/det|>"
    chat.hear(f"/boxes {tmp_path / 'drawn.png'}")
    assert Image.open(tmp_path / "drawn.png").size == (30, 20)


def test_save(chat: Chat, picture: str, tmp_path: Path) -> None:
    chat.hear(f"What? '{picture}'")
    chat.hear(f"/save {tmp_path / 'c.json'}")
    chat.hear(f"/save {tmp_path / 'c.md'}")
    saved = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert saved["messages"][0] == {"role": "user", "content": "What?", "images": [picture]}
    assert saved["messages"][1] == {"role": "assistant", "content": chat.turns[0].answer}
    text = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert f"![](<{picture}>)" in text and "**What?**" in text


def test_long_conversations_are_warned_of(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.warn_of_length(4095)
    assert "4095 of 4096 tokens" in capsys.readouterr().err


def test_a_pipe_of_another_encoding(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_module, "load", lambda args: loaded)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n".encode("latin-1")), encoding="utf-8"))
    with pytest.raises(ValueError, match="The standard input is not text in UTF-8"):
        chat_module.run(options())


def test_lines_of_a_pipe(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(chat_module, "load", lambda args: loaded)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\\\nthere\n\n/help\n/exit\nnever read\n"))
    heard: list[str] = []
    hear = Chat.hear
    monkeypatch.setattr(Chat, "hear", lambda self, line: (heard.append(line), hear(self, line))[1])
    assert chat_module.run(options()) == 0
    assert heard == ["Hello\nthere", "", "/help", "/exit"]
    assert "/temperature NUMBER" in capsys.readouterr().err


# ---------------------------------------------------------------- a real terminal


class Terminal:
    """A pseudo-terminal with the program in it."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deepseek_vl2.cli", *arguments],
            cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=self._own_the_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    @staticmethod
    def _own_the_terminal() -> None:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes an interrupt

    def type(self, keys: str) -> None:
        self.seen = ""
        os.write(self.master, keys.encode())

    def expect(self, pattern: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.seen[-2000:]!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the program has closed the terminal
                    break

    def end(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self.master)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_in_a_terminal(model_path: Path, tmp_path: Path) -> None:
    # With a seed, since one in ten answers of random weights ends within a line.
    arguments = ["chat", "--model", str(model_path), "--max_new_tokens", "3500", "--temperature", "1", "--seed", "2"]
    terminal = Terminal(*arguments)
    terminal.expect(r"is ready(.|\n)*> ")
    terminal.type("Tell me a long story\n")
    terminal.expect(r"story\r\n(.|\n){40}")  # an answer is on its way
    terminal.type("\x03")
    terminal.expect(r"\(stopped\)(.|\n)*> ")
    time.sleep(0.5)  # CPython's readline misses an interrupt between showing its prompt and waiting for keys
    terminal.type("\x03")
    terminal.expect("Ctrl-D or /exit")
    terminal.type("/max_new_tokens 4\n")
    terminal.expect("> ")
    terminal.type("again\n")
    terminal.expect("cut off after 4 tokens(.|\n)*> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0
