"""Packed weights: formats, loading while packing, files, and what models of them compute."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import GREEDY, KINDS, MINI_IMAGE_ID, mini_inputs, mini_model, new_tokens, released_names
from torch import nn

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.moe import DeepseekV2Experts, eager_experts_forward
from deepseek_vl2.models.quantization import (
    PackedWeight,
    WeightFormat,
    dequantize,
    fit_format,
    pack_int4,
    packed_linear,
    quantize,
    relative_error,
    unpack_int4,
)
from deepseek_vl2.models.quantized_config import file_config, refused_by_vllm
from deepseek_vl2.models.quantized_layers import PackedExperts, PackedLinear, packed_layers
from deepseek_vl2.models.quantizer import WeightOnlyConfig, plan_formats

FORMATS = {
    "int4-32": WeightFormat("int4", 32),
    "int4-64": WeightFormat("int4", 64),
    "int4-128": WeightFormat("int4", 128),
    "int8": WeightFormat("int8"),
    "int8-64": WeightFormat("int8", 64),
    "fp8": WeightFormat("fp8"),
    "fp8-block": WeightFormat("fp8", block=True),
}
# Of Gaussian weights: norm of the error over theirs.
LARGEST_ERROR = {
    "int4-32": 0.085,
    "int4-64": 0.095,
    "int4-128": 0.102,
    "int8": 0.011,
    "int8-64": 0.007,
    "fp8": 0.028,
    "fp8-block": 0.028,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "int4": {"weights": "int4", "group_size": 32},
    "int4-head": {"weights": "int4", "group_size": 64, "head": "int8"},
    "int8": {"weights": "int8"},
    "fp8": {"weights": "fp8", "head": "fp8"},
    "fp8-block": {"weights": "fp8", "block": True},
}


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


# ---------------------------------------------------------------- formats


def test_words_of_int4_hold_eight_columns_the_first_lowest() -> None:
    numbers = torch.arange(-8, 8, dtype=torch.int8)[None]
    words = pack_int4(numbers)
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x76543210, 0xFEDCBA98]
    assert torch.equal(unpack_int4(words), numbers)


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_matrix_is_close_and_has_the_shapes_that_its_format_says(name: str) -> None:
    fmt, weight = FORMATS[name], gaussian(200, 384)
    packed = quantize(weight, fmt)
    assert packed.packed.dtype == fmt.packed_dtype
    assert packed.packed.shape == (200, fmt.packed_columns(384))
    assert packed.scale.shape == fmt.scale_shape(200, 384)
    assert packed.scale.dtype == weight.dtype
    assert relative_error(weight, packed, fmt) <= LARGEST_ERROR[name]


@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_packed_one_by_one(name: str) -> None:
    weight = torch.stack([gaussian(128, 256), gaussian(128, 256) * 3])
    packed = quantize(weight, FORMATS[name])
    for expert in range(2):
        alone = quantize(weight[expert], FORMATS[name])
        assert torch.equal(packed.packed[expert].float(), alone.packed.float())
        assert torch.equal(packed.scale[expert], alone.scale)


def test_what_int4_represents_exactly_stays_as_it_is() -> None:
    numbers = torch.arange(-8, 8).repeat(4)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    weight = torch.stack([numbers * 0.5, numbers * -0.25, torch.zeros(64)])
    fmt = WeightFormat("int4", 64)
    assert torch.equal(dequantize(quantize(weight, fmt), fmt), weight)


def test_the_scale_of_int4_leaves_less_error_than_the_largest_weight_over_seven() -> None:
    weight, fmt = gaussian(64, 512, torch.float32), WeightFormat("int4", 32)
    groups = weight.view(64, -1, 32)
    scale = groups.abs().amax(dim=-1, keepdim=True) / 7
    plain = ((groups / scale).round().clamp(-8, 7) * scale - groups).norm() / groups.norm()
    assert relative_error(weight, quantize(weight, fmt), fmt) < 0.88 * plain


def test_columns_that_count_more_get_less_error() -> None:
    weight, fmt = gaussian(64, 256, torch.float32), WeightFormat("int4", 128)
    importance = torch.ones(256)
    importance[::4] = 100.0
    errors = []
    for given in (None, importance):
        error = (dequantize(quantize(weight, fmt, importance_I=given), fmt) - weight)[:, ::4]
        errors.append(float(error.norm()))
    assert errors[1] < 0.95 * errors[0]


def test_groups_that_do_not_divide_become_smaller_and_then_int8() -> None:
    assert fit_format(WeightFormat("int4", 128), 6848) == WeightFormat("int4", 64)
    assert fit_format(WeightFormat("int4", 32), 112) == WeightFormat("int4", 16)
    assert fit_format(WeightFormat("int4", 64), 72) == WeightFormat("int8")
    assert fit_format(WeightFormat("int8"), 7) == WeightFormat("int8")
    with pytest.raises(ValueError, match="64 do not divide 72"):
        quantize(gaussian(4, 72), WeightFormat("int4", 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = gaussian(4, 64)
    weight[2, 3] = value
    for fmt in FORMATS.values():
        if fmt.group_size in (0, 32, 64):
            with pytest.raises(ValueError, match="not finite"):
                quantize(weight, fmt)


@pytest.mark.parametrize("name", FORMATS)
def test_products_and_gradients_are_those_of_the_unpacked_weight(name: str) -> None:
    fmt = FORMATS[name]
    packed = quantize(gaussian(130, 256, torch.float32), fmt)
    weight, bias = dequantize(packed, fmt), torch.randn(130)
    x = torch.randn(3, 5, 256, requires_grad=True)
    out = packed_linear(x, packed, fmt, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), x)
    torch.testing.assert_close(grad, expected)


# ---------------------------------------------------------------- layers


def test_casting_a_model_leaves_packed_weights_as_they_are() -> None:
    for name in ("int4-32", "int8", "fp8"):
        layer = PackedLinear.of(nn.Linear(64, 32, dtype=torch.bfloat16), FORMATS[name])
        before = layer.packed("weight")
        layer.to(torch.float32).half()
        for old, new in zip(before, layer.packed("weight"), strict=True):
            assert old.dtype == new.dtype
            assert torch.equal(old.float(), new.float())
        assert layer.bias is not None and layer.bias.dtype == torch.float16
        assert layer.to("meta").packed("weight").packed.device.type == "meta"


def test_packed_experts_compute_what_the_unpacked_ones_do() -> None:
    model = mini_model("small")
    experts = next(m for m in model.modules() if isinstance(m, DeepseekV2Experts))
    formats = {"gate_up_proj": WeightFormat("int4", 32), "down_proj": WeightFormat("int8")}
    packed = PackedExperts(experts.num_experts, experts.hidden_size, experts.inner_size, experts.act_fn, formats)
    for part, fmt in formats.items():
        weight = getattr(experts, part).detach()
        packed.set_packed(part, quantize(weight, fmt))
        getattr(experts, part).data = packed.dequantized(part)
    for tokens in (1, 7, 40):
        hidden, weights = torch.randn(tokens, experts.hidden_size), torch.rand(tokens, 3)
        ids = torch.rand(tokens, experts.num_experts).topk(3).indices
        with torch.no_grad():
            expected = eager_experts_forward(experts, hidden, ids, weights)
            torch.testing.assert_close(packed(hidden, ids, weights), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- models


@cache
def released(kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save a mini model in the released layout, once."""
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix=f"quantization-{kind}-"))
    mini_model(kind).to(dtype).save_pretrained(directory)
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return DeepseekVLV2ForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()


