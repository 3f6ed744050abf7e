"""One decoding step of the language model as a chain of kernels over static buffers.

Batch 1 takes eight kernels a layer, each a GEMV over one weight; a small batch takes eleven, as GEMMs; a large one is
multiplied by cuBLAS, and its experts as in a prefill. Each is the plain PyTorch form of `deepseek_vl2.models` rounded
in fewer places.

Shape suffixes: B rows, C capacity of the cache in tokens, H hidden size, N attention heads, R rank of the latent, P
rotated part of a head, E routed experts, K experts of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from ..ops.triton import (
    decode_experts_gemm,
    decode_experts_gemv,
    decode_gemm,
    decode_gemv,
    decode_mha,
    decode_mla,
    linear,
    norm,
    prefill_experts,
    router,
)
from ..ops.triton.common import multiprocessors, power_of_two
from ..ops.triton.decode_align import tile_rows
from ..ops.triton.decode_experts import ExpertWeights
from .decode_buffers import DecodeBuffers
from .decoder_weights import AttentionWeights, DecoderWeights, LayerWeights

# Up to this many rows, each row may read the heads' part of kv_b_proj for itself: it stays in the L2 cache.
MAX_ROWS_PER_HEAD = 4
# Beyond, experts have rows enough for the products of a prefill.
MAX_SMALL_BATCH = 64


LayerPool = tuple[torch.Tensor, ...]


def mha_kv_splits(rows: int, heads: int, programs: int) -> int:
    """Return into how many parts each row's keys are cut for plain multi-head attention.

    Two programs on each multiprocessor keep it busy with a single row's cache; those for several rows are of one warp,
    so more are wanted.
    """
    programs *= 2 if rows == 1 else 18
    return min(power_of_two(triton.cdiv(programs, rows * heads)), decode_mla.MAX_SPLITS)


def project(
    weights: AttentionWeights, buffers: DecodeBuffers, source: torch.Tensor, normed: tuple[torch.Tensor, float]
) -> None:
    """Write queries and what is cached, projected, into "projected"; a single row is normed on the way."""
    width = sum(weight.shape[0] for weight in weights.projections)
    projected = buffers.take("projected", buffers.count, width)
    if buffers.count == 1:
        decode_gemv.linear_gemv(source[0], weights.projections, projected[0], *normed, **buffers.pdl)
    elif buffers.count <= MAX_SMALL_BATCH:
        decode_gemm.linear_gemm(source, weights.projections, projected, **buffers.pdl)
    else:
        for weight, span in decode_gemv.side_by_side(weights.projections):
            projected[:, span] = linear.linear(source, weight)


def attend_mla(weights: AttentionWeights, buffers: DecodeBuffers, cache: torch.Tensor, mixed: torch.Tensor) -> None:
    """Write each head's attention over the latents, [B, N, value size], from "projected"."""
    kv_b = weights.kv_b
    assert kv_b is not None and weights.norm is not None
    rows, heads, rank, rotated = buffers.count, weights.heads, kv_b.shape[2], buffers.cos.shape[1]
    width = sum(weight.shape[0] for weight in weights.projections)
    projected = buffers.take("projected", rows, width)
    query = buffers.take("query", rows, heads, rank + rotated)
    alone = rows <= MAX_ROWS_PER_HEAD
    decode_mla.prepare(
        projected, kv_b, weights.norm, weights.eps, buffers.cos, buffers.sin, buffers.rows.positions,
        buffers.rows.starts, query, cache, alone, **buffers.pdl,
    )  # fmt: skip
    if not alone:
        unrotated = weights.unrotated
        heads_query = projected[:, : heads * (unrotated + rotated)].unflatten(1, (heads, -1))[..., :unrotated]
        decode_gemm.batched_gemm(heads_query, kv_b[:, :unrotated].mT, query[..., :rank], **buffers.pdl)
    splits = decode_mla.num_kv_splits(rows, heads, multiprocessors(buffers.hidden.device))
    partial = buffers.take("partial", rows, splits, heads, rank, dtype=torch.float32)
    lse = buffers.take("lse", rows, splits, heads, dtype=torch.float32)
    rows_ = buffers.rows
    decode_mla.attend_splits(query, cache, rows_.positions, rows_.starts, weights.scaling, partial, lse, **buffers.pdl)
    if alone:
        decode_mla.reduce_splits(partial, lse, buffers.rows.positions, mixed, kv_b, **buffers.pdl)
        return
    latents = buffers.take("latents", rows, heads, rank)
    decode_mla.reduce_splits(partial, lse, buffers.rows.positions, latents, **buffers.pdl)
    decode_gemm.batched_gemm(latents, kv_b[:, weights.unrotated :], mixed, **buffers.pdl)


