"""The files of ``deepseek-vl2 batch``: questions, answers, errors, and what runs leave for each other.

Only what earlier runs wrote is ever replaced or removed, and one run at a time works on an output.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_REASON = 1000  # characters of an error


class Asked(NamedTuple):
    """What lines are asked with, as texts that are the same for the same.

    Fields:
        options: the options.
        model: see `batch_model.model_identity`.
    """

    options: str = ""
    model: str = ""


ANYHOW = Asked()


@dataclass
class Job:
    """One line of the input.

    Fields:
        line: its number, from 1.
        key: of its text, of the options and of the model that it is asked with: an answer is to this very line.
        text: the line; ``None`` when it is not text in UTF-8.
    """

    line: int
    key: str
    text: str | None


def read_jobs(path: Path, asked: Asked = ANYHOW) -> list[Job]:
    """Read the lines that are not blank; arguments as `iter_jobs`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or none of its lines is text, or it holds nothing.
    """
    jobs = list(iter_jobs(path, asked))
    check_input(path, len(jobs), any(job.text is not None for job in jobs))
    return jobs


def iter_jobs(path: Path, asked: Asked = ANYHOW) -> Iterator[Job]:
    """Yield the lines that are not blank, while they are read.

    Args:
        path: the input.
        asked: with what the lines are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a directory, or a device.
    """
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise ValueError(f"{path} is {kind}: name a file of one JSON object a line.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with open(path, "rb") as file:
        for number, line in enumerate(text_lines(file), 1):
            if line.strip():
                yield Job(number, line_key(line, asked), decoded(line))


def text_lines(file: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines as text files end them: by a line feed, a carriage return, or both.

    Not splitlines: JSON may hold separators such as U+2028 as they are, and they end no line.
    """
    for number, line in enumerate(file):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        yield from line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")


def check_input(path: Path, lines: int, any_text: bool) -> None:
    """Raise ``ValueError`` for an input without lines, or without one that is text."""
    if not lines:
        raise ValueError(f"{path} holds no questions.")
    if not any_text:
        raise ValueError(f"{path} is not text in UTF-8.")


def line_key(line: bytes, asked: Asked = ANYHOW) -> str:
    """Return what tells a line, asked with some options and of some model, from others; the model stands last."""
    key = hashlib.sha256(line + asked.options.encode(errors="backslashreplace")).hexdigest()[:16]
    return f"{key}-{asked.model}" if asked.model else key


def decoded(line: bytes) -> str | None:
    """Return a line as text, if it is."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


# ---------------------------------------------------------------- names


def part_files(output: Path) -> list[Path]:
    """Return what processes have written and nobody has gathered."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.part[0-9]*"))


def errors_file(output: Path) -> Path:
    """Return the file of the lines that could not be answered."""
    return output.with_name(f"{output.name}.errors")


def new_file(output: Path) -> Path:
    """Return the file that is written before it takes the place of another."""
    return output.with_name(f"{output.name}.new")


def lock_file(output: Path) -> Path:
    """Return the file that is locked while a run works on an output."""
    return output.with_name(f"{output.name}.lock")


def own_files(output: Path) -> list[Path]:
    """Return all files that a run on this output may replace or remove."""
    errors = errors_file(output)
    return [output, errors, new_file(output), new_file(errors), *part_files(output)]


# ---------------------------------------------------------------- what may be replaced


def check_files(questions: Path, output: Path) -> None:
    """See that nothing is in the way which a run would destroy.

    Raises:
        ValueError: the output, or a file that belongs to it, is the input or was not written by a run.
        FileNotFoundError: the output's directory does not exist.
    """
    for name, path in (("INPUT", questions), ("OUTPUT", output)):
        if path.name == "-" and not path.exists():
            raise ValueError(f"{name} must be a file, which the next run goes on with: - is none.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {output.parent} to write {output.name} into.")
    lock = lock_file(output)
    for file in (*own_files(output), lock):
        if not os.path.lexists(file):
            continue
        if file.exists() and questions.exists() and file.samefile(questions):
            raise ValueError(f"{file} holds the questions: the answers need another OUTPUT.")
        regular = file.is_file() and not file.is_symlink()
        empty = regular and not file.stat().st_size
        if not empty and not (regular and file != lock and holds_records(file, whole=file == output)):
            raise ValueError(f"{file} was not written by this command and is left as it is: name another OUTPUT.")


def holds_records(path: Path, whole: bool) -> bool:
    """Whether a file holds records of runs and nothing else; unless it is ``whole``, some may be cut off.

    Killed processes leave such beginnings, and the next ones go on behind them in a new line.
    """
    with open(path, "rb") as file:
        for line in file:
            begun = not whole and line.startswith(b'{"line": '[: len(line)]) and not is_json(line)
            if line.strip() and parsed_record(line) is None and not begun:
                return False
    return True


