"""Adapters start as nothing, train alone, and merge into a checkpoint in the released layout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support import KINDS, mini_model, released_names
from training_support import batch, logits, train

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.training.lora import PARTS, add_lora, load_lora, merge_and_save, merge_lora, target_modules

pytest.importorskip("peft")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_merge_and_reload_in_the_released_layout(kind: str, tmp_path: Path) -> None:
    base = mini_model(kind)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    before = logits(base)
    model = add_lora(base, rank=4, parts=PARTS)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)  # W + 0: products in another order
    losses = train(model)
    assert losses[-1] < losses[0]
    after = logits(model)
    assert (after - before).abs().max() > 0.05
    model.save_pretrained(tmp_path / "adapters")
    assert sum(file.stat().st_size for file in (tmp_path / "adapters").glob("*.safetensors")) < 3e6

    loaded = load_lora(mini_model(kind), tmp_path / "adapters")
    again = dict(loaded.named_parameters())
    assert all(torch.equal(again[name], tensor) for name, tensor in model.named_parameters())
    torch.testing.assert_close(logits(loaded), after, rtol=0, atol=2e-5)  # memory laid out anew: sums in other orders
    assert not any(parameter.requires_grad for parameter in loaded.parameters())

    merged = merge_and_save(model, None, tmp_path / "merged", max_shard_size="500KB")
    assert isinstance(merged, DeepseekVLV2ForCausalLM)
    assert {name for name, t in merged.state_dict().items() if not torch.equal(t, frozen[name])} == {
        name for name in frozen if is_adapted(name)
    }
    assert released_names(tmp_path / "merged") == released_names(saved(mini_model(kind), tmp_path / "plain"))
    reloaded = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(reloaded), after, rtol=0, atol=1e-4)  # W + BA in one matrix: another order


def saved(model: DeepseekVLV2ForCausalLM, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def is_adapted(name: str) -> bool:
    """Whether adapters of all parts change a tensor: matrices of layers, never norms, gates or embeddings."""
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return True
    words = ("self_attn", ".mlp.", "projector", "attn.qkv", "attn.proj")
    matrix = name.endswith(".weight") and any(word in name for word in words)
    return matrix and not any(word in name for word in ("norm", "mlp.gate.", "embed", "attn_pool"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_gradients_flow_into_the_adapters_of_a_part_only(kind: str, part: str) -> None:
    model = add_lora(mini_model(kind), rank=2, parts=(part,))
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)  # else the A's gradient is zero in the first step
    model(**batch()).loss.backward()
    for name, parameter in model.named_parameters():
        trained = "lora_" in name
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name
        if trained:
            assert {"attention": "self_attn", "mlp": ".mlp.", "experts": ".experts."}.get(part, part) in name


def test_every_linear_layer_of_a_part_is_found() -> None:
    model = mini_model("base")
    layers = len(model.language.model.layers)
    found = target_modules(model, ("attention",))
    assert len(found) == 5 * layers or len(found) == 4 * layers
    assert {name.rpartition(".")[2] for name in found} >= {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert len(target_modules(model, ("mlp",))) == 3 * layers  # one dense layer, and shared experts in the others
    assert target_modules(model, ("projector",)) == ["projector.layers.0", "projector.layers.2"]
    assert len(target_modules(model, ("vision",))) == 4 * len(model.vision.blocks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_in_bfloat16_and_with_recomputed_layers(checkpointing: bool) -> None:
    model = add_lora(mini_model("small").to(torch.bfloat16), rank=4)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = train(model, steps=6)
    assert losses[-1] < losses[0] and all(loss == loss for loss in losses)


def test_an_adapted_model_generates_and_merging_keeps_its_answer() -> None:
    model = add_lora(mini_model("small"), rank=4)
    train(model)
    inputs = batch()
    inputs.pop("labels")
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
    answer = model.generate(**inputs, **settings)
    assert merge_lora(model).generate(**inputs, **settings).tolist() == answer.tolist()


def test_merging_saves_the_processor_too(processor: DeepseekVLV2Processor, tmp_path: Path) -> None:
    merge_and_save(add_lora(mini_model("tiny"), rank=2), processor, tmp_path)
    assert (tmp_path / "processor_config.json").is_file() and (tmp_path / "config.json").is_file()


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mini_model("tiny")
    with pytest.raises(ValueError, match=r"Unknown parts.*'head'.*attention"):
        add_lora(model, parts=("head",))
    with pytest.raises(ValueError, match="at least 1"):
        add_lora(model, rank=0)
    with pytest.raises(ValueError, match=r"cannot drop out.*parts"):
        add_lora(model, dropout=0.1)
    with pytest.raises(ValueError, match="nothing to adapt"):
        add_lora(mini_model("tiny", n_routed_experts=None), parts=("experts",))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install .*train"):
        add_lora(model)


def test_modules_may_drop_out() -> None:
    model = add_lora(mini_model("tiny"), rank=2, dropout=0.5, parts=("attention", "mlp"))
    assert train(model)[0] > 0
