"""Served answers of models with packed weights are those of their `generate`, asked together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from server_support import chat_body, data_url, image_part, make_server, picture

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.quantizer import WeightOnlyConfig

QUESTIONS = ("<image>What is this?", "Name three colours.", "<image>What do you see, and where?")


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_served_answers_are_those_of_generate(
    weights: Any,
    golden_model: Callable[..., DeepseekVLV2ForCausalLM],
    processor: DeepseekVLV2Processor,
    tmp_path: Path,
) -> None:
    golden_model("small").save_pretrained(tmp_path)
    config = WeightOnlyConfig(weights)
    model = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config).eval()
    expected, bodies = [], []
    for text in QUESTIONS:
        images = [picture(300, 200)] if "<image>" in text else []
        content = [*(image_part(data_url(image)) for image in images)]
        content.append({"type": "text", "text": text.removeprefix("<image>")})
        bodies.append(chat_body(content, max_tokens=8, temperature=0))
        inputs = processor(conversations=[{"role": "<|User|>", "content": text}], images=images)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected.append(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    with make_server(model, processor) as server, ThreadPoolExecutor(3) as threads:
        answers = threads.map(
            lambda body: httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json(), bodies
        )
        found = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert found == expected
