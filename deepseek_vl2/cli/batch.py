"""``deepseek-vl2 batch``: answer a file of questions."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from deepseek_vl2.cli.batch_files import (
    Asked,
    Job,
    check_answers,
    check_files,
    errors_file,
    forget,
    gather,
    locked,
    naming,
    part_files,
    read_jobs,
    read_records,
    record_line,
    write_answers,
)
from deepseek_vl2.cli.batch_model import model_identity
from deepseek_vl2.cli.batch_window import answer_lines
from deepseek_vl2.cli.options import (
    add_generation_arguments,
    add_model_arguments,
    answer_options,
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
  deepseek-vl2 batch questions.jsonl answers.jsonl --ray --batch_size 64
  deepseek-vl2 batch questions.jsonl answers.jsonl --ray_address 10.0.0.1:6379 --backend vllm

Several processes take a GPU and a share of the lines; with --ray they may be on several machines, take lines as they
have room, and are replaced when they die. Images are named relative to the working directory.
"""

LAUNCHED = "DEEPSEEK_VL2_BATCH_LAUNCHED"  # in the environment of processes that must not launch others


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("input", metavar="INPUT", help="a JSON Lines file of questions")
    parser.add_argument("output", metavar="OUTPUT", help="where the answers go, as JSON Lines in the input's order")
    parser.add_argument("--batch_size", type=whole_number(1), default=1, help="lines at a time; default: 1")
    parser.add_argument(
        "--processes", type=whole_number(1),
        help="number of worker processes, one GPU each; default: 1, and with --ray one for each GPU of the cluster, or "
        "for each node where there are none",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="begin anew, rather than go on with OUTPUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_ray_arguments(parser.add_argument_group("cluster"))
    add_model_arguments(parser)
    add_generation_arguments(parser)


def add_ray_arguments(group: Any) -> None:
    """Declare on which cluster, and by which engine."""
    group.add_argument("--ray", action="store_true", help="workers of a Ray cluster answer the lines")
    group.add_argument(
        "--ray_address", metavar="ADDRESS",
        help="HOST:PORT of that cluster, or auto for the one that runs here; default: RAY_ADDRESS of the environment, "
        "else a cluster of this machine, started for this run",
    )  # fmt: skip
    group.add_argument(
        "--backend", choices=("engine", "vllm"), default="engine",
        help="what each worker answers with: our engine (default), or vLLM with this package's plugin; with --ray",
    )  # fmt: skip


def run(args: Namespace) -> int:
    """Answer this process's share of the lines; the first process gathers them all."""
    if args.ray or args.ray_address is not None:
        from deepseek_vl2.cli import batch_ray

        return batch_ray.run(args, finish)
    if args.backend == "vllm":
        raise ValueError("--backend vllm needs --ray.")
    args.processes = args.processes or 1
    questions, output = Path(args.input), Path(os.path.realpath(args.output))
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    shared = LAUNCHED in os.environ or rank > 0  # the lock is held by who launched this process, or by the first
    if not shared:
        check_files(questions, output)
    jobs = read_jobs(questions, Asked(answer_options(args), model_identity(args)))
    with contextlib.nullcontext() if shared else locked(output) as lock:
        if not shared:
            check_files(questions, output)  # another run may have ended since
        if world == 1 and args.processes > 1:
            return launch(args, lock) or finish(output, len(jobs))
        return answer_share(args, jobs, output, rank, world)


def answer_share(args: Namespace, jobs: list[Job], output: Path, rank: int, world: int) -> int:
    """Answer every ``world``-th line, from the ``rank``-th on."""
    wait = meet_others(args) if world > 1 else lambda: None
    wait()
    answered = set() if args.overwrite else check_answers(jobs, gather(output), output)
    mine = [job for job in jobs[rank::world] if job.line not in answered]

    def begin() -> None:
        wait()  # all have a model, and have read what there was, before anything is written
        if args.overwrite and rank == 0:
            forget(output)
        wait()

    try:
        if mine:
            work(args, mine, output.with_name(f"{output.name}.part{rank}"), len(jobs[rank::world]), rank == 0, begin)
        else:
            begin()
        wait()
    finally:
        if world == 1 and part_files(output):
            write_answers(output)
    if world > 1:
        if rank == 0:
            write_answers(output)
        leave_others()
    # Launchers take a worker's exit code for a crash.
    return finish(output, len(jobs)) if world == 1 else 0


def launch(args: Namespace, lock: int | None) -> int:
    """Run this command in several processes, which hold the lock too; return the exit code.

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
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            pass_fds=() if lock is None else (lock,),
        )
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


def finish(output: Path, total: int) -> int:
    """Tell how it went; the exit code is 1 when lines could not be answered."""
    failed = list(read_records(errors_file(output)))
    blank = [not str(record.get("answer") or "").strip() for record in read_records(output)]
    answered, empty = len(blank), sum(blank)
    note(f"{answered} of {total} lines are answered in {output}.")
    if empty:
        note(f"{empty} of them {'has' if empty == 1 else 'have'} no text: the model ended its answer at once.")
    for record in failed[:5]:
        note(f"  line {record['line']}: {record['error']}")
    if failed:
        note(f"{len(failed)} lines could not be answered: {errors_file(output)} lists them.")
    return 0 if answered == total else 1


# ---------------------------------------------------------------- answering


def work(args: Namespace, jobs: list[Job], part: Path, share: int, show: bool, begin: Callable[[], None]) -> None:
    """Answer lines, several at a time, and append their records in order to this process's part file.

    What earlier runs wrote stays as it is until ``begin`` is called, with the model loaded.
    """
    from tqdm import tqdm

    loaded = load(args)
    begin()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    bar = tqdm(total=share, initial=share - len(jobs), unit="line", disable=args.quiet or not show)
    with bar, naming(part), open(part, "a", encoding="utf-8", newline="\n") as file:
        if part.stat().st_size:
            file.write("\n")  # a killed process may have left its last line unfinished
        for record in answer_lines(loaded, jobs, args, seed):
            file.write(record_line(record))
            file.flush()
            bar.update()
