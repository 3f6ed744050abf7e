"""What tests of single kernels share: inputs, outputs that show what was not written, and the measure of an error.

Inputs are drawn anew in every run. Outputs are poisoned before: what a kernel does not write stays NaN. The measure is
|out - plain| / |plain|, the plain form computed in float32 from the same rounded inputs. float32 agrees to 1e-5, which
leaves room for another order of sums; half precision to the rounding of inputs of a product and of results, 2^-8 of
bfloat16 and 2^-11 of float16, some of which add up where results are rounded twice. The interpreter cuts bfloat16 off
where a GPU rounds it: twice the error, and all in one direction.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from deepseek_vl2.ops.triton import decode_experts
from deepseek_vl2.ops.triton.router import GREEDY, GROUP_LIMITED, NOAUX_TC, RouterConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# Half precisions differ in rounding alone: the slow interpreter sees one of them, a GPU all.
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if ON_GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3 if ON_GPU else 1.6e-2}
ROWS = [2, 16, pytest.param(33, marks=pytest.mark.slow), *([5, 64] if ON_GPU else [])]

ROUTERS = [
    RouterConfig(8, 3),
    RouterConfig(64, 6, scale=1.5),
    RouterConfig(72, 6, sigmoid=True, method=NOAUX_TC, norm_topk_prob=True, scale=2.0),
    RouterConfig(24, 4, method=GROUP_LIMITED, num_groups=6, topk_groups=2),
    RouterConfig(24, 5, sigmoid=True, method=NOAUX_TC, num_groups=4, topk_groups=2, norm_topk_prob=True),
    RouterConfig(16, 2, method=GREEDY, num_groups=4, topk_groups=2),
]


def slow(*values: int) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def with_widths(*widths: int) -> list[tuple[torch.dtype, int]]:
    """Return dtypes with widths: all on a GPU, where each is compiled; the interpreter sees each of both once."""
    return list(product(DTYPES, widths)) if ON_GPU else list(zip(DTYPES, widths, strict=True))


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def check(out: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.shape == plain.shape
    assert torch.isfinite(out).all(), "a result was not written, or not finite"
    error = (out.double() - plain.double()).norm() / plain.double().norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def layer(width: int, experts_: int, inner: int, shared: int, dtype: torch.dtype) -> decode_experts.ExpertWeights:
    def matrix(*shape: int) -> torch.Tensor:
        return draw(*shape, dtype=dtype, scale=shape[-1] ** -0.5)

    return decode_experts.ExpertWeights(
        matrix(experts_, 2 * inner, width) if experts_ else None,
        matrix(experts_, width, inner) if experts_ else None,
        matrix(shared, width) if shared else None,
        matrix(shared, width) if shared else None,
        matrix(width, shared) if shared else None,
    )


def wide(weights: decode_experts.ExpertWeights) -> decode_experts.ExpertWeights:
    parts = (weights.gate_up, weights.down, weights.shared_gate, weights.shared_up, weights.shared_down)
    return decode_experts.ExpertWeights(*(None if part is None else part.float() for part in parts))


def random_ids(rows: int, experts_: int, chosen: int) -> torch.Tensor:
    return torch.rand(rows, experts_, device=DEVICE).argsort(dim=1)[:, :chosen].int()
