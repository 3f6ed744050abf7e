"""``deepseek-vl2 batch``: answer a file of questions."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from deepseek_vl2.cli.batch_lines import Job, answer_lines
from deepseek_vl2.cli.options import (
    add_generation_arguments,
    add_model_arguments,
    load,
    note,
    whole_number,
)

DESCRIPTION = "Answer a file of questions, one JSON object a line. An interrupted run goes on where it was."
EXAMPLES = """\
a line is one of
  {"prompt": "What is this?", "images": ["photo.jpg"], "id": 7}
  {"messages": [{"role": "user", "content": [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "..."}]}]}
and its answer {"line": 1, "id": 7, "answer": "...", "finish_reason": "stop", "usage": {...}, "objects": [...]}.
Lines that cannot be answered go to OUTPUT.errors, with the reason, and are tried again by the next run.

examples:
  deepseek-vl2 batch questions.jsonl answers.jsonl
  deepseek-vl2 batch questions.jsonl answers.jsonl --model deepseek-ai/deepseek-vl2-tiny --batch_size 8
  deepseek-vl2 batch questions.jsonl answers.jsonl --processes 4
  accelerate launch -m deepseek_vl2.cli batch questions.jsonl answers.jsonl

Several processes take a GPU and a share of the lines. Images are named relative to the working directory.
"""

LAUNCHED = "DEEPSEEK_VL2_BATCH_LAUNCHED"  # in the environment of processes that must not launch others


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("input", metavar="INPUT", help="a JSON Lines file of questions")
    parser.add_argument("output", metavar="OUTPUT", help="where the answers go, as JSON Lines in the input's order")
    parser.add_argument("--batch_size", type=whole_number(1), default=1, help="lines at a time; default: 1")
    parser.add_argument("--processes", type=whole_number(1), default=1, help="so many, through accelerate, a GPU each")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, rather than go on with OUTPUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_arguments(parser)
    add_generation_arguments(parser)


def run(args: Namespace) -> int:
    """Answer this process's share of the lines; the first process gathers them all."""
    jobs = read_jobs(Path(args.input))
    output = Path(args.output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {output.parent} to write {output.name} into.")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world == 1 and args.processes > 1 and LAUNCHED not in os.environ:
        return launch(args) or finish(output, len(jobs))
    if args.overwrite and rank == 0:
        for file in (output, errors_file(output), *part_files(output)):
            file.unlink(missing_ok=True)
    wait = meet_others(args) if world > 1 else lambda: None
    wait()
    answered = check_answers(jobs, gather(output), output)
    mine = [job for job in jobs[rank::world] if job.line not in answered]
    wait()  # all have read what there was before any writes
    try:
        if mine:
            work(args, mine, output.with_name(f"{output.name}.part{rank}"), len(jobs[rank::world]), show=rank == 0)
        wait()
    finally:
        if world == 1:
            write_answers(output)
    if world > 1:
        if rank == 0:
            write_answers(output)
        leave_others()
    # Launchers take a worker's exit code for a crash.
    return finish(output, len(jobs)) if world == 1 else 0


def launch(args: Namespace) -> int:
    """Run this command in several processes; return the exit code.

    Raises:
        ValueError: there are GPUs, but fewer than processes.
    """
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < args.processes and args.device != "cpu":
        raise ValueError(f"{args.processes} processes need a GPU each, but torch sees {gpus}; --device cpu needs none.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(args.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), LAUNCHED: "1"}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "deepseek_vl2.cli", "batch", *args.argv]
    workers = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(args.processes)
    ]
    try:
        while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
            time.sleep(0.2)
    finally:  # when one has failed, or the user interrupts, the others end too
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()
    return next((code for code in codes if code), 0)


def meet_others(args: Namespace) -> Any:
    """Join the other processes, take this one's GPU, and return what waits for all of them."""
    import torch
    from accelerate import PartialState

    # Shares take unequal times: whoever is done first waits, as long as it takes.
    on_cpu = args.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    if args.device is None:
        args.device = str(state.device)
    return state.wait_for_everyone


def leave_others() -> None:
    """End what `meet_others` began."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- files


def read_jobs(path: Path) -> list[Job]:
    """Read the lines that are not blank.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not text or holds nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        # Not splitlines: JSON may hold separators such as U+2028 as they are, and they end no line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error
    jobs = [
        Job(line, hashlib.sha256(text.encode()).hexdigest()[:16], text)
        for line, text in enumerate(lines, 1)
        if text.strip()
    ]
    if not jobs:
        raise ValueError(f"{path} holds no questions.")
    return jobs


def part_files(output: Path) -> list[Path]:
    """Return what processes have written and nobody has gathered."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.part[0-9]*"))


def errors_file(output: Path) -> Path:
    """Return the file of the lines that could not be answered."""
    return output.with_name(f"{output.name}.errors")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a file; a last line that a killed process left unfinished is none."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for text in file:
            try:
                record = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and "line" in record:
                yield record


def gather(output: Path) -> dict[int, dict[str, Any]]:
    """Return all records of this and earlier runs by line; an answer replaces an error, a later record an earlier."""
    records: dict[int, dict[str, Any]] = {}
    for file in (output, *part_files(output)):
        for record in read_records(file):
            if "error" not in record or "answer" not in records.get(record["line"], {}):
                records[record["line"]] = record
    return records


def check_answers(jobs: list[Job], records: dict[int, dict[str, Any]], output: Path) -> set[int]:
    """Return the lines that are answered.

    Raises:
        ValueError: the answers belong to another input.
    """
    keys = {job.line: job.key for job in jobs}
    answered = {line for line, record in records.items() if "answer" in record}
    foreign = sorted(line for line in answered if records[line].get("key") != keys.get(line))
    if foreign:
        raise ValueError(
            f"{output} answers another input: its line {foreign[0]} was another one. "
            "Name another output, or begin anew with --overwrite."
        )
    return answered


def write_answers(output: Path) -> None:
    """Gather all answers into the output, in the input's order, and all errors beside it."""
    records = gather(output)
    ordered = [records[line] for line in sorted(records)]
    parts = part_files(output)
    for file, kept in ((output, "answer"), (errors_file(output), "error")):
        chosen = [json.dumps(record, ensure_ascii=False) for record in ordered if kept in record]
        if chosen or kept == "answer":
            aside = file.with_name(f"{file.name}.new")
            aside.write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
            aside.replace(file)  # a kill half-way leaves the old file whole
        else:
            file.unlink(missing_ok=True)
    for part in parts:
        part.unlink()


def finish(output: Path, total: int) -> int:
    """Tell how it went; the exit code is 1 when lines could not be answered."""
    failed = list(read_records(errors_file(output)))
    answered = sum(1 for _ in read_records(output))
    note(f"{answered} of {total} lines are answered in {output}.")
    for record in failed[:5]:
        note(f"  line {record['line']}: {record['error']}")
    if failed:
        note(f"{len(failed)} lines could not be answered: {errors_file(output)} lists them.")
    return 0 if answered == total else 1


# ---------------------------------------------------------------- answering


def work(args: Namespace, jobs: list[Job], part: Path, share: int, show: bool) -> None:
    """Answer lines, several at a time, and append their records in order to this process's part file."""
    from tqdm import tqdm

    loaded = load(args)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    bar = tqdm(total=share, initial=share - len(jobs), unit="line", disable=args.quiet or not show)
    with bar, open(part, "a", encoding="utf-8") as file:
        if part.stat().st_size:
            file.write("\n")  # a killed process may have left its last line unfinished
        for record in answer_lines(loaded, jobs, args, seed):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
