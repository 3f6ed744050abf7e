"""bitsandbytes' nf4 and int8: experts are packed too, adapters train over them and merge into a plain checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import KINDS, mini_model, released_names
from training_support import batch, logits, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deepseek_vl2.cli.main import main
from deepseek_vl2.engine.support import unsupported_modules
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.utils.demo import demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from deepseek_vl2.models import bnb_quantizer
from deepseek_vl2.models.bnb_layers import BnbExperts, bnb_linears, dense_linear
from deepseek_vl2.models.moe import DeepseekV2Experts
from deepseek_vl2.models.quantizer import LINEAR, WeightOnlyConfig
from deepseek_vl2.training.lora import add_lora, load_lora, merge_and_save, merge_lora

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4 twice": {**NF4, "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
# The values of nf4, from the QLoRA paper (arXiv 2305.14314, appendix E).
BELOW = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004]
ABOVE = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
LEVELS = torch.tensor([*BELOW, 0.0, *ABOVE])


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, directory in directories.items():
        mini_model(kind).save_pretrained(directory)
    return directories


def load(directory: Path, name: str = "nf4", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = BitsAndBytesConfig(**{**CONFIGS[name], **options})
    return DeepseekVLV2ForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=config).eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def experts_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BnbExperts)]


def nearest_nf4(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.flatten().unflatten(0, (-1, 64))
    scale = blocks.abs().amax(dim=1, keepdim=True)
    places = (blocks / scale).unsqueeze(-1).sub(LEVELS).abs().argmin(dim=-1)
    return (LEVELS[places] * scale).view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_experts_and_linear_layers_are_packed_and_nothing_else(name: str, kind: str, released: dict[str, Path]) -> None:
    plain = mini_model(kind).eval()
    model = load(released[kind], name)
    wanted = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and LINEAR.fullmatch(n)}
    assert {found for found, _ in bnb_linears(model)} == wanted
    assert len(experts_of(model)) == sum(isinstance(m, DeepseekV2Experts) for m in plain.modules()) > 0
    assert not any(isinstance(module, DeepseekV2Experts) for module in model.modules())
    bits = {"nf4": 4.5, "nf4 twice": 4.125, "fp4": 4.5, "int8": 8}[name]
    for experts in experts_of(model):
        numbers = sum(rows * columns for rows, columns in experts.shapes.values()) * experts.num_experts
        tensors = dict([*experts.named_parameters(), *experts.named_buffers()])
        held = 8 * sum(tensor.nbytes for part, tensor in tensors.items() if "nested_code" not in part)
        assert bits <= held / numbers < bits + 0.8  # rows are short here: their scales weigh more
        assert not any(tensor.is_floating_point() or tensor.requires_grad for tensor in tensors.values())
    left = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in left.items())


@pytest.mark.parametrize("nested", [False, True])
def test_an_expert_has_the_nearest_of_the_sixteen_levels(nested: bool, released: dict[str, Path]) -> None:
    experts = experts_of(load(released["small"], bnb_4bit_use_double_quant=nested))[0]
    plain = next(m for m in mini_model("small").modules() if isinstance(m, DeepseekV2Experts))
    for part in experts.shapes:
        expected = nearest_nf4(getattr(plain, part).detach())
        close = {"rtol": 0, "atol": 1e-6} if not nested else {"rtol": 0.05, "atol": 1e-4}
        torch.testing.assert_close(experts.dequantized(part), expected, **close)
        torch.testing.assert_close(experts.dequantized(part)[3], experts.matrix(part, 3))


def test_a_linear_layer_has_the_nearest_of_the_sixteen_levels_too(released: dict[str, Path]) -> None:
    plain = mini_model("small", intermediate_size=96)  # rows of one and a half blocks
    for name, linear in bnb_linears(load(released["small"])):
        exact = plain.get_submodule(name)
        expected = nearest_nf4(exact.weight.detach())
        torch.testing.assert_close(dense_linear(linear).weight, expected, rtol=0, atol=1e-6)
        x = torch.randn(3, exact.in_features)
        torch.testing.assert_close(linear(x), x @ expected.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "nf4 twice", "fp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_unpacked_model(name: str, kind: str, released: dict[str, Path]) -> None:
    model = load(released[kind], name)
    packed = logits(model)
    plain = model.dequantize()
    assert not experts_of(plain) and not list(bnb_linears(plain)) and not plain.is_quantized
    torch.testing.assert_close(logits(plain), packed, rtol=1e-4, atol=1e-4)


def test_logits_of_int8_are_near_the_unpacked_model(released: dict[str, Path]) -> None:
    model = load(released["small"], "int8")
    packed = logits(model)
    plain = logits(model.dequantize())
    assert (plain - packed).norm() < 0.03 * plain.norm()  # bitsandbytes rounds what its linear layers multiply too


@pytest.mark.parametrize(
    ("kind", "name"), [("tiny", "nf4"), ("small", "nf4 twice"), ("base", "nf4"), ("small", "int8")]
)
def test_adapters_train_merge_and_reload(kind: str, name: str, released: dict[str, Path], tmp_path: Path) -> None:
    base = load(released[kind], name)
    frozen = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    before = logits(base)
    model = add_lora(base, rank=4)
    adapted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("experts.lora_down_proj_A" in n for n in adapted) and any("q_proj" in n for n in adapted)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    losses = train(model)
    assert losses[-1] < losses[0]
    after = logits(model)
    assert (after - before).abs().max() > 0.05
    state = {key.replace(".base_layer", ""): tensor for key, tensor in base.state_dict().items()}
    assert all(torch.equal(state[key], tensor) for key, tensor in frozen.items())

    model.save_pretrained(tmp_path / "adapters")
    again = load_lora(load(released[kind], name), tmp_path / "adapters")
    torch.testing.assert_close(logits(again), after, rtol=0, atol=1e-5)

    merged = merge_and_save(model, None, tmp_path / "merged")
    assert not experts_of(merged) and not list(bnb_linears(merged)) and not merged.is_quantized
    if name == "int8":
        assert (logits(merged) - after).norm() < 0.03 * after.norm()
    else:
        torch.testing.assert_close(logits(merged), after, rtol=1e-3, atol=2e-3)
    assert released_names(tmp_path / "merged") == released_names(released[kind])
    plain = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(plain), logits(merged))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_checkpointing_gives_the_same_gradients(name: str, released: dict[str, Path]) -> None:
    base = load(released["small"], name)
    model = add_lora(base, rank=2)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name and "B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = gradients(model)
    assert sum("mlp.experts" in each for each in expected) == 4 * len(experts_of(base))
    assert all(float(gradient.norm()) > 0 for gradient in expected.values())
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for each, gradient in expected.items():
        torch.testing.assert_close(found[each], gradient, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_inputs_as_those_of_the_unpacked_experts(released: dict[str, Path]) -> None:
    experts = experts_of(load(released["base"], "nf4 twice"))[0]
    matrices = {part: experts.dequantized(part) for part in experts.shapes}
    rows = torch.randn(5, experts.hidden_size, requires_grad=True)
    experts.run_expert(rows, 2).square().sum().backward()
    packed, rows.grad = rows.grad, None
    gate, up = (rows @ matrices["gate_up_proj"][2].mT).chunk(2, dim=-1)
    ((experts.act_fn(gate) * up) @ matrices["down_proj"][2].mT).square().sum().backward()
    torch.testing.assert_close(packed, rows.grad, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_model_trains_in_float32_and_merges_back(released: dict[str, Path], tmp_path: Path) -> None:
    base = load(released["base"], dtype=torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16)
    model = add_lora(base, rank=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model)
    assert losses[-1] < losses[0]
    wrapped = next(m for m in model.modules() if "lora_down_proj_A" in dict(m.named_children()))
    first, second = wrapped.lora_down_proj_A["default"], wrapped.lora_down_proj_B["default"]
    packed = wrapped.get_base_layer().dequantized("down_proj").float()
    expected = packed + second.detach() @ first.detach() * wrapped.scaling["default"]
    merge_and_save(model, None, tmp_path)
    plain = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.bfloat16 and released_names(tmp_path) == released_names(released["base"])
    assert {p.dtype for n, p in plain.named_parameters() if n.endswith("proj.weight")} == {torch.bfloat16}
    experts = next(m for m in plain.modules() if isinstance(m, DeepseekV2Experts))
    assert torch.equal(experts.down_proj, expected.to(torch.bfloat16))


def test_adapters_that_peft_adds_itself_merge_unrounded(released: dict[str, Path]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(load(released["small"]), config)
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn.o_proj"))
    base = layer.get_base_layer()
    expected = dense_linear(base).weight + layer.get_delta_weight("default")
    after = logits(model)
    merged = merge_lora(model)
    torch.testing.assert_close(merged.language.model.layers[1].self_attn.o_proj.weight, expected.detach())
    torch.testing.assert_close(logits(merged), after, rtol=1e-3, atol=2e-3)


def test_casting_a_model_leaves_its_packed_experts(released: dict[str, Path]) -> None:
    model = load(released["small"], "nf4 twice")
    before = experts_of(model)[0].dequantized("down_proj")
    model.to(torch.bfloat16)
    assert torch.equal(experts_of(model)[0].dequantized("down_proj"), before)
    assert logits(model).isfinite().all()


def test_a_packed_model_generates_by_its_modules(released: dict[str, Path]) -> None:
    model = load(released["small"])
    inputs = batch()
    inputs.pop("labels")
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    tokens = model.generate(**inputs, **settings)
    assert "is a Linear4bit: quantized" in str(unsupported_modules(model.language))
    assert tokens.tolist() == model.dequantize().generate(**inputs, **settings).tolist()


def test_auto_classes_pack_them_too_and_dictionaries_are_read(released: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(released["small"], quantization_config=BitsAndBytesConfig(**NF4))
    assert experts_of(model)
    model = DeepseekVLV2ForCausalLM.from_pretrained(released["small"], quantization_config=dict(NF4))
    assert experts_of(model)


def test_layers_that_are_named_stay_as_they_are(released: dict[str, Path]) -> None:
    skipped = ["language.model.layers.1"]
    model = load(released["small"], llm_int8_skip_modules=skipped)
    assert not any(name.startswith("language.model.layers.1.") for name, _ in bnb_linears(model))
    assert isinstance(model.language.model.layers[1].mlp.experts, DeepseekV2Experts)
    assert len(experts_of(model)) == 1


def test_adapters_that_peft_puts_on_packed_numbers_are_an_error(released: dict[str, Path]) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = get_peft_model(load(released["small"]), config)
    with pytest.raises(ValueError, match="dtype"):
        logits(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_model_is_saved_and_read_back(name: str, kind: str, released: dict[str, Path], tmp_path: Path) -> None:
    model = load(released[kind], name)
    before, state = logits(model), model.state_dict()
    model.save_pretrained(tmp_path)
    again = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path).eval()
    assert again.dtype == torch.float32 and len(experts_of(again)) == len(experts_of(model)) > 0
    found = again.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in state.items())
    assert torch.equal(logits(again), before)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice").eval()), before)


@pytest.mark.parametrize("name", ["nf4 twice", "int8"])
def test_a_saved_model_in_bfloat16_and_several_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also as the commands load and describe it."""
    options = {"llm_int8_skip_modules": ["language.model.layers.1"], "bnb_4bit_compute_dtype": torch.bfloat16}
    model = load(demo_checkpoint(), name, torch.bfloat16, **options)
    processor = DeepseekVLV2Processor.from_pretrained(demo_checkpoint())
    inputs = dict(processor(conversations=[{"role": "user", "content": "Hello"}]))
    for saved in (model, processor):
        saved.save_pretrained(tmp_path, **({"max_shard_size": "50KB"} if saved is model else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, _, again = load_pretrained_model(tmp_path, device="cpu")
    assert again.dtype == torch.bfloat16 and len(experts_of(again)) == 1
    assert isinstance(again.language.model.layers[1].mlp.experts, DeepseekV2Experts)
    settings = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(again.generate(**inputs, **settings), model.generate(**inputs, **settings))
    capsys.readouterr()
    assert main(["info", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "packed by bitsandbytes" in told.out and not told.err


def test_what_was_read_back_trains_merges_and_unpacks(released: dict[str, Path], tmp_path: Path) -> None:
    load(released["small"]).save_pretrained(tmp_path / "packed")
    base = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path / "packed")
    unpacked = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path / "packed").eval()
    torch.testing.assert_close(logits(unpacked.dequantize()), logits(load(released["small"])), rtol=1e-4, atol=1e-4)
    model = add_lora(base, rank=4)
    losses = train(model)
    assert losses[-1] < losses[0]
    merge_and_save(model, None, tmp_path / "merged")
    assert released_names(tmp_path / "merged") == released_names(released["small"])


def spoilt(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return directory


EXPERTS = "language.model.layers.1.mlp.experts"
QUERIES = "language.model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{QUERIES}.absmax"), r"missing tensors \(1\):\s+" + f"{QUERIES}.absmax"),
    "no description": (lambda t: t.pop(f"{QUERIES}.quant_state.bitsandbytes__nf4"), "missing tensors"),
    "no experts": (lambda t: t.pop(f"{EXPERTS}.down_proj"), f"missing tensors.*\\s+{EXPERTS}.down_proj"),
    "no scales of experts": (lambda t: t.pop(f"{EXPERTS}.down_proj_absmax"), "missing tensors"),
    "another shape": (lambda t: t.update({QUERIES: t[QUERIES][:64].clone()}), "another shape"),
    "one more": (lambda t: t.update(more=torch.zeros(2)), "extra tensors"),
    "NaN scales": (lambda t: t[f"{QUERIES}.absmax"].fill_(float("nan")), f"NaN or infinite, in {QUERIES}"),
    "infinite scales": (lambda t: t[f"{EXPERTS}.down_proj_absmax"].fill_(float("inf")), "NaN or infinite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_packed_models(damage: str, released: dict[str, Path], tmp_path: Path) -> None:
    load(released["small"]).save_pretrained(tmp_path)
    change, words = DAMAGES[damage]
    with pytest.raises(ValueError, match=words):
        DeepseekVLV2ForCausalLM.from_pretrained(spoilt(tmp_path, change))


def test_a_saved_model_needs_bitsandbytes(
    released: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(released["small"]).save_pretrained(tmp_path)
    monkeypatch.setattr(bnb_quantizer, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="packed by bitsandbytes, which is not installed"):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)


def test_a_saved_model_is_not_packed_twice(released: dict[str, Path], tmp_path: Path) -> None:
    load(released["small"]).save_pretrained(tmp_path)
    for wanted in (BitsAndBytesConfig(**NF4), WeightOnlyConfig("int8")):
        with pytest.raises(ValueError, match="quantized already"):
            DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, quantization_config=wanted)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(load_in_4bit=False, _load_in_4bit=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="neither load_in_4bit nor load_in_8bit"):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"llm_int8_has_fp16_weight": True}, "hold weights unpacked"),
        ({"llm_int8_enable_fp32_cpu_offload": True}, "hold weights unpacked"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "uint8"),
        ({"bnb_4bit_quant_type": "nf5"}, "nf4 or fp4"),
        ({"load_in_4bit": False}, "asks for nothing"),
    ],
)
def test_options_that_would_leave_weights_unpacked_are_refused(
    options: dict[str, Any], words: str, released: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=words):
        load(released["small"], **options)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = mini_model("small")
    with torch.no_grad():
        model.language.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NaN or infinite, in .*layers\.1\.mlp\.experts\.down_proj"):
        load(tmp_path)


def test_weights_that_do_not_come_from_files_are_refused(released: dict[str, Path]) -> None:
    model = mini_model("small")
    with pytest.raises(ValueError, match="from its directory or hub id"):
        DeepseekVLV2ForCausalLM.from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            quantization_config=BitsAndBytesConfig(**NF4),
        )
