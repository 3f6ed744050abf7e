"""Kernels over packed weights against the plain forms: on a GPU, or on a CPU through Triton's interpreter.

Outputs are poisoned before: what a kernel does not write stays NaN.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from deepseek_vl2.models.quantization import PackedWeight, WeightFormat, dequantize, quantize
from deepseek_vl2.ops.triton.quant_common import QuantWeight
from deepseek_vl2.ops.triton.quant_experts import QuantExperts, quant_down, quant_inner
from deepseek_vl2.ops.triton.quant_gemm import quant_gemm
from deepseek_vl2.ops.triton.quant_gemv import quant_gemv

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = {
    "int4-16": WeightFormat("int4", 16),
    "int4-32": WeightFormat("int4", 32),
    "int4-64": WeightFormat("int4", 64),
    "int4-128": WeightFormat("int4", 128),
    "int8": WeightFormat("int8"),
    "fp8": WeightFormat("fp8"),
    "fp8-block": WeightFormat("fp8", block=True),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
SEEDS = iter(range(10_000))


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(next(SEEDS))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def check(out: torch.Tensor, plain: torch.Tensor) -> None:
    assert out.shape == plain.shape
    assert torch.isfinite(out).all(), "a result was not written, or not finite"
    error = (out.double() - plain.double()).norm() / plain.double().norm()
    assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"


def packed(fmt: WeightFormat, *shape: int) -> tuple[QuantWeight, torch.Tensor]:
    """Return a packed matrix of random weights, and the matrix that it stands for."""
    found: PackedWeight = quantize(draw(*shape, scale=shape[-1] ** -0.5), fmt)
    return QuantWeight(*found, fmt.group_size, fmt.block), dequantize(found, fmt)


def rms(x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return norm.float() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("sizes", "width", "normed"), [((20,), 128, False), ((9, 3, 6), 640, True)])
def test_one_row(name: str, sizes: tuple[int, ...], width: int, normed: bool) -> None:
    pairs = [packed(FORMATS[name], size, width) for size in sizes]
    x, residual = draw(width), draw(sum(sizes))
    norm = 1 + 0.1 * draw(width) if normed else None
    out = poisoned(sum(sizes))
    quant_gemv(x, [weight for weight, _ in pairs], out, norm, 1e-6, residual)
    given = x if norm is None else rms(x, norm)
    check(out, residual + torch.cat([F.linear(given, exact) for _, exact in pairs]))


@pytest.mark.parametrize("name", ["int4-64", "fp8-block"])
def test_one_row_in_bfloat16_with_a_residual_in_place(name: str) -> None:
    weight, exact = packed(FORMATS[name], 96, 256)
    x, residual = draw(256, dtype=torch.bfloat16), draw(96, dtype=torch.bfloat16)
    expected = residual.float() + F.linear(x.float(), exact)
    quant_gemv(x, [weight], residual, residual_N=residual)
    check(residual, expected)


def test_the_largest_output_of_each_program_is_noted() -> None:
    weight, exact = packed(FORMATS["int8"], 37, 64)
    x, out = draw(64), poisoned(37)
    best = (poisoned(10), torch.full((10,), -1, device=DEVICE, dtype=torch.int32))
    quant_gemv(x, [weight], out, best=best)
    check(out, F.linear(x, exact))
    parts = F.pad(out, (0, 3), value=float("-inf")).view(10, 4)
    assert torch.equal(best[0], parts.amax(dim=1))
    assert torch.equal(best[1].long(), parts.argmax(dim=1) + torch.arange(10, device=DEVICE) * 4)


def experts_plain(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    ("name", "parts"), [*((name, "both") for name in FORMATS), ("int4-64", "routed"), ("int4-64", "shared")]
)
def test_experts_of_one_row(name: str, parts: str) -> None:
    fmt, (experts, hidden, inner, shared_inner) = FORMATS[name], (5, 128, 128, 256)
    gate_up, exact_gate_up = packed(fmt, experts, 2 * inner, hidden)
    down, exact_down = packed(fmt, experts, hidden, inner)
    pairs = [packed(fmt, *shape) for shape in ((shared_inner, hidden),) * 2 + ((hidden, shared_inner),)]
    shared, exact = [weight for weight, _ in pairs], [weight for _, weight in pairs]
    routed = parts != "shared"
    weights = QuantExperts(*((gate_up, down) if routed else (None, None)), *(shared if parts != "routed" else ()))
    ids = torch.tensor([3, 0, 4], device=DEVICE, dtype=torch.int32) if routed else None
    shares = torch.tensor([0.5, 1.5, 0.25], device=DEVICE) if routed else None
    x, norm, residual = draw(hidden), 1 + 0.1 * draw(hidden), draw(hidden)
    middle = poisoned(3 * inner * routed + shared_inner * (parts != "routed"))
    quant_inner(x, norm, 1e-6, weights, middle, ids, BLOCK_N=32)
    given = rms(x, norm)
    expected = [experts_plain(given, exact_gate_up[expert]) for expert in ([3, 0, 4] if routed else [])]
    if parts != "routed":
        expected.append(F.silu(F.linear(given, exact[0])) * F.linear(given, exact[1]))
    check(middle, torch.cat(expected))
    out = poisoned(hidden)
    quant_down(middle, weights, residual, out, ids, shares, BLOCK_H=32)
    total = residual.clone()
    if routed and shares is not None:
        for slot, expert in enumerate([3, 0, 4]):
            total += shares[slot] * F.linear(expected[slot], exact_down[expert])
    if parts != "routed":
        total += F.linear(expected[-1], exact[2])
    check(out, total)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "outputs", "width"), [(5, 40, 640), (33, 16, 256)])
def test_a_few_rows(name: str, rows: int, outputs: int, width: int) -> None:
    weight, exact = packed(FORMATS[name], outputs, width)
    x, residual = draw(rows, width), draw(rows, outputs)
    out = poisoned(rows, outputs)
    quant_gemm(x, weight, out, residual)
    check(out, residual + F.linear(x, exact))


def test_what_the_kernels_do_not_read_is_refused() -> None:
    weight, _ = packed(FORMATS["int4-32"], 8, 64)
    other, _ = packed(FORMATS["int8"], 8, 64)
    with pytest.raises(ValueError, match="one format"):
        quant_gemv(draw(64), [weight, other], poisoned(16))
    with pytest.raises(ValueError, match="one to 3"):
        quant_gemv(draw(64), [weight] * 4, poisoned(32))
    with pytest.raises(ValueError, match="powers of two"):
        quant_gemv(draw(64), [QuantWeight(weight.packed, weight.scale, 24)], poisoned(8))
    with pytest.raises(ValueError, match="contiguous"):
        quant_gemv(draw(64), [QuantWeight(weight.packed[:, ::2], weight.scale, 32)], poisoned(8))
    with pytest.raises(ValueError, match="routed or shared"):
        QuantExperts().first(None)