def is_json(line: bytes) -> bool:
    """Whether a line is JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def parsed_record(line: bytes) -> dict[str, Any] | None:
    """Return a record of a run; ``None`` for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("line"), int):
        return None
    return record if isinstance(record.get("key"), str) and ("answer" in record or "error" in record) else None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system that names no file, such as that of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def locked(output: Path) -> Iterator[int | None]:
    """Keep other runs off an output; yields the lock's file, which processes that share the work keep open.

    The system lets go of the lock when the last of them has ended, however it did.

    Raises:
        ValueError: another run works on the output.
        OSError: nothing can be written beside it.
    """
    if fcntl is None:
        yield None
        return
    path = lock_file(output)
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(f"Nothing can be written into {output.parent}: {error.strerror}.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed it meanwhile: then it keeps nobody off.
            current = path.exists() and os.path.samestat(os.stat(path), os.fstat(file))
        except BlockingIOError:
            os.close(file)
            raise ValueError(f"Another run works on {output}: wait for it, or name another OUTPUT.") from None
        except OSError:
            os.close(file)
            raise
        if current:
            break
        os.close(file)
    try:
        yield file
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


# ---------------------------------------------------------------- records


def record_line(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON that any reader takes."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def error_record(job: Job, reason: str) -> dict[str, Any]:
    """Return the record of a line that cannot be answered."""
    reason = reason.encode(errors="backslashreplace").decode()
    return {"line": job.line, "key": job.key, "error": reason[:MAX_REASON] or "Unknown error."}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a file; a last line that a killed process left unfinished is none."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            record = parsed_record(line)
            if record is not None:
                yield record


class Place(NamedTuple):
    """Where the record of a line is, so that records need not all be in memory.

    Fields:
        file, offset: the file, and its byte at which the record begins.
        key: of the line that it answers.
        answered: an answer, not an error.
    """

    file: Path
    offset: int
    key: str
    answered: bool


def gather(output: Path) -> dict[int, Place]:
    """Return where all records of this and earlier runs are, by line.

    An answer replaces an error, a later record an earlier one.
    """
    places: dict[int, Place] = {}
    for path in (output, *part_files(output)):
        if not path.is_file():
            continue
        offset = 0
        with open(path, "rb") as file:
            for line in file:
                record = parsed_record(line)
                if record is not None:
                    number, answered = record["line"], "error" not in record
                    if answered or number not in places or not places[number].answered:
                        places[number] = Place(path, offset, record["key"], answered)
                offset += len(line)
    return places


def check_answers(jobs: Iterable[Job], places: dict[int, Place], output: Path) -> set[int]:
    """Return the lines that are answered.

    Raises:
        ValueError: the answers belong to another input, or are another model's.
    """
    answered = {line for line, place in places.items() if place.answered}
    unmatched, others = set(answered), set()
    for job in jobs:
        if job.line not in answered:
            continue
        there = places[job.line].key
        if there == job.key:
            unmatched.discard(job.line)
        elif there.partition("-")[0] == job.key.partition("-")[0]:
            others.add(job.line)
    if others and others == unmatched:
        raise ValueError(
            f"{output} has answers of another model, dtype or quantization, such as that to line {min(others)}: name "
            "the same --model as before, another output, or begin anew with --overwrite."
        )
    if unmatched:
        raise ValueError(
            f"{output} answers another input: its line {min(unmatched)} was another one, or was asked "
            "with other options. Name another output, or begin anew with --overwrite."
        )
    return answered


def forget(output: Path) -> None:
    """Remove what earlier runs wrote."""
    for file in own_files(output):
        file.unlink(missing_ok=True)


def write_answers(output: Path) -> None:
    """Gather all answers into the output, in the input's order, and all errors beside it."""
    places = gather(output)
    parts = part_files(output)
    for file, answers in ((output, True), (errors_file(output), False)):
        chosen = [places[line] for line in sorted(places) if places[line].answered == answers]
        if chosen or answers:
            aside = new_file(file)
            copy_records(chosen, aside)
            aside.replace(file)  # a kill half-way leaves the old file whole
        else:
            file.unlink(missing_ok=True)
    for part in parts:
        part.unlink()


def copy_records(places: Iterable[Place], target: Path) -> None:
    """Write records, one a line, into a file."""
    with naming(target), contextlib.ExitStack() as stack, open(target, "wb") as written:
        opened: dict[Path, IO[bytes]] = {}
        for place in places:
            if place.file not in opened:
                opened[place.file] = stack.enter_context(open(place.file, "rb"))
            source = opened[place.file]
            source.seek(place.offset)
            written.write(source.readline().rstrip(b"\r\n") + b"\n")
