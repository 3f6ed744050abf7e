"""``deepseek-vl2 batch --ray``: the lines of a file answered by the workers of a Ray cluster.

This process reads the lines and is the only one that writes: it appends records to a part file as they come, and
gathers them in the input's order at the end, as the other ways of `batch` do.
"""

from __future__ import annotations

import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_vl2 import __version__
from deepseek_vl2.cli.batch_files import (
    ANYHOW,
    Asked,
    Job,
    Place,
    check_answers,
    check_files,
    check_input,
    error_record,
    forget,
    gather,
    iter_jobs,
    locked,
    naming,
    part_files,
    record_line,
    write_answers,
)
from deepseek_vl2.cli.batch_model import model_identity
from deepseek_vl2.cli.batch_worker import Greeting, LineWorker
from deepseek_vl2.cli.options import answer_options, note


@dataclass
class Survey:
    """What is to be done.

    Fields:
        total: lines of the input.
        answered: the numbers of those that earlier runs answered.
    """

    total: int
    answered: set[int]


def run(args: Namespace, finish: Callable[[Path, int], int]) -> int:
    """Answer the lines that are open; ``finish(output, lines)`` tells how it went.

    Raises:
        ValueError, OSError: a user's mistake, or workers that die again and again.
    """
    check_options(args)
    questions, output = Path(args.input), Path(os.path.realpath(args.output))
    check_files(questions, output)
    with locked(output):
        check_files(questions, output)  # another run may have ended since
        asked = Asked(answer_options(args), model_identity(args))
        survey = survey_input(questions, {} if args.overwrite else gather(output), output, asked)
        try:
            if len(survey.answered) < survey.total:
                answer_all(args, questions, output, survey, asked)
        finally:
            if part_files(output):
                write_answers(output)
        return finish(output, survey.total)


def check_options(args: Namespace) -> None:
    """Raise ``ValueError`` for options that do not go together."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--ray starts its workers itself: run the command once, not through a launcher.")
    if args.device not in (None, "cpu", "cuda", "mps"):
        raise ValueError(f"With --ray a worker has one GPU, which Ray chooses: leave --device {args.device} out.")
    if args.backend != "vllm":
        return
    others = {
        "--quantize": args.quantize,
        "--quantize_head": args.quantize_head,
        "--max_memory": args.max_memory,
        "--device": args.device,
        "--chunk_size": None if args.chunk_size == -1 else args.chunk_size,
    }
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: of our engine, not of --backend vllm.")


def survey_input(questions: Path, places: dict[int, Place], output: Path, asked: Asked = ANYHOW) -> Survey:
    """Read the input once, keeping none of it; ``asked``: with what its lines are.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it holds no text, or the answers belong to another one.
    """
    total, any_text = 0, False

    def counted() -> Iterator[Job]:
        nonlocal total, any_text
        for job in iter_jobs(questions, asked):
            total, any_text = total + 1, any_text or job.text is not None
            yield job

    answered = check_answers(counted(), places, output)
    check_input(questions, total, any_text)
    return Survey(total, answered)


def answer_all(args: Namespace, questions: Path, output: Path, survey: Survey, asked: Asked) -> None:
    """Have the open lines answered, and append their records to a part file."""
    from tqdm import tqdm

    from deepseek_vl2.integrations.ray.cluster import connected, fleet_of
    from deepseek_vl2.integrations.ray.dispatch import Dispatcher

    todo = survey.total - len(survey.answered)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    begun = not args.overwrite

    def started(greeting: Greeting) -> None:
        nonlocal begun
        check_version(greeting)
        for text in greeting.notes:
            tell(text)
        if not begun:  # a model is loaded: what earlier runs wrote may go
            begun = True
            forget(output)

    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            told.add(text)
            note(text)

    with connected(args.ray_address) as ray:
        fleet = fleet_of(ray, args.processes, args.device in ("cpu", "mps"))
        if not fleet.fitting:
            tell("No node of the cluster has the CPU, and the GPU if any, that a worker takes: waiting for one.")
        elif fleet.workers > fleet.fitting:
            tell(f"The cluster has room for {fleet.fitting} workers now: the others start when there is more.")
        actor = ray.remote(num_cpus=fleet.cpus, num_gpus=fleet.gpus, scheduling_strategy="SPREAD")(LineWorker)
        dispatcher = Dispatcher(
            ray,
            lambda: actor.remote(args, seed, os.getcwd()),
            min(fleet.workers, todo),
            2 * args.batch_size,  # those being answered, and as many that are being read
            error_record,
            started,
            tell,
            lambda: fleet_of(ray, args.processes, args.device in ("cpu", "mps")).fitting > 0,
        )
        jobs = (job for job in iter_jobs(questions, asked) if job.line not in survey.answered)
        bar = tqdm(total=survey.total, initial=len(survey.answered), unit="line", disable=args.quiet)
        with bar:
            write_records(dispatcher.run(jobs), output.with_name(f"{output.name}.part0"), bar)


def write_records(records: Iterator[dict[str, Any]], part: Path, bar: Any) -> None:
    """Append records to a part file as they come."""
    file = None
    try:
        for record in records:
            if file is None:  # not before there is a model: until then nothing of earlier runs is touched
                file = open(part, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
                if part.stat().st_size:
                    file.write("\n")  # a killed process may have left its last line unfinished
            with naming(part):
                file.write(record_line(record))
                file.flush()
            bar.update()
    finally:
        if file is not None:
            with naming(part):
                file.close()


def check_version(greeting: Greeting) -> None:
    """Raise ``ValueError`` for a worker with another version of this package."""
    if greeting.version != __version__:
        raise ValueError(
            f"{greeting.host} has version {greeting.version} of deepseek_vl2, and this machine {__version__}: "
            "install one version on all nodes."
        )
