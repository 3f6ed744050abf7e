"""``deepseek-vl2 completion``: print a script that completes commands, options and their values in a shell."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from typing import NamedTuple

from deepseek_vl2.cli.parser import hidden_options
from deepseek_vl2.cli.releases import RELEASES
from deepseek_vl2.utils.places import DEMO_NAME, NANO_NAME

DESCRIPTION = "Print a script that completes commands, options, choices, models and files in a shell."
EXAMPLES = """\
examples:
  bash: eval "$(deepseek-vl2 completion bash)", in ~/.bashrc
  zsh:  source <(deepseek-vl2 completion zsh), in ~/.zshrc behind compinit
  fish: deepseek-vl2 completion fish > ~/.config/fish/completions/deepseek-vl2.fish

The script holds all that it needs: pressing TAB starts no Python. Print it anew after an update of the package.
"""
SHELLS = ("bash", "zsh", "fish")
MODELS = (NANO_NAME, DEMO_NAME, *RELEASES)


class Option(NamedTuple):
    """An option, or a command's arguments.

    Fields:
        flags: how it is written, ``("--image", "-i")``; none: the arguments.
        help: what it does, in a line.
        takes: "nothing", "words" (those of ``values``), "model" (those, or a directory), "file", or "text".
        values: what it may be.
        many: several values may follow.
    """

    flags: tuple[str, ...]
    help: str
    takes: str
    values: tuple[str, ...] = ()
    many: bool = False


class CommandWords(NamedTuple):
    """What a command understands."""

    name: str
    summary: str
    options: list[Option]
    arguments: Option


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that shall complete")


def run(args: Namespace) -> int:
    """Print the script."""
    from deepseek_vl2.cli import completion_scripts
    from deepseek_vl2.cli.main import PROGRAM

    write = {
        "bash": completion_scripts.bash_script,
        "zsh": completion_scripts.zsh_script,
        "fish": completion_scripts.fish_script,
    }[args.shell]
    print(write(PROGRAM, all_commands()), end="")
    return 0


def all_commands() -> list[CommandWords]:
    """Return what every command understands, from its parser."""
    from deepseek_vl2.cli.main import COMMANDS, command_parser

    found = []
    for name, command in COMMANDS.items():
        parser = command_parser(name)
        hidden = hidden_options(parser)
        read = [read_action(action, hidden) for action in parser._actions if not isinstance(action.dest, int)]
        arguments = [option for option in read if not option.flags and option.takes != "nothing"]
        first = arguments[0] if arguments else Option((), "", "file")
        found.append(CommandWords(name, command.summary, [option for option in read if option.flags], first))
    return found


def read_action(action: Action, hidden: set[str]) -> Option:
    """Return one of a parser's options or arguments, without the spellings that its help does not show."""
    flags = tuple(flag for flag in action.option_strings if flag not in hidden)
    text = " ".join((action.help or "").replace("%(default)s", str(action.default)).split())
    many = action.nargs in ("+", "*") or (action.dest == "image" and bool(flags))
    if not action.option_strings or flags:
        takes, values = value_of(action)
        return Option(flags, text, takes, values, many)
    return Option((), text, "nothing")


def value_of(action: Action) -> tuple[str, tuple[str, ...]]:
    """Return what an option takes, and which values it may have; those with spaces are left to be typed."""
    if action.nargs == 0:
        return "nothing", ()
    if action.choices is not None:
        return "words", tuple(str(choice) for choice in action.choices if " " not in str(choice))
    if action.metavar == "MODEL" or action.dest == "model":
        return "model", MODELS
    if action.type is not None and getattr(action.type, "__name__", "") != "Path":
        return "text", ()  # a number, or another thing that no list holds
    return "file", ()
