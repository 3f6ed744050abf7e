"""Kernels over packed weights are compared with the plain forms before a model runs by them.

They are compiled anew for each format, shape and GPU. One that is compiled wrongly must not answer: the model's own
modules do then. Of layers alike one is looked at, of experts two, and of the head some rows: unpacked in float32 they
take up to 200 MB, before there is a KV cache.

Shape suffixes: B rows, H hidden size, I intermediate size, K experts of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..models.quantization import PackedWeight, WeightFormat, dequantize
from ..ops.triton import (
    decode_experts,
    decode_experts_gemm,
    decode_experts_gemv,
    decode_gemm,
    decode_gemv,
    linear,
)
from ..ops.triton.decode_align import align_plain, tile_rows
from ..ops.triton.decode_experts import ExpertWeights
from ..ops.triton.prefill_experts import permuted_experts
from ..ops.triton.weights import BLOCK, QuantWeight, Weight, format_of
from .decoder_weights import DecoderWeights, LayerWeights

ROWS = 3
EXPERTS = 2
HEAD_ROWS = 1024
# Sums in another order, and intermediate states rounded to 16 bits; a wrong scale or a column left out is far beyond.
LARGEST_ERROR = 0.03
EPS = 1e-6
KINDS = {torch.int32: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}

Pairs = Iterator[tuple[str, torch.Tensor, torch.Tensor]]


def unpacked(weight: Weight | None) -> torch.Tensor | None:
    """Return a weight in float32."""
    if not isinstance(weight, QuantWeight):
        return None if weight is None else weight.float()
    fmt = WeightFormat(KINDS[weight.packed.dtype], weight.group_size, weight.block)  # type: ignore[arg-type]
    return dequantize(PackedWeight(weight.packed, weight.scale), fmt).float()


def draw(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return random numbers, and leave everybody else's as they are."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, device=device, generator=generator).to(dtype)


def some_experts(weights: ExpertWeights) -> ExpertWeights:
    """Return a layer's first experts, and its shared ones."""

    def first(weight: Weight | None) -> Weight | None:
        if not isinstance(weight, QuantWeight):
            return None if weight is None else weight[:EXPERTS]
        return replace(weight, packed=weight.packed[:EXPERTS], scale=weight.scale[:EXPERTS])

    return replace(weights, gate_up=first(weights.gate_up), down=first(weights.down))


def linear_pairs(weight: QuantWeight, dtype: torch.dtype) -> Pairs:
    """Yield what kernels give for one matrix, and what they should."""
    exact = unpacked(weight)
    assert exact is not None
    x = draw(ROWS, weight.shape[1], dtype, weight.device)
    out = torch.full((ROWS, weight.shape[0]), float("nan"), dtype=dtype, device=weight.device)
    plain = F.linear(x.float(), exact)
    decode_gemv.linear_gemv(x[0], [weight], out[0])
    yield "one row", out[0].clone(), plain[0]
    decode_gemm.linear_gemm(x, [weight], out)
    yield "several rows", out, plain
    yield "unpacking", linear.dequantize(weight, dtype), exact


