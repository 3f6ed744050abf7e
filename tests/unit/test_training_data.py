"""Conversations read from JSON Lines: lazily, by any process, and with errors that name file and line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import noise_image
from torch.utils.data import DataLoader

from deepseek_vl2.training.data import ConversationDataset

QUESTION = {"role": "<|User|>", "content": "<image>\nWhat?", "images": ["a.png"]}
ANSWER = {"role": "<|Assistant|>", "content": "That."}
TEXT_ONLY = [{"role": "user", "content": "Hi."}, ANSWER]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes lines, strings as they are, into a file beside the image a.png."""
    noise_image(0, 20, 10).save(tmp_path / "a.png")

    def write(*lines: Any, name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return file

    return write


@pytest.mark.parametrize(
    "line",
    [
        [QUESTION, ANSWER],
        {"conversation": [QUESTION, ANSWER]},
        {"conversations": [QUESTION, ANSWER], "id": 7},
        {"messages": [{"role": "user", "content": "<image>\nWhat?"}, ANSWER], "images": ["a.png"]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
            ]
        },
    ],
)
def test_every_form_of_a_line_is_the_same_sample(write: Callable[..., Path], line: Any) -> None:
    sample = ConversationDataset(write(line))[0]
    assert [message["content"] for message in sample["conversation"]] == ["<image>\nWhat?", "That."]
    assert [image.size for image in sample["images"]] == [(20, 10)]
    assert sample["source"].endswith("data.jsonl, line 1")


