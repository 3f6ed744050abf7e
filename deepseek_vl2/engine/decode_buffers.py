"""What a decoding step by kernels reads and writes besides weights and the KV cache.

Shape suffixes: B rows, C capacity of the cache in tokens, E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from ..ops.triton.common import pdl_options
from ..ops.triton.decode_align import ExpertTokens, max_further
from ..ops.triton.router import RouterConfig
from .decoder_weights import DecoderWeights
from .rows import RowTensors

MAX_PDL_ROWS = 16


@dataclass
class DecodeBuffers:
    """All that a step reads and writes besides weights and the KV cache; graphs hold the addresses.

    Fields:
        rows: where the rows stand; their tokens are replaced by the likeliest next ones, their positions advance.
        logits: [B, vocabulary], float32; ``None`` where the output head is not on this device.
        cos: table for all positions, [C, rotated], and ``sin``.
        counters: [B], 0 between the kernels, see `router.route`.
        expert_counts: of each layer, [layers, E + 1 or more], see `decode_align.ExpertTokens`; 0 when a step begins.
        pdl: the options of launches, see `common.pdl_options`.
    """

    rows: RowTensors
    logits: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    hidden: torch.Tensor
    normed: torch.Tensor
    counters: torch.Tensor
    expert_counts: torch.Tensor
    pdl: dict[str, Any] = field(default_factory=dict)
    scratch: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """B."""
        return self.hidden.shape[0]

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return scratch memory of that name and shape; it is made at the first call, and shared between layers."""
        dtype = dtype or self.hidden.dtype
        key = f"{name} {list(shape)} {dtype}"
        if key not in self.scratch:
            self.scratch[key] = torch.empty(shape, dtype=dtype, device=self.hidden.device)
        return self.scratch[key]

    def expert_tokens(self, layer: int, routing: RouterConfig, tile: int) -> ExpertTokens:
        """Return the lists of a layer's experts, which its router writes."""
        further = max_further(self.count, routing.top_k, tile)
        return ExpertTokens(
            self.expert_counts[layer, : routing.num_experts + 1],
            self.take("expert tokens", routing.num_experts, self.count, dtype=torch.int32),
            self.take("further tiles", further, dtype=torch.int32),
            routing.top_k,
            tile,
        )


def new_buffers(
    weights: DecoderWeights, rows: RowTensors, cos: torch.Tensor, sin: torch.Tensor, pdl: bool = True
) -> DecodeBuffers:
    """Return buffers for those rows, on their device; the tables' length bounds the positions.

    With ``pdl`` kernels use programmatic dependent launch where the device has it: all of those
    for one row, and for up to `MAX_PDL_ROWS` all but the experts' first products. For more rows it was slower.
    """
    device, count, (vocabulary, hidden) = rows.tokens.device, len(rows.tokens), weights.head.shape
    dtype, ends_here = weights.embedding.dtype, weights.head.device == device
    most = max(layer.experts.num_experts for layer in weights.layers)
    # Each layer's begin at a multiple of 16 bytes: for other addresses Triton compiles the kernels a second time.
    counts = triton.cdiv(most + 1, 4) * 4
    with torch.inference_mode(False):  # captured steps write them, in any mode
        return DecodeBuffers(
            rows=rows,
            logits=torch.zeros(count if ends_here else 0, vocabulary, device=device),
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            hidden=torch.zeros(count, hidden, dtype=dtype, device=device),
            normed=torch.zeros(count, hidden, dtype=dtype, device=device),
            counters=torch.zeros(count, dtype=torch.int32, device=device),
            expert_counts=torch.zeros(len(weights.layers), counts, dtype=torch.int32, device=device),
            pdl=pdl_options(device) if pdl and count <= MAX_PDL_ROWS else {},
        )
