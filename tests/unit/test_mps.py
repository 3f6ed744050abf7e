"""Packed weights on Apple's GPUs, as far as a CPU can show it: devices and dtypes of what runs, on a pretended one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from mps_support import MPS, MpsTensor, pretended_mps
from support import mini_inputs, mini_model

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.quantization import FP8, pack_int4, unpack_int4
from deepseek_vl2.models.quantized_checkpoint import packing_device
from deepseek_vl2.models.quantizer import WeightOnlyConfig
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model
from deepseek_vl2.utils.memory import free_memory

INPUTS = mini_inputs([5, (1, 1), 4])
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top-p": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3},
}


@cache
def released() -> Path:
    directory = Path(mkdtemp(prefix="mps-"))
    mini_model("small").save_pretrained(directory)
    return directory


def load(weights: Any) -> Any:
    config = WeightOnlyConfig(weights, head="int8")
    model = DeepseekVLV2ForCausalLM.from_pretrained(released(), dtype=torch.float32, quantization_config=config)
    return model.eval()


def drawn(model: Any, inputs: dict[str, torch.Tensor], **draw: Any) -> torch.Tensor:
    torch.manual_seed(3)
    out: torch.Tensor = model.generate(**inputs, max_new_tokens=3, **draw)
    return out


def test_the_pretended_device_refuses_what_apples_does() -> None:
    with pretended_mps():
        there = torch.ones(2, 2, device=MPS)
        assert there.device.type == "mps" and (there @ there).tolist() == [[2.0, 2.0], [2.0, 2.0]]
        with pytest.raises(TypeError, match="float64"):
            there.double()
        with pytest.raises(TypeError, match="float8"):
            there.to(FP8)
        with pytest.raises(RuntimeError, match="one device"):
            _ = there + torch.ones(2, 2)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize(("weights", "draws"), [("int4", ["top-p", "penalty"]), ("int8", ["greedy"])])
def test_packed_models_run_there_and_draw_the_same_tokens(weights: str, draws: list[str]) -> None:
    model = load(weights)
    with torch.no_grad():
        logits = model(**INPUTS).logits
    tokens = {name: drawn(model, INPUTS, **DRAWS[name]) for name in draws}
    with pretended_mps():
        model = model.to(MPS)
        assert all(isinstance(p.data, MpsTensor) for p in model.parameters())
        inputs = {name: tensor.to(MPS) for name, tensor in INPUTS.items()}
        there = model(**inputs).logits
        torch.testing.assert_close(there.cpu(), logits, rtol=1e-4, atol=1e-4)
        for name in draws:
            found = drawn(model, inputs, **DRAWS[name])
            assert found.device.type == "mps"
            assert torch.equal(found.cpu(), tokens[name]), name


def test_words_of_int4_are_unpacked_there_by_shifts() -> None:
    numbers = torch.randint(-8, 8, (3, 5, 64), dtype=torch.int8)
    packed = pack_int4(numbers)
    with pretended_mps():
        assert torch.equal(unpack_int4(packed.to(MPS)).cpu(), numbers)


def test_fp8_is_refused_there_before_anything_is_loaded(tmp_path: Path) -> None:
    source = write_demo_checkpoint(tmp_path / "demo")
    for config in ("fp8", WeightOnlyConfig("int4", head="fp8")):
        with pytest.raises(ValueError, match="have no fp8 numbers: use int8 or int4"):
            load_pretrained_model(source, device="mps", quantize=config)
    _, processor, model = load_pretrained_model(source, device="cpu", quantize="fp8")
    model.save_pretrained(tmp_path / "packed")
    processor.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="have no fp8 numbers"):
        load_pretrained_model(tmp_path / "packed", device="mps")


def test_packing_is_the_hosts_where_the_accelerator_is_apples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: MPS)
    assert packing_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert packing_device() == torch.device("cuda")


def test_free_memory_is_what_apple_recommends_less_what_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12_000_000_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 11_999_999_000)
    assert free_memory(torch.device("mps")) == 1_000
    with pytest.raises(ValueError, match=r"needs about .* in int4.* and mps has 0\.0 GB free"):
        load_pretrained_model(write_demo_checkpoint(tmp_path / "demo"), device="mps", quantize="int4")