def attend_mha(weights: AttentionWeights, buffers: DecodeBuffers, cache: LayerPool, mixed: torch.Tensor) -> None:
    """Write each head's attention over keys and values, [B, N, D], from "projected"."""
    rows, heads, size, pdl = buffers.count, weights.heads, weights.size, buffers.pdl
    projected = buffers.take("projected", rows, (heads + 2 * weights.key_heads) * size)
    query = buffers.take("query", rows, heads, size)
    keys, values = cache
    positions, starts = buffers.rows.positions, buffers.rows.starts
    decode_mha.rotate_and_write(projected, buffers.cos, buffers.sin, positions, starts, query, keys, values, **pdl)
    splits = mha_kv_splits(rows, heads, multiprocessors(buffers.hidden.device))
    partial = buffers.take("partial", rows, splits, heads, size, dtype=torch.float32)
    lse = buffers.take("lse", rows, splits, heads, dtype=torch.float32)
    decode_mha.attend_splits(query, keys, values, positions, starts, weights.scaling, partial, lse, **pdl)
    decode_mla.reduce_splits(partial, lse, buffers.rows.positions, mixed, step=decode_mha.kv_block(rows), **pdl)


def attend(weights: AttentionWeights, buffers: DecodeBuffers, cache: LayerPool) -> None:
    """Add the attention's output to the hidden state, from "projected"."""
    mixed = buffers.take("mixed", buffers.count, weights.heads, weights.size)
    if weights.kv_b is not None:
        attend_mla(weights, buffers, cache[0], mixed)
    else:
        attend_mha(weights, buffers, cache, mixed)
    hidden = buffers.hidden
    if buffers.count == 1:
        decode_gemv.linear_gemv(mixed[0].flatten(), [weights.out], hidden[0], residual_N=hidden[0], **buffers.pdl)
    elif buffers.count <= MAX_SMALL_BATCH:
        decode_gemm.linear_gemm(mixed.flatten(1), [weights.out], hidden, hidden, **buffers.pdl)
    else:
        linear.add_linear(mixed.flatten(1), weights.out, hidden)


def mlp_gemv(layer: LayerWeights, buffers: DecodeBuffers) -> None:
    """Add a layer's experts, or its dense MLP, to the hidden state of one row, by GEMV."""
    hidden, routing, weights, pdl = buffers.hidden[0], layer.routing, layer.experts, buffers.pdl
    top_k = routing.top_k if routing is not None else 0
    inner = buffers.take("inner", top_k * weights.intermediate_size + weights.shared_intermediate_size)
    if routing is None or layer.gate is None:
        decode_experts_gemv.gate_up_gemv(hidden, layer.post_norm, layer.eps, weights, inner, **pdl)
        decode_experts_gemv.down_gemv(inner, weights, hidden, hidden, **pdl)
        return
    logits = buffers.take("gate", 1, routing.num_experts, dtype=torch.float32)
    ids = buffers.take(f"ids {id(layer)}", 1, top_k, dtype=torch.int32)
    topk_weights = buffers.take("topk weights", 1, top_k, dtype=torch.float32)
    router.route(
        buffers.hidden, layer.post_norm, layer.eps, layer.gate, layer.bias, routing, logits, buffers.counters, ids,
        topk_weights, **pdl,
    )  # fmt: skip
    decode_experts_gemv.gate_up_gemv(hidden, layer.post_norm, layer.eps, weights, inner, ids[0], **pdl)
    decode_experts_gemv.down_gemv(inner, weights, hidden, hidden, ids[0], topk_weights[0], **pdl)


def mlp_gemm(
    model: DecoderWeights, index: int, buffers: DecodeBuffers, next_norm: torch.Tensor, next_eps: float
) -> None:
    """Add a layer's experts, or its dense MLP, to the hidden states, and write the next norm of them."""
    layer, hidden, normed = model.layers[index], buffers.hidden, buffers.normed
    routing, weights = layer.routing, layer.experts
    pdl, small = buffers.pdl, buffers.count <= MAX_SMALL_BATCH
    rows, width = hidden.shape
    ids = tokens = topk_weights = routed = routed_out = shared = shared_out = row_map = None
    if routing is not None and layer.gate is not None:
        ids = buffers.take(f"ids {id(layer)}", rows, routing.top_k, dtype=torch.int32)
        topk_weights = buffers.take("topk weights", rows, routing.top_k, dtype=torch.float32)
        logits = buffers.take("gate", rows, routing.num_experts, dtype=torch.float32)
        tokens = buffers.expert_tokens(index, routing, tile_rows(weights.gate_up)) if small else None
        router.route(
            hidden, layer.post_norm, layer.eps, layer.gate, layer.bias, routing, logits, buffers.counters, ids,
            topk_weights, normed, live_rows=buffers.rows.live if small else None, tokens=tokens, **pdl,
        )  # fmt: skip
        routed = buffers.take("routed", rows, routing.top_k, weights.intermediate_size)
        routed_out = buffers.take("routed out", rows, routing.top_k, width)
    else:
        norm.fused_add_rms_norm(hidden, None, None, None, layer.post_norm, layer.eps, hidden, normed, **pdl)
    if weights.shared_gate is not None:
        shared = buffers.take("shared", rows, weights.shared_intermediate_size)
        shared_out = buffers.take("shared out", rows, width)
    if small:
        decode_experts_gemm.gate_up_gemm(normed, weights, routed, shared, tokens, PDL_LAUNCH=bool(pdl))
        decode_experts_gemm.down_gemm(routed, shared, weights, routed_out, shared_out, tokens, **pdl)
    else:
        routed_out, row_map, shared_out = large_batch_mlp(weights, normed, ids)
    norm.fused_add_rms_norm(
        hidden, routed_out, topk_weights, shared_out, next_norm, next_eps, hidden, normed, row_map_P=row_map, **pdl
    )


