"""What commands tell beside their answers: that a model loads, that it is a toy, tokens and times; images by stdin."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deepseek_vl2.cli import options
from deepseek_vl2.cli.main import main
from deepseek_vl2.cli.options import Loaded, load
from deepseek_vl2.cli.stats import Stats
from deepseek_vl2.serve.streaming import Answer
from deepseek_vl2.synthetic import evaluate, fonts
from deepseek_vl2.synthetic.samples import TASKS
from deepseek_vl2.synthetic.tasks import TASK_NAMES
from deepseek_vl2.utils import progress
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model
from deepseek_vl2.utils.places import NANO_IS_A_TOY, is_nano, nano_directory
from deepseek_vl2.utils.progress import ERASE, Progress, weights_reported

ROOT = Path(__file__).resolve().parents[2]
PICTURE = str(ROOT / "images" / "table.png")


class Terminal(io.StringIO):
    """A stream that says that somebody looks."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_checkpoint(tmp_path_factory.mktemp("demo")))


# ---------------------------------------------------------------- loading

AT_ONCE = """
import io, sys
class Terminal(io.StringIO):
    def isatty(self): return True
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them fails, as late as it is tried
sys.stderr, shown = Terminal(), sys.stderr
from deepseek_vl2.cli.main import main
code = main(sys.argv[1:])
shown.write(sys.stderr.getvalue())
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "Hi", "-i", PICTURE], "Loading nano ..."),
        (["ask", "Hi", "-m", "deepseek-ai/deepseek-vl2-tiny"], "Loading deepseek-ai/deepseek-vl2-tiny ..."),
        (["ground", PICTURE, "x"], "Loading nano ..."),
        (["chat"], "Loading nano ..."),
        (["serve", "demo"], "Loading demo ..."),
        (["info", "nano"], "Looking at nano ..."),
        (["evaluate"], "Looking at nano ..."),
        (["quantize", "nano", "out"], "Looking at nano ..."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_terminal_is_told_before_anything_slow_begins(arguments: list[str], words: str) -> None:
    done = subprocess.run([sys.executable, "-c", AT_ONCE, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(words), done.stderr
    assert f"\x1b[Kdeepseek-vl2 {arguments[0]}: error: " in done.stderr  # the line is gone when the error comes


def test_a_terminal_sees_seconds_or_per_cent_and_then_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "TICK", 0.01)
    with Progress("Loading x") as line:
        line.begun -= 7
        wait_for(lambda: "Loading x ... 7 s" in sys.stderr.getvalue())
        line.report(0.42)
        wait_for(lambda: "Loading x ... 42 %" in sys.stderr.getvalue())
    assert sys.stderr.getvalue().endswith(ERASE)


def wait_for(what: Any) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_log_is_told_once_and_only_of_what_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("Loading x"):
        pass
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(progress, "SLOW", 0.01)
    with Progress("Starting", terminal_only=True):
        time.sleep(0.05)
    with Progress("Loading x"):
        wait_for(lambda: sys.stderr.getvalue())
        time.sleep(0.05)
    assert sys.stderr.getvalue() == "Loading x ...\n"


def test_reading_weights_is_reported(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[float] = []
    with weights_reported(seen.append):
        load_pretrained_model(model_path, device="cpu")
    assert seen and seen == sorted(seen) and seen[-1] == 1.0
    assert capsys.readouterr().err == ""  # no bar of the library's beside it


# ---------------------------------------------------------------- toys


@pytest.fixture
def quick_load(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever model is named, the demo checkpoint is loaded."""
    from deepseek_vl2.utils import io as package_io

    real = package_io.load_pretrained_model
    monkeypatch.setattr(package_io, "load_pretrained_model", lambda name, **rest: real(model_path, **rest))


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "Hi", "--json"],
        ["ask", "Hi", "-m", "nano"],
        ["ask", "Hi", "-m", str(nano_directory())],
        ["ground", PICTURE, "x"],
        ["chat"],
        ["batch", "questions.jsonl", "answers.jsonl", "--quiet"],
    ],
    ids=" ".join,
)
def test_nano_is_called_a_toy_once_wherever_it_answers(
    arguments: list[str],
    quick_load: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAgain\n"))
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Ho"}\n')
    assert main([*arguments, "--max_new_tokens", "2", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert told.err.count(NANO_IS_A_TOY) == 1 and "toy" not in told.out


def test_the_server_says_so_when_it_starts(
    quick_load: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("llguidance")
    from deepseek_vl2.serve.api import command

    for name, count in (("nano", 1), (None, 1), ("demo", 0)):
        parser = ArgumentParser()
        command.add_arguments(parser)
        command.build_server(parser.parse_args([*([name] if name else []), "--device", "cpu", "--slots", "1"]))
        assert capsys.readouterr().err.count(NANO_IS_A_TOY) == count


def test_other_models_are_no_toys(
    model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "Hi", "-m", model_path, "--max_new_tokens", "2"]) == 0
    assert "toy" not in capsys.readouterr().err
    assert not is_nano("./nano") and not is_nano("deepseek-ai/nano")
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    told: list[str] = []
    args = Namespace(model="demo", device="cpu", dtype="float32", quantize=None, quantize_head=None, max_memory=None)
    assert isinstance(load(args, told.append), Loaded) and not told
    monkeypatch.setenv("RANK", "0")
    options.tell_toys("demo", told.append)
    assert told == [options.RANDOM_WEIGHTS]


# ---------------------------------------------------------------- tokens and times


def test_ask_tells_tokens_and_times(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ask", "Hi", "-i", PICTURE, "--model", model_path, "--max_new_tokens", "4", "--json"]
    assert main([*arguments, "--stats"]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    stats, usage = answer["stats"], answer["usage"]
    assert (stats["prompt_tokens"], stats["new_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert 0 < stats["first_token_seconds"] <= stats["seconds"]
    told = shown.err.splitlines()[-1]
    assert told.startswith(f"{usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} new tokens")
    assert "first token after " in told and " s in all" in told
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "stats" not in json.loads(shown.out) and "new tokens" not in shown.err


def test_times_of_an_answer() -> None:
    stats = Stats()
    stats.begin(10.0)
    stats.count(12.0, 2)
    stats.count(13.0, 5)
    stats.end(14.0, Answer(prompt_tokens=7, completion_tokens=10))
    assert stats.to_dict() == {
        "prompt_tokens": 7,
        "new_tokens": 10,
        "first_token_seconds": 2.0,
        "tokens_per_second": 4.0,
        "seconds": 4.0,
    }
    expected = "7 prompt tokens, 10 new tokens, first token after 2.00 s, then 4.0 tokens/s; 4.00 s in all"
    assert str(stats) == expected
    nothing = Stats()
    nothing.begin(0.0)
    nothing.end(1.0, Answer(prompt_tokens=7, completion_tokens=1))
    assert str(nothing) == "7 prompt tokens, 1 new tokens; 1.00 s in all"


# ---------------------------------------------------------------- images from the standard input


class Piped:
    """A standard input with bytes in it."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False

    def read(self) -> str:
        return self.buffer.read().decode()


def test_an_image_is_read_from_the_standard_input(
    model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for source, content in ((PICTURE, b""), ("-", Path(PICTURE).read_bytes())):
        monkeypatch.setattr(sys, "stdin", Piped(content))
        assert main(["ask", "What?", "-i", source, "-m", model_path, "--max_new_tokens", "3", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["answer"] == answers[1]["answer"] and answers[1]["images"][0]["source"] == "-"
    assert answers[1]["images"][0]["width"] == Image.open(PICTURE).width


@pytest.mark.parametrize(
    ("arguments", "content", "words"),
    [
        (["ask", "x", "-i", "-"], b"", "The standard input is empty"),
        (["ask", "x", "-i", "-"], b"no image", "The standard input: "),
        (["ask", "x", "-i", "-", "-i", "-"], b"x", "The standard input holds one thing"),
        (["ask", "-", "-i", "-"], b"x", "The standard input holds one thing"),
        (["ask", "-"], b"\xe9", "The standard input is not text in UTF-8"),
        (["chat", "-i", "-"], b"x", "The standard input holds the conversation"),
        (["ground", "-", "x"], b"", "The standard input is empty"),
    ],
)
def test_what_the_standard_input_cannot_be(
    arguments: list[str],
    content: bytes,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(content))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_nobody_waits_for_an_image_that_nobody_pipes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["ask", "x", "-i", "-"]) == 1
    assert "pipe one in" in capsys.readouterr().err


# ---------------------------------------------------------------- what an evaluation needs


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a model was loaded before the needs were checked")

    monkeypatch.setattr("deepseek_vl2.utils.io.load_pretrained_model", load)


EVALUATIONS = {
    "evaluate": lambda arguments: main(["evaluate", *arguments]),
    "python -m": evaluate.main,
}


@pytest.mark.parametrize("form", EVALUATIONS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "./no_such"], "no checkpoint directory"),
        (["--model", "empty"], "config.json"),
        (["--model", "bare"], "no safetensors files"),
        (["--output", "file/results"], "is a file"),
        (["--output", "file"], "is a file"),
        (["--device", "cuda:99"], "no device cuda:99"),
        (["--quantize_head", "int8"], "needs --quantize"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_evaluation_checks_its_needs_before_it_starts(
    form: str,
    arguments: list[str],
    words: str,
    model_path: str,
    nothing_loads: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "bare").mkdir()
    for file in Path(model_path).glob("*.json"):
        (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    assert EVALUATIONS[form](arguments) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "run",
    [*EVALUATIONS.values(), lambda arguments: main(["quantize", "nano", "out", "--suite", "3"])],
    ids=[*EVALUATIONS, "quantize --suite"],
)
def test_a_missing_extra_is_told_before_an_evaluation_starts(
    run: Any, nothing_loads: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fonts, "find_spec", lambda package: None)
    fonts.font_files.cache_clear()
    assert run([]) == 1
    assert 'pip install "deepseek_vl2[synthetic]"' in capsys.readouterr().err


def test_an_output_that_is_not_ours_to_write_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="cannot be written"):
        evaluate.check_writable(tmp_path / "new" / "results")


def test_the_names_of_the_tasks_are_those_of_the_suite() -> None:
    assert tuple(TASKS) == TASK_NAMES