@cache
def quantized(kind: str, name: str) -> Any:
    return load(released(kind), quantization_config=WeightOnlyConfig(**CONFIGS[name]))


def unpacked(model: Any, directory: Path) -> Any:
    """Return a plain model with a quantized one's weights."""
    plain = load(directory)
    for name, layer in packed_layers(model):
        for part in layer.formats:
            plain.get_submodule(name).get_parameter(part).data = layer.dequantized(part)
    return plain


INPUTS = mini_inputs([5, (1, 1), 4], [3, (1, 1), 2])
# All formats, and all kinds: which layers are packed is the kind's, how is the format's.
PAIRS = [*(("base", name) for name in CONFIGS), ("tiny", "int4-head"), ("small", "fp8")]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_loading_packs_all_that_it_says_and_computes_with_it(kind: str, name: str) -> None:
    model = quantized(kind, name)
    layers = dict(packed_layers(model))
    for layer in range(3):
        assert any(f".layers.{layer}.self_attn." in found for found in layers)
        assert any(f".layers.{layer}.mlp." in found for found in layers)
    assert not any(type(m) is DeepseekV2Experts for m in model.modules())
    left = {n.rpartition(".")[2] for n, m in model.language.named_modules() if isinstance(m, nn.Linear)}
    assert left - {"kv_b_proj"} == (set() if CONFIGS[name].get("head") else {"lm_head"})
    assert ("kv_b_proj" in left) == (kind != "tiny")
    assert not any(found.startswith(("vision.", "projector.")) for found in layers)
    with torch.no_grad():
        logits = model(**INPUTS).logits
        torch.testing.assert_close(logits, unpacked(model, released(kind))(**INPUTS).logits, rtol=1e-3, atol=1e-4)


