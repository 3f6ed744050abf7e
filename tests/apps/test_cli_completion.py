"""The completion scripts, run by the shells themselves; and TAB in a conversation."""

from __future__ import annotations

import contextlib
import io
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote

import pytest

from deepseek_vl2.cli.completion import all_commands
from deepseek_vl2.cli.main import COMMANDS, main
from deepseek_vl2.cli.tab_completion import completions, word_start

CASES = [
    ("", {"ask", "chat", "pull", "list", "completion"}),
    ("as", {"ask"}),
    ("--ver", {"--version"}),
    ("--traceback inf", {"info"}),
    ("ask --dt", {"--dtype"}),
    ("ask Hi --max_new", {"--max_new_tokens"}),
    ("ask Hi --dtype ", {"bfloat16", "float16", "float32"}),
    ("ask Hi --dtype b", {"bfloat16"}),
    ("ask Hi --quantize_head in", {"int4", "int8"}),
    ("ask Hi -m deepseek-ai/deepseek-vl2-", {"deepseek-ai/deepseek-vl2-small", "deepseek-ai/deepseek-vl2-tiny"}),
    ("info na", {"nano"}),
    ("pull deepseek-ai/deepseek-vl2-t", {"deepseek-ai/deepseek-vl2-tiny"}),
    ("evaluate --tasks read loc", {"locate", "locate_all"}),
    ("completion ", {"bash", "zsh", "fish"}),
    ("finetune --method f", {"full"}),
    ("ask Hi --top_k ", set()),
]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("completion")

    def write(shell: str) -> Path:
        path, text = folder / f"completion.{shell}", io.StringIO()
        if not path.exists():
            with contextlib.redirect_stdout(text):
                assert main(["completion", shell]) == 0
            path.write_text(text.getvalue(), encoding="utf-8")
        return path

    return write


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def shell_words(line: str) -> str:
    return " ".join(quote(word) for word in f"deepseek-vl2 {line}".split(" "))


