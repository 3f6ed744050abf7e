"""The sampler's random numbers: a hash of a row's seed, its position and the token, on the device.

No generator's state is kept, so they depend neither on the batch nor on what other rows do.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

MASK32 = 0xFFFFFFFF
# Constants of a 32-bit mixing function of low bias: multiply, fold, multiply, fold.
SPREAD, FIRST, SECOND = 0x9E3779B1, 0x21F0AAAD, 0x735A2D97


def mix(x: Any) -> Any:
    """Mix the bits of 32-bit numbers held in 64 bits (an int, or tensors of int64)."""
    x = x ^ (x >> 16)
    x = (x * FIRST) & MASK32
    x = x ^ (x >> 15)
    x = (x * SECOND) & MASK32
    return x ^ (x >> 15)


def mix_numpy(x: np.ndarray) -> np.ndarray:
    """Mix the bits of uint32 numbers, as `mix` does; several times as fast on a CPU."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(FIRST)
    x ^= x >> np.uint32(15)
    x *= np.uint32(SECOND)
    x ^= x >> np.uint32(15)
    return x


def row_keys(seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """Return a 32-bit number for each row's seed and position, [B], int64."""
    low, high = mix(seeds_B & MASK32), mix((seeds_B >> 32) & MASK32)
    return mix((mix((low + SPREAD * high) & MASK32) + positions_B.long() * SPREAD) & MASK32)


def exponential_noise(keys_B: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return exponentially distributed numbers for each row and token, [B, V], float32, none of them zero."""
    # 23 bits and a half are exact in float32; with 24 the largest would be rounded to 1, whose logarithm is 0.
    if keys_B.device.type == "cpu":
        tokens = np.arange(vocabulary, dtype=np.uint32) * np.uint32(SPREAD)
        bits = mix_numpy(tokens[None] + keys_B.numpy().astype(np.uint32)[:, None])
        uniform = torch.from_numpy((bits >> np.uint32(9)).astype(np.float32))
    else:
        tokens_V = torch.arange(vocabulary, device=keys_B.device) * SPREAD
        uniform = (mix((tokens_V[None] + keys_B[:, None]) & MASK32) >> 9).float()
    return uniform.add_(0.5).mul_(2.0**-23).log_().neg_()