def test_images_are_sought_beside_their_file_or_under_the_root(write: Callable[..., Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "deeper" / "data.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(write([QUESTION, ANSWER]).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"line 1: There is no image file at .*deeper.a\.png"):
        ConversationDataset(elsewhere)[0]
    assert len(ConversationDataset(elsewhere, image_root=tmp_path)[0]["images"]) == 1


@pytest.mark.parametrize("host", ["", "localhost"])
def test_an_image_is_named_as_batch_names_it(write: Callable[..., Path], tmp_path: Path, host: str) -> None:
    (tmp_path / "a.png").rename(tmp_path / "a b.png")
    address = f"file://{host}{(tmp_path / 'a%20b.png').as_posix()}"
    dataset = ConversationDataset(write({"messages": [QUESTION | {"images": [address]}, ANSWER]}))
    dataset.check()
    assert [image.size for image in dataset[0]["images"]] == [(20, 10)]


def test_several_files_blank_lines_and_crlf(write: Callable[..., Path]) -> None:
    first = write(TEXT_ONLY, "", "   ", [TEXT_ONLY[0], {**ANSWER, "content": "ä"}])
    second = write(name="second.jsonl")
    second.write_bytes(
        b"\xef\xbb\xbf" + json.dumps([QUESTION, ANSWER]).encode() + b"\r\n" + json.dumps(TEXT_ONLY).encode()
    )
    dataset = ConversationDataset([first, second])
    assert len(dataset) == 4
    assert dataset[1]["conversation"][1]["content"] == "ä"
    assert [dataset.source(i).rsplit("/")[-1] for i in range(4)] == [
        "data.jsonl, line 1",
        "data.jsonl, line 4",
        "second.jsonl, line 1",
        "second.jsonl, line 2",
    ]
    assert dataset[-1]["source"] == dataset.source(3)
    assert len(dataset[2]["images"]) == 1
    for index in (4, -5):
        with pytest.raises(IndexError):
            dataset[index]


def test_it_reads_lazily_and_travels_to_workers(write: Callable[..., Path]) -> None:
    dataset = ConversationDataset(write(*[[{"role": "user", "content": f"{i}"}, ANSWER] for i in range(50)]))
    assert len(pickle.dumps(dataset)) < 4000  # offsets, not conversations
    loader = DataLoader(pickle.loads(pickle.dumps(dataset)), batch_size=None, num_workers=2)
    assert [sample["conversation"][0]["content"] for sample in loader] == [str(i) for i in range(50)]


WRONG = {
    '{"conversation": [': r"line 2: the line is not valid JSON \(.* at character 19\)",
    '{"text": "no"}': r"line 2: the object has none of the keys conversation, conversations, messages: \['text'\]",
    '"no"': "line 2: a conversation is a list of messages",
    json.dumps([{"role": "robot", "content": "?"}, ANSWER]): "line 2: unknown role 'robot' in message 1",
    json.dumps([*TEXT_ONLY, {"role": "system", "content": "?"}]): "line 2: a system message must come first",
    json.dumps(
        [{"role": "user", "content": "<image> <image>"}, ANSWER]
    ): "line 2: the user turns hold 2 <image> tags, but 0",
    json.dumps(
        [QUESTION, {**ANSWER, "content": "<image>"}]
    ): "line 2: message 2 is the .*Assistant.* and holds <image>",
    json.dumps([QUESTION]): "line 2: there is no answer",
    json.dumps([QUESTION, {**ANSWER, "content": " "}]): "line 2: message 2 is an empty answer",
    json.dumps([{"role": "user", "content": None}, ANSWER]): "line 2: A message needs a content",
    json.dumps([{**QUESTION, "images": ["http://x.org/a.png"]}, ANSWER]): "line 2: http://x.org/a.png is an address",
    json.dumps([{**QUESTION, "images": [3]}, ANSWER]): "line 2: an image is named by its path or a data URL, not int",
    json.dumps({"messages": [QUESTION, ANSWER], "images": ["a.png"]}): "line 2: images are named both",
    json.dumps({"messages": TEXT_ONLY, "images": 5}): "line 2: images is a list of paths and data URLs, not int",
    json.dumps({"messages": TEXT_ONLY, "images": {"a.png": 1}}): "line 2: images is a list .*, not dict",
    json.dumps({"messages": TEXT_ONLY, "image": "a.png"}): "line 2: .*'image' is not read",
    json.dumps({"messages": TEXT_ONLY, "tools": [{"type": "function"}]}): "line 2: the line has tools",
    json.dumps([{**QUESTION, "images": [""]}, ANSWER]): "line 2: the path of an image is empty",
    json.dumps([{**QUESTION, "images": ["HTTPS://x.org/a.png"]}, ANSWER]): "line 2: HTTPS://x.org/a.png is an address",
    "[" * 100_000: "line 2: the line is nested too deeply",
}


@pytest.mark.parametrize("line", WRONG)
def test_errors_name_file_and_line(write: Callable[..., Path], line: str) -> None:
    dataset = ConversationDataset(write(TEXT_ONLY, line))
    for act in (lambda: dataset[1], dataset.check):
        with pytest.raises(ValueError, match=r"data\.jsonl, " + WRONG[line]):
            act()


def test_a_data_url_may_be_in_capitals(write: Callable[..., Path]) -> None:
    dataset = ConversationDataset(write([{**QUESTION, "images": ["DATA:image/png;base64,AAAA"]}, ANSWER]))
    dataset.check()
    with pytest.raises(ValueError, match="line 1: The data is not an image"):
        dataset[0]


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is a directory: name a file of one conversation a line"):
        ConversationDataset(tmp_path)


def test_a_line_that_is_no_utf8_is_named(write: Callable[..., Path]) -> None:
    file = write(TEXT_ONLY)
    file.write_bytes(file.read_bytes() + b'["\xff"]\n')
    with pytest.raises(ValueError, match=r"line 2: the line is not UTF-8 text \(.* at byte 2\)"):
        ConversationDataset(file)[1]


def test_a_damaged_image_is_named_with_its_line(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    dataset = ConversationDataset(write([{**QUESTION, "images": ["broken.png"]}, ANSWER]))
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1: .*broken\.png"):
        dataset[0]


def test_check_finds_missing_images_without_decoding_and_counts(write: Callable[..., Path]) -> None:
    missing = [{**QUESTION, "images": ["gone.png"]}, ANSWER]
    dataset = ConversationDataset(write(TEXT_ONLY, missing, TEXT_ONLY, missing, "[]"))
    with pytest.raises(FileNotFoundError, match=r"line 2: .*gone\.png\. \(2 more of 5 conversations are unusable\)"):
        dataset.check()
    ConversationDataset(write([QUESTION, ANSWER])).check()


def test_files_that_are_not_there_or_hold_nothing(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no data file at .*none\.jsonl"):
        ConversationDataset(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="There is no conversation in"):
        ConversationDataset(write("", " "))
    with pytest.raises(ValueError, match="There is no conversation in no files"):
        ConversationDataset([])
