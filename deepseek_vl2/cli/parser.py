"""The parser of every command: it suggests what may have been meant, and words its errors alike."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deepseek_vl2.cli.images import SUFFIXES

TRACEBACK = "--traceback"
# Options that may well be blank; others of words name something, and one of all options' defaults would do it instead.
MAY_BE_BLANK = ("prompt", "system_prompt", "stop", "root_path", "api_key")
ADDRESSES = ("http://", "https://", "data:", "file:")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" for a mistyped word, or nothing where no known one is like it."""
    from difflib import get_close_matches

    names = list(known)
    plain = {name.strip("-").replace("_", "-").lower(): name for name in names}
    close = get_close_matches(word.strip("-").replace("_", "-").lower(), plain, n=1)
    if not close:
        return ""
    meant = plain[close[0]]
    if word.startswith("--") and "_" not in word:
        meant = meant.replace("_", "-")
    return f" Did you mean {meant}?"


def asks_for_traceback(argv: Sequence[str]) -> bool:
    """Whether a command's arguments ask for the traceback of an error."""
    own = argv[: argv.index("--")] if "--" in argv else argv
    return TRACEBACK in own


def names_image(word: str) -> bool:
    """Whether an argument can only be an image: a file that is there, an address, or a name with an image's ending."""
    if word.startswith("-") or not word:
        return False
    if word.startswith(ADDRESSES) or word.lower().endswith(SUFFIXES):
        return True
    try:
        return Path(word).is_file()
    except OSError:  # a question, too long for a file's name
        return False


def spread_images(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return arguments in which each image has an option of its own: ``-i a.png b.png`` becomes two ``-i``.

    A shell makes several arguments of ``-i *.png``. The question may follow them: what cannot be an image ends them.
    """
    spread: list[str] = []
    option, awaited = "", False  # whose images are being read, and whether the first of them is still to come
    for index, word in enumerate(argv):
        if word == "--":
            return spread + list(argv[index:])
        if word in options:
            option, awaited = word, True
        elif awaited:
            awaited = False
        elif option and names_image(word):
            spread.append(option)
        else:
            option = ""
        spread.append(word)
    return spread


class CommandParser(ArgumentParser):
    """An ``ArgumentParser`` with suggestions, short usage lines in errors, and ``--traceback``.

    Args:
        images: options whose values are images, of which several may follow one option.
        **options: as ``ArgumentParser`` takes them.
    """

    def __init__(self, *, images: Sequence[str] = (), **options: Any) -> None:
        super().__init__(formatter_class=RawDescriptionHelpFormatter, **options)
        self.images = images
        self.add_argument(TRACEBACK, action="store_true", help="show where in the program an error arose")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the options; what is unknown ends the program, with a suggestion."""
        given = list(sys.argv[1:] if args is None else args)
        found, unknown = self.parse_known_args(spread_images(given, self.images), namespace)
        if unknown:
            known = [name for name in self._option_string_actions if name not in hidden_options(self)]
            first = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{suggestion(first, known) if first else ''}")
        return found

    def _get_option_tuples(self, option_string: str) -> Any:
        """Return the options that a shortened one may be; `asks_for_traceback` looks for the whole word."""
        return [
            found for found in super()._get_option_tuples(option_string) if TRACEBACK not in found[0].option_strings
        ]

    def _get_value(self, action: Action, arg_string: str) -> Any:
        if not arg_string.strip() and action.type in (None, Path) and action.dest not in MAY_BE_BLANK:
            raise ArgumentError(action, "it is empty, as from a variable that is not set")
        return super()._get_value(action, arg_string)

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            meant = suggestion(str(value), choices)
            raise ArgumentError(action, f"invalid choice: {value!r} (choose from {', '.join(choices)}).{meant}")

    def error(self, message: str) -> NoReturn:
        """End the program with what is wrong, the arguments that are needed, and where to read more."""
        self.exit(2, f"{self.short_usage()}{self.prog}: error: {message}\n{self.prog} --help explains the options.\n")

    def short_usage(self) -> str:
        """Return the usage without what may be left out; of dozens of options the error would be the last line."""
        if self.usage is not None:
            return self.format_usage()
        needed = [action for action in self._actions if action.required or not action.option_strings]
        formatter = self._get_formatter()
        formatter.add_usage(f"{self.prog} [options]", [], [])
        words = formatter.format_help().strip()
        for action in needed:
            words += " " + argument_usage(action)
        return f"{words}\n"


def argument_usage(action: Action) -> str:
    """Return how one argument is given."""
    name = action.metavar if isinstance(action.metavar, str) else action.dest
    if action.option_strings:
        return f"{action.option_strings[0]} {str(name).upper()}"
    return f"[{name}]" if action.nargs == "?" else str(name)


def hidden_options(parser: ArgumentParser) -> set[str]:
    """Return the options that the help does not show."""
    return {name for action in parser._actions if action.help is SUPPRESS for name in action.option_strings}
