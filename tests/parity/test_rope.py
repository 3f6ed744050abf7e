"""Rotary angles equal transformers' and formulas written out in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepseek_vl2.models.attention import DeepseekV2Attention, DeepseekV2MultiHeadAttention
from deepseek_vl2.models.modeling_deepseek import DeepseekV2Config
from deepseek_vl2.models.rope import RotaryEmbedding, apply_rotary, split_interleaved_pairs

DIM, TRAINED = 32, 64

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": TRAINED}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "another base": {"rope_type": "default", "rope_theta": 777.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn with other betas": {**YARN, "beta_fast": 20, "beta_slow": 2, "rope_theta": 5e4},
    "yarn with equal mscales": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    "yarn with unequal mscales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn with a factor of 40": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
}


def config_of(rope: dict[str, Any], use_mla: bool = True) -> DeepseekV2Config:
    """Return a config whose rotated part of a head has ``DIM`` numbers."""
    sizes = {"qk_rope_head_dim": DIM, "hidden_size": DIM * 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    return DeepseekV2Config(**sizes, use_mla=use_mla, max_position_embeddings=TRAINED, rope_parameters=rope)


def numpy_frequencies(rope: dict[str, Any], length: int) -> np.ndarray:
    """Return the frequencies of a sequence of that length, each kind by its formula, in float64."""
    base, factor = rope.get("rope_theta", 10000.0), rope.get("factor", 1.0)
    exponents = np.arange(0, DIM, 2) / DIM
    if rope["rope_type"] == "dynamic":
        growth = factor * max(length, TRAINED) / TRAINED - (factor - 1)
        base = base * growth ** (DIM / (DIM - 2))
    plain = base**-exponents
    if rope["rope_type"] == "linear":
        return plain / factor
    if rope["rope_type"] != "yarn":
        return plain

    def dimension(rotations: float) -> float:
        return DIM * math.log(TRAINED / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(dimension(rope.get("beta_slow", 1))), DIM - 1)
    slowed = np.clip((np.arange(DIM // 2) - low) / (high - low if high > low else 0.001), 0, 1)
    return plain / factor * slowed + plain * (1 - slowed)


def numpy_magnitude(rope: dict[str, Any]) -> float:
    """Return what yarn multiplies cosines and sines by."""
    if rope["rope_type"] != "yarn":
        return 1.0

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0

    return mscale(rope.get("mscale", 1)) / mscale(rope.get("mscale_all_dim", 0))


@pytest.mark.parametrize("use_mla", [True, False])
@pytest.mark.parametrize("length", [10, TRAINED, 3 * TRAINED])
@pytest.mark.parametrize("name", ROPES)
def test_angles_equal_the_formulas(name: str, length: int, use_mla: bool) -> None:
    rotary, positions = RotaryEmbedding(config_of(ROPES[name], use_mla)), torch.arange(length)[None]
    assert rotary.dim == DIM
    angles = np.arange(length)[:, None] * numpy_frequencies(ROPES[name], length)
    angles = np.concatenate((angles, angles), axis=-1)
    cos, sin = rotary(positions, torch.float32)
    magnitude = numpy_magnitude(ROPES[name])
    # Float32 angles of up to 192 radians are rounded by 1e-5.
    assert np.abs(cos[0].double().numpy() - magnitude * np.cos(angles)).max() < 3e-5
    assert np.abs(sin[0].double().numpy() - magnitude * np.sin(angles)).max() < 3e-5


@pytest.mark.parametrize("length", [10, 3 * TRAINED])
@pytest.mark.parametrize("name", [name for name, rope in ROPES.items() if rope["rope_type"] != "default"])
def test_frequencies_and_magnitude_equal_transformers(name: str, length: int) -> None:
    rope = {"rope_theta": 10000.0, **ROPES[name]}
    trained = TRAINED * 8 if rope["rope_type"] == "yarn" else TRAINED
    stock = LlamaConfig(
        hidden_size=DIM * 4, num_attention_heads=4, max_position_embeddings=trained, rope_parameters=rope
    )
    want, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](stock, torch.device("cpu"), seq_len=length)
    rotary = RotaryEmbedding(config_of(rope))
    cos, sin = rotary(torch.tensor([[0, 1, length - 1]]), torch.float32)
    angles = torch.tensor([[0], [1], [length - 1]]) * torch.cat((want, want))
    torch.testing.assert_close(cos[0], angles.cos() * magnitude, rtol=0, atol=3e-5)  # rounded angles, as above
    torch.testing.assert_close(sin[0], angles.sin() * magnitude, rtol=0, atol=3e-5)


@pytest.mark.parametrize("attention", [DeepseekV2Attention, DeepseekV2MultiHeadAttention])
@pytest.mark.parametrize(
    ("name", "mscale"),
    [("default", 1), ("linear", 1), ("yarn", 1), ("yarn with unequal mscales", 0.05 * math.log(8) + 1)],
)
def test_the_softmax_scale_takes_mscale_all_dim_squared(attention: type, name: str, mscale: float) -> None:
    config = config_of(ROPES[name], use_mla=attention is DeepseekV2Attention)
    head = DIM if attention is DeepseekV2MultiHeadAttention else DIM + config.qk_nope_head_dim
    assert attention(config, 0).scaling == pytest.approx(head**-0.5 * mscale**2)


def test_interleaved_pairs_rotate_as_complex_numbers() -> None:
    """(a0, b0, a1, b1, ...) are complex numbers a + ib, each turned by its angle; the order alone changes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, DIM, generator=generator)
    rotary = RotaryEmbedding(config_of(ROPES["default"]))
    cos, sin = rotary(torch.arange(5).expand(2, -1), torch.float32)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None, :, : DIM // 2]
    got = apply_rotary(split_interleaved_pairs(x), cos, sin)
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), dim=-1), rtol=0, atol=1e-6)  # one product
