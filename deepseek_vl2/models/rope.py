"""Rotary position embeddings: default, linear, dynamic and yarn.

Shape suffixes: B batch, T sequence, D rotated dimensions, F = D / 2 frequencies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .configuration_deepseek import DeepseekV2Config


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return yarn's magnitude correction for a context that grew by ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_softmax_scale(rope: dict[str, Any]) -> float:
    """Return what the attention's softmax scale is multiplied by: mscale_all_dim squared under yarn, else 1."""
    if rope["rope_type"] != "yarn" or not rope.get("mscale_all_dim"):
        return 1.0
    return yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2


def default_inverse_frequencies(
    dim: int, base: float | torch.Tensor, device: torch.device | None, factor: float = 1.0
) -> torch.Tensor:
    """Return 1 / (factor * base^(2i/dim)), [F] (or [B, F] for a base of shape [B, 1]), in float32."""
    exponents_F = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (factor * base**exponents_F)


def dynamic_inverse_frequencies(
    dim: int, base: float, factor: float, trained_length: int, position_ids_BT: torch.Tensor
) -> torch.Tensor:
    """Return NTK-aware frequencies, [B, 1, F]: rows longer than ``trained_length`` get a larger base.

    Each row's own length decides, so a row in a batch rotates as it does alone.
    """
    length_B1 = (position_ids_BT.amax(dim=-1, keepdim=True) + 1).float().clamp(min=trained_length)
    growth_B1 = factor * length_B1 / trained_length - (factor - 1)
    base_B1 = base * growth_B1 ** (dim / (dim - 2))
    return default_inverse_frequencies(dim, base_B1, position_ids_BT.device)[:, None, :]


def yarn_inverse_frequencies(dim: int, base: float, rope: dict[str, Any], device: torch.device | None) -> torch.Tensor:
    """Return yarn's frequencies, [F]: fast ones kept, slow ones divided by the factor, a ramp between."""
    original_length = rope["original_max_position_embeddings"]

    def dim_of_rotations(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dim_of_rotations(rope.get("beta_fast", 32))), 0)
    high: float = min(math.ceil(dim_of_rotations(rope.get("beta_slow", 1))), dim - 1)
    if low == high:
        high += 0.001  # the ramp would divide by zero
    kept_F = default_inverse_frequencies(dim, base, device)
    slowed_F = default_inverse_frequencies(dim, base, device, rope["factor"])
    ramp_F = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    keep_F = 1.0 - ramp_F
    return slowed_F * (1 - keep_F) + kept_F * keep_F


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles at given positions.

    Frequencies are computed anew in float32 at every call: no buffer exists that `.to(torch.bfloat16)` could round
    (the original has one, and most positions beyond 256 collide in it).
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.dim = config.rotary_dim
        self.rope = dict(config.rope_parameters)
        self.trained_length = config.max_position_embeddings
        self.magnitude = 1.0
        if self.rope["rope_type"] == "yarn":
            factor = self.rope["factor"]
            self.magnitude = yarn_mscale(factor, self.rope.get("mscale", 1)) / yarn_mscale(
                factor, self.rope.get("mscale_all_dim", 0)
            )

    def inverse_frequencies(self, position_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the frequencies, [F] or [B, 1, F], in float32."""
        kind, base, device = self.rope["rope_type"], self.rope["rope_theta"], position_ids_BT.device
        if kind == "dynamic":
            return dynamic_inverse_frequencies(
                self.dim, base, self.rope["factor"], self.trained_length, position_ids_BT
            )
        if kind == "yarn":
            return yarn_inverse_frequencies(self.dim, base, self.rope, device)
        return default_inverse_frequencies(self.dim, base, device)

    @torch.no_grad()
    def forward(self, position_ids_BT: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin), each [B, T, D], computed in float32 and cast to ``dtype``."""
        positions_BT1 = position_ids_BT[..., None].float()
        if self.rope["rope_type"] == "linear":
            positions_BT1 = positions_BT1 / self.rope["factor"]
        angles_BTF = positions_BT1 * self.inverse_frequencies(position_ids_BT)
        angles_BTD = torch.cat((angles_BTF, angles_BTF), dim=-1)
        return (angles_BTD.cos() * self.magnitude).to(dtype), (angles_BTD.sin() * self.magnitude).to(dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return (-second half, first half) of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def split_interleaved_pairs(x: torch.Tensor) -> torch.Tensor:
    """Reorder the last dimension from (a0, b0, a1, b1, ...) to (a0, a1, ..., b0, b1, ...).

    Checkpoints with latent attention store rotated pairs side by side; `rotate_half` expects them a half apart.
    """
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` [B, H, T, D] by angles whose cosines and sines are [B, T, D]."""
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)