# Relative error of all logits of a mini model; measured, and a tenth more. Random weights are the hardest to quantize,
# and where scores of experts are close a token goes to another one: more so in base, whose gate is a sigmoid.
LARGEST_LOGITS_ERROR = {
    "tiny": {"int4": 0.215, "int4-head": 0.25, "int8": 0.02, "fp8": 0.07, "fp8-block": 0.077},
    "small": {"int4": 0.28, "int4-head": 0.32, "int8": 0.023, "fp8": 0.1, "fp8-block": 0.105},
    "base": {"int4": 0.35, "int4-head": 0.415, "int8": 0.073, "fp8": 0.154, "fp8-block": 0.167},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_logits_is_bounded(kind: str, name: str) -> None:
    with torch.no_grad():
        exact = load(released(kind))(**INPUTS).logits
        error = float((quantized(kind, name)(**INPUTS).logits - exact).norm() / exact.norm())
    assert error <= LARGEST_LOGITS_ERROR[kind][name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_generate_gives_the_likeliest_tokens_of_forward(kind: str, name: str) -> None:
    model = quantized(kind, name)
    inputs = mini_inputs([5, (1, 1), 4])
    tokens = new_tokens(model.generate(**inputs, **GREEDY, suppress_tokens=[MINI_IMAGE_ID]), inputs)
    ids = inputs["input_ids"]
    for step in range(tokens.shape[1]):
        mask = torch.cat((inputs["images_seq_mask"], torch.zeros(1, step, dtype=torch.bool)), dim=1)
        given = {**inputs, "input_ids": ids, "images_seq_mask": mask, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            assert model(**given).logits[0, -1, :MINI_IMAGE_ID].argmax() == tokens[0, step]
        ids = torch.cat((ids, tokens[:, step : step + 1]), dim=1)


@pytest.mark.parametrize(("kind", "name"), [("tiny", "int4"), ("tiny", "int8"), ("small", "fp8"), ("base", "int4")])
def test_batches_and_chunks_give_the_tokens_of_a_row_alone(kind: str, name: str) -> None:
    model = quantized(kind, name)
    rows: list[list[Any]] = [[5, (1, 1), 4], [3, (2, 1), 9]]
    options = {**GREEDY, "suppress_tokens": [MINI_IMAGE_ID]}
    alone = []
    for index, row in enumerate(rows):
        inputs = mini_inputs(row, seed=index)
        alone.append(new_tokens(model.generate(**inputs, **options), inputs))
        chunked = model.generate(**inputs, **options, prefill_chunk_size=7)
        assert torch.equal(new_tokens(chunked, inputs), alone[-1])
    inputs = mini_inputs(*rows)
    assert torch.equal(new_tokens(model.generate(**inputs, **options), inputs), torch.cat(alone))


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_saved_model_comes_back_with_the_same_logits(kind: str, name: str, tmp_path: Path) -> None:
    model = quantized(kind, name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    again = load(tmp_path)
    assert {n: str(layer) for n, layer in packed_layers(again)} == {n: str(layer) for n, layer in packed_layers(model)}
    with torch.no_grad():
        assert torch.equal(again(**INPUTS).logits, model(**INPUTS).logits)
    again.save_pretrained(tmp_path / "again")
    first, second = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].float(), second[key].float()) for key in first)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_auto_classes_load_a_quantized_directory(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    quantized("small", "int4").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(True for _ in packed_layers(model))
    auto = AutoModelForCausalLM.from_pretrained(
        released("small"), quantization_config=WeightOnlyConfig(**CONFIGS["int4"]), dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.equal(auto.eval()(**INPUTS).logits, model.eval()(**INPUTS).logits)


def test_dequantize_gives_a_plain_model_in_the_released_layout(tmp_path: Path) -> None:
    model = load(released("base"), quantization_config=WeightOnlyConfig("int8", head="int8"))
    with torch.no_grad():
        expected = model(**INPUTS).logits
    plain = model.dequantize()
    assert not list(packed_layers(plain))
    with torch.no_grad():
        torch.testing.assert_close(plain(**INPUTS).logits, expected, rtol=1e-3, atol=1e-4)
    plain.save_pretrained(tmp_path)
    assert released_names(tmp_path) == released_names(released("base"))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_bfloat16_models_are_packed_from_their_files_and_run(tmp_path: Path) -> None:
    directory = released("small", torch.bfloat16)
    model = DeepseekVLV2ForCausalLM.from_pretrained(directory, quantization_config=WeightOnlyConfig("int4")).eval()
    assert model.dtype == torch.bfloat16
    assert {layer.packed(n).scale.dtype for _, layer in packed_layers(model) for n in layer.formats} == {torch.bfloat16}
    out = model.generate(**mini_inputs([5, (1, 1), 4]), **GREEDY)
    assert out.shape[1] == mini_inputs([5, (1, 1), 4])["input_ids"].shape[1] + 8


def test_unknown_kinds_groups_and_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="int4, int8, fp8, not to 'int3'"):
        WeightOnlyConfig("int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="32, 64, 128"):
        WeightOnlyConfig("int4", group_size=48)
    with pytest.raises(ValueError, match="Groups are of int4 alone"):
        WeightOnlyConfig("int8", group_size=64)
    with pytest.raises(ValueError, match="of fp8 alone"):
        WeightOnlyConfig("int4", block=True)


def test_one_config_loads_several_models() -> None:
    config = WeightOnlyConfig("int8")
    for kind in ("tiny", "base"):
        model = load(released(kind), quantization_config=config)
        assert set(model.config.quantization_config.formats) == set(plan_formats(mini_model(kind), config))
    assert config.formats == {}


# ---------------------------------------------------------------- other people's files


def fp8_block_checkpoint(kind: str, directory: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint as DeepSeek's own fp8 ones are; returns the weights that it stands for."""
    mini_model(kind, moe_intermediate_size=128).save_pretrained(directory)
    source = load_file(directory / "model.safetensors")
    tensors, expected = {}, {}
    for name, tensor in source.items():
        if ".layers." in name and name.endswith("_proj.weight") and "vision" not in name:
            fmt = WeightFormat("fp8", block=True)
            packed = quantize(tensor.float(), fmt, torch.float32)
            tensors[name] = packed.packed
            tensors[f"{name}_scale_inv"] = packed.scale
            expected[name] = dequantize(packed, fmt)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return expected


def test_blocks_of_fp8_as_deepseek_stores_them_are_read(tmp_path: Path) -> None:
    expected = fp8_block_checkpoint("tiny", tmp_path)
    model = load(tmp_path)
    query = model.language.model.layers[0].self_attn.q_proj
    assert isinstance(query, PackedLinear) and query.format.block and query.weight_scale.dtype == torch.float32
    assert torch.equal(query.dequantized("weight"), expected["language.model.layers.0.self_attn.q_proj.weight"])
    assert load(tmp_path, torch.bfloat16)(**mini_inputs([5])).logits.isfinite().all()


def edited_checkpoint(directory: Path, **changes: Any) -> Path:
    """Save an int4 model and change tensors of one of its layers: ``None`` takes one away."""
    quantized("small", "int4").save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    layer = "language.model.layers.1.mlp.experts.3.up_proj"
    for part, value in changes.items():
        tensors.pop(f"{layer}.{part}", None)
        if value is not None:
            tensors[f"{layer}.{part}"] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_zero_point": torch.zeros(4, 2, dtype=torch.int32)}, "experts.3.up_proj has asymmetric weights"),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "another order"),
        ({"weight_shape": None}, "no weight_shape"),
        ({"weight_scale": torch.ones(32, 5)}, "does not belong"),
        ({"weight_packed": torch.zeros(32, 3, dtype=torch.int32)}, "neither 4 nor 8 bits"),
        (
            {"weight_packed": None, "weight_shape": None, "weight_scale": None, "weight": torch.zeros(32, 64)},
            "others are not|not packed",
        ),
    ],
)
def test_files_that_are_packed_otherwise_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(edited_checkpoint(tmp_path, **changes))


def test_a_missing_packed_tensor_is_named(tmp_path: Path) -> None:
    layer = {"weight_packed": None, "weight_shape": None, "weight_scale": None}
    with pytest.raises(ValueError, match=r"experts.3.up_proj|others are not"):
        load(edited_checkpoint(tmp_path, **layer))


def test_quantizing_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    quantized("small", "int4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized already"):
        load(tmp_path, quantization_config=WeightOnlyConfig("int8"))


def test_int8_in_bytes_is_read_like_int8_in_words(tmp_path: Path) -> None:
    model = quantized("small", "int8")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        shape = tensors.pop(name.replace("_packed", "_shape"))
        words = tensors.pop(name).view(torch.uint8)[:, : int(shape[1])]
        tensors[name.removesuffix("_packed")] = (words.int() - 128).to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(**INPUTS).logits, model(**INPUTS).logits)


SMALL = "language.model.layers.0"


def config_of(formats: dict[str, WeightFormat], most: str = "int8") -> dict[str, Any]:
    others = {f"language.model.layers.{layer}.self_attn.o_proj": FORMATS[most] for layer in range(5)}
    return file_config({**others, **{f"{SMALL}.{name}": fmt for name, fmt in formats.items()}})


def test_a_saved_config_says_what_vllm_asks_for() -> None:
    int8 = config_of({})["config_groups"]["group_0"]
    assert (int8["weights"]["strategy"], int8["weights"]["group_size"]) == ("channel", -1)
    assert int8["input_activations"] is None
    for name, inputs in (("fp8", ("token", None)), ("fp8-block", ("group", 128))):
        group = config_of({}, name)["config_groups"]["group_0"]
        asked = group["input_activations"]
        assert asked["dynamic"] is True and (asked["strategy"], asked.get("group_size")) == inputs
    head = file_config({"language.lm_head": FORMATS["int4-64"]})
    assert head["config_groups"]["group_1"]["targets"] == ["re:language\\.lm_head$"]
    assert not any(re.match(pattern[3:], "language.lm_head") for pattern in head["ignore"])


def test_layers_of_another_format_are_named_as_vllm_has_them_too() -> None:
    other = FORMATS["int8"]
    formats = {"mlp.up_proj": other, "self_attn.k_proj": other, "mlp.experts.gate_up_proj": other}
    (patterns,) = (
        g["targets"] for g in config_of(formats, "int4-64")["config_groups"].values() if len(g["targets"]) > 1
    )
    names = ["mlp.up_proj", "mlp.gate_up_proj", "self_attn.qkv_proj", "self_attn.k_proj", "mlp.experts.11.gate_proj"]
    names.append("mlp.experts.routed_experts.0.up_proj")
    for name in names:
        assert sum(bool(re.match(p.removeprefix("re:"), f"{SMALL}.{name}")) for p in patterns) == 1, name
    for name in ("mlp.gate_proj", "self_attn.q_proj", "mlp.experts.0.down_proj", "mlp.shared_experts.up_proj"):
        assert not any(re.match(p.removeprefix("re:"), f"{SMALL}.{name}") for p in patterns), name


def test_blocks_of_fp8_do_not_hold_rows_of_two_stacked_matrices() -> None:
    formats = plan_formats(mini_model("tiny", intermediate_size=192), WeightOnlyConfig("fp8", block=True))
    kinds = {name.rpartition(".")[2]: fmt for name, fmt in formats.items() if ".layers.0." in name}
    assert kinds["gate_proj"] == kinds["up_proj"] == WeightFormat("fp8")
    assert kinds["down_proj"] == kinds["o_proj"] == WeightFormat("fp8", block=True)


def test_what_vllm_refuses_is_said() -> None:
    experts = {
        f"{SMALL}.mlp.experts.gate_up_proj": FORMATS["int4-64"],
        f"{SMALL}.mlp.experts.down_proj": FORMATS["int4-64"],
    }
    assert refused_by_vllm(experts) == []
    (mixed,) = refused_by_vllm({**experts, f"{SMALL}.mlp.experts.down_proj": FORMATS["int8"]})
    assert (
        mixed == f"vLLM's experts have one format: {SMALL}.mlp.experts has two; int8 gives them one, and both read it."
    )
    (small,) = refused_by_vllm({f"{SMALL}.mlp.up_proj": WeightFormat("int4", 16)})
    assert "groups of 32, 64, 128 columns" in small and f"{SMALL}.mlp.up_proj has groups of 16" in small


@pytest.mark.parametrize("name", CONFIGS)
def test_compressed_tensors_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = quantized("base", name)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    layers = [n.rpartition(".")[0] for n in tensors if n.endswith(".weight_scale")]
    assert len(layers) > 50
    for layer in layers:
        scheme = scheme_of(config, layer)
        state = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == layer}
        compressor = BaseCompressor.load_from_registry(scheme.format or config.format)
        read = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(read.float(), our_weight(model, layer).float()), layer


def scheme_of(config: Any, layer: str) -> Any:
    """Return compressed-tensors' scheme of a layer: that of a name goes before that of a class."""
    from compressed_tensors.utils.match import match_name

    groups = list(config.config_groups.values())
    named = [g for g in groups if any(t.startswith("re:") and match_name(layer, t) for t in g.targets)]
    assert not any(match_name(layer, pattern) for pattern in config.ignore)
    return (named or [g for g in groups if "Linear" in g.targets])[0]


def our_weight(model: Any, layer: str) -> torch.Tensor:
    """Return the unpacked weight of a layer that is named as in a file."""
    prefix, is_expert, rest = layer.rpartition(".experts.")
    if not is_expert:
        weight: torch.Tensor = model.get_submodule(layer).dequantized("weight")
        return weight
    expert, part = rest.split(".")
    experts = model.get_submodule(f"{prefix}.experts")
    name = "down_proj" if part == "down_proj" else "gate_up_proj"
    fused = dequantize(PackedWeight(*experts.expert(name, int(expert))), experts.formats[name])
    return fused if part == "down_proj" else fused.chunk(2)[part == "up_proj"]