def bash_answers(path: Path, lines: list[str], folder: Path) -> list[set[str]]:
    """Return what bash would offer for each line."""
    asked = "\n".join(
        f"COMP_WORDS=({shell_words(line)}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=(); _deepseek_vl2\n"
        'printf "%s " "${COMPREPLY[@]}"; echo'
        for line in lines
    )
    out = run("bash", "--norc", "-c", f"source {quote(str(path))}\n{asked}", folder=folder)
    return [set(line.split()) for line in out.splitlines()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(script: Callable[[str], Path], tmp_path: Path) -> None:
    more = [
        ("ask Hi --dtype = b", {"bfloat16"}),  # as bash splits --dtype=b
        ("ask Hi --max-new", {"--max-new-tokens"}),  # spelled as it was begun
        ("ask Hi --quantize-head int8 --dtype fl", {"float16", "float32"}),
        ("ask Hi --stats ", set()),  # files: bash's own completion
    ]
    for (line, expected), found in zip(
        [*CASES, *more], bash_answers(script("bash"), [line for line, _ in [*CASES, *more]], tmp_path), strict=True
    ):
        assert expected <= found if line == "" else expected == found, line


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_every_command_and_its_options(script: Callable[[str], Path], tmp_path: Path) -> None:
    names = list(COMMANDS)
    lines = ["", *(f"{name} --" for name in names)]
    top, *each = bash_answers(script("bash"), lines, tmp_path)
    assert top == set(names)
    for command, found in zip(all_commands(), each, strict=True):
        flags = {flag for option in command.options for flag in option.flags if flag.startswith("--")}
        assert found == flags and {"--help", "--traceback"} <= flags, command.name


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_offers_directories_for_models(script: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "nano-tuned").mkdir()
    (found,) = bash_answers(script("bash"), ["ask Hi --model nan"], tmp_path)
    assert found == {"nano", "nano-tuned"}


ZSH = """
autoload -Uz compinit && compinit -u -D
source {script}
_describe() {{ [[ $1 == -o ]] && shift; local -a all; all=(${{(P)2}}); print -rl -- ${{all%%:*}}; }}
compadd() {{ shift; print -rl -- "$@"; }}
_files() {{ }}
ask() {{ words=("$@"); CURRENT=$#; _deepseek_vl2; print -- ----; }}
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes(script: Callable[[str], Path], tmp_path: Path) -> None:
    """Its matching by prefix is left out: what the function offers is looked at."""
    asked = "\n".join(f"ask {shell_words(line)}" for line, _ in CASES)
    out = run("zsh", "-f", "-c", ZSH.format(script=quote(str(script("zsh")))) + asked, folder=tmp_path)
    answers = out.split("----\n")[:-1]
    for (line, expected), answer in zip(CASES, answers, strict=True):
        begun = line.rpartition(" ")[2]
        found = {word for word in answer.split() if word.startswith(begun)}
        assert expected <= found if line == "" else expected == found, line


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(script: Callable[[str], Path], tmp_path: Path) -> None:
    cases = [case for case in CASES if "read loc" not in case[0]]  # fish completes the first value of an option alone
    asked = "".join(f'\ncomplete -C "deepseek-vl2 {line}"\necho ----' for line, _ in cases)
    out = run("fish", "--no-config", "-c", f"source {quote(str(script('fish')))}{asked}", folder=tmp_path)
    for (line, expected), answer in zip(cases, out.split("----\n")[:-1], strict=True):
        found = {entry.partition("\t")[0] for entry in answer.splitlines()}
        assert expected <= found if line == "" else expected == found, line


# ---------------------------------------------------------------- in a conversation


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("cat.png", "car.jpg", "my photo.png", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "sea.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/im", ["/image "]),
        ("/s", ["/save ", "/seed ", "/stats ", "/system "]),
        ("/image ca", ["car.jpg", "cat.png"]),
        ("What is ca", ["car.jpg", "cat.png"]),
        ("What is holi", ["holiday/"]),
        ("holiday/s", ["holiday/sea.png"]),
        ("~/holiday/s", ["~/holiday/sea.png"]),
        ("/image my", ["my\\ photo.png"]),
        ("/image my\\ ph", ["my\\ photo.png"]),
        ("look .hid", [".hidden.png"]),
        ("/seed c", []),
        ("/image nothing", []),
        ("no/such/fol", []),
    ],
)
def test_tab_in_a_conversation(line: str, expected: list[str], folder: Path) -> None:
    commands = ("/image", "/save", "/seed", "/stats", "/system", "/boxes")
    assert completions(line, word_start(line), commands) == expected


def test_absolute_paths_are_completed(folder: Path) -> None:
    line = f"What is {folder}/holiday/"
    assert completions(line, word_start(line), ("/image",)) == [f"{folder}/holiday/sea.png"]


TYPED = """
import os, sys
from deepseek_vl2.cli.tab_completion import complete_with_tab
complete_with_tab(("/image", "/save"))
print(repr(input("> ")))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("/im\tcat\t", "/image cat.png"),
        ("What is my\t?", "What is my\\ photo.png?"),
        ("/image holi\ts\t", "/image holiday/sea.png"),
    ],
)
def test_tab_as_readline_does_it(keys: str, line: str, folder: Path) -> None:
    import pty

    main_end, own_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TYPED], stdin=own_end, stdout=own_end, stderr=own_end, cwd=folder,
        start_new_session=True, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(own_end)
    seen, end = "", time.monotonic() + 60
    try:
        while repr(line) not in seen and time.monotonic() < end:
            if select.select([main_end], [], [], 0.2)[0]:
                seen += os.read(main_end, 65536).decode(errors="replace")
            if seen.endswith("> "):
                os.write(main_end, f"{keys}\n".encode())
        assert repr(line) in seen
    except OSError:  # the program has closed the terminal
        assert repr(line) in seen
    finally:
        process.kill()
        process.wait()
        os.close(main_end)
