"""The processor takes transformers' options: each does what it says or is refused, and none is ignored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import mini_processor, noise_image

from deepseek_vl2.models import DeepseekVLV2Processor

PROCESSOR = mini_processor()
TEXTS = ["short", "a longer text"]
LENGTHS = [6, 14]  # with bos


def test_the_side_of_the_padding() -> None:
    for options in ({"padding_side": "right"}, {"padding": "right"}, {"padding": True, "padding_side": "right"}):
        batch = PROCESSOR(prompt=TEXTS, **options)
        assert batch.attention_mask[0].tolist() == [True] * 6 + [False] * 8
    for options in ({}, {"padding_side": "left"}, {"padding": "longest"}, {"padding": "left"}):
        assert PROCESSOR(prompt=TEXTS, **options).attention_mask[0].tolist() == [False] * 8 + [True] * 6


def test_padding_to_a_length_or_a_multiple() -> None:
    batch = PROCESSOR(prompt=TEXTS, padding="max_length", max_length=20)
    assert batch.input_ids.shape == batch.labels.shape == batch.images_seq_mask.shape == (2, 20)
    assert batch.attention_mask.sum(1).tolist() == LENGTHS == batch.seq_lens
    assert PROCESSOR(prompt=TEXTS, pad_to_multiple_of=8).input_ids.shape == (2, 16)
    right = PROCESSOR(prompt=TEXTS, padding="max_length", max_length=20, padding_side="right")
    assert bool(right.attention_mask[:, 0].all()) and not right.attention_mask[:, -1].any()


def test_without_padding_rows_must_be_as_long() -> None:
    assert PROCESSOR(prompt=["abc", "xyz"], padding=False).input_ids.shape == (2, 4)
    with pytest.raises(ValueError, match="6, 14"):
        PROCESSOR(prompt=TEXTS, padding=False)


def test_truncation() -> None:
    whole, cut = PROCESSOR(prompt=TEXTS), PROCESSOR(prompt=TEXTS, truncation=True, max_length=8)
    assert cut.seq_lens == [6, 8] and torch.equal(cut.input_ids[1], whole.input_ids[1, :8])
    assert torch.equal(cut.labels[1], whole.labels[1, :8])
    sample = PROCESSOR(prompt=TEXTS[1], truncation=True, max_length=8, force_batchify=False)
    assert len(sample) == 8 and sample.input_ids.tolist() == cut.input_ids[1].tolist()


def test_an_image_is_never_cut() -> None:
    image = noise_image(1)
    batch = PROCESSOR(prompt="<image> and words", images=[image], truncation=True, max_length=30)
    assert batch.seq_lens == [30] and int(batch.images_seq_mask.sum()) == 25
    with pytest.raises(ValueError, match="would cut its image"):
        PROCESSOR(prompt="words and <image>", images=[image], truncation=True, max_length=20)


IMPOSSIBLE: list[dict[str, Any]] = [
    {"padding": "sideways"},
    {"padding_side": "up"},
    {"truncation": "only_first"},
    {"truncation": True},
    {"max_length": 5},
    {"max_length": 0, "truncation": True},
    {"padding": "max_length"},
    {"padding": "max_length", "max_length": 9},
    {"return_tensors": "tf"},
    {"text_kwargs": 5},
]


@pytest.mark.parametrize("options", IMPOSSIBLE)
def test_what_cannot_be_done_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PROCESSOR(prompt=TEXTS, **options)


def test_arrays_of_numpy() -> None:
    want = PROCESSOR(prompt=["<image>", "hi"], images=[noise_image(1)])
    got = PROCESSOR(prompt=["<image>", "hi"], images=[noise_image(1)], return_tensors="np")
    for name in ("input_ids", "labels", "attention_mask", "images", "images_seq_mask", "images_spatial_crop"):
        assert isinstance(got[name], np.ndarray) and np.array_equal(got[name], want[name].numpy())
    assert isinstance(PROCESSOR(prompt="hi", return_tensors="np", force_batchify=False).images, np.ndarray)


def test_groups_of_keywords() -> None:
    image = noise_image(1, 140, 70)
    groups = {
        "text_kwargs": {"padding": "max_length", "max_length": 70},
        "images_kwargs": {"cropping": False},
        "common_kwargs": {"return_tensors": "np"},
    }
    got = PROCESSOR(prompt="<image>hi", images=[image], **groups)
    want = PROCESSOR(
        prompt="<image>hi", images=[image], padding="max_length", max_length=70, cropping=False, return_tensors="np"
    )
    assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in ("input_ids", "images"))
    with pytest.warns(UserWarning, match="do_pan_and_scan"):
        PROCESSOR(prompt="hi", images_kwargs={"do_pan_and_scan": True})


def test_nothing_stands_for_the_default() -> None:
    options = {"padding": None, "truncation": None, "max_length": None, "padding_side": None, "return_tensors": None}
    assert torch.equal(PROCESSOR(prompt=TEXTS, **options).input_ids, PROCESSOR(prompt=TEXTS).input_ids)


def test_the_chat_template_takes_them_too() -> None:
    messages = [[{"role": "user", "content": text}] for text in TEXTS]
    options = {"padding_side": "right", "return_tensors": "np", "pad_to_multiple_of": 32}
    got = PROCESSOR.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    again = PROCESSOR.apply_chat_template(messages, tokenize=True, return_dict=True, processor_kwargs=options)
    assert isinstance(got.input_ids, np.ndarray) and got.input_ids.shape[1] == 32 and got.attention_mask[:, 0].all()
    assert np.array_equal(got.input_ids, again.input_ids)
    for name in ("tools", "documents"):
        for tokenize in (True, False):
            with pytest.raises(ValueError, match="tools"):
                PROCESSOR.apply_chat_template(messages[0], tokenize=tokenize, **{name: [{"name": "search"}]})
    assert PROCESSOR.apply_chat_template(messages[0], tools=None, documents=None, tokenize=False)


def test_the_side_that_the_tokenizer_names() -> None:
    processor = DeepseekVLV2Processor.from_pretrained("nano")
    right, left = [True, False], [False, True]
    texts = ["a", "a longer one"]
    assert processor(text=texts).attention_mask[0, [0, -1]].tolist() == left
    processor.tokenizer.padding_side = "right"
    assert processor(text=texts).attention_mask[0, [0, -1]].tolist() == right
    assert processor(prompt=texts).attention_mask[0, [0, -1]].tolist() == right
    assert processor(text=texts, padding_side="left").attention_mask[0, [0, -1]].tolist() == left
    assert processor(text=texts, padding="left").attention_mask[0, [0, -1]].tolist() == left
    loaded = DeepseekVLV2Processor.from_pretrained("nano", padding_side="right")
    assert loaded(text=texts).attention_mask[0, [0, -1]].tolist() == right


def test_transformers_names_of_truncation() -> None:
    for name in ("longest_first", "only_first"):
        assert PROCESSOR(prompt="a long text", truncation=name, max_length=4).input_ids.shape == (1, 4)
    assert len(PROCESSOR(prompt="abcdef", truncation="do_not_truncate").input_ids[0]) == 7
    with pytest.raises(ValueError, match="truncation"):
        PROCESSOR(prompt="a", truncation="only_second", max_length=4)


def test_groups_within_the_keywords_of_a_chat_template() -> None:
    messages = [{"role": "user", "content": "hi"}]
    options = {"text_kwargs": {"padding": "max_length", "max_length": 99}}
    for given in ({"processor_kwargs": options}, options):
        batch = PROCESSOR.apply_chat_template(messages, tokenize=True, return_dict=True, **given)
        assert batch.input_ids.shape == (1, 99)


def test_nothing_is_not_named_as_ignored(recwarn: pytest.WarningsRecorder) -> None:
    PROCESSOR(text="a", videos=None, audio=None)
    assert not recwarn.list
