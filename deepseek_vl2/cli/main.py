"""The command line's front: it finds the command, runs it, and turns errors into lines and exit codes.

Every error is one line, "deepseek-vl2 COMMAND: error: ...". Exit codes: 0 done, 1 a user's mistake, 2 wrong usage,
130 interrupted. Torch is imported by the commands that need it, never here: ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any, NamedTuple, TextIO

from deepseek_vl2 import __version__
from deepseek_vl2.cli.options import fetch_missing, is_out_of_memory
from deepseek_vl2.cli.parser import TRACEBACK, CommandParser, asks_for_traceback, suggestion
from deepseek_vl2.utils.errors import UsageError

PROGRAM = "deepseek-vl2"
DESCRIPTION = "DeepSeek-VL2: ask about images, find things in them, chat, serve, fine-tune."
EXAMPLES = """\
examples:
  deepseek-vl2 ask "What is this?" --image photo.jpg
  deepseek-vl2 ground photo.jpg "the giraffe at the back"
  deepseek-vl2 chat --model deepseek-ai/deepseek-vl2-tiny
  deepseek-vl2 batch questions.jsonl answers.jsonl
  deepseek-vl2 info deepseek-ai/deepseek-vl2-small
  deepseek-vl2 pull deepseek-ai/deepseek-vl2-tiny

Each command has its own --help with examples. Model names: "nano", the small model that ships with the package; a
directory; or a hub id such as deepseek-ai/deepseek-vl2-tiny.
"""


class Command(NamedTuple):
    """A command, imported when it is called.

    Fields:
        module: where its ``add_arguments`` and ``run`` or ``main`` are.
        summary: one line of help.
        extra: the extra of the package whose dependencies it needs.
    """

    module: str
    summary: str
    extra: str | None = None


COMMANDS = {
    "ask": Command("deepseek_vl2.cli.ask", "ask one question about some images"),
    "chat": Command("deepseek_vl2.cli.chat", "talk about images, in the terminal"),
    "ground": Command("deepseek_vl2.cli.ground", "find things: a drawing and boxes"),
    "batch": Command("deepseek_vl2.cli.batch", "answer a file of questions"),
    "info": Command("deepseek_vl2.cli.info", "sizes, memory needed, devices, versions"),
    "list": Command("deepseek_vl2.cli.models", "the models that are on this machine"),
    "pull": Command("deepseek_vl2.cli.pull", "download a model from the Hugging Face hub"),
    "quantize": Command("deepseek_vl2.cli.quantize", "write a checkpoint with weights in 8 or 4 bits"),
    "demo": Command("deepseek_vl2.serve.web.command", "a web page to chat in", "gradio"),
    "serve": Command("deepseek_vl2.serve.api.command", "an OpenAI-compatible server", "serve"),
    "finetune": Command("deepseek_vl2.training.finetune", "train a model on your own conversations", "train"),
    "evaluate": Command("deepseek_vl2.synthetic.evaluate", "measure a model on synthetic pictures", "synthetic"),
    "completion": Command("deepseek_vl2.cli.completion", "a script that completes commands in a shell"),
}


def build_parser() -> ArgumentParser:
    """Return the parser of the program itself; each command has its own."""
    commands = "\n".join(f"  {name:12}{command.summary}" for name, command in COMMANDS.items())
    parser = CommandParser(
        prog=PROGRAM,
        description=f"{DESCRIPTION}\n\ncommands:\n{commands}",
        epilog=EXAMPLES,
        usage=f"{PROGRAM} [--version] [--traceback] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def as_declared(argv: list[str], declared: Collection[str]) -> list[str]:
    """Return arguments with options spelled as they are declared: ``--max-new-tokens`` for ``--max_new_tokens``.

    Some commands' options have underscores, as the original's scripts, and some hyphens, as other servers.
    """
    spellings = {name.replace("_", "-"): name for name in declared}
    spelled: list[str] = []
    for index, argument in enumerate(argv):
        if argument == "--":
            return spelled + argv[index:]
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name not in declared:
            name = spellings.get(name.replace("_", "-"), name)
        spelled.append(f"{name}{equals}{value}")
    return spelled


def build_command_parser(
    add_arguments: Callable[[ArgumentParser], None], program: str, description: str | None, examples: str | None = None
) -> ArgumentParser:
    """Return a command's parser."""
    parser = CommandParser(prog=program, description=description, epilog=examples)
    add_arguments(parser)
    return parser


def command_parser(name: str, module: Any = None) -> ArgumentParser:
    """Return the parser of a command of the program; ``module``: its module, where that is imported already."""
    command, program = COMMANDS[name], f"{PROGRAM} {name}"
    module = import_module(command.module) if module is None else module
    if hasattr(module, "build_parser"):
        parser: ArgumentParser = module.build_parser(program)
        return parser
    description, examples = getattr(module, "DESCRIPTION", command.summary), getattr(module, "EXAMPLES", None)
    return build_command_parser(module.add_arguments, program, description, examples)


