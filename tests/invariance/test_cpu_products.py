"""On a CPU that only imitates products of bfloat16, those of many rows are of float32: equal but for roundings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import mini_inputs, mini_model

from deepseek_vl2.models import cpu, siglip_vit

# Sums in another order now and then round to the next number of bfloat16, 2^-8 away.
ROUNDING = 2**-8
ROW = (20, (2, 1), 9)  # text, an image of two tiles beside its global view, text


@pytest.fixture
def imitating(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let the CPU be one that imitates bfloat16; yields the rows of each product in float32."""
    seen: list[int] = []
    wide_linear = cpu.wide_linear

    def counted(x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(x.numel() // x.shape[-1])
        return wide_linear(x, *args)

    for module in (cpu, siglip_vit):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(cpu, "wide_linear", counted)
    yield seen


def relative(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_wide_products(rows: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, rows, 24).bfloat16(), torch.randn(50, 24).bfloat16()
    bias = torch.randn(50).bfloat16() if biased else None
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for most in (1 << 25, 24 * 7, 1):  # at once, and some rows of the weight after the other
        monkeypatch.setattr(cpu, "MOST_WIDENED", most)
        out = cpu.wide_linear(x, weight, bias)
        assert out.dtype == torch.bfloat16 and out.shape == want.shape
        assert relative(out, want) < ROUNDING


@torch.no_grad()
def test_only_many_rows_of_bfloat16_are_widened(imitating: list[int]) -> None:
    layer = torch.nn.Linear(8, 8).bfloat16()
    with cpu.wide_products(True):
        layer(torch.randn(cpu.MANY_ROWS - 1, 8).bfloat16())
        layer.float()(torch.randn(40, 8))
        assert imitating == []
        layer.bfloat16()(torch.randn(2, cpu.MANY_ROWS, 8).bfloat16())
    layer(torch.randn(40, 8).bfloat16())
    with cpu.wide_products(False):
        layer(torch.randn(40, 8).bfloat16())
    assert imitating == [2 * cpu.MANY_ROWS]


@torch.no_grad()
def test_products_of_groups(imitating: list[int]) -> None:
    rows, weights = torch.randn(70, 16).bfloat16(), torch.randn(5, 24, 16).bfloat16()
    ends = torch.tensor([3, 3, 40, 70, 70]).int()
    want = torch.cat([rows[a:b].double() @ w.double().T for a, b, w in zip([0, *ends], ends, weights, strict=False)])
    for wide in (False, True):
        with cpu.wide_products(wide):
            assert relative(cpu.grouped_products(rows, weights, ends), want) < ROUNDING
    assert imitating == [37, 30]


@pytest.mark.parametrize("kind", ["tiny", "small", "base"])
@torch.no_grad()
def test_a_model_answers_alike(kind: str, imitating: list[int]) -> None:
    """Both are off float32 by roundings, of which chance may make one's larger than the other's: by half, at most."""
    model, inputs = mini_model(kind).eval(), mini_inputs(ROW)
    exact = model(**inputs).logits
    assert imitating == []
    model = model.to(torch.bfloat16)
    wide = model(**inputs).logits
    assert len(imitating) > 20
    imitating.clear()
    with pytest.MonkeyPatch.context() as patch:
        for module in (cpu, siglip_vit):
            patch.setattr(module, "multiplies_bfloat16", lambda: True)
        plain = model(**inputs).logits
    assert imitating == []
    assert relative(wide, exact) < 1.5 * relative(plain, exact)


@torch.no_grad()
def test_eager_keeps_its_arithmetic(imitating: list[int]) -> None:
    model = mini_model("small", "eager").to(torch.bfloat16)
    for block in model.vision.blocks:
        block.attn.quick_on_cpu = False  # as where it is loaded so
    model(**mini_inputs(ROW))
    assert imitating == []


def test_training_keeps_its_products(imitating: list[int]) -> None:
    model = mini_model("tiny").to(torch.bfloat16)
    model(**mini_inputs(ROW)).logits.sum().backward()
    assert imitating == []


@pytest.mark.parametrize(("flags", "expected"), [((False, False), False), ((True, False), True), ((False, True), True)])
def test_what_a_cpu_is_asked(flags: tuple[bool, bool], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name, flag in zip(names, flags, strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda flag=flag: flag, raising=False)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    assert cpu.multiplies_bfloat16.__wrapped__() is expected
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert cpu.multiplies_bfloat16.__wrapped__()
