"""A file of questions: answers as one by one, bad lines reported, interrupted runs resumed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deepseek_vl2.cli import batch as batch_module
from deepseek_vl2.cli import batch_lines
from deepseek_vl2.cli.main import main
from deepseek_vl2.cli.options import Loaded
from deepseek_vl2.engine.holder import engine_of
from deepseek_vl2.engine.request import Answer
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model

ROOT = Path(__file__).resolve().parents[2]
PICTURE = str(ROOT / "images" / "table.png")
TEXTS = ("Hello", "A somewhat longer question, for the padding", "Third", "Fourth", "猫")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_checkpoint(tmp_path_factory.mktemp("demo")))


@pytest.fixture(scope="module")
def loaded(model_path: str) -> Loaded:
    import torch

    return Loaded(model_path, *load_pretrained_model(model_path, "cpu", torch.float32))


@pytest.fixture(autouse=True)
def one_model(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "load", lambda args: loaded)


def write_lines(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts))
    return path


def run(questions: Path, answers: Path, *options: str) -> int:
    return main(["batch", str(questions), str(answers), "--max_new_tokens", "6", "--quiet", *options])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "q.jsonl", *({"prompt": text, "id": index} for index, text in enumerate(TEXTS)))


def test_batches_answer_as_one_by_one(questions: Path, tmp_path: Path) -> None:
    results = []
    for size in ("1", "2", "5"):
        output = tmp_path / f"{size}.jsonl"
        assert run(questions, output, "--batch_size", size) == 0
        results.append(records(output))
    assert results[0] == results[1] == results[2]
    assert [record["id"] for record in results[0]] == list(range(5))
    assert results[0][0]["usage"]["completion_tokens"] == 6


def test_a_line_of_its_own_seed(questions: Path, tmp_path: Path) -> None:
    settings = ("--temperature", "1", "--seed", "9")
    assert run(questions, tmp_path / "a", *settings) == 0
    assert run(questions, tmp_path / "b", *settings, "--batch_size", "3") == 0
    assert records(tmp_path / "a") == records(tmp_path / "b")
    same = write_lines(tmp_path / "same.jsonl", *[{"prompt": "Hello"}] * 3)
    assert run(same, tmp_path / "c", *settings, "--batch_size", "3") == 0
    assert len({record["answer"] for record in records(tmp_path / "c")}) == 3


def test_images_and_messages(tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "What?"}]
    questions = write_lines(
        tmp_path / "q.jsonl",
        {"prompt": "What?", "images": [PICTURE]},
        {"messages": [{"role": "user", "content": parts}]},
        {"messages": [{"role": "user", "content": "<image>\nWhat?", "images": [PICTURE]}]},
    )
    assert run(questions, tmp_path / "a.jsonl") == 0
    answers = records(tmp_path / "a.jsonl")
    assert len({record["answer"] for record in answers}) == 1
    assert answers[0]["usage"]["prompt_tokens"] > 421


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "Not JSON"),
        ('{"prompt": "x"', "Not JSON"),
        ("[1]", "an object with either"),
        ({}, "an object with either"),
        ({"prompt": "x", "messages": []}, "an object with either"),
        ({"prompt": 3}, '"prompt" must be a text'),
        ({"prompt": "x", "images": [3]}, '"images" a list of texts'),
        ({"prompt": "x", "images": ["no_such.png"]}, "no_such.png"),
        ({"prompt": "<image> <image>", "images": [PICTURE]}, "2 <image> tags but 1 images"),
        ({"messages": []}, "no messages"),
        ({"messages": ["a"]}, "wrong shape"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "Unknown type"),
        ({"messages": [{"role": "user"}]}, "needs a content"),
        ({"messages": [{"content": "x"}]}, "role"),
        ('{"prompt": "half of a pair: \\ud83d"}', "surrogate"),
        ('{"prompt": "x", "id": "\\udc00"}', "surrogate"),
        ('{"prompt": "x", "id": NaN}', "Not JSON"),
        ('{"prompt": "x", "id": 1e999}', "Not JSON"),
        ('{"prompt": "x", "id": ' + "1" * 5000 + "}", "Not JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"prompt": "x", "id": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
        ('{"messages": ' + '[{"role": "user", "content": ' * 300 + "1" + "}]" * 300 + "}", "content"),
        (b"\xff\xfe", "Not text in UTF-8"),
        ({"prompt": "word " * 6000}, "the model knows 4,096"),
        ({"prompt": "x" * 4096}, "the model knows 4,096"),
        ({"prompt": "x", "image": PICTURE}, '"image" is not read'),
        ({"prompt": "x", "image_url": PICTURE}, '"image_url" is not read'),
        ({"prompt": "x", "max_new_tokens": 5}, '"max_new_tokens" is not read of a line'),
        ({"prompt": "x", "system_prompt": "y"}, '"system_prompt" is not read of a line'),
        ({"messages": "hi"}, "A conversation is a list of messages"),
        ({"messages": [{"role": "user", "content": "hi"}], "images": [PICTURE]}, "0 <image> tags but 1 images"),
        ({"messages": [{"role": "user", "content": "hi", "image": PICTURE}]}, "A message has 'image'"),
        (
            {"messages": [{"role": "user", "content": "<image>", "images": [PICTURE]}], "images": [PICTURE]},
            "images of their own",
        ),
        ({"messages": [{"role": "user", "content": "<image>"}], "images": {"a": 1}}, "a list of texts"),
        ({"prompt": "x", "images": [PICTURE] * 20}, "the model knows 4,096"),
    ],
)
def test_bad_lines_are_reported_and_skipped(
    line: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_lines(tmp_path / "q.jsonl", {"prompt": "good"}, "", line, {"prompt": "good too"})
    assert run(questions, tmp_path / "a.jsonl", "--batch_size", "4") == 1
    assert [record["line"] for record in records(tmp_path / "a.jsonl")] == [1, 4]
    (error,) = records(tmp_path / "a.jsonl.errors")
    assert error["line"] == 3 and words in error["error"]
    assert "line 3" in capsys.readouterr().err


def test_a_line_may_list_the_images_of_its_messages(tmp_path: Path) -> None:
    tagged = [{"role": "user", "content": "<image>\nWhat?"}]
    lines = ({"messages": tagged, "images": [PICTURE]}, {"messages": [{**tagged[0], "images": [PICTURE]}]})
    questions = write_lines(tmp_path / "q.jsonl", *lines, {"prompt": "x", "source": "my own", "answer": "y"})
    assert run(questions, tmp_path / "a.jsonl") == 0
    listed, own, plain = records(tmp_path / "a.jsonl")
    assert listed["usage"]["prompt_tokens"] == own["usage"]["prompt_tokens"] > 400 > plain["usage"]["prompt_tokens"]


def test_separators_within_a_text_end_no_line(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    asked = {"prompt": "one\u2028two\u0085three"}
    questions.write_bytes(f"{json.dumps(asked, ensure_ascii=False)}\r\n{json.dumps(asked)}\n".encode())
    assert run(questions, tmp_path / "a.jsonl") == 0
    first, second = records(tmp_path / "a.jsonl")
    assert first["answer"] == second["answer"] and (first["line"], second["line"]) == (1, 2)


def test_a_question_that_fails_takes_no_other_with_it(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(questions, tmp_path / "whole.jsonl") == 0
    submit, asked = batch_lines.submit, []

    def failing(loaded: Any, question: Any, *rest: Any) -> Any:
        asked.append(question.job.line)
        if question.job.line == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 28800000000 bytes.")
        return submit(loaded, question, *rest)

    monkeypatch.setattr(batch_lines, "submit", failing)
    assert run(questions, tmp_path / "a.jsonl", "--batch_size", "5") == 1
    assert asked == [1, 2, 3, 4, 5, 3], "tried once more when the others are done"
    whole = records(tmp_path / "whole.jsonl")
    assert records(tmp_path / "a.jsonl") == [*whole[:2], *whole[3:]]
    (error,) = records(tmp_path / "a.jsonl.errors")
    assert error["line"] == 3 and "Out of memory" in error["error"]


@pytest.mark.parametrize("alone", [True, False])
def test_a_question_that_fails_among_others_is_asked_alone(
    alone: bool, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: Loaded
) -> None:
    """What the engine could not do while others were at work."""
    assert run(questions, tmp_path / "whole.jsonl") == 0
    engine = engine_of(loaded.model)
    accept = Answer.accept

    def failing(answer: Any, *rest: Any) -> None:
        if len(answer.prompt) == lengths[1] and len(answer.tokens) == 2 and (alone or engine.busy > 1):
            raise RuntimeError("It does not work.")
        accept(answer, *rest)

    whole = records(tmp_path / "whole.jsonl")
    lengths = [record["usage"]["prompt_tokens"] for record in whole]
    assert lengths.count(lengths[1]) == 1
    monkeypatch.setattr(Answer, "accept", failing)
    assert run(questions, tmp_path / "a.jsonl", "--batch_size", "5") == int(alone)
    assert records(tmp_path / "a.jsonl") == ([whole[0], *whole[2:]] if alone else whole)
    if alone:
        (error,) = records(tmp_path / "a.jsonl.errors")
        assert error["line"] == 2 and error["error"] == "RuntimeError: It does not work."


def test_an_answer_ends_where_the_model_knows_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "most_tokens", lambda loaded: 120)
    questions = write_lines(tmp_path / "q.jsonl", {"prompt": "x" * 105}, {"prompt": "y"})
    for size in ("1", "2"):
        output = tmp_path / f"{size}.jsonl"
        assert run(questions, output, "--batch_size", size, "--max_new_tokens", "10") == 0
        long, short = records(output)
        room = 120 - long["usage"]["prompt_tokens"]
        assert 0 < room < 10 and long["usage"]["completion_tokens"] == room and long["finish_reason"] == "length"
        assert short["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize("way", ["same", "dots", "symlink", "hard link", "errors", "part", "dangling"])
def test_the_questions_are_never_overwritten(
    way: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = questions.read_bytes()
    output = {
        "same": questions,
        "dots": tmp_path / "x" / ".." / "q.jsonl",
        "symlink": tmp_path / "link",
        "hard link": tmp_path / "hard",
        "errors": tmp_path / "q",
        "part": tmp_path / "q",
        "dangling": tmp_path / "link",
    }[way]
    (tmp_path / "x").mkdir()
    if way == "symlink":
        output.symlink_to(questions)
    elif way == "hard link":
        output.hardlink_to(questions)
    elif way in ("errors", "part"):
        questions = questions.rename(tmp_path / ("q.errors" if way == "errors" else "q.part0"))
    elif way == "dangling":
        output.symlink_to(tmp_path / "later.jsonl")  # the answers go where it points to
        assert run(questions, output) == 0
        assert output.is_symlink() and len(records(tmp_path / "later.jsonl")) == 5
        return
    for options in ((), ("--overwrite",)):
        assert run(questions, output, *options) == 1
        assert questions.read_bytes() == before
        assert "holds the questions" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.errors", "a.jsonl.part3", "a.jsonl.new", "a.jsonl.lock"])
@pytest.mark.parametrize(
    "content",
    [
        b"dear diary\n",
        b'{"prompt": "other questions"}\n',
        b"\x89PNG\r\n\x1a\n\0\0",
        b'{"line": 1, "key": "0", "answer": "x"}\nand notes\n',
        b'{"line": 1, "text": "of another program"}\n',
    ],
)
def test_what_others_wrote_is_never_replaced(
    name: str, content: bytes, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    for options in ((), ("--overwrite",)):
        assert run(questions, tmp_path / "a.jsonl", *options) == 1
        assert "was not written by this command" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == content
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, "q.jsonl"])


def test_a_directory_is_no_output(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").mkdir()
    assert run(questions, tmp_path / "a.jsonl") == 1
    assert run(questions, Path(os.devnull)) == 1
    assert capsys.readouterr().err.count("was not written by this command") == 2


def test_a_run_that_fails_replaces_nothing(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a.jsonl"
    output.touch()  # an empty file holds nothing to lose
    assert run(questions, output) == 0
    before = output.read_bytes()

    def no_model(args: Any) -> Any:
        raise FileNotFoundError("There is no such model.")

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "load", no_model)
        assert run(questions, output, "--overwrite") == 1
        assert output.read_bytes() == before
        assert run(questions, tmp_path / "b.jsonl") == 1
        assert not (tmp_path / "b.jsonl").exists()
    lines = count_answers(monkeypatch)
    assert run(questions, output, "--overwrite") == 0
    assert lines == [1, 2, 3, 4, 5] and output.read_bytes() == before


def test_two_runs_do_not_mix(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.jsonl"
    submit, codes = batch_lines.submit, []

    def meddling(*arguments: Any) -> Any:
        if not codes:
            codes.append(run(questions, output))
        return submit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batch_lines, "submit", meddling)
        assert run(questions, output, "--batch_size", "5") == 0
    assert codes == [1] and "Another run works on" in capsys.readouterr().err
    (tmp_path / "a.jsonl.lock").touch()  # a killed run's lock keeps nobody off
    assert run(questions, output) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


def count_answers(monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> list[int]:
    """Count the lines that are generated for; a run ends with Ctrl-C after so many."""
    lines: list[int] = []
    submit = batch_lines.submit

    def counted(loaded: Any, question: Any, *rest: Any) -> Any:
        if fail_after is not None and len(lines) >= fail_after:
            raise KeyboardInterrupt
        lines.append(question.job.line)
        return submit(loaded, question, *rest)

    monkeypatch.setattr(batch_lines, "submit", counted)
    return lines


def test_an_interrupted_run_goes_on(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(questions, tmp_path / "whole.jsonl") == 0
    with monkeypatch.context() as patch:
        count_answers(patch, fail_after=2)
        assert run(questions, tmp_path / "a.jsonl") == 130
    assert [record["line"] for record in records(tmp_path / "a.jsonl")] == [1, 2]
    lines = count_answers(monkeypatch)
    assert run(questions, tmp_path / "a.jsonl") == 0
    assert lines == [3, 4, 5]
    assert records(tmp_path / "a.jsonl") == records(tmp_path / "whole.jsonl")
    assert run(questions, tmp_path / "a.jsonl") == 0 and lines == [3, 4, 5]  # nothing is left to do
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl", "whole.jsonl"]


def test_what_a_killed_run_left_is_used(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(questions, tmp_path / "whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "a.jsonl.part0").write_text(whole[0] + whole[2][:25], "utf-8")  # killed while it wrote a line
    (tmp_path / "a.jsonl.part1").write_text(whole[1], "utf-8")
    lines = count_answers(monkeypatch)
    assert run(questions, tmp_path / "a.jsonl") == 0
    assert lines == [3, 4, 5]
    assert (tmp_path / "a.jsonl").read_text("utf-8") == "".join(whole)


def test_mended_lines_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "later.png"
    questions = write_lines(tmp_path / "q.jsonl", {"prompt": "a"}, {"prompt": "b", "images": [str(picture)]})
    assert run(questions, tmp_path / "a.jsonl") == 1
    picture.write_bytes(Path(PICTURE).read_bytes())
    lines = count_answers(monkeypatch)
    assert run(questions, tmp_path / "a.jsonl") == 0
    assert lines == [2] and not (tmp_path / "a.jsonl.errors").exists()


def test_answers_to_another_input_are_not_mixed(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(questions, tmp_path / "a.jsonl") == 0
    first, *rest = questions.read_bytes().splitlines(keepends=True)
    alike = tmp_path / "alike.jsonl"  # of as many lines
    alike.write_bytes(first + rest[0].replace(b"{", b'{ "id": "new", ', 1) + b"".join(rest[1:]))
    assert run(alike, tmp_path / "a.jsonl") == 1
    assert "answers another input: its line 2 was another one" in capsys.readouterr().err
    other = write_lines(tmp_path / "other.jsonl", {"prompt": "Something else"})
    assert run(other, tmp_path / "a.jsonl") == 1
    assert "answers another input" in capsys.readouterr().err
    assert run(other, tmp_path / "a.jsonl", "--overwrite") == 0
    assert len(records(tmp_path / "a.jsonl")) == 1


@pytest.mark.parametrize(
    "options",
    [["--system_prompt", "Be brief."], ["--max_new_tokens", "3"], ["--stop", "x"], ["--temperature", "0.5"]],
)
def test_answers_with_other_options_are_not_mixed(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert run(questions, tmp_path / "a.jsonl") == 0
    before = (tmp_path / "a.jsonl").read_bytes()
    assert run(questions, tmp_path / "a.jsonl", *options) == 1
    assert "was asked with other options" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize("options", [("--dtype", "float16"), ("--quantize", "int8"), ("--model", "some/other")])
def test_answers_of_another_model_are_not_mixed(
    questions: Path, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.jsonl"
    assert run(questions, output) == 0
    before = output.read_bytes()
    assert run(questions, output, *options) == 1
    assert "has answers of another model, dtype or quantization" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert run(questions, output) == 0  # the same one goes on
    assert run(questions, output, *options, "--overwrite") == 0
    assert output.read_bytes() != before


def test_a_model_is_known_by_its_files(model_path: str, tmp_path: Path) -> None:
    from argparse import Namespace

    from deepseek_vl2.cli.batch_model import model_identity

    copy = tmp_path / "model"
    shutil.copytree(model_path, copy)
    args = Namespace(model=str(copy), dtype="bfloat16", quantize=None, quantize_head=None)
    first = model_identity(args)
    (tmp_path / "link").symlink_to(copy)
    assert model_identity(Namespace(**{**vars(args), "model": str(tmp_path / "link")})) == first
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 + 5] ^= 1
    weights.write_bytes(content)
    second = model_identity(args)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert len({first, second, model_identity(args)}) == 3


def test_what_changes_no_answer_may_change(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(questions, tmp_path / "a.jsonl") == 0
    lines = count_answers(monkeypatch)
    for options in (["--batch_size", "3"], ["--top_p", "0.5"], ["--chunk_size", "9"], ["--seed", "3"]):
        assert run(questions, tmp_path / "a.jsonl", *options) == 0
    assert not lines


def test_a_full_disk_names_the_file(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = batch_module.record_line

    def full(record: dict[str, Any]) -> str:
        if record["line"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(record)

    monkeypatch.setattr(batch_module, "record_line", full)
    assert run(questions, tmp_path / "a.jsonl") == 1
    assert f"{tmp_path / 'a.jsonl.part0'}: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(batch_module, "record_line", real)
    lines = count_answers(monkeypatch)
    assert run(questions, tmp_path / "a.jsonl") == 0 and lines == [3, 4, 5]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-", "a.jsonl"], "INPUT must be a file"),
        (["q.jsonl", "-"], "OUTPUT must be a file"),
        (["q.jsonl", "a.jsonl", "--model", ""], "argument --model/--model_path/-m: it is empty"),
        (["q.jsonl", "a.jsonl", "--seed", "1" + "0" * 30], "argument --seed: must be at most"),
    ],
)
def test_what_names_nothing_is_told(
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["batch", *words])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code != 0 and says in capsys.readouterr().err
    assert sorted(os.listdir()) == ["q.jsonl"]


def test_the_detail_of_an_image_is_read(tmp_path: Path, loaded: Loaded) -> None:
    def line(detail: str | None) -> dict[str, Any]:
        part = {"type": "image_url", "image_url": {"url": PICTURE, "detail": detail}}
        return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}

    questions = write_lines(tmp_path / "q.jsonl", line("low"), line("high"), line(None), line("huge"))
    assert run(questions, tmp_path / "a.jsonl") == 1
    low, high, plain = (record["usage"]["prompt_tokens"] for record in records(tmp_path / "a.jsonl"))
    assert low < high == plain
    (wrong,) = records(tmp_path / "a.jsonl.errors")
    assert wrong["line"] == 4 and "detail of an image" in wrong["error"]


def test_stop_words_and_ends(questions: Path, tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(questions, tmp_path / "a.jsonl") == 0
    text = records(tmp_path / "a.jsonl")[0]["answer"]
    assert run(questions, tmp_path / "b.jsonl", "--stop", text[2:4]) == 0
    first = records(tmp_path / "b.jsonl")[0]
    assert first["answer"] == text[: text.index(text[2:4])] and first["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no file"), ("\n\n", "no questions"), (b"\xff\xfe\x00", "not text in UTF-8")]
)
def test_inputs_that_are_none(content: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(path, tmp_path / "a.jsonl") == 1
    assert words in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert run(questions, tmp_path / "a.jsonl", "--processes", "2") == 1
    assert "need a GPU each, but torch sees 1" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_lines(questions: Path, tmp_path: Path, model_path: str) -> None:
    assert run(questions, tmp_path / "one.jsonl", "--dtype", "float32", "--model", model_path) == 0
    arguments = ["batch", str(questions), str(tmp_path / "two.jsonl"), "--max_new_tokens", "6", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-m", "deepseek_vl2.cli", *arguments, "--model", model_path, "--processes", "2"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "two.jsonl") == records(tmp_path / "one.jsonl")
    assert "Traceback" not in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.jsonl", "q.jsonl", "two.jsonl"]


@pytest.mark.slow
def test_a_run_that_is_killed_three_times(tmp_path: Path, model_path: str) -> None:
    texts = [f"Question {number}" for number in range(40)]
    questions = write_lines(tmp_path / "q.jsonl", *({"prompt": text} for text in texts))
    output, part = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part0"
    arguments = ["batch", str(questions), str(output), "--max_new_tokens", "20", "--dtype", "float32", "--quiet"]
    command = [sys.executable, "-m", "deepseek_vl2.cli", *arguments, "--model", model_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kill in range(3):
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"answer") < 5 * (kill + 1)):
            time.sleep(0.02)
        assert process.poll() is None, "it was done before it was killed"
        process.kill()
        process.wait(30)
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=300).returncode == 0
    assert [record["line"] for record in records(output)] == list(range(1, 41))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]
    same = ("--dtype", "float32", "--model", model_path)
    assert run(questions, tmp_path / "whole.jsonl", "--max_new_tokens", "20", *same) == 0
    assert records(output) == records(tmp_path / "whole.jsonl")
