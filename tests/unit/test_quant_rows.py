"""Products of few rows with packed weights by compiled C, beside the plain forms."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from deepseek_vl2.engine.packed import run_packed_experts
from deepseek_vl2.models.configuration_deepseek import DeepseekV2Config
from deepseek_vl2.models.cpu import row_products
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM
from deepseek_vl2.models.moe import DeepseekV2Experts
from deepseek_vl2.models.quantization import PackedWeight, WeightFormat, dequantize, quantize
from deepseek_vl2.models.quantized_layers import PackedExperts, PackedLinear, packed_experts_forward, set_module
from deepseek_vl2.models.rope import apply_rotary
from deepseek_vl2.ops.cpu import quant_rows
from deepseek_vl2.ops.cpu.bindings import FLAGS, load
from deepseek_vl2.ops.cpu.quant_rows import ARGUMENTS, MOST_ROWS, Packed, QuantRows

FORMATS = [WeightFormat("int4", group) for group in (16, 32, 64, 128)] + [WeightFormat("int8")]
# What the C file is compiled for, and the instructions that a CPU needs to run it.
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}
TARGETS = {
    "native": {"avx2", "fma"},
    "haswell": {"avx2", "fma", "bmi2"},
    "skylake-avx512": AVX512 | {"adx", "clflushopt"},
    "cascadelake": AVX512 | {"adx", "clflushopt", "avx512_vnni"},
}


def instructions() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


pytestmark = pytest.mark.skipif(not instructions() >= TARGETS["native"], reason="for x86 CPUs with AVX2")


@pytest.fixture(scope="module", params=TARGETS)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions as they are compiled for this CPU, and for others whose instructions it has."""
    if not instructions() >= TARGETS[request.param]:
        pytest.skip(f"this CPU does not run what is compiled for {request.param}")
    if request.param == "native":
        return QuantRows()
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    flags = tuple(f"-march={request.param}" if flag == "-march=native" else flag for flag in FLAGS)
    patch.setattr("deepseek_vl2.ops.cpu.bindings.FLAGS", flags)
    found = QuantRows.__new__(QuantRows)
    found._library = load(quant_rows.SOURCE, ARGUMENTS)
    patch.undo()
    return found


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def pack(weight: torch.Tensor, fmt: WeightFormat) -> Packed:
    return Packed(*quantize(weight, fmt), fmt.group_size)


def unpack(weight: Packed, fmt: WeightFormat) -> torch.Tensor:
    return dequantize(PackedWeight(*weight[:2]), fmt).float()


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (33, 256), (70, 896), (5, 1408), (134, 8192), (16, 16), (6, 208)])
def test_a_row_is_that_of_the_unpacked_weight(rows: QuantRows, fmt: WeightFormat, shape: tuple[int, int]) -> None:
    if fmt.group_size and shape[1] % fmt.group_size:
        pytest.skip("groups do not divide the columns")
    packed, x, bias = quantize(gaussian(*shape), fmt), gaussian(1, 1, shape[1], seed=1), gaussian(shape[0], seed=2)
    found = rows.linear(x, Packed(*packed, fmt.group_size), bias)
    assert found is not None and found.shape == (1, 1, shape[0]) and found.dtype == torch.bfloat16
    weight = dequantize(packed, fmt).float()
    exact = F.linear(x.float(), weight, bias.float())
    usual = weight.norm() * x.float().norm() / shape[1] ** 0.5  # of the products; a single one may come out small
    assert float((found.float() - exact).norm() / torch.maximum(exact.norm(), usual)) < 0.012


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_integers_are_multiplied_exactly(rows: QuantRows, fmt: WeightFormat) -> None:
    """A row of small integers with a scale of a power of two loses nothing: any slip of a lane or a nibble shows."""
    generator = torch.Generator().manual_seed(3)
    columns = 3 * 128 + (0 if fmt.group_size == 128 else 64)
    numbers = torch.randint(-7, 8, (40, columns), generator=generator)
    weight = numbers.float() * 0.5
    if fmt.kind == "int4":
        weight.view(40, -1, fmt.group_size)[..., 0] = -4.0
    else:
        weight[:, 0] = 63.5
    packed = quantize(weight, fmt, torch.bfloat16)
    assert torch.equal(dequantize(packed, fmt).float(), weight)
    x = torch.randint(-120, 121, (1, columns), generator=generator).float()
    x.view(-1, 32)[:, 0] = 127
    for row in (x, -x):
        found = rows.linear(row.bfloat16(), Packed(*packed, fmt.group_size))
        assert found is not None
        assert torch.equal(found, F.linear(row, weight).bfloat16())


def test_extreme_weights_and_rows_do_not_overflow(rows: QuantRows) -> None:
    for sign in (1.0, -1.0):
        for fmt in FORMATS:
            weight = torch.full((3, 256), sign * 2.0).bfloat16()
            x = torch.full((1, 256), 3.0).bfloat16()
            found = rows.linear(x, pack(weight, fmt))
            assert found is not None and relative(found, torch.full((1, 3), sign * 1536.0)) < 0.01


