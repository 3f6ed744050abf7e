"""The lines of ``deepseek-vl2 batch``: from a line to what is asked, and from the engine's answer to its record."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_vl2.cli.images import clean_path, download, open_image
from deepseek_vl2.cli.options import Loaded, generation_options, is_out_of_memory


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
