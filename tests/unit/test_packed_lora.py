"""Adapters over packed weights train, come back, and merge into a plain checkpoint in the released layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import KINDS, mini_model, released_names
from torch.distributed.fsdp import MixedPrecisionPolicy
from training_support import batch, logits, train

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.moe import DeepseekV2Experts
from deepseek_vl2.models.quantized_layers import PackedExperts, packed_layers
from deepseek_vl2.models.quantizer import WeightOnlyConfig
from deepseek_vl2.training.lora import add_lora, load_lora, merge_and_save
from deepseek_vl2.training.processes import shard_as_it_is

pytest.importorskip("peft")

from deepseek_vl2.training.packed_lora import PackedLoraExperts


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, directory in directories.items():
        mini_model(kind).save_pretrained(directory)
    return directories


def load(directory: Path, weights: Any) -> Any:
    config = WeightOnlyConfig(weights)
    return DeepseekVLV2ForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=config).eval()


@pytest.mark.parametrize(("kind", "weights"), [("tiny", "int4"), ("small", "int8"), ("base", "int4"), ("base", "fp8")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_merge_and_reload(
    kind: str, weights: str, checkpointing: bool, released: dict[str, Path], tmp_path: Path
) -> None:
    base = load(released[kind], weights)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    before = logits(base)
    model = add_lora(base, rank=4)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    if checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    losses = train(model)
    assert losses[-1] < losses[0]
    after = logits(model)
    assert (after - before).abs().max() > 0.05
    state = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(state[name].float(), tensor.float()) for name, tensor in frozen.items())

    model.save_pretrained(tmp_path / "adapters")
    again = load_lora(load(released[kind], weights), tmp_path / "adapters")
    torch.testing.assert_close(logits(again), after, rtol=0, atol=1e-5)

    merged = merge_and_save(model, None, tmp_path / "merged")
    assert not list(packed_layers(merged))
    torch.testing.assert_close(logits(merged), after, rtol=1e-3, atol=2e-3)
    assert released_names(tmp_path / "merged") == released_names(released[kind])
    plain = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(plain), logits(merged))


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_sharded_as_floats_they_are_the_same_weights(weights: str, released: dict[str, Path]) -> None:
    """FSDP 2 rounds what it takes for weights, and before torch 2.14 shards no integers."""
    model = add_lora(load(released["small"], weights), rank=4)
    expected = logits(model)
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16))
    shard_as_it_is(plugin, model)
    assert plugin.mixed_precision_policy is None
    assert {parameter.dtype for parameter in model.parameters()} <= {torch.float32, torch.bfloat16}
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.to(torch.float32)), expected)
    losses = train(model)
    assert losses[-1] < losses[0]


def test_every_chosen_expert_gets_a_gradient(released: dict[str, Path]) -> None:
    model = add_lora(load(released["small"], "int4"), rank=2, parts=("experts",))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    experts = sum(isinstance(layer, PackedExperts) for _, layer in packed_layers(model))
    assert experts == 2 and len(trained) == 4 * experts and all("lora_" in name for name in trained)
    model.train()
    model(**batch()).loss.backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        if "_B." in name:  # those of A are zero as long as B is
            assert (parameter.grad.flatten(1).norm(dim=1) > 0).sum() >= 6, name


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_adapters_of_a_bfloat16_model_train_in_float32_and_merge_back(
    weights: Any, released: dict[str, Path], tmp_path: Path
) -> None:
    config = WeightOnlyConfig(weights)
    base = DeepseekVLV2ForCausalLM.from_pretrained(released["base"], dtype=torch.bfloat16, quantization_config=config)
    model = add_lora(base, rank=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    base.gradient_checkpointing_enable()
    losses = train(model)
    assert losses[-1] < losses[0]
    wrapped = next(m for m in model.modules() if isinstance(m, PackedLoraExperts))
    first, second = wrapped.lora_down_proj_A["default"], wrapped.lora_down_proj_B["default"]
    packed: Any = wrapped.get_base_layer()
    expected = packed.dequantized("down_proj").float() + second.detach() @ first.detach() * wrapped.scaling["default"]
    merge_and_save(model, None, tmp_path)
    plain = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.bfloat16 and released_names(tmp_path) == released_names(released["base"])
    experts = next(m for m in plain.modules() if isinstance(m, DeepseekV2Experts))
    assert torch.equal(experts.down_proj, expected.to(torch.bfloat16))


def test_dropout_of_experts_is_refused(released: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="cannot drop out"):
        add_lora(load(released["small"], "int4"), dropout=0.1)
