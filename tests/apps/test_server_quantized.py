"""Served answers of models with packed weights are those of their `generate`, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepseek_vl2.serve.api.token_bytes import TokenBytes
from server_support import GREEDY, job, picture, running_engine, text_prompt

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.quantizer import WeightOnlyConfig

QUESTIONS = ("<image>\nWhat is this?", "Name three colours.", "<image>\nWhat do you see, and where?")


@pytest.fixture
def token_bytes(processor: DeepseekVLV2Processor) -> TokenBytes:
    return TokenBytes(processor.tokenizer)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_served_answers_are_those_of_generate(
    weights: str,
    golden_model: Callable[..., DeepseekVLV2ForCausalLM],
    token_bytes: TokenBytes,
    processor: DeepseekVLV2Processor,
    tmp_path: Path,
) -> None:
    golden_model("small").save_pretrained(tmp_path)
    config = WeightOnlyConfig(weights)  # type: ignore[arg-type]
    model = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config).eval()
    expected = []
    for text in QUESTIONS:
        images = [picture(300, 200)] if "<image>" in text else []
        conversation = [{"role": "<|User|>", "content": text}, {"role": "<|Assistant|>", "content": ""}]
        inputs = processor(conversations=conversation, images=images)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
        expected.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    with running_engine(model, token_bytes, prefill_chunk=64) as engine:
        jobs = []
        for text in QUESTIONS:
            images = [picture(300, 200)] if "<image>" in text else []
            jobs.append(job(text_prompt(processor, text, images), 8, GREEDY))
        engine.submit([one for one, _ in jobs])
        found = [listener.wait().ids for _, listener in jobs]
    assert found == [ids[: len(answer)] for ids, answer in zip(expected, found, strict=True)]
    assert all(found)
