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
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from deepseek_vl2.cli.options import add_memory_arguments, loading_options
from deepseek_vl2.utils.io import load_pretrained_model

from .samples import TASKS
from .sheet import picture_sheet
from .suite import UNTILED, TaskResult, run_task, table

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(prog=prog, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="nano, a checkpoint's directory or a hub id (default: nano)")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, *UNTILED], help="which tasks (default: all)")
    parser.add_argument("--number", type=int, default=200, help="questions of each task (default: 200)")
    parser.add_argument("--batch_size", type=int, default=16, help="questions answered at once (default: 16)")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the best there is")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights (default: bfloat16)")
    add_memory_arguments(parser)
    parser.add_argument("--output", type=Path, help="directory for table.md, sheet.png and answers.jsonl")
    args = parser.parse_args(argv)
    for name in ("number", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, not {getattr(args, name)}")
    return args


def write_results(results: list[TaskResult], directory: Path) -> None:
    """Write the table, the picture sheet and every answer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(table(results), encoding="utf-8")
    picture_sheet(results).save(directory / "sheet.png", optimize=True)
    with open(directory / "answers.jsonl", "w", encoding="utf-8") as file:
        for result in results:
            for index, item in enumerate(result.judged):
                turn = item.sample.turns[0]
                row = {"task": result.task, "index": index, "question": turn.question, "truth": turn.answer}
                file.write(json.dumps({**row, "answer": item.answer, **item.scores}, ensure_ascii=False) + "\n")


def run(args: Namespace) -> list[TaskResult]:
    """Load, ask and report; returns the results."""
    _, processor, model = load_pretrained_model(args.model, dtype=DTYPES[args.dtype], **loading_options(args))
    results = []
    for task in args.tasks or [*TASKS, *UNTILED]:
        start = time.perf_counter()
        results.append(run_task(model, processor, task, args.number, args.batch_size))
        scores = ", ".join(f"{name} {100 * value:.1f} %" for name, value in results[-1].means.items())
        sys.stderr.write(f"{task}: {scores} ({time.perf_counter() - start:.0f} s)\n")
    sys.stdout.write("\n" + table(results))
    if args.output is not None:
        write_results(results, args.output)
        sys.stdout.write(f"\nWritten: table.md, sheet.png and answers.jsonl in {args.output}\n")
    return results


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; the exit code is 1 for a user's mistake."""
    args = parse_args(argv, prog)
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