def run_program(parser: ArgumentParser, argv: list[str] | None, run: Callable[[Namespace], int]) -> int:
    """Read a program's arguments, run it, and return its exit code; errors are told as in `run_guarded`."""
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(as_declared(given, parser._option_string_actions))
    return run_guarded(parser.prog, lambda: run(args), show_traceback=asks_for_traceback(given))


def fetch_model(name: str) -> str:
    """Return where a model is to be loaded from, downloaded where the cache lacks it: see `options.fetch_missing`."""
    return fetch_missing(name)


def run_command(name: str, argv: list[str]) -> int:
    """Import and run one command.

    A command is a module with ``add_arguments(parser)`` and ``run(args)`` or ``main(args)``, or with ``main(argv)``
    alone, which then reads its own arguments.
    """
    command = COMMANDS[name]
    try:
        module = import_module(command.module)
        if not hasattr(module, "add_arguments") or hasattr(module, "build_parser"):
            named = {"prog": f"{PROGRAM} {name}"} if "prog" in inspect.signature(module.main).parameters else {}
            return int(module.main(argv, **named) or 0)
        parser = command_parser(name, module)
        args = parser.parse_args(as_declared(argv, parser._option_string_actions))
        args.argv = argv  # batch hands them to its processes
        return int((module.run if hasattr(module, "run") else module.main)(args) or 0)
    except ModuleNotFoundError as error:
        raise ValueError(missing_module(name, command, error)) from error


def missing_module(name: str, command: Command, error: ModuleNotFoundError) -> str:
    """Return what to do about a module that a command needs and that is not there."""
    if (error.name or "").partition(".")[0] == "deepseek_vl2":
        return f"This installation lacks the command {name} ({error.name} is missing)."
    package = f"deepseek_vl2[{command.extra}]" if command.extra else str(error.name)
    return f'{name} needs the package {error.name}: pip install "{package}"'


def first_lines(error: BaseException) -> str:
    """Return an error's first paragraph: what follows in the libraries' long messages helps nobody here.

    The system's errors are told by their words, behind the name of the file where there is one, without their number.
    """
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        file = "" if error.filename is None else f"{error.filename}: "
        return f"{file}{error.strerror}"
    return str(error).strip().partition("\n\n")[0] or type(error).__name__


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning that is meant for users as one line, without the place in the program that it came from."""
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        sys.stderr.write(f"Note: {message}\n")


def run_guarded(program: str, work: Callable[[], int], show_traceback: bool = False) -> int:
    """Do the work of a program and return its exit code; a user's mistake becomes one line on the error stream."""
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows another, rather than an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            return work()
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130
    except BrokenPipeError:  # the reader, such as head, has had enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if show_traceback or not (isinstance(error, (ValueError, OSError, ImportError)) or is_out_of_memory(error)):
            raise
        hint = " Try --dtype bfloat16, --chunk_size 512, fewer images or another --device." * is_out_of_memory(error)
        sys.stderr.write(f"{program}: error: {first_lines(error)}{hint}\n")
        return 2 if isinstance(error, UsageError) else 1


def read_command(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Return the program's own options, with the command's name, and the arguments of the command."""
    parser = build_parser()
    if not argv:  # all that can be done, and an exit code that tells a script of its mistake
        parser.print_help(sys.stderr)
        parser.exit(2)
    place = next((index for index, argument in enumerate(argv) if not argument.startswith("-")), len(argv))
    args, unknown = parser.parse_known_args(argv[:place])
    if unknown:
        known = [name for name in parser._option_string_actions if name.startswith("--")]
        meant = suggestion(unknown[0], known) or f" Options of a command follow it: {PROGRAM} COMMAND {unknown[0]} ..."
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{meant}")
    if place == len(argv):
        parser.error(f"the command is missing. The commands are {', '.join(COMMANDS)}.")
    args.command = argv[place]
    if args.command not in COMMANDS:
        meant = suggestion(args.command, COMMANDS) or f" The commands are {', '.join(COMMANDS)}."
        parser.error(f"there is no command {args.command!r}.{meant}")
    return args, argv[place + 1 :]


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    # Read when PyTorch is imported: idle threads then sleep rather than spin, which on busy cores is many times faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = sys.argv[1:] if argv is None else argv
    args, rest = read_command(argv)
    if args.traceback:
        rest = [TRACEBACK, *rest]
    return run_guarded(
        f"{PROGRAM} {args.command}", lambda: run_command(args.command, rest), show_traceback=asks_for_traceback(rest)
    )


if __name__ == "__main__":
    sys.exit(main())
