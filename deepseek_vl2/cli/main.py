"""The command line's front: it finds the command, runs it, and turns errors into lines and exit codes.

Exit codes: 0 done, 1 a user's mistake, 2 wrong usage, 130 interrupted. Torch is imported by the commands that need it,
never here: ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any, NamedTuple, TextIO

from deepseek_vl2 import __version__
from deepseek_vl2.cli.options import is_out_of_memory

PROGRAM = "deepseek-vl2"
DESCRIPTION = "DeepSeek-VL2: ask about images, find things in them, chat, serve, fine-tune."
EXAMPLES = """\
examples:
  deepseek-vl2 ask "What is this?" --image photo.jpg
  deepseek-vl2 ground photo.jpg "the giraffe at the back"
  deepseek-vl2 chat --model deepseek-ai/deepseek-vl2-tiny
  deepseek-vl2 batch questions.jsonl answers.jsonl
  deepseek-vl2 info deepseek-ai/deepseek-vl2-small

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
    "quantize": Command("deepseek_vl2.cli.quantize", "write a checkpoint with weights in 8 or 4 bits"),
    "demo": Command("deepseek_vl2.serve.web.command", "a web page to chat in", "gradio"),
    "serve": Command("deepseek_vl2.serve.api.command", "an OpenAI-compatible server", "serve"),
    "finetune": Command("deepseek_vl2.training.finetune", "train a model on your own conversations", "train"),
    "evaluate": Command("deepseek_vl2.synthetic.evaluate", "measure a model on synthetic pictures", "synthetic"),
}


def build_parser() -> ArgumentParser:
    """Return the parser of the program itself; each command has its own."""
    commands = "\n".join(f"  {name:10}{command.summary}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        prog=PROGRAM,
        description=f"{DESCRIPTION}\n\ncommands:\n{commands}",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        usage=f"{PROGRAM} [--version] [--traceback] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the program an error arose")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the above")
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


def run_command(name: str, argv: list[str]) -> int:
    """Import and run one command.

    A command is a module with ``add_arguments(parser)`` and ``run(args)`` or ``main(args)``, or with ``main(argv)``
    alone, which then reads its own arguments.
    """
    command = COMMANDS[name]
    try:
        return call_command(import_module(command.module), command, f"{PROGRAM} {name}", argv)
    except ModuleNotFoundError as error:
        raise ValueError(missing_module(name, command, error)) from error


def call_command(module: Any, command: Command, program: str, argv: list[str]) -> int:
    """Read a command's arguments and run it."""
    if not hasattr(module, "add_arguments"):
        named = {"prog": program} if "prog" in inspect.signature(module.main).parameters else {}
        return int(module.main(argv, **named) or 0)
    parser = ArgumentParser(
        prog=program,
        description=getattr(module, "DESCRIPTION", command.summary),
        epilog=getattr(module, "EXAMPLES", None),
        formatter_class=RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(as_declared(argv, parser._option_string_actions))
    args.argv = argv  # batch hands them to its processes
    return int((module.run if hasattr(module, "run") else module.main)(args) or 0)


def missing_module(name: str, command: Command, error: ModuleNotFoundError) -> str:
    """Return what to do about a module that a command needs and that is not there."""
    if (error.name or "").partition(".")[0] == "deepseek_vl2":
        return f"This installation lacks the command {name} ({error.name} is missing)."
    package = f"deepseek_vl2[{command.extra}]" if command.extra else str(error.name)
    return f'{name} needs the package {error.name}: pip install "{package}"'


def first_lines(error: BaseException) -> str:
    """Return an error's first paragraph: what follows in the libraries' long messages helps nobody here."""
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
    except (ValueError, OSError, RuntimeError) as error:
        if show_traceback or not (isinstance(error, (ValueError, OSError)) or is_out_of_memory(error)):
            raise
        hint = " Try --dtype bfloat16, --chunk_size 512, fewer images or another --device." * is_out_of_memory(error)
        sys.stderr.write(f"{program}: {first_lines(error)}{hint}\n")
        return 1


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    # Read when PyTorch is imported: idle threads then sleep rather than spin, which on busy cores is many times faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = sys.argv[1:] if argv is None else argv
    own = next((index for index, argument in enumerate(argv) if not argument.startswith("-")), len(argv) - 1) + 1
    args = build_parser().parse_args(argv[:own])
    return run_guarded(
        f"{PROGRAM} {args.command}", lambda: run_command(args.command, argv[own:]), show_traceback=args.traceback
    )


if __name__ == "__main__":
    sys.exit(main())
