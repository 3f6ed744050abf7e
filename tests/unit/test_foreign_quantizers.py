"""Quantizers of other packages: they would leave the experts as they are, and are refused with what to use instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file
from support import mini_config, mini_model
from transformers.dynamic_module_utils import get_imports

from deepseek_vl2 import models
from deepseek_vl2.models import DeepseekVLV2ForCausalLM

CONFIGS: dict[str, dict[str, Any]] = {
    "TorchAoConfig": {},
    "FineGrainedFP8Config": {},
    "QuantoConfig": {"weights": "int8"},
    "HqqConfig": {},
    "CompressedTensorsConfig": {},
    "GPTQConfig": {"bits": 4},
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("released")
    mini_model("small").save_pretrained(directory)
    return directory


def foreign_config(name: str) -> Any:
    """Return a config of that class; without its package, an object of it that was never set up."""
    kind = getattr(transformers, name)
    try:
        if name == "TorchAoConfig":
            from torchao.quantization import Int8WeightOnlyConfig

            return kind(Int8WeightOnlyConfig())
        return kind(**CONFIGS[name])
    except ImportError:
        return kind.__new__(kind)


@pytest.mark.parametrize("name", CONFIGS)
def test_quantizers_that_leave_the_experts_are_refused(name: str, released: Path) -> None:
    with pytest.raises(
        ValueError, match=f"^{name} quantizes linear layers alone.*routed experts.*WeightOnlyConfig.*QLoRA"
    ):
        DeepseekVLV2ForCausalLM.from_pretrained(released, quantization_config=foreign_config(name))


def test_auto_classes_refuse_them_too(released: Path) -> None:
    with pytest.raises(ValueError, match="use quantize="):
        transformers.AutoModelForCausalLM.from_pretrained(released, quantization_config=foreign_config("QuantoConfig"))


@pytest.mark.parametrize("bits", [4, 8])
def test_without_bitsandbytes_its_config_says_what_is_missing(
    bits: int, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"transformers.quantizers.quantizer_bnb_{bits}bit.is_bitsandbytes_available", lambda: False)
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
        DeepseekVLV2ForCausalLM.from_pretrained(released, quantization_config=config)


def test_weights_that_do_not_come_from_files_are_refused_too(released: Path) -> None:
    state = load_file(released / "model.safetensors")
    with pytest.raises(ValueError, match="routed experts"):
        DeepseekVLV2ForCausalLM.from_pretrained(
            None, config=mini_config("small"), state_dict=state, quantization_config=foreign_config("QuantoConfig")
        )


def test_checkpoints_of_other_quantizers_are_refused(released: Path, tmp_path: Path) -> None:
    config = json.loads((released / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((released / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"quantized by gptq.*does not read"):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)


def test_the_number_of_experts_has_the_name_that_others_ask_for() -> None:
    config = mini_config("small").get_text_config()
    assert config.num_experts == config.n_routed_experts == 8
    assert "num_experts" not in config.to_dict()


def test_code_that_comes_with_a_checkpoint_needs_no_bitsandbytes() -> None:
    files = list(Path(models.__path__[0]).glob("*.py"))
    assert len(files) > 50
    assert not any("bitsandbytes" in get_imports(file) for file in files)
