"""Files that cannot be read or written are told by their names and the system's words."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from deepseek_vl2.cli import batch_files
from deepseek_vl2.cli.main import main, run_guarded


def fails(error: OSError) -> Any:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "ask: error: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "ask: error: /a/b: Permission denied"),
        (FileNotFoundError("There is no file x."), "ask: error: There is no file x."),
    ],
)
def test_the_systems_errors_are_words(error: OSError, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded("ask", fails(error)) == 1
    assert capsys.readouterr().err.strip() == words


def test_questions_that_are_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source, says in ((tmp_path, "is a directory"), (tmp_path / "pipe", "is no regular file")):
        assert main(["batch", str(source), str(tmp_path / "out.jsonl"), "--model", "demo"]) == 1
        assert f"{source} {says}: name a file" in capsys.readouterr().err


def test_a_place_that_nothing_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(".lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(batch_files.os, "open", refuse)
    (tmp_path / "q.jsonl").write_text('{"prompt": "hi"}\n')
    assert main(["batch", str(tmp_path / "q.jsonl"), str(tmp_path / "out.jsonl"), "--model", "demo"]) == 1
    assert f"Nothing can be written into {tmp_path}: Read-only file system." in capsys.readouterr().err
