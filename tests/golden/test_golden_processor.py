"""The processor gives what the original's gives: ids, masks, crops, labels, prompts and tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import CASES, CONVERSATION_CASES, GOLDEN, case_images, case_inputs

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.processing_deepseek_vl_v2 import BatchCollateOutput

# Both sides compute value / 255, minus mean, over std in float32; only the order of a sum over a tile may differ.
TILE_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def processed(processor: DeepseekVLV2Processor) -> Callable[[str], BatchCollateOutput]:
    """Return a case's batch; each is processed once."""
    return cache(lambda case: processor(**case_inputs(CASES[case])))


def expected(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected" / "processor" / f"{case}.safetensors")


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_ids_masks_crops_and_prompt_equal_the_original(
    processor: DeepseekVLV2Processor, case: str, inference_mode: bool
) -> None:
    want = expected(case)
    got = processor.process_one(**case_inputs(CASES[case]), inference_mode=inference_mode)
    length = len(want["input_ids"])
    assert got.input_ids.tolist() == want["input_ids" if inference_mode else "input_ids_training"].tolist()
    assert got.images_seq_mask[:length].tolist() == want["images_seq_mask"].tolist()
    assert not got.images_seq_mask[length:].any()
    assert got.images_spatial_crop.tolist() == want["images_spatial_crop"].tolist()
    assert got.num_image_tokens == want["num_image_tokens"].tolist()
    assert got.sft_format == (GOLDEN / "expected" / "processor" / f"{case}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_labels_equal_the_original(
    processor: DeepseekVLV2Processor, monkeypatch: pytest.MonkeyPatch, case: str, mask_prompt: bool
) -> None:
    monkeypatch.setattr(processor, "mask_prompt", mask_prompt)
    for inference_mode in (True, False):
        got = processor.process_one(**case_inputs(CASES[case]), inference_mode=inference_mode)
        name = f"labels_mask_prompt_{mask_prompt}_inference_{inference_mode}"
        assert got.target_ids.tolist() == expected(case)[name].tolist()


@pytest.mark.parametrize("case", CASES)
def test_tiles_equal_the_original(processed: Callable[[str], BatchCollateOutput], case: str) -> None:
    want = expected(case)
    got = processed(case).images[0]
    assert got.shape == (len(want["tile_mean"]), 3, 384, 384)
    tolerance = {"rtol": 0, "atol": TILE_TOLERANCE}
    torch.testing.assert_close(got[:, :, 5::53, 7::53], want["tile_grid"], **tolerance)
    torch.testing.assert_close(got.flatten(1).mean(1), want["tile_mean"], **tolerance)
    torch.testing.assert_close(got.flatten(1).std(1), want["tile_std"], **tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_one_holds_the_sample(processed: Callable[[str], BatchCollateOutput], case: str) -> None:
    want = expected(case)
    got = processed(case)
    assert got.input_ids.tolist() == [want["input_ids"].tolist()]
    assert got.attention_mask.dtype == torch.bool and bool(got.attention_mask.all())
    assert got.seq_lens == [len(want["input_ids"])]


# ---------------------------------------------------------------- the chat template


def openai_messages(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Rewrite a golden conversation with OpenAI-style content: each tag becomes an image part."""
    roles = {"<|User|>": "user", "<|Assistant|>": "assistant"}
    images = iter(case_images(case))
    messages = []
    for message in case["conversation"]:
        parts: list[dict[str, Any]] = []
        for index, text in enumerate(message["content"].split("<image>")):
            if index:
                parts.append({"type": "image", "image": next(images)})
            if text:
                parts.append({"type": "text", "text": text})
        messages.append({"role": roles.get(message["role"], message["role"]), "content": parts})
    return messages


@pytest.mark.parametrize("case", CONVERSATION_CASES)
def test_openai_style_messages_give_the_same_ids_and_images(
    processor: DeepseekVLV2Processor, processed: Callable[[str], BatchCollateOutput], case: str
) -> None:
    want = processed(case)
    got = processor.apply_chat_template(
        openai_messages(CASES[case]), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert got.input_ids.tolist() == want.input_ids.tolist() == [expected(case)["input_ids"].tolist()]
    assert torch.equal(got.images, want.images)
    assert torch.equal(got.images_spatial_crop, want.images_spatial_crop)
    assert torch.equal(got.images_seq_mask, want.images_seq_mask)
    assert torch.equal(got.attention_mask, want.attention_mask)


@pytest.mark.parametrize("case", [c for c in CONVERSATION_CASES if not CASES[c]["conversation"][-1]["content"]])
def test_messages_without_the_empty_answer_give_the_same_ids(processor: DeepseekVLV2Processor, case: str) -> None:
    messages = openai_messages(CASES[case])[:-1]
    got = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert got.input_ids.tolist() == [expected(case)["input_ids"].tolist()]


@pytest.mark.parametrize("style", ["openai", "plain"])
@pytest.mark.parametrize("case", CONVERSATION_CASES)
def test_rendering_first_and_processing_the_text_gives_the_same_ids(
    processor: DeepseekVLV2Processor, processed: Callable[[str], BatchCollateOutput], case: str, style: str
) -> None:
    messages = openai_messages(CASES[case]) if style == "openai" else CASES[case]["conversation"]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    want = processed(case)
    got = processor(text=text, images=case_images(CASES[case]))
    assert got.input_ids.tolist() == want.input_ids.tolist()
    assert torch.equal(got.images, want.images)


@pytest.mark.parametrize("case", CONVERSATION_CASES)
def test_the_tokenizers_own_template_renders_the_same_text(processor: DeepseekVLV2Processor, case: str) -> None:
    messages = openai_messages(CASES[case])
    ours = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    theirs = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours == theirs


def test_a_finished_conversation_without_generation_prompt_keeps_its_eos(processor: DeepseekVLV2Processor) -> None:
    messages = openai_messages(CASES["training_pair"])
    got = processor.apply_chat_template(messages, tokenize=True)
    assert got.tolist() == [expected("training_pair")["input_ids_training"].tolist()]
