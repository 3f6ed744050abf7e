"""The RMS norm rounds before it multiplies by its weight, as the checkpoints were trained."""

from __future__ import annotations

import pytest
import torch

from deepseek_vl2.models.norm import DeepseekV2RMSNorm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_norm_rounds_before_its_weight(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x = DeepseekV2RMSNorm(256, eps=1e-5).to(dtype), torch.randn(1, rows, 256).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(mean=1.0, std=0.3)
        got = norm(x)
    wide = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    rounded_first = norm.weight * wide.to(dtype)
    rounded_last = (norm.weight.double() * wide).to(dtype)
    assert torch.equal(got, rounded_first)
    assert not torch.equal(rounded_first, rounded_last)  # or the numbers would not tell