def large_batch_mlp(
    weights: ExpertWeights, normed_BH: torch.Tensor, ids_BK: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the routed experts' outputs in the order of experts, their row map, and the shared experts' output."""
    routed = row_map = shared = None
    if ids_BK is not None and weights.gate_up is not None and weights.down is not None:
        routed, row_map = prefill_experts.permuted_experts(normed_BH, weights.gate_up, weights.down, ids_BK)
    if weights.shared_gate is not None and weights.shared_up is not None and weights.shared_down is not None:
        gate, up = linear.linear(normed_BH, weights.shared_gate), linear.linear(normed_BH, weights.shared_up)
        shared = linear.linear(prefill_experts.silu_and_mul(gate, up), weights.shared_down)
    return routed, row_map, shared


def predict(weights: DecoderWeights, buffers: DecodeBuffers) -> None:
    """Write the logits, and the likeliest ids in place of those read."""
    if buffers.count > 1:
        if buffers.count <= MAX_SMALL_BATCH:
            decode_gemm.linear_gemm(buffers.normed, [weights.head], buffers.logits, rounded=True, **buffers.pdl)
        else:
            buffers.logits.copy_(linear.linear(buffers.normed, weights.head))
        parts = triton.cdiv(weights.head.shape[0], decode_gemv.ARGMAX_BLOCK)
        partials = (
            buffers.take("best", buffers.count, parts, dtype=torch.float32),
            buffers.take("best id", buffers.count, parts, dtype=torch.int32),
        )
        decode_gemv.partial_argmax(buffers.logits, partials, **buffers.pdl)
        decode_gemv.reduce_argmax(partials, buffers.rows.tokens, **buffers.pdl)
        return
    block = decode_gemv.gemv_blocks(weights.head, weights.head.shape[0])["BLOCK_N"]
    programs = triton.cdiv(weights.head.shape[0], block)
    partials = (
        buffers.take("best", programs, dtype=torch.float32),
        buffers.take("best id", programs, dtype=torch.int32),
    )
    hidden, logits = buffers.hidden[0], buffers.logits[0]
    pdl = buffers.pdl
    decode_gemv.linear_gemv(
        hidden, [weights.head], logits, weights.norm, weights.eps, rounded=True, partials=partials, **pdl
    )
    decode_gemv.reduce_argmax(partials, buffers.rows.tokens, **pdl)


def decode_stage(
    weights: DecoderWeights, buffers: DecodeBuffers, pools: Sequence[LayerPool], first: int, last: int
) -> None:
    """Run some layers for one token of each row.

    The first layer's stage begins with the rows' tokens, others with what `DecodeBuffers.hidden` holds; the last one's
    ends with logits and the likeliest next tokens. Pools and positions are brought forward.
    """
    layers, single = weights.layers, buffers.count == 1
    if first == 0:
        torch.index_select(weights.embedding, 0, buffers.rows.tokens, out=buffers.hidden)
    if not single:
        buffers.expert_counts.zero_()  # which a large batch does not use
        scale, eps = layers[first].input_norm, layers[first].eps
        norm.fused_add_rms_norm(buffers.hidden, None, None, None, scale, eps, buffers.hidden, buffers.normed)
    for index in range(first, last):
        layer = layers[index]
        source = buffers.hidden if single else buffers.normed
        project(layer.attention, buffers, source, (layer.input_norm, layer.eps))
        attend(layer.attention, buffers, pools[index])
        if single:
            mlp_gemv(layer, buffers)
            continue
        # A stage that ends here has no use for the next norm, whose weight may lie on another device.
        following = layers[index + 1] if index + 1 < last else layer
        next_norm, next_eps = following.input_norm, following.eps
        if index + 1 == len(layers):
            next_norm, next_eps = weights.norm, weights.eps
        mlp_gemm(weights, index, buffers, next_norm, next_eps)
    if last == len(layers):
        predict(weights, buffers)
    buffers.rows.positions.add_(buffers.rows.advance)


def experts_hit(weights: DecoderWeights, buffers: DecodeBuffers) -> list[int]:
    """Return how many experts of each layer the last step read."""
    counts = []
    for layer in weights.layers:
        if layer.routing is not None:
            ids = buffers.take(f"ids {id(layer)}", buffers.count, layer.routing.top_k, dtype=torch.int32)
            counts.append(int(ids.unique().numel()))
    return counts