def test_a_row_of_zeros_gives_the_bias(rows: QuantRows) -> None:
    for fmt in FORMATS:
        bias = gaussian(7)
        found = rows.linear(torch.zeros(1, 128).bfloat16(), pack(gaussian(7, 128), fmt), bias)
        assert found is not None and torch.equal(found[0], bias)


def test_what_is_not_finite_shows_and_what_is_tiny_vanishes(rows: QuantRows) -> None:
    for fmt in FORMATS:
        weight = pack(gaussian(5, 128), fmt)
        for value in (float("nan"), float("inf")):
            x = gaussian(1, 128, seed=1)
            x[0, 70] = value
            found = rows.linear(x, weight)
            assert found is not None and not bool(found.isfinite().any())
        found = rows.linear(torch.full((1, 128), 1e-38).bfloat16(), weight)
        assert found is not None and float(found.abs().max()) < 1e-30


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows_get_what_each_gets_alone_and_nothing_else_is_written(rows: QuantRows, fmt: WeightFormat) -> None:
    for outputs, width in ((37, 128), (4, 1408), (95, 256)):
        weight, x = pack(gaussian(outputs, width), fmt), gaussian(5, width, seed=1)
        buffer = torch.full((7, outputs), float("nan")).bfloat16()
        pointers = (x.data_ptr(), *weight.pointers(), None, buffer[1:].data_ptr())
        assert rows._library.packed_linear(*pointers, 5, outputs, width, weight.shift(), 2) == 0
        alone = [rows.linear(x[row : row + 1], weight) for row in range(5)]
        assert torch.equal(buffer[1:6], torch.cat([each for each in alone if each is not None]))
        assert bool(buffer[0].isnan().all() and buffer[6].isnan().all())
    assert rows.linear(gaussian(MOST_ROWS, width), weight) is not None
    assert rows.linear(gaussian(MOST_ROWS + 1, width), weight) is None
    assert rows.linear(gaussian(0, width), weight) is None


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[2], FORMATS[4]], ids=str)
def test_queries_keys_and_values_are_projected_and_rotated(rows: QuantRows, fmt: WeightFormat) -> None:
    parts = [pack(gaussian(heads * 48, 256, seed=heads) / 16, fmt) for heads in (4, 2, 2)]
    for count in (1, 3):
        x = gaussian(1, count, 256, seed=5)
        cos, sin = gaussian(1, count, 48, seed=6), gaussian(1, count, 48, seed=7)
        found = rows.queries_keys_values(x, *parts, cos, sin)
        assert found is not None and [tuple(each.shape) for each in found] == [(1, n, count, 48) for n in (4, 2, 2)]
        projected = [rows.linear(x, part) for part in parts]
        heads = [each.unflatten(-1, (-1, 48)).transpose(1, 2) for each in projected if each is not None]
        plain = (apply_rotary(heads[0], cos, sin), apply_rotary(heads[1], cos, sin), heads[2])
        assert all(map(torch.equal, found, plain))
    assert rows.queries_keys_values(x, *parts, cos[:, :1], sin[:, :1]) is None
    assert rows.queries_keys_values(x, parts[0], parts[1], parts[0], cos, sin) is None
    assert rows.queries_keys_values(x, *parts, gaussian(1, 3, 40), gaussian(1, 3, 40)) is None


def packed_experts(up: WeightFormat, down: WeightFormat) -> PackedExperts:
    layer = PackedExperts(6, 256, 128, ACT2FN["silu"], {"gate_up_proj": up, "down_proj": down})
    layer.set_packed("gate_up_proj", quantize(gaussian(6, 256, 256) / 16, up))
    layer.set_packed("down_proj", quantize(gaussian(6, 256, 128, seed=1) / 11, down))
    return layer


def parts_of(layer: PackedExperts) -> list[Packed]:
    return [Packed(*layer.packed(name), layer.formats[name].group_size) for name in ("gate_up_proj", "down_proj")]


