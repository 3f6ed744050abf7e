"""The lines of ``deepseek-vl2 batch``: from a line to what is asked, and from the engine's answer to its record."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepseek_vl2.cli.batch_files import Job, error_record, record_line
from deepseek_vl2.cli.images import clean_path, download, open_image
from deepseek_vl2.cli.options import Loaded, generation_options, is_out_of_memory, most_tokens, room_for_answer

# Fields that people write into a line for an answer of its own; the run's options are all lines'.
OPTIONS = (
    "max_new_tokens", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "system_prompt", "system", "instructions", "tools",
    "response_format", "guided_json", "guided_regex",
)  # fmt: skip


@dataclass
class Question:
    """A line that can be asked.

    Fields:
        job: the line.
        id: what the line calls itself, if anything.
        sample: its prompt, as the processor gives it.
        images: its images, as the processor took them.
        is_low: each is seen as one view, without tiles.
    """

    job: Job
    id: Any
    sample: Any
    images: list[Any]
    is_low: bool = False

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Return width and height of each image, in pixels."""
        return [image.size for image in self.images if hasattr(image, "size")]


@dataclass(eq=False)
class Pending:
    """A line on its way.

    Fields:
        job: the line.
        question: what it asks; ``None`` where that cannot be read.
        error: what is wrong with the line.
        failure: why a line that can be asked was not answered.
        end: the engine's last word.
    """

    job: Job
    question: Question | None = None
    error: str | None = None
    failure: Exception | None = None
    engine: Any = None
    request: Any = None
    text: str = ""
    end: Any = None

    @property
    def done(self) -> bool:
        """Whether there is an answer, or an error."""
        return self.error is not None or self.failure is not None or self.end is not None

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
            self.failure = event.error

    def record(self) -> dict[str, Any]:
        """Return the line's record.

        Raises:
            Exception: the device failed, and would refuse every other line.
        """
        if self.failure is not None:
            if is_broken_device(self.failure):
                raise self.failure
            self.error = why_unanswered(self.failure)
        if self.error is not None or self.question is None:
            return error_record(self.job, self.error or "")
        return answer_record(self.question, self.text, self.end)


def is_broken_device(error: Exception) -> bool:
    """Whether nothing more can be run after an error: a GPU that failed refuses everything from then on."""
    return type(error).__name__ == "AcceleratorError" or ("CUDA error" in str(error) and not is_out_of_memory(error))


def why_unanswered(error: Exception) -> str:
    """Return what to tell about a question that could not be answered."""
    memory = is_out_of_memory(error) or isinstance(error, MemoryError) or "allocate memory" in str(error)
    return f"Out of memory: {error}" if memory else f"{type(error).__name__}: {error}"


def prepare(loaded: Loaded, job: Job, system_prompt: str) -> Pending:
    """Read a line, to be submitted; what is wrong with it becomes its error."""
    try:
        return Pending(job, read_question(loaded, job, system_prompt))
    except Exception as error:  # whatever a line says, the others are answered
        known = isinstance(error, (ValueError, OSError))
        return Pending(job, error=str(error) if known else f"The line has a wrong shape: {error}.")


def submit_safely(loaded: Loaded, question: Question, args: Namespace, seed: int) -> Pending:
    """Hand a question to the engine; what goes wrong becomes its failure."""
    try:
        return submit(loaded, question, args, seed)
    except Exception as error:
        return Pending(question.job, question, failure=error)


def submit(loaded: Loaded, question: Question, args: Namespace, seed: int) -> Pending:
    """Hand a question to the engine."""
    from deepseek_vl2.engine.detokenizer import token_bytes_of
    from deepseek_vl2.engine.holder import engine_of
    from deepseek_vl2.engine.prompts import prompt_of
    from deepseek_vl2.engine.request import Request
    from deepseek_vl2.serve.streaming import answer_params, model_ends

    options, ends = generation_options(args), model_ends(loaded.model)
    room = room_for_answer(most_tokens(loaded), len(question.sample["input_ids"]))
    params = answer_params(options, ends, seed + question.job.line)  # a line gets what it would get alone
    line = Pending(question.job, question, engine=engine_of(loaded.model))
    line.request = Request(
        prompt_of(loaded.model, question.sample),
        replace(params, max_tokens=min(params.max_tokens, room)),
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
    from deepseek_vl2.models.messages import check_messages, is_low_conversation
    from deepseek_vl2.utils.prompts import question_about

    line = read_line(job)
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise ValueError('A line is an object with either "prompt" or "messages".')
    check_names(line)
    messages: Sequence[Any]
    if "prompt" in line:
        images = line_images(line)
        if not isinstance(line["prompt"], str):
            raise ValueError('"prompt" must be a text and "images" a list of texts.')
        messages, images = question_about(images, line["prompt"]), []
    else:
        messages = line["messages"] if isinstance(line["messages"], list) else check_messages(line["messages"])
        images = line_images(line)
    turns = loaded.processor.messages_to_conversation([fetched(message) for message in messages])
    listed = [source for turn in turns for source in turn["images"]]
    if images and listed:
        raise ValueError('The messages have images of their own: leave the line\'s "images" out.')
    shown = [open_image(source) if isinstance(source, str) else source for source in listed or images]
    sample = loaded.processor.process_one(conversations=turns, images=shown, system_prompt=system_prompt)
    room_for_answer(most_tokens(loaded), len(sample["input_ids"]))
    return Question(job, line.get("id"), sample, shown, is_low_conversation(turns))


def line_images(line: dict[str, Any]) -> list[str]:
    """Return the images that a line lists, for the image tags of its messages or for its prompt."""
    images = [line["images"]] if isinstance(line.get("images"), str) else line.get("images") or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError('"prompt" must be a text and "images" a list of texts.')
    return images


def check_names(line: dict[str, Any]) -> None:
    """Raise ``ValueError`` for fields that would change the answer if they were read; others are the user's own."""
    from deepseek_vl2.models.messages import MISNAMED

    for name in line:
        if name in MISNAMED:
            raise ValueError(f'A line names its images under "images", a list; "{name}" is not read.')
        if name in OPTIONS:
            raise ValueError(f'"{name}" is not read of a line: it is an option of the whole run.')


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


def fetched(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message whose image parts are paths, data or downloaded within the limits of `download`."""
    from deepseek_vl2.models.messages import is_low

    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        source = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
        source = source.get("url") if isinstance(source, dict) else source
        if isinstance(source, str) and part.get("type") != "text":
            address = source.startswith(("http://", "https://"))
            image = open_image_data(download(source)) if address else clean_path(source)
            part = {"type": "image", "image": image, "detail": "low" if is_low(part) else None}
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
