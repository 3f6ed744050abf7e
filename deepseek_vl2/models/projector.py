"""The projector from patch features to language embeddings."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_deepseek_vl_v2 import MlpProjectorConfig


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for before, after in pairwise(sizes[1:]):
        layers += [nn.GELU(), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def merge_neighbours(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """Gather ``ratio`` x ``ratio`` neighbourhoods of a square grid of features into single features.

    The grid is padded with zeros at its right and bottom edge to a multiple of ``ratio``. Channels come out in the
    order of `torch.nn.functional.unfold`: all positions of channel 0, then of channel 1, and so on.

    Args:
        x: [B, side * side, C].
        ratio: side of a neighbourhood.

    Returns:
        [B, ceil(side / ratio) ** 2, C * ratio * ratio].
    """
    batch, length, channels = x.shape
    side = math.isqrt(length)
    pad = -side % ratio
    grid = x.view(batch, side, side, channels)
    if pad:
        grid = F.pad(grid, (0, 0, 0, pad, 0, pad))
    out = (side + pad) // ratio
    cells = grid.view(batch, out, ratio, out, ratio, channels)
    merged = cells.permute(0, 5, 2, 4, 1, 3).reshape(batch, channels * ratio * ratio, out * out)
    # Left transposed, as `unfold` leaves it: a linear layer with a bias rounds twice in bfloat16 on such an input and
    # once on a contiguous one, and the checkpoints' answers come from the former.
    return merged.transpose(1, 2)


def output_side(config: MlpProjectorConfig, patches: int) -> int:
    """Return the tokens along one side of a tile of ``patches`` x ``patches`` patches."""
    if config.token_pooling:
        return patches // 2
    if config.projector_type == "downsample_mlp_gelu":
        return math.ceil(patches / config.downsample_ratio)
    return patches


class MlpProjector(nn.Module):
    """Project patch features [B, patches, input_dim] to token embeddings [B, tokens, n_embed].

    Source: ``MlpProjector`` of the original package.
    """

    def __init__(self, config: MlpProjectorConfig) -> None:
        super().__init__()
        self.cfg = config
        self.layers = self._build(config)
        if config.token_pooling:
            self.token_pooling_layer = nn.Linear(config.input_dim * 4, config.input_dim)

    @staticmethod
    def _build(config: MlpProjectorConfig) -> nn.Module:
        if config.projector_type == "identity":
            return nn.Identity()
        if config.projector_type == "linear":
            return nn.Linear(config.input_dim, config.n_embed)
        if config.projector_type == "mlp_gelu":
            return _mlp([config.input_dim] + [config.n_embed] * config.depth)
        inner = config.n_embed * config.mlp_ratio
        merged = config.input_dim * config.downsample_ratio**2
        return _mlp([merged] + [inner] * (config.depth - 1) + [config.n_embed])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of patch features."""
        if self.cfg.token_pooling:
            side = math.isqrt(x.shape[1])
            # An odd last row and column is dropped here, as by the original's `unfold`.
            even = x.view(x.shape[0], side, side, -1)[:, : side // 2 * 2, : side // 2 * 2].flatten(1, 2)
            x = self.token_pooling_layer(merge_neighbours(even, 2).contiguous())
        elif self.cfg.projector_type == "downsample_mlp_gelu":
            x = merge_neighbours(x, self.cfg.downsample_ratio)
        return self.layers(x)
