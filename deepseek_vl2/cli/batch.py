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
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from deepseek_vl2.cli.images import clean_path, download, open_image
from deepseek_vl2.cli.options import (
    Loaded,
    add_generation_arguments,
    add_model_arguments,
    generation_options,
    is_out_of_memory,
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


@dataclass
class Job:
    """One line of the input.

    Fields:
        line: its number, from 1.
        key: of its text, to tell whether an answer is to this very line.
        text: the line.
    """

    line: int
    key: str
    text: str


@dataclass
class Question:
    """A line that can be asked."""

    job: Job
    id: Any
    sample: Any
    sizes: list[tuple[int, int]]


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


def answer_lines(loaded: Loaded, jobs: Iterable[Job], args: Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a record for each line, in order: an answer, or an error; ``--batch_size`` lines are answered together."""
    window: deque[Pending] = deque()
    todo = iter(jobs)
    try:
        while True:
            while sum(not line.done for line in window) < args.batch_size and (job := next(todo, None)) is not None:
                window.append(ask(loaded, job, args, seed))
            if not window:
                return
            if window[0].done:
                yield window.popleft().record(args)
            else:
                wait_for_another(window)
    finally:
        for line in window:
            line.cancel()


def wait_for_another(window: Sequence[Pending]) -> None:
    """Drive the engine until one more line is done, so that its place is filled though earlier ones go on."""
    done = sum(line.done for line in window)
    window[0].engine.run_until(lambda: sum(line.done for line in window) > done)


@dataclass
class Pending:
    """A line on its way.

    Fields:
        job: the line.
        question: what it asks; ``None`` where that cannot be read.
        error: why there is no answer.
    """

    job: Job
    question: Question | None = None
    error: str | None = None
    engine: Any = None
    request: Any = None
    text: str = ""
    end: Any = None

    @property
    def done(self) -> bool:
        """Whether there is an answer, or an error."""
        return self.error is not None or self.end is not None

    def cancel(self) -> None:
        """Stop the answer."""
        if self.request is not None and not self.done:
            self.engine.cancel(self.request)

    def take(self, event: Any) -> None:
        """Note what the engine tells."""
        from deepseek_vl2.engine.request import Delta

        if isinstance(event, Delta):
            self.text += event.text
            self.end = event if event.finish_reason is not None else None
        else:
            self.end = event.error

    def record(self, args: Namespace) -> dict[str, Any]:
        """Return the line's record.

        Raises:
            ValueError: memory ran out.
        """
        if isinstance(self.end, Exception):
            if is_out_of_memory(self.end):
                raise ValueError(f"Out of memory: lower --batch_size ({args.batch_size}). {self.end}") from self.end
            self.error = f"The model failed: {self.end}"
        if self.error is not None or self.question is None:
            return {"line": self.job.line, "key": self.job.key, "error": self.error}
        return answer_record(self.question, self.text, self.end)


def ask(loaded: Loaded, job: Job, args: Namespace, seed: int) -> Pending:
    """Hand a line to the engine; what is wrong with it becomes its error."""
    try:
        return submit(loaded, read_question(loaded, job, args.system_prompt), args, seed)
    except (ValueError, OSError, TypeError, AttributeError, KeyError) as error:  # whatever shape a line has
        reason = str(error) if isinstance(error, (ValueError, OSError)) else f"The line has a wrong shape: {error}."
        return Pending(job, error=reason)


def submit(loaded: Loaded, question: Question, args: Namespace, seed: int) -> Pending:
    """Hand a question to the engine."""
    from deepseek_vl2.engine.detokenizer import token_bytes_of
    from deepseek_vl2.engine.holder import engine_of
    from deepseek_vl2.engine.prompts import prompt_of
    from deepseek_vl2.engine.request import Request
    from deepseek_vl2.serve.streaming import answer_params, model_ends

    options, ends = generation_options(args), model_ends(loaded.model)
    line = Pending(question.job, question, engine=engine_of(loaded.model))
    line.request = Request(
        prompt_of(loaded.model, question.sample),
        answer_params(options, ends, seed + question.job.line),  # a line gets what it would get alone
        line.take,
        token_bytes_of(loaded.tokenizer, ends),
        options.prefill_chunk_size,
    )
    line.engine.submit([line.request])
    return line


def read_question(loaded: Loaded, job: Job, system_prompt: str) -> Question:
    """Read one line and its images.

    Raises:
        ValueError, OSError: what is wrong with it.
    """
    from deepseek_vl2.utils.prompts import question_about

    try:
        line = json.loads(job.text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Not JSON: {error}.") from error
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise ValueError('A line is an object with either "prompt" or "messages".')
    if "prompt" in line:
        images = [line["images"]] if isinstance(line.get("images"), str) else list(line.get("images") or [])
        if not isinstance(line["prompt"], str) or not all(isinstance(image, str) for image in images):
            raise ValueError('"prompt" must be a text and "images" a list of texts.')
        messages = question_about(images, line["prompt"])
    else:
        messages = line["messages"]
    turns = loaded.processor.messages_to_conversation([fetched(message) for message in messages])
    shown = [open_image(s) if isinstance(s, str) else s for turn in turns for s in turn["images"]]
    sample = loaded.processor.process_one(conversations=turns, images=shown, system_prompt=system_prompt)
    sizes = [image.size for image in shown if hasattr(image, "size")]
    return Question(job, line.get("id"), sample, sizes)


def fetched(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose image parts are paths, data or downloaded within the limits of `download`."""
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        source = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
        source = source.get("url") if isinstance(source, dict) else source
        if isinstance(source, str) and part.get("type") != "text":
            address = source.startswith(("http://", "https://"))
            part = {"type": "image", "image": open_image_data(download(source)) if address else clean_path(source)}
        parts.append(part)
    return {**message, "content": parts}


def open_image_data(data: bytes) -> Any:
    """Read an image's bytes."""
    from deepseek_vl2.models.image_loading import load_image

    return load_image(data)


def answer_record(question: Question, text: str, end: Any) -> dict[str, Any]:
    """Return the record of one answer, of which ``end`` is the engine's last word."""
    from deepseek_vl2.utils.grounding import parse_grounding

    record = {
        "line": question.job.line,
        "key": question.job.key,
        **({} if question.id is None else {"id": question.id}),
        "answer": text,
        "finish_reason": end.finish_reason,
        "usage": {
            "prompt_tokens": len(question.sample["input_ids"]),
            "completion_tokens": end.completion_tokens,
        },
    }
    found = parse_grounding(text, question.sizes or None).to_dict()["objects"]
    return {**record, "objects": found} if found else record