def expert_pairs(layer: LayerWeights, dtype: torch.dtype) -> Pairs:
    """Yield what kernels give for a layer's experts, and what they should."""
    weights = some_experts(layer.experts)
    exact = ExpertWeights(*map(unpacked, (weights.gate_up, weights.down)), *map(unpacked, shared_of(weights)))
    hidden, device = layer.post_norm.shape[0], layer.post_norm.device
    x = draw(ROWS, hidden, dtype, device)
    ids = topk_weights = None
    if weights.gate_up is not None:
        ids = torch.tensor([[1, 0], [0, 1], [1, 0]], dtype=torch.int32, device=device)
        topk_weights = torch.tensor([0.75, 0.5], device=device).expand(ROWS, 2).contiguous()
    routed, shared = decode_experts.gate_up_plain(x.float(), exact, ids)
    routed_out, shared_out = decode_experts.down_plain(routed, shared, exact, ids)

    def like(plain: torch.Tensor | None) -> torch.Tensor | None:
        return None if plain is None else torch.full_like(plain, float("nan"), dtype=dtype)

    inner, outer = (like(routed), like(shared)), (like(routed_out), like(shared_out))
    tokens = None if ids is None else align_plain(ids, weights.num_experts, tile_rows(weights.gate_up))
    decode_experts_gemm.gate_up_gemm(x, weights, *inner, tokens)
    decode_experts_gemm.down_gemm(*inner, weights, *outer, tokens)
    for got, want in zip(outer, (routed_out, shared_out), strict=True):
        if got is not None and want is not None:
            yield "experts of several rows", got, want
    one = torch.ones_like(layer.post_norm)
    given = x[0].float()
    scale = torch.rsqrt(given.pow(2).mean() + EPS)
    routed, shared = decode_experts.gate_up_plain(given[None] * scale, exact, None if ids is None else ids[:1])
    parts = [part.flatten() for part in (routed, shared) if part is not None]
    middle = torch.full((sum(map(len, parts)),), float("nan"), dtype=dtype, device=device)
    decode_experts_gemv.gate_up_gemv(x[0], one, EPS, weights, middle, None if ids is None else ids[0])
    yield "gates and ups of one row", middle, torch.cat(parts)
    out, want = torch.zeros_like(x[0]), torch.zeros(hidden, device=device)
    down = decode_experts.down_plain(routed, shared, exact, None if ids is None else ids[:1])
    if down[0] is not None and topk_weights is not None:
        want = want + (down[0][0] * topk_weights[0][:, None]).sum(dim=0)
    if down[1] is not None:
        want = want + down[1][0]
    first = (None, None) if ids is None or topk_weights is None else (ids[0], topk_weights[0])
    decode_experts_gemv.down_gemv(middle, weights, out, out, *first)
    yield "experts of one row", out, want
    if ids is not None and isinstance(weights.gate_up, QuantWeight) and isinstance(weights.down, QuantWeight):
        rows, row_map = permuted_experts(x, weights.gate_up, weights.down, ids)
        assert routed_out is not None
        yield "experts of a prompt", rows[row_map.long()], routed_out.flatten(0, 1)


def shared_of(weights: ExpertWeights) -> tuple[Weight | None, Weight | None, Weight | None]:
    """Return the matrices of the shared experts."""
    return weights.shared_gate, weights.shared_up, weights.shared_down


def formats_of(layer: LayerWeights) -> list[dict[str, int]]:
    """Return the formats of a layer's weights."""
    weights = (layer.attention.out, layer.experts.gate_up, layer.experts.down, *shared_of(layer.experts))
    return [format_of(weight) for weight in weights if weight is not None]


def is_packed(weights: DecoderWeights) -> bool:
    """Whether some weights are packed."""
    layers = weights.layers
    every = [weights.head, *(layer.attention.out for layer in layers), *(layer.experts.down for layer in layers)]
    every += [layer.experts.shared_down for layer in layers]
    return any(isinstance(weight, QuantWeight) for weight in every)


@torch.no_grad()
def check_packed(weights: DecoderWeights) -> None:
    """Compare the kernels over a model's packed weights with the plain forms; does nothing for plain weights.

    Raises:
        RuntimeError: a result is too far off.
    """
    if not is_packed(weights):
        return
    dtype, pairs = weights.embedding.dtype, list[Pairs]()
    # A dense layer is one with shared experts alone.
    layers = [layer for layer in weights.layers if layer.routing is not None] or list(weights.layers)
    for layer in {str(formats_of(layer)): layer for layer in reversed(layers)}.values():
        pairs.append(expert_pairs(layer, dtype))
        if isinstance(layer.attention.out, QuantWeight):
            pairs.append(linear_pairs(layer.attention.out, dtype))
    if isinstance(weights.head, QuantWeight):
        packed, scale = weights.head.packed, weights.head.scale
        rows = HEAD_ROWS // BLOCK if weights.head.block else HEAD_ROWS
        pairs.append(linear_pairs(replace(weights.head, packed=packed[:HEAD_ROWS], scale=scale[:rows]), dtype))
    for part in pairs:
        for name, got, want in part:
            error = float((got.float() - want).norm() / want.norm().clamp_min(1e-30))
            if not error <= LARGEST_ERROR:  # also where it is no number
                raise RuntimeError(f"kernels over packed weights are off by {error:.3f} ({name})")
