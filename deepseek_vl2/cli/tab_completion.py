"""TAB in ``deepseek-vl2 chat``: commands, and paths of images and files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

FILE_COMMANDS = ("/image", "/boxes", "/save")


def matching_paths(text: str) -> list[str]:
    """Return the paths that begin with a text; directories end in a slash, ``~`` stays as it was typed."""
    typed, _, start = text.rpartition("/")
    folder = Path(os.path.expanduser(f"{typed}/")) if "/" in text else Path()
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    lead = f"{typed}/" if "/" in text else ""
    shown = [name for name in names if name.startswith(start) and (start.startswith(".") or not name.startswith("."))]
    return [f"{lead}{name}{'/' if (folder / name).is_dir() else ''}" for name in shown]


def completions(line: str, begin: int, commands: Iterable[str]) -> list[str]:
    """Return what a word may become.

    Args:
        line: the whole line up to the cursor.
        begin: where in it the word begins; spaces within a path are escaped.
        commands: the conversation's.
    """
    word = line[begin:]
    first = line[:begin].split()
    if not first and word.startswith("/") and "/" not in word[1:]:
        found = [f"{name} " for name in commands if name.startswith(word)]
        if found:
            return found
    if first and first[0].startswith("/") and first[0] in commands and first[0] not in FILE_COMMANDS:
        return []  # a number or a text
    return [path.replace(" ", "\\ ") for path in matching_paths(word.replace("\\ ", " "))]


def word_start(line: str) -> int:
    """Return where the last word of a line begins; an escaped space is part of it."""
    begin = len(line)
    while begin > 0 and (line[begin - 1] != " " or line[begin - 2 : begin - 1] == "\\"):
        begin -= 1
    return begin


def complete_with_tab(commands: Iterable[str]) -> None:
    """Let TAB complete what is typed into ``input()``; without readline, which Windows lacks, nothing changes."""
    try:
        import readline
    except ImportError:
        return
    names = list(commands)
    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            begin, shown = word_start(line), readline.get_begidx()
            # What readline takes for the word may begin behind an escaped space.
            found[:] = [path[shown - begin :] for path in completions(line, begin, names)]
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
