"""Memory of adapters: what is counted is what is trained, and the page's table is what is computed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import KINDS, RELEASES, mini_config, mini_model

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.quantizer import WeightOnlyConfig
from deepseek_vl2.training.lora import add_lora
from deepseek_vl2.training.memory import AdapterMemory, adapter_memory, adapter_numbers

pytest.importorskip("peft")

TRAINED = {"experts too": ("attention", "mlp", "experts"), "without experts": ("attention", "mlp")}
PAGE = Path(__file__).parents[2] / "docs" / "training.md"
ROW = re.compile(
    r"^\| (\w+) \| (experts too|without experts) \| ([\d.]+) M \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
    re.M,
)


@pytest.mark.parametrize("parts", [("attention", "mlp", "experts"), ("attention",), ("projector", "vision", "experts")])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_numbers_are_counted_as_are_trained(kind: str, parts: tuple[str, ...]) -> None:
    counted = adapter_memory(mini_config(kind), rank=3, parts=parts).numbers
    model = add_lora(mini_model(kind), rank=3, parts=parts)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_over_packed_weights_the_adapters_are_the_same(tmp_path: Path) -> None:
    mini_model("small").save_pretrained(tmp_path)
    base: Any = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, quantization_config=WeightOnlyConfig("int4"))
    model = add_lora(base, rank=2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == adapter_memory(mini_config("small"), rank=2).numbers


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_is_computed(kind: str) -> None:
    config = DeepseekVLV2Config.from_dict(json.loads((RELEASES / kind / "config.json").read_text(encoding="utf-8")))
    memory = adapter_memory(config, parts=TRAINED["experts too"])
    assert memory.weights["int8"] == memory.weights["fp8"]
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(config)
    rows = {name: rest for size, name, *rest in ROW.findall(PAGE.read_text(encoding="utf-8")) if size == kind}
    assert rows.keys() == TRAINED.keys()
    for name, parts in TRAINED.items():
        found = AdapterMemory(memory.weights, adapter_numbers(model, parts=parts))
        held = [f"{found.held(precision) / 1e9:.1f}" for precision in ("bfloat16", "int8", "int4", "nf4")]
        assert rows[name] == [f"{found.numbers / 1e6:.1f}", *held]
