"""Ask a checkpoint the held-out questions of the synthetic suite: a table, a picture sheet and all answers.

Examples:
    deepseek-vl2 evaluate
    deepseek-vl2 evaluate --model CHECKPOINT --number 500 --dtype float32 --output results
    deepseek-vl2 evaluate --tasks locate read --number 50
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_vl2.cli.main import build_command_parser, run_program
from deepseek_vl2.cli.options import (
    DTYPES,
    add_memory_arguments,
    check_device,
    check_reachable,
    check_writable,
    fetch_missing,
    loading_options,
    whole_number,
)
from deepseek_vl2.utils.progress import Progress, weights_reported

from .tasks import EVERY_TASK

if TYPE_CHECKING:
    from .suite import TaskResult

PROGRAM = "evaluate"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--model", default="nano", help="nano, a checkpoint's directory or a hub id (default: nano)")
    parser.add_argument("--tasks", nargs="+", choices=EVERY_TASK, help="which tasks (default: all)")
    parser.add_argument("--number", type=whole_number(1), default=200, help="questions of each task (default: 200)")
    parser.add_argument(
        "--batch_size", type=whole_number(1), default=16, help="questions answered at once (default: 16)"
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu, or auto to spread it; default: the best there is")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights (default: bfloat16)")
    add_memory_arguments(parser)
    parser.add_argument("--output", type=Path, help="directory for table.md, sheet.png and answers.jsonl")


def build_parser(prog: str | None = None) -> ArgumentParser:
    """Return the command's parser."""
    return build_command_parser(add_arguments, prog or PROGRAM, __doc__)


# ---------------------------------------------------------------- before it starts


def check_needs(args: Namespace) -> None:
    """Check what an evaluation needs before any model is loaded, or hours of answers are lost.

    Raises:
        ImportError: the extra ``synthetic`` is not installed.
        ValueError: there is no such device, or the checkpoint is not whole, or not of this family.
        OSError: the output cannot be written, or there is no such checkpoint.
    """
    from .fonts import font_files

    font_files()
    if args.output is not None:
        check_writable(args.output)
    with Progress(f"Looking at {args.model}", terminal_only=True):
        check_device(args.device)
        loading_options(args)
        check_reachable(args.model)
        check_checkpoint(args.model)


def check_checkpoint(name: str) -> None:
    """Raise ``ValueError`` or ``OSError`` for a directory that holds no whole checkpoint of this family."""
    from deepseek_vl2.models import DeepseekVLV2Config
    from deepseek_vl2.models.checkpoint import find_files
    from deepseek_vl2.models.checkpoint_check import check_config
    from deepseek_vl2.utils.io import resolve_model_path

    source = resolve_model_path(name)
    if isinstance(source, Path):
        check_config(source, DeepseekVLV2Config.model_type)
        if not find_files(source):
            raise FileNotFoundError(f"There are no safetensors files in {source}.")


# ---------------------------------------------------------------- asking


def write_results(results: list[TaskResult], directory: Path) -> None:
    """Write the table, the picture sheet and every answer."""
    from .sheet import picture_sheet
    from .suite import table

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(table(results), encoding="utf-8")
    picture_sheet(results).save(directory / "sheet.png", optimize=True)
    with open(directory / "answers.jsonl", "w", encoding="utf-8") as file:
        for result in results:
            for index, item in enumerate(result.judged):
                turn = item.sample.turns[0]
                row = {"task": result.task, "index": index, "question": turn.question, "truth": turn.answer}
                file.write(json.dumps({**row, "answer": item.answer, **item.scores}, ensure_ascii=False) + "\n")


def run(args: Namespace) -> int:
    """Check, load, ask and report.

    Raises:
        ImportError, ValueError, OSError: see `check_needs`.
    """
    check_needs(args)
    source = fetch_missing(args.model)
    with Progress(f"Loading {args.model}") as line:
        import torch

        from deepseek_vl2.utils.io import load_pretrained_model

        from .suite import run_task, table

        with weights_reported(line.report):
            dtype, options = getattr(torch, args.dtype), loading_options(args)
            _, processor, model = load_pretrained_model(source, dtype=dtype, **options)
    results = []
    for task in args.tasks or EVERY_TASK:
        start = time.perf_counter()
        with Progress(f"Asking {args.number} questions: {task}", terminal_only=True):
            results.append(run_task(model, processor, task, args.number, args.batch_size))
        scores = ", ".join(f"{name} {100 * value:.1f} %" for name, value in results[-1].means.items())
        sys.stderr.write(f"{task}: {scores} ({time.perf_counter() - start:.0f} s)\n")
    sys.stdout.write("\n" + table(results))
    if args.output is not None:
        write_results(results, args.output)
        sys.stdout.write(f"\nWritten: table.md, sheet.png and answers.jsonl in {args.output}\n")
    return 0


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; the exit code is 1 for a user's mistake, 2 for wrong usage."""
    return run_program(build_parser(prog), argv, run)


if __name__ == "__main__":
    sys.exit(main())