def choose(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return expert ids, some of them shared by rows and some chosen by none, and their weights."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(count)])
    return ids + (ids == 2).long() * 3, torch.rand(count, 3, generator=generator)


@pytest.mark.parametrize("formats", [(0, 1), (2, 3), (3, 4), (4, 0), (4, 4)])
def test_experts_are_the_plain_ones_whatever_runs_beside(rows: QuantRows, formats: tuple[int, int]) -> None:
    layer = packed_experts(*(FORMATS[index] for index in formats))
    x, (ids, weights) = gaussian(7, 256, seed=2), choose(7)
    with torch.no_grad():
        found = rows.experts(x, *parts_of(layer), ids, weights)
        plain = packed_experts_forward(layer.run_expert, 6, x.float(), ids, weights)
    assert found is not None and relative(found, plain) < 0.02
    for row in range(7):
        one = slice(row, row + 1)
        assert torch.equal(rows.experts(x[one], *parts_of(layer), ids[one], weights[one]), found[one])  # type: ignore[arg-type]


@pytest.mark.parametrize("formats", [(0, 1), (2, 4), (4, 2)])
def test_an_mlp_is_an_expert_that_all_rows_choose(rows: QuantRows, formats: tuple[int, int]) -> None:
    layer = packed_experts(*(FORMATS[index] for index in formats))
    gate_up, down = parts_of(layer)
    (gate, up), (gate_scale, up_scale) = (t.chunk(2) for t in (gate_up.numbers[3], gate_up.scale[3]))
    last = Packed(down.numbers[3], down.scale[3], down.group_size)
    gate_part, up_part = (Packed(*pair, gate_up.group_size) for pair in ((gate, gate_scale), (up, up_scale)))
    for count in (1, 4):
        x = gaussian(1, count, 256, seed=2)
        found = rows.mlp(x, gate_part, up_part, last)
        ids, weights = torch.full((count, 1), 3), torch.ones(count, 1)
        same = rows.experts(x[0], gate_up, down, ids, weights)
        assert found is not None and same is not None and torch.equal(found[0], same)
    assert rows.mlp(x, gate_part, up_part, gate_part) is None


def test_other_tensors_and_formats_are_left_to_pytorch(rows: QuantRows) -> None:
    fmt = WeightFormat("int4", 32)
    weight, x = pack(gaussian(8, 64), fmt), gaussian(1, 64)
    assert rows.linear(x, weight) is not None
    assert rows.linear(x.float(), weight) is None
    assert rows.linear(gaussian(2, 32), weight) is None
    assert rows.linear(x, weight._replace(scale=weight.scale.float())) is None
    assert rows.linear(x, pack(gaussian(8, 64), WeightFormat("fp8"))) is None
    assert rows.linear(gaussian(1, 63), pack(gaussian(8, 63), WeightFormat("int8"))) is None
    assert rows.linear(x, pack(gaussian(8, 64), WeightFormat("int8", 32))) is None
    parts, row = parts_of(packed_experts(fmt, fmt)), gaussian(1, 256)
    assert rows.experts(row, *parts, torch.tensor([[6]]), torch.ones(1, 1)) is None
    assert rows.experts(row, *parts, torch.tensor([[-1]]), torch.ones(1, 1)) is None
    assert rows.experts(row, *parts, torch.tensor([[1]]), torch.ones(1, 1).bfloat16()) is None


def test_modules_take_them_while_few_rows_are_decoded() -> None:
    layer = packed_experts(FORMATS[2], FORMATS[4])
    x, (ids, weights) = gaussian(2, 256, seed=2), choose(2)
    with torch.no_grad():
        assert run_packed_experts(layer, x, ids, weights) is None
        with row_products():
            fast = run_packed_experts(layer, x, ids, weights)
            assert fast is not None and torch.equal(layer(x, ids, weights), fast)
            layer.act_fn = torch.nn.GELU()
            assert run_packed_experts(layer, x, ids, weights) is None


def pack_model(model: Any, fmt: WeightFormat) -> None:
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            set_module(model.model.layers, name, PackedLinear.of(layer, fmt))
        elif isinstance(layer, DeepseekV2Experts):
            formats = {"gate_up_proj": fmt, "down_proj": fmt}
            packed = PackedExperts(layer.num_experts, layer.hidden_size, layer.inner_size, layer.act_fn, formats)
            for part in formats:
                packed.set_packed(part, quantize(layer.get_parameter(part), fmt))
            set_module(model.model.layers, name, packed)


def test_layers_of_a_model_run_together_but_for_those_that_someone_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    found = quant_rows.quant_rows()
    assert found is not None
    called: list[str] = []
    call = found._call
    monkeypatch.setattr(found, "_call", lambda name, *arguments: called.append(name) or call(name, *arguments))
    config = DeepseekV2Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, use_mla=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = DeepseekV2ForCausalLM(config).bfloat16().eval()
    pack_model(model, WeightFormat("int4", 32))
    ids = torch.tensor([[3, 5, 9]])
    with torch.no_grad():
        together = model(ids).logits
        assert called == [
            "packed_queries_keys_values", "packed_linear", "packed_mlp",
            "packed_queries_keys_values", "packed_linear", "packed_experts", "packed_mlp",
        ]  # fmt: skip
        handles = [
            layer.register_forward_hook(lambda *_: None)
            for layer in (model.model.layers[0].self_attn.k_proj, model.model.layers[0].mlp.up_proj)
        ]
        called.clear()
        watched = model(ids).logits
        assert called[:7] == ["packed_linear"] * 7
        for handle in handles:
            handle.remove()
        monkeypatch.setenv("DEEPSEEK_VL2_KERNELS", "0")
        called.clear()
        plain = model(ids).logits
        assert not called
    assert torch.equal(watched, together)
    assert relative(together, plain.float()) < 0.03


def test_the_c_file_compiles_without_warnings(tmp_path: Path) -> None:
    for march in ("native", "haswell", "skylake-avx512", "icelake-server"):
        flags = ["-O2", f"-march={march}", "-Wall", "-Wextra", "-Werror", "-fopenmp", "-std=gnu11"]
        command = ["gcc", *flags, "-c", str(quant_rows.SOURCE), "-o", str(tmp_path / "x.o")]
        subprocess.run(command, check=True, timeout=60)
