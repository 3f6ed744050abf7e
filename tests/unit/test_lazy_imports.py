"""The package's own names: there when asked for, and nothing heavy before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import deepseek_vl2


@pytest.mark.parametrize("name", deepseek_vl2.__all__)
def test_a_name_of_the_package_is_that_of_its_module(name: str) -> None:
    found = getattr(deepseek_vl2, name)
    assert found.__name__ == name and name in dir(deepseek_vl2)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, deepseek_vl2; dir(deepseek_vl2); print({'torch', 'transformers', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = deepseek_vl2.nothing  # type: ignore[attr-defined]


def test_every_class_loads_nano_by_its_name() -> None:
    from deepseek_vl2 import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

    config = DeepseekVLV2Config.from_pretrained("nano")
    processor = DeepseekVLV2Processor.from_pretrained("nano")
    model = DeepseekVLV2ForCausalLM.from_pretrained("nano")
    assert config.image_token_id == processor.image_token_id == model.config.image_token_id
    assert model.get_input_embeddings().weight.shape[0] == config.language_config.vocab_size
