"""Products of one row with packed weights by compiled C, beside the plain forms."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from deepseek_vl2.engine.packed import run_packed_experts
from deepseek_vl2.models.cpu import row_products
from deepseek_vl2.models.quantization import WeightFormat, dequantize, quantize
from deepseek_vl2.models.quantized_layers import PackedExperts, packed_experts_forward
from deepseek_vl2.ops.cpu import quant_rows
from deepseek_vl2.ops.cpu.bindings import FLAGS, load
from deepseek_vl2.ops.cpu.quant_rows import ARGUMENTS, QuantRows

WANTED = {"avx2", "fma"}
FORMATS = [WeightFormat("int4", group) for group in (16, 32, 64, 128)] + [WeightFormat("int8")]


def instructions() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


pytestmark = pytest.mark.skipif(not instructions() >= WANTED, reason="for x86 CPUs with AVX2")


@pytest.fixture(scope="module", params=["native", "avx2"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions as they are compiled for this CPU, and for one that has AVX2 alone."""
    if request.param == "native":
        return QuantRows()
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    flags = tuple("-march=haswell" if flag == "-march=native" else flag for flag in FLAGS)
    patch.setattr("deepseek_vl2.ops.cpu.bindings.FLAGS", flags)
    found = QuantRows.__new__(QuantRows)
    found._library = load(quant_rows.SOURCE, ARGUMENTS)
    patch.undo()
    return found


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (33, 256), (70, 896), (5, 1408), (130, 6848 // 107 * 128), (16, 16)])
def test_a_row_is_that_of_the_unpacked_weight(rows: QuantRows, fmt: WeightFormat, shape: tuple[int, int]) -> None:
    if fmt.group_size and shape[1] % fmt.group_size:
        pytest.skip("groups do not divide the columns")
    packed, x, bias = quantize(gaussian(*shape), fmt), gaussian(1, 1, shape[1], seed=1), gaussian(shape[0], seed=2)
    found = rows.linear(x, *packed, fmt.group_size, bias)
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
        found = rows.linear(row.bfloat16(), *packed, fmt.group_size)
        assert found is not None
        assert torch.equal(found, F.linear(row, weight).bfloat16())


def test_extreme_weights_and_rows_do_not_overflow(rows: QuantRows) -> None:
    for sign in (1.0, -1.0):
        for fmt in FORMATS:
            weight = torch.full((3, 256), sign * 2.0).bfloat16()
            x = torch.full((1, 256), 3.0).bfloat16()
            found = rows.linear(x, *quantize(weight, fmt), fmt.group_size)
            assert found is not None and relative(found, torch.full((1, 3), sign * 1536.0)) < 0.01


def test_a_row_of_zeros_gives_the_bias(rows: QuantRows) -> None:
    for fmt in FORMATS:
        bias = gaussian(7)
        found = rows.linear(torch.zeros(1, 128).bfloat16(), *quantize(gaussian(7, 128), fmt), fmt.group_size, bias)
        assert found is not None and torch.equal(found[0], bias)


def packed_experts(up: WeightFormat, down: WeightFormat) -> PackedExperts:
    layer = PackedExperts(6, 256, 128, ACT2FN["silu"], {"gate_up_proj": up, "down_proj": down})
    layer.set_packed("gate_up_proj", quantize(gaussian(6, 256, 256) / 16, up))
    layer.set_packed("down_proj", quantize(gaussian(6, 256, 128, seed=1) / 11, down))
    return layer


@pytest.mark.parametrize("formats", [(0, 1), (2, 3), (3, 4), (4, 0), (4, 4)])
def test_experts_of_one_row_are_the_plain_ones(rows: QuantRows, formats: tuple[int, int]) -> None:
    layer = packed_experts(*(FORMATS[index] for index in formats))
    x, ids, weights = gaussian(1, 256, seed=2), torch.tensor([[5, 0, 3]]), torch.tensor([[0.5, 0.3, 1.2]])
    parts = ((*layer.packed(name), layer.formats[name].group_size) for name in ("gate_up_proj", "down_proj"))
    with torch.no_grad():
        found = rows.experts(x, *parts, ids, weights)
        plain = packed_experts_forward(layer.run_expert, 6, x.float(), ids, weights)
    assert found is not None and relative(found, plain) < 0.02


def test_other_tensors_and_formats_are_left_to_pytorch(rows: QuantRows) -> None:
    fmt = WeightFormat("int4", 32)
    packed, x = quantize(gaussian(8, 64), fmt), gaussian(1, 64)
    assert rows.linear(x, *packed, 32) is not None
    assert rows.linear(x.float(), *packed, 32) is None
    assert rows.linear(gaussian(2, 64), *packed, 32) is None
    assert rows.linear(x, packed.packed, packed.scale.float(), 32) is None
    assert rows.linear(x, *quantize(gaussian(8, 64), WeightFormat("fp8")), 0) is None
    assert rows.linear(gaussian(1, 63), *quantize(gaussian(8, 63), WeightFormat("int8")), 0) is None
    layer = packed_experts(fmt, fmt)
    parts = [(*layer.packed(name), 32) for name in ("gate_up_proj", "down_proj")]
    row = gaussian(1, 256)
    assert rows.experts(row, *parts, torch.tensor([[6]]), torch.ones(1, 1)) is None
    assert rows.experts(row, *parts, torch.tensor([[1]]), torch.ones(1, 1).bfloat16()) is None


def test_modules_take_them_while_one_row_is_decoded() -> None:
    layer = packed_experts(FORMATS[2], FORMATS[4])
    x, ids, weights = gaussian(1, 256, seed=2), torch.tensor([[1, 4]]), torch.rand(1, 2)
    with torch.no_grad():
        assert run_packed_experts(layer, x, ids, weights) is None
        with row_products():
            fast = run_packed_experts(layer, x, ids, weights)
            assert fast is not None and torch.equal(layer(x, ids, weights), fast)
            layer.act_fn = torch.nn.GELU()
            assert run_packed_experts(layer, x, ids, weights) is None


def test_the_c_file_compiles_without_warnings(tmp_path: Path) -> None:
    for march in ("native", "haswell", "skylake-avx512", "icelake-server"):
        flags = ["-O2", f"-march={march}", "-Wall", "-Wextra", "-Werror", "-fopenmp", "-std=gnu11"]
        command = ["gcc", *flags, "-c", str(quant_rows.SOURCE), "-o", str(tmp_path / "x.o")]
        subprocess.run(command, check=True, timeout=60)
