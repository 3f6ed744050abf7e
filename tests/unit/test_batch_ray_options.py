"""``batch --ray`` before there is a cluster: options that contradict each other, an input read without keeping it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from deepseek_vl2.cli.batch_files import Job, Place, iter_jobs, read_jobs
from deepseek_vl2.cli.batch_ray import survey_input
from deepseek_vl2.cli.main import main


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "Hello"}\n' * 3, "utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "vllm"], "--backend vllm needs --ray"),
        (["--ray", "--device", "cuda:1"], "leave --device cuda:1 out"),
        (["--ray_address", "auto", "--device", "auto"], "leave --device auto out"),
        (["--ray", "--backend", "vllm", "--quantize", "int4"], "--quantize: of our engine"),
        (["--ray", "--backend", "vllm", "--chunk-size", "64", "--max-memory", "8GB"], "--max_memory, --chunk_size: of"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], words: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", str(questions), str(tmp_path / "a.jsonl"), *options]) == 1
    assert words in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["q.jsonl"]


def test_a_launcher_and_ray_do_not_go_together(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["batch", str(questions), str(tmp_path / "a.jsonl"), "--ray"]) == 1
    assert "not through a launcher" in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["batch", str(questions), str(tmp_path / "a.jsonl"), "--ray"]) == 1
    assert 'pip install "deepseek_vl2[ray]"' in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["q.jsonl"]


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_the_files_of_others_are_left_alone(
    option: list[str], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "a.jsonl"
    notes.write_text("dear diary\n", "utf-8")
    assert main(["batch", str(questions), str(notes), "--ray", *option]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert notes.read_text("utf-8") == "dear diary\n"


def test_lines_end_as_texts_end_them(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf1\r\n2\r3\n\n\r\n\xff\r\r4 \xe2\x80\xa8 5")
    assert [(job.line, job.text) for job in iter_jobs(path)] == [
        (1, "1"), (2, "2"), (3, "3"), (6, None), (8, "4 \u2028 5"),
    ]  # fmt: skip
    assert read_jobs(path) == list(iter_jobs(path))


def test_the_input_is_read_while_it_is_worked_on(questions: Path) -> None:
    jobs = iter_jobs(questions)
    assert next(jobs).line == 1
    with open(questions, "a", encoding="utf-8") as file:  # what is not read yet is not held either
        file.write("".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(20_000)))
    assert sum(1 for _ in jobs) == 20_002


def test_a_survey_tells_what_is_open_and_knows_another_input(questions: Path, tmp_path: Path) -> None:
    first, second, _ = iter_jobs(questions)

    def place(job: Job, answered: bool) -> Place:
        return Place(tmp_path / "a.jsonl", 0, job.key, answered)

    survey = survey_input(questions, {1: place(first, True), 2: place(second, False)}, tmp_path / "a.jsonl")
    assert (survey.total, survey.answered) == (3, {1})
    for wrong in ({1: Place(tmp_path, 0, "another", True)}, {9: place(first, True)}):
        with pytest.raises(ValueError, match="answers another input"):
            survey_input(questions, wrong, tmp_path / "a.jsonl")
