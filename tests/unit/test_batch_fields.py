"""A field of a processor's output is the same thing as an attribute and as an item."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import GREEDY, MINI_IMAGE_ID, mini_model, mini_processor, noise_image

from deepseek_vl2.models.batch import BatchCollateOutput, VLChatProcessorOutput

FIELDS = {
    VLChatProcessorOutput: ("sft_format", "input_ids", "target_ids", "images", "images_seq_mask", "num_image_tokens"),
    BatchCollateOutput: ("sft_format", "input_ids", "labels", "attention_mask", "images", "images_spatial_crop"),
}
CASES = [(kind, name) for kind, names in FIELDS.items() for name in (*names, "a_new_one")]

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "method": lambda out: out.copy(),
    "pickle": lambda out: pickle.loads(pickle.dumps(out)),
}


def fresh(kind: type) -> Any:
    processor = mini_processor()
    out = processor(prompt="<image>\nhi", images=[noise_image(1)], force_batchify=kind is BatchCollateOutput)
    assert type(out) is kind
    return out


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_setting_one_sets_the_other(kind: type, name: str) -> None:
    out, value = fresh(kind), torch.arange(3)
    setattr(out, name, value)
    assert out[name] is value and getattr(out, name) is value and out.data[name] is value and name in out
    assert dict(out)[name] is value and out.get(name) is value and {**out}[name] is value
    out[name] = other = torch.arange(4)
    assert getattr(out, name) is other


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("delete", [delattr, lambda out, name: out.__delitem__(name), lambda out, name: out.pop(name)])
def test_deleting_one_deletes_the_other(kind: type, name: str, delete: Callable[[Any, str], Any]) -> None:
    out = fresh(kind)
    setattr(out, name, torch.arange(3))
    delete(out, name)
    assert name not in out and not hasattr(out, name) and name not in out.data
    with pytest.raises(AttributeError, match=name):
        delattr(out, name)
    with pytest.raises(KeyError, match=name):
        del out[name]


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("again", COPIES)
def test_copies_hold_what_was_set_and_share_no_fields(kind: type, again: str) -> None:
    out, value = fresh(kind), torch.arange(3)
    out.input_ids = value
    out.images = value.float()
    twin = COPIES[again](out)
    assert type(twin) is kind and twin.keys() == out.keys()
    assert torch.equal(twin.input_ids, value) and torch.equal(twin["images"], value.float())
    twin.input_ids = torch.arange(9)
    del twin.images
    assert out.input_ids is value and out["input_ids"] is value and "images" in out
    assert twin.convert_to_tensors("pt") is twin


@pytest.mark.parametrize("kind", FIELDS)
def test_what_was_set_moves_and_casts_with_the_rest(kind: type) -> None:
    out = fresh(kind)
    out.images = torch.ones(2)
    out.extra = [torch.ones(2), {"deep": torch.arange(2)}]
    out.input_ids = torch.arange(3)
    moved = out.to("meta", torch.bfloat16)
    assert moved is out and out["images"].device.type == out.input_ids.device.type == "meta"
    assert out.images.dtype == torch.bfloat16 and out["input_ids"].dtype == torch.long
    assert out.extra[0].device.type == out.extra[1]["deep"].device.type == "meta"
    assert out.extra[0].dtype == torch.bfloat16 and out.extra[1]["deep"].dtype == torch.long


@pytest.mark.parametrize("kind", FIELDS)
def test_a_method_cannot_be_hidden_by_a_field(kind: type) -> None:
    out = fresh(kind)
    for name in ("to", "keys", "held"):
        with pytest.raises(AttributeError, match=name):
            setattr(out, name, 1)
        out[name] = 1
        assert callable(getattr(out, name)) and out[name] == 1
    out.data = {"input_ids": [1]}
    assert list(out) == ["input_ids"] and out.input_ids == [1]


def test_a_replaced_mask_reaches_the_model() -> None:
    model = mini_model("tiny")
    model.config.image_token_id = MINI_IMAGE_ID
    batch = mini_processor()(prompt="hi there")
    batch.attention_mask = torch.zeros_like(batch.attention_mask).index_fill_(1, torch.tensor([6, 7, 8]), True)
    same = {**batch, "attention_mask": batch.attention_mask.clone()}
    del same["labels"]
    assert torch.equal(model(**batch).logits[:, -1], model(**same).logits[:, -1])
    assert torch.equal(model.generate(**batch, **GREEDY), model.generate(**same, **GREEDY))
    assert not torch.equal(model(**batch).logits[:, -1], model(batch.input_ids).logits[:, -1])


def test_a_replaced_field_of_a_sample_reaches_its_batch() -> None:
    processor = mini_processor()
    sample = processor(prompt="hi", force_batchify=False)
    sample.target_ids = torch.full_like(sample.input_ids, -100)
    sample.input_ids = sample.input_ids + 1
    batch = processor.batchify([sample])
    assert torch.equal(batch.input_ids[0], sample["input_ids"]) and bool((batch.labels == -100).all())
