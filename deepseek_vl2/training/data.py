"""Conversations to train on, read from JSON Lines as they are needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from deepseek_vl2.models.image_download import is_address
from deepseek_vl2.models.image_loading import MAX_IMAGE_PIXELS, is_data_url, load_image
from deepseek_vl2.models.messages import MISNAMED, image_source, messages_to_conversation, path_of
from deepseek_vl2.models.turns import walk_turns

IMAGE_TAG = "<image>"
CONVERSATION_KEYS = ("conversation", "conversations", "messages")


@contextmanager
def located(source: str | None) -> Iterator[None]:
    """Put where a sample comes from in front of the message of a ``ValueError`` or ``FileNotFoundError``."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if source is None or str(error).startswith(f"{source}: "):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{source}: {error}") from error


def index_lines(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the byte offset and the number, counted from 1, of each line that is not blank; int64 [lines] each.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if file.exists() and not file.is_file():
        kind = "a directory" if file.is_dir() else "no regular file"
        raise FileNotFoundError(f"{file} is {kind}: name a file of one conversation a line.")
    if not file.is_file():
        raise FileNotFoundError(f"There is no data file at {file}.")
    offsets, numbers, offset = [], [], 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.isspace():
                offsets.append(offset)
                numbers.append(number)
            offset += len(line)
    return np.array(offsets, dtype=np.int64), np.array(numbers, dtype=np.int64)


def parse_line(line: bytes, needs_answers: bool = True) -> tuple[Sequence[Mapping[str, Any]], list[Any]]:
    """Return a line's messages, and the images listed beside them; without ``needs_answers`` of a question, too.

    Raises:
        ValueError: the line is not a conversation in JSON.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except json.JSONDecodeError as error:
        message = f"the line is not valid JSON ({error.msg} at character {error.pos}): one conversation takes one line."
        raise ValueError(message) from error
    except RecursionError:
        raise ValueError("the line is nested too deeply.") from None
    images: list[Any] = []
    if isinstance(record, Mapping):
        keys = CONVERSATION_KEYS if needs_answers else (*CONVERSATION_KEYS, "prompt")
        key = next((key for key in keys if key in record), None)
        if key is None:
            raise ValueError(f"the object has none of the keys {', '.join(keys)}: {sorted(record)}.")
        check_names(record)
        listed = record.get("images") or []
        images = [listed] if isinstance(listed, str) else listed
        if not isinstance(images, list):
            raise ValueError(f"images is a list of paths and data URLs, not {type(listed).__name__}.")
        record = record[key] if key != "prompt" else question(record[key], len(images))
    if not isinstance(record, list) or not all(isinstance(message, Mapping) for message in record):
        raise ValueError("a conversation is a list of messages, each an object with role and content.")
    return record, images


def check_names(record: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for fields that would change what is learned if they were read; others are the user's."""
    for name in record:
        if name in MISNAMED and record[name] is not None:
            raise ValueError(f"a line names its images under 'images', a list; {name!r} is not read.")
    if record.get("tools"):
        raise ValueError("the line has tools, and the prompts of DeepSeek-VL2 have no place for them.")


def question(prompt: Any, images: int) -> list[dict[str, Any]]:
    """Return the messages of a question whose images stand in front of its text."""
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is a text, not {type(prompt).__name__}.")
    tags = "" if IMAGE_TAG in prompt else f"{IMAGE_TAG}\n" * images
    return [{"role": "user", "content": tags + prompt}]


def check_conversation(conversation: Sequence[Mapping[str, Any]], images: int, needs_answers: bool = True) -> None:
    """Check what can be checked without a processor.

    Args:
        conversation: messages whose content is text.
        images: how many images they show.
        needs_answers: there is something to learn: every turn of the assistant has text, and there is one.

    Raises:
        ValueError: an unknown role, a system message that is not first, an image tag outside a user turn, tags and
            images that differ in number, or no answer to learn.
    """
    try:
        turns = walk_turns(conversation)
    except ValueError as error:
        message = str(error)
        raise ValueError(message[:1].lower() + message[1:]) from error
    for number, turn in enumerate(turns, start=1):
        if needs_answers and turn.role == "assistant" and not turn.content:
            raise ValueError(f"message {number} is an empty answer: training needs the text to learn.")
    tags = sum(turn.count_tags() for turn in turns)
    if tags != images:
        raise ValueError(f"the user turns hold {tags} {IMAGE_TAG} tags, but {images} images are named.")
    if needs_answers and not any(turn.role == "assistant" for turn in turns):
        raise ValueError("there is no answer: training needs a turn of the assistant.")


class ConversationDataset(Dataset[dict[str, Any]]):
    """Conversations in JSON Lines files, one a line, in the form that inference takes.

    A line is a list of messages, or an object that holds one under ``conversation``, ``conversations`` or ``messages``.
    A message has ``role`` and ``content``, and names its images under ``images``, or as OpenAI-style content parts;
    an object may also list all images, in order, under ``images``. Paths are relative to ``image_root``.

    Only the offsets of the lines stay in memory, 16 bytes a conversation; lines and images are read when asked for, by
    any number of processes.

    Args:
        files: a file, or several.
        image_root: where relative image paths start; by default each file's own directory.
        max_pixels: refuse larger images.
        needs_answers: refuse conversations without an answer to learn; otherwise a line may be a question of
            ``deepseek-vl2 batch``, too: ``prompt`` and ``images``.

    Items are dicts: ``conversation`` (messages with text and image tags), ``images`` (PIL images, RGB) and ``source``
    (file and line).

    Raises:
        FileNotFoundError: a file, or later an image, is not there.
        ValueError: there is no conversation, or later a line is not a usable one; file and line are named.
    """

    def __init__(
        self,
        files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        image_root: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
        needs_answers: bool = True,
    ) -> None:
        listed = [files] if isinstance(files, (str, os.PathLike)) else list(files)
        self.files = [Path(file) for file in listed]
        self.image_root = None if image_root is None else Path(image_root)
        self.max_pixels = max_pixels
        self.needs_answers = needs_answers
        self._index = [index_lines(file) for file in self.files]
        self._ends = np.cumsum([len(offsets) for offsets, _ in self._index])
        if not len(self):
            raise ValueError(f"There is no conversation in {', '.join(map(str, self.files)) or 'no files'}.")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, index: int) -> tuple[Path, int, int]:
        """Return file, byte offset and line number of a conversation."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} conversations, and none has the index {index}.")
        index %= len(self)
        which = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[which - 1]) if which else 0)
        offsets, numbers = self._index[which]
        return self.files[which], int(offsets[within]), int(numbers[within])

    def source(self, index: int) -> str:
        """Return where a conversation stands: ``file, line n``."""
        file, _, number = self._find(index)
        return f"{file}, line {number}"

    def read(self, index: int) -> tuple[list[dict[str, Any]], list[Any]]:
        """Return a conversation, checked, and its images' sources: paths, made absolute, or data URLs.

        Raises:
            ValueError: the line is not a usable conversation.
        """
        file, offset, _ = self._find(index)
        # Opened anew each time: workers that share a file also share its position.
        with open(file, "rb") as stream:
            stream.seek(offset)
            line = stream.readline()
        with located(self.source(index)):
            messages, beside = parse_line(line, self.needs_answers)
            conversation = messages_to_conversation(messages, IMAGE_TAG, image_source)
            named = [source for message in conversation for source in message.pop("images")]
            if named and beside:
                raise ValueError("images are named both in the messages and beside them: choose one place.")
            sources = [self._resolve(source, file) for source in named or beside]
            check_conversation(conversation, len(sources), self.needs_answers)
        return conversation, sources

    def _resolve(self, source: Any, file: Path) -> Any:
        if not isinstance(source, str):
            raise ValueError(f"an image is named by its path or a data URL, not {type(source).__name__}.")
        if not source.strip():
            raise ValueError("the path of an image is empty.")
        if is_address(source):
            raise ValueError(f"{source} is an address: download the image and name the file.")
        if is_data_url(source):
            return source
        return str((self.image_root or file.parent) / path_of(source))

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversation, sources = self.read(index)
        with located(self.source(index)):
            images = [load_image(source, self.max_pixels) for source in sources]
        return {"conversation": conversation, "images": images, "source": self.source(index)}

    def check(self) -> None:
        """Read every line, and look whether its image files are there, without decoding them.

        Raises:
            ValueError, FileNotFoundError: the first thing that is wrong, and how many lines have something wrong.
        """
        first: Exception | None = None
        wrong = 0
        for index in range(len(self)):
            try:
                for source in self.read(index)[1]:
                    if not is_data_url(source) and not os.path.isfile(source):
                        raise FileNotFoundError(f"{self.source(index)}: There is no image file at {source}.")
            except (FileNotFoundError, ValueError) as error:
                first, wrong = first or error, wrong + 1
        if first is not None:
            more = f" ({wrong - 1} more of {len(self)} conversations are unusable)" if wrong > 1 else ""
            raise type(first)(f"{first}{more}") from first
