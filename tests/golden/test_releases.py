"""The released models: every tensor's name and shape, special tokens and processor settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import KINDS, RELEASES

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.checkpoint import released_shapes


def facts(kind: str, name: str) -> dict[str, Any]:
    return json.loads((RELEASES / kind / name).read_text(encoding="utf-8"))


def parameters(kind: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((RELEASES / kind / "parameters.json.gz").read_bytes()))


@pytest.fixture(scope="module", params=KINDS)
def release(request: pytest.FixtureRequest) -> tuple[str, DeepseekVLV2ForCausalLM]:
    """Return a released model at its real size, without memory."""
    config = DeepseekVLV2Config.from_pretrained(RELEASES / request.param)
    with torch.device("meta"):
        return request.param, DeepseekVLV2ForCausalLM(config)


def test_every_tensor_has_its_released_name_and_shape(release: tuple[str, DeepseekVLV2ForCausalLM]) -> None:
    kind, model = release
    want = {name: tuple(shape) for name, shape in parameters(kind)["tensors"].items()}
    assert released_shapes(model, model.config.language_config) == want


def test_the_totals_are_those_published(release: tuple[str, DeepseekVLV2ForCausalLM]) -> None:
    kind, model = release
    want = parameters(kind)
    assert len(want["tensors"]) == want["num_tensors"]
    buffers = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    assert sum(t.numel() for t in [*model.parameters(), *buffers]) == want["total_params"]


def test_nothing_but_the_checkpoints_tensors_is_stored(release: tuple[str, DeepseekVLV2ForCausalLM]) -> None:
    kind, model = release
    fused = {name for name in model.state_dict() if ".experts." in name}
    assert set(model.state_dict()) - fused <= set(parameters(kind)["tensors"])


@pytest.mark.parametrize("kind", ["tiny", "base"])
def test_special_tokens_have_their_released_ids(processor: DeepseekVLV2Processor, kind: str) -> None:
    for token, index in facts(kind, "special_token_ids.json").items():
        assert processor.tokenizer.convert_tokens_to_ids(token) == index, token
        assert processor.encode(token, bos=False) == [index]


@pytest.mark.parametrize("kind", KINDS)
def test_released_processor_settings_are_read(tokenizer_dir: Path, tmp_path: Path, kind: str) -> None:
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(facts(kind, "processor_config.json")))
    processor = DeepseekVLV2Processor.from_pretrained(tmp_path)
    for name, value in facts(kind, "processor_config.json").items():
        if name != "processor_class":
            assert json.loads(json.dumps(getattr(processor, name))) == value, name
