"""The weights of a language model as the kernels of a decoding step and of a prefill read them.

Shape suffixes: H hidden size, N attention heads, R rank of the latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.triton.decode_experts import ExpertWeights
from ..ops.triton.router import RouterConfig
from ..ops.triton.weights import Weight


@dataclass(frozen=True)
class AttentionWeights:
    """The weights of a layer's attention.

    Fields:
        projections: query and compressed latent; or query, key and value.
        out: the output projection, [H, N * value size].
        scaling: of the softmax.
        heads: N.
        key_heads: heads of keys and values; unused by latent attention.
        size: of a head's value.
        kv_b: kv_b_proj's weight, [N, unrotated + value size, R]; ``None`` for plain multi-head attention.
        norm: the latent's norm.
        eps: its epsilon.
    """

    projections: tuple[Weight, ...]
    out: Weight
    scaling: float
    heads: int
    key_heads: int
    size: int
    kv_b: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    eps: float = 0.0

    @property
    def unrotated(self) -> int:
        """Numbers of a head's query that are not rotated."""
        return 0 if self.kv_b is None else self.kv_b.shape[1] - self.size


@dataclass(frozen=True)
class LayerWeights:
    """The weights of a layer; ``gate`` and what belongs to it are missing in a dense one."""

    input_norm: torch.Tensor
    attention: AttentionWeights
    post_norm: torch.Tensor
    eps: float
    experts: ExpertWeights
    gate: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    routing: RouterConfig | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """The weights of a language model, plain or packed, as its modules hold them.

    Nothing is copied but a packed kv_b_proj, which is unpacked: 4.2 MB a layer of small and 8.4 MB of base.
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    eps: float
    head: Weight
