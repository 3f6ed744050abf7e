"""``deepseek-vl2 batch``: answer a file of questions."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from deepseek_vl2.cli.batch_files import (
    Job,
    check_answers,
    check_files,
    error_record,
    errors_file,
    forget,
    gather,
    locked,
    part_files,
    read_jobs,
    read_records,
    record_line,
    write_answers,
)
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
    questions, output = Path(args.input), Path(os.path.realpath(args.output))
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    shared = LAUNCHED in os.environ or rank > 0  # the lock is held by who launched this process, or by the first
    jobs = read_jobs(questions)
    if not shared:
        check_files(questions, output)
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
    answered = sum(1 for _ in read_records(output))
    note(f"{answered} of {total} lines are answered in {output}.")
    for record in failed[:5]:
        note(f"  line {record['line']}: {record['error']}")
    if failed:
        note(f"{len(failed)} lines could not be answered: {errors_file(output)} lists them.")
    return 0 if answered == total else 1


# ---------------------------------------------------------------- answering


def work(args: Namespace, jobs: list[Job], part: Path, share: int, show: bool, begin: Callable[[], None]) -> None:
    """Answer lines, batch by batch, and append each batch's records to this process's part file.

    What earlier runs wrote stays as it is until ``begin`` is called, with the model loaded.
    """
    from tqdm import tqdm

    loaded = load(args)
    begin()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    bar = tqdm(total=share, initial=share - len(jobs), unit="line", disable=args.quiet or not show)
    with bar, open(part, "a", encoding="utf-8", newline="\n") as file:
        if part.stat().st_size:
            file.write("\n")  # a killed process may have left its last line unfinished
        for start in range(0, len(jobs), args.batch_size):
            batch = jobs[start : start + args.batch_size]
            file.write("".join(record_line(record) for record in answer_batch(loaded, batch, args, seed)))
            file.flush()
            bar.update(len(batch))


def answer_batch(loaded: Loaded, jobs: Sequence[Job], args: Namespace, seed: int) -> list[dict[str, Any]]:
    """Return a record for each line: an answer, or an error."""
    questions, records = [], []
    for job in jobs:
        try:
            questions.append(read_question(loaded, job, args.system_prompt))
        except Exception as error:  # whatever a line says, the others are answered
            known = isinstance(error, (ValueError, OSError))
            records.append(error_record(job, str(error) if known else f"The line has a wrong shape: {error}."))
    return records + answer_questions(loaded, questions, args, seed)


def answer_questions(loaded: Loaded, questions: list[Question], args: Namespace, seed: int) -> list[dict[str, Any]]:
    """Return a record for each question: they are answered together, or where that fails, one by one."""
    if not questions:
        return []
    try:
        return generate(loaded, questions, args, seed)
    except Exception as error:
        if is_broken_device(error):
            raise
        if len(questions) == 1:
            return [error_record(questions[0].job, why_unanswered(error))]
        if is_out_of_memory(error):
            note(f"Out of memory with {len(questions)} lines at a time: lower --batch_size. They are tried one by one.")
    return [record for question in questions for record in answer_questions(loaded, [question], args, seed)]


def is_broken_device(error: Exception) -> bool:
    """Whether nothing more can be run after an error: a GPU that failed refuses everything from then on."""
    return type(error).__name__ == "AcceleratorError" or ("CUDA error" in str(error) and not is_out_of_memory(error))


def why_unanswered(error: Exception) -> str:
    """Return what to tell about a question that could not be answered."""
    memory = is_out_of_memory(error) or isinstance(error, MemoryError) or "allocate memory" in str(error)
    return f"Out of memory: {error}" if memory else f"{type(error).__name__}: {error}"


def read_question(loaded: Loaded, job: Job, system_prompt: str) -> Question:
    """Read one line and its images.

    Raises:
        ValueError, OSError: what is wrong with it.
    """
    from deepseek_vl2.utils.prompts import question_about

    line = read_line(job)
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
    length, most = len(sample["input_ids"]), most_tokens(loaded)
    if length >= most:
        raise ValueError(f"The prompt has {length:,} tokens; the model knows {most:,}, its answer's included.")
    sizes = [image.size for image in shown if hasattr(image, "size")]
    return Question(job, line.get("id"), sample, sizes)


def read_line(job: Job) -> Any:
    """Return what a line says.

    Raises:
        ValueError: it is not JSON, or such that no record of it could be written.
    """
    if job.text is None:
        raise ValueError("Not text in UTF-8.")
    try:
        line = json.loads(job.text)
        record_line({"line": line}).encode()
    except RecursionError:
        raise ValueError("Not JSON that can be read: it is nested too deeply.") from None
    except UnicodeEncodeError:
        raise ValueError("Not text: it has one half of a surrogate pair without the other.") from None
    except ValueError as error:
        raise ValueError(f"Not JSON: {error}.") from error
    return line


def most_tokens(loaded: Loaded) -> int:
    """Return how many tokens a prompt and its answer may have together."""
    return int(loaded.model.config.language_config.max_position_embeddings)


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


def generate(loaded: Loaded, questions: list[Question], args: Namespace, seed: int) -> list[dict[str, Any]]:
    """Answer questions together; each gets what it would get alone, and the seed of its own line."""
    from transformers import LogitsProcessorList

    from deepseek_vl2.serve.streaming import GREEDY_BELOW, SeededSampler

    options = generation_options(args)
    most, lengths = most_tokens(loaded), [len(question.sample["input_ids"]) for question in questions]
    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": min(options.max_new_tokens, most - min(lengths)),
    }
    if options.repetition_penalty != 1:
        settings["repetition_penalty"] = options.repetition_penalty
    if options.prefill_chunk_size is not None:
        settings["prefill_chunk_size"] = options.prefill_chunk_size
    if options.temperature > GREEDY_BELOW:
        seeds = [seed + question.job.line for question in questions]
        sampler = SeededSampler(options.temperature, options.top_k, options.top_p, seeds)
        settings["logits_processor"] = LogitsProcessorList([sampler])
    inputs = loaded.processor.batchify([question.sample for question in questions]).to(loaded.model.device)
    output = loaded.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        # Beside a shorter prompt, a longer one's answer may have gone beyond what the model knows.
        record_of(loaded, question, ids[: most - length], args)
        for question, ids, length in zip(questions, output, lengths, strict=True)
    ]


def record_of(loaded: Loaded, question: Question, ids: list[int], args: Namespace) -> dict[str, Any]:
    """Return the record of one answer from its token ids, which may go on behind its end."""
    from deepseek_vl2.serve.streaming import StopWordFilter
    from deepseek_vl2.utils.grounding import parse_grounding

    ends = loaded.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    length = next((index for index, id_ in enumerate(ids) if id_ in ends), None)
    words = StopWordFilter(args.stop)
    text = words.push(loaded.tokenizer.decode(ids[:length], skip_special_tokens=False)) + words.flush()
    usage = {
        "prompt_tokens": len(question.sample["input_ids"]),
        "completion_tokens": len(ids) if length is None else length + 1,
    }
    record = {
        "line": question.job.line,
        "key": question.job.key,
        **({} if question.id is None else {"id": question.id}),
        "answer": text,
        "finish_reason": "stop" if words.stopped or length is not None else "length",
        "usage": usage,
    }
    found = parse_grounding(text, question.sizes or None).to_dict()["objects"]
    return {**record, "objects": found} if found else record
