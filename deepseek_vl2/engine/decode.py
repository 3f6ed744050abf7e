"""One decoding step of the language model as a chain of kernels over static buffers.

Batch 1 takes eight kernels a layer, each a pass over one weight; a few rows take eleven, as small matrix products.
Each is the plain PyTorch form of `deepseek_vl2.models` rounded in fewer places.

Shape suffixes: B rows, C room of the cache in tokens, H hidden size, N attention heads, R rank of the latent, P rotated
part of a head, E routed experts, K experts of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from ..ops.triton import (
    decode_experts_gemm,
    decode_experts_gemv,
    decode_gemm,
    decode_gemv,
    decode_mha,
    decode_mla,
    norm,
    router,
)
from ..ops.triton.common import early_start, power_of_two
from ..ops.triton.decode_experts import ExpertWeights
from ..ops.triton.router import GateRule

# Up to this many rows, each row may read the heads' part of kv_b_proj for itself: it stays in the L2 cache.
MAX_ROWS_PER_HEAD = 4
MAX_ROWS = 64
MAX_EARLY_ROWS = 16
# An H100 and an H200 have as many.
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Attention:
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

    projections: tuple[torch.Tensor, ...]
    out: torch.Tensor
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
class Layer:
    """The weights of a layer; ``gate`` and what belongs to it are missing in a dense one."""

    input_norm: torch.Tensor
    attention: Attention
    post_norm: torch.Tensor
    eps: float
    experts: ExpertWeights
    gate: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    rule: GateRule | None = None


@dataclass(frozen=True)
class Weights:
    """The weights of a language model, as its modules hold them: nothing is copied."""

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    eps: float
    head: torch.Tensor


Cache = tuple[torch.Tensor, ...]


@dataclass
class Buffers:
    """All that a step reads and writes besides weights; graphs hold the addresses.

    Fields:
        tokens: the ids to read, [B], int64; replaced by the likeliest next ones.
        positions: where they stand, [B], int32; advanced by one.
        logits: [B, vocabulary], float32.
        cos: table for all positions, [C, rotated], and ``sin``.
        caches: of each layer: ([B, C, R + P],) or keys and values, [B, M, C, D] each.
        tickets: [B], 0 between the kernels, see `router.route`.
        early: the options of launches, see `primitives.early_start`.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    caches: list[Cache]
    hidden: torch.Tensor
    normed: torch.Tensor
    tickets: torch.Tensor
    early: dict[str, Any] = field(default_factory=dict)
    scratch: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def room(self) -> int:
        """C."""
        return self.cos.shape[0]

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return scratch memory of that name and shape; it is made at the first call, and shared between layers."""
        dtype = dtype or self.hidden.dtype
        key = f"{name} {list(shape)} {dtype}"
        if key not in self.scratch:
            self.scratch[key] = torch.empty(shape, dtype=dtype, device=self.hidden.device)
        return self.scratch[key]


def new_cache(attention: Attention, rows: int, cos: torch.Tensor) -> Cache:
    """Return a layer's empty cache."""
    room, rotated = cos.shape
    like = attention.out
    if attention.kv_b is not None:
        return (like.new_zeros(rows, room, attention.kv_b.shape[2] + rotated),)
    shape = (rows, attention.key_heads, room, attention.size)
    return like.new_zeros(shape), like.new_zeros(shape)


def new_buffers(weights: Weights, rows: int, cos: torch.Tensor, sin: torch.Tensor, early: bool = True) -> Buffers:
    """Return buffers for that many rows; the tables' length is the cache's room.

    With ``early`` kernels start before the ones in front of them have ended, where the device can do that: all of those
    for one row, and for up to `MAX_EARLY_ROWS` all but the experts' first products. For more rows it was slower.

    Raises:
        ValueError: more rows than the kernels take.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"The decoding kernels take 1 to {MAX_ROWS} rows, got {rows}.")
    device, (vocabulary, hidden) = weights.head.device, weights.head.shape
    return Buffers(
        tokens=torch.zeros(rows, dtype=torch.long, device=device),
        positions=torch.zeros(rows, dtype=torch.int32, device=device),
        logits=torch.zeros(rows, vocabulary, device=device),
        cos=cos.contiguous(),
        sin=sin.contiguous(),
        caches=[new_cache(layer.attention, rows, cos) for layer in weights.layers],
        hidden=weights.head.new_zeros(rows, hidden),
        normed=weights.head.new_zeros(rows, hidden),
        tickets=torch.zeros(rows, dtype=torch.int32, device=device),
        early=early_start(device) if early and rows <= MAX_EARLY_ROWS else {},
    )


def multihead_splits(rows: int, heads: int) -> int:
    """Return into how many parts each row's keys are cut for plain multi-head attention.

    Two programs on each multiprocessor keep it busy with a single row's cache; those for several rows are of one warp,
    so more are wanted.
    """
    programs = MULTIPROCESSORS * (2 if rows == 1 else 18)
    return min(power_of_two(triton.cdiv(programs, rows * heads)), decode_mla.MAX_SPLITS)


def project(weights: Attention, buffers: Buffers, source: torch.Tensor, normed: tuple[torch.Tensor, float]) -> None:
    """Write queries and what is cached, projected, into "projected"; a single row is normed on the way."""
    width = sum(weight.shape[0] for weight in weights.projections)
    projected = buffers.take("projected", buffers.rows, width)
    if buffers.rows == 1:
        decode_gemv.one_row_linear(source[0], weights.projections, projected[0], *normed, **buffers.early)
    else:
        decode_gemm.few_rows_linear(source, weights.projections, projected, **buffers.early)


def attend_latent(weights: Attention, buffers: Buffers, cache: torch.Tensor, mixed: torch.Tensor) -> None:
    """Write each head's attention over the latents, [B, N, value size], from "projected"."""
    kv_b = weights.kv_b
    assert kv_b is not None and weights.norm is not None
    rows, heads, rank, rotated = buffers.rows, weights.heads, kv_b.shape[2], buffers.cos.shape[1]
    width = sum(weight.shape[0] for weight in weights.projections)
    projected = buffers.take("projected", rows, width)
    query = buffers.take("query", rows, heads, rank + rotated)
    alone = rows <= MAX_ROWS_PER_HEAD
    decode_mla.prepare(
        projected, kv_b, weights.norm, weights.eps, buffers.cos, buffers.sin, buffers.positions, query, cache, alone,
        **buffers.early,
    )  # fmt: skip
    if not alone:
        unrotated = weights.unrotated
        heads_query = projected[:, : heads * (unrotated + rotated)].unflatten(1, (heads, -1))[..., :unrotated]
        decode_gemm.few_rows_of_groups(heads_query, kv_b[:, :unrotated].mT, query[..., :rank], **buffers.early)
    splits = decode_mla.splits_of(rows, heads, MULTIPROCESSORS)
    partial = buffers.take("partial", rows, splits, heads, rank, dtype=torch.float32)
    share = buffers.take("share", rows, splits, heads, dtype=torch.float32)
    decode_mla.attend_splits(query, cache, buffers.positions, weights.scaling, partial, share, **buffers.early)
    if alone:
        decode_mla.join_splits(partial, share, buffers.positions, mixed, kv_b, **buffers.early)
        return
    latents = buffers.take("latents", rows, heads, rank)
    decode_mla.join_splits(partial, share, buffers.positions, latents, **buffers.early)
    decode_gemm.few_rows_of_groups(latents, kv_b[:, weights.unrotated :], mixed, **buffers.early)


def attend_multihead(weights: Attention, buffers: Buffers, cache: Cache, mixed: torch.Tensor) -> None:
    """Write each head's attention over keys and values, [B, N, D], from "projected"."""
    rows, heads, size, early = buffers.rows, weights.heads, weights.size, buffers.early
    projected = buffers.take("projected", rows, (heads + 2 * weights.key_heads) * size)
    query = buffers.take("query", rows, heads, size)
    keys, values = cache
    decode_mha.rotate_and_write(projected, buffers.cos, buffers.sin, buffers.positions, query, keys, values, **early)
    splits = multihead_splits(rows, heads)
    partial = buffers.take("partial", rows, splits, heads, size, dtype=torch.float32)
    share = buffers.take("share", rows, splits, heads, dtype=torch.float32)
    decode_mha.attend_splits(query, keys, values, buffers.positions, weights.scaling, partial, share, **early)
    decode_mla.join_splits(partial, share, buffers.positions, mixed, step=decode_mha.keys_a_step(rows), **early)


def attend(weights: Attention, buffers: Buffers, cache: Cache) -> None:
    """Add the attention's output to the hidden state, from "projected"."""
    mixed = buffers.take("mixed", buffers.rows, weights.heads, weights.size)
    if weights.kv_b is not None:
        attend_latent(weights, buffers, cache[0], mixed)
    else:
        attend_multihead(weights, buffers, cache, mixed)
    hidden = buffers.hidden
    if buffers.rows == 1:
        decode_gemv.one_row_linear(mixed[0].flatten(), [weights.out], hidden[0], residual_N=hidden[0], **buffers.early)
    else:
        decode_gemm.few_rows_linear(mixed.flatten(1), [weights.out], hidden, hidden, **buffers.early)


def feed_one_row(layer: Layer, buffers: Buffers) -> None:
    """Add a layer's experts, or its dense MLP, to the hidden state of one row."""
    hidden, rule, weights, early = buffers.hidden[0], layer.rule, layer.experts, buffers.early
    chosen = rule.chosen if rule is not None else 0
    inner = buffers.take("inner", chosen * weights.inner + weights.shared_inner)
    if rule is None or layer.gate is None:
        decode_experts_gemv.one_row_inner(hidden, layer.post_norm, layer.eps, weights, inner, **early)
        decode_experts_gemv.one_row_down(inner, weights, hidden, hidden, **early)
        return
    logits = buffers.take("gate", 1, rule.experts, dtype=torch.float32)
    ids = buffers.take(f"ids {id(layer)}", 1, chosen, dtype=torch.int32)
    shares = buffers.take("shares", 1, chosen, dtype=torch.float32)
    router.route(
        buffers.hidden, layer.post_norm, layer.eps, layer.gate, layer.bias, rule, logits, buffers.tickets, ids, shares,
        **early,
    )  # fmt: skip
    decode_experts_gemv.one_row_inner(hidden, layer.post_norm, layer.eps, weights, inner, ids[0], **early)
    decode_experts_gemv.one_row_down(inner, weights, hidden, hidden, ids[0], shares[0], **early)


def feed_few_rows(layer: Layer, buffers: Buffers, next_norm: torch.Tensor, next_eps: float) -> None:
    """Add a layer's experts, or its dense MLP, to the hidden states, and write the next norm of them."""
    hidden, normed, rule, weights = buffers.hidden, buffers.normed, layer.rule, layer.experts
    early = buffers.early
    rows, width = hidden.shape
    ids = shares = routed = routed_out = shared = shared_out = None
    if rule is not None and layer.gate is not None:
        ids = buffers.take(f"ids {id(layer)}", rows, rule.chosen, dtype=torch.int32)
        shares = buffers.take("shares", rows, rule.chosen, dtype=torch.float32)
        logits = buffers.take("gate", rows, rule.experts, dtype=torch.float32)
        router.route(
            hidden, layer.post_norm, layer.eps, layer.gate, layer.bias, rule, logits, buffers.tickets, ids, shares,
            normed, **early,
        )  # fmt: skip
        routed = buffers.take("routed", rows, rule.chosen, weights.inner)
        routed_out = buffers.take("routed out", rows, rule.chosen, width)
    else:
        norm.finish_layer(hidden, None, None, None, layer.post_norm, layer.eps, hidden, normed, **early)
    if weights.shared_gate is not None:
        shared = buffers.take("shared", rows, weights.shared_inner)
        shared_out = buffers.take("shared out", rows, width)
    decode_experts_gemm.few_rows_inner(normed, weights, routed, shared, ids, NEXT_EARLY=bool(early))
    decode_experts_gemm.few_rows_down(routed, shared, weights, routed_out, shared_out, ids, **early)
    norm.finish_layer(hidden, routed_out, shares, shared_out, next_norm, next_eps, hidden, normed, **early)


def predict(weights: Weights, buffers: Buffers) -> None:
    """Write the logits, and the likeliest ids in place of those read."""
    if buffers.rows > 1:
        decode_gemm.few_rows_linear(buffers.normed, [weights.head], buffers.logits, rounded=True, **buffers.early)
        parts = triton.cdiv(weights.head.shape[0], decode_gemv.PART)
        best = (
            buffers.take("best", buffers.rows, parts, dtype=torch.float32),
            buffers.take("best id", buffers.rows, parts, dtype=torch.int32),
        )
        decode_gemv.best_of_parts(buffers.logits, best, **buffers.early)
        decode_gemv.pick_best(best, buffers.tokens, **buffers.early)
        return
    block = decode_gemv.one_row_blocks(weights.head.shape[1], weights.head.shape[0])["BLOCK_N"]
    programs = triton.cdiv(weights.head.shape[0], block)
    best = (
        buffers.take("best", programs, dtype=torch.float32),
        buffers.take("best id", programs, dtype=torch.int32),
    )
    hidden, logits = buffers.hidden[0], buffers.logits[0]
    early = buffers.early
    decode_gemv.one_row_linear(
        hidden, [weights.head], logits, weights.norm, weights.eps, rounded=True, best=best, **early
    )
    decode_gemv.pick_best(best, buffers.tokens, **early)


def decode_step(weights: Weights, buffers: Buffers) -> None:
    """Read one token of each row: caches, logits, tokens and positions are all brought forward."""
    torch.index_select(weights.embedding, 0, buffers.tokens, out=buffers.hidden)
    layers, single = weights.layers, buffers.rows == 1
    if not single:
        norm.finish_layer(
            buffers.hidden, None, None, None, layers[0].input_norm, layers[0].eps, buffers.hidden, buffers.normed
        )
    for index, (layer, cache) in enumerate(zip(layers, buffers.caches, strict=True)):
        source = buffers.hidden if single else buffers.normed
        project(layer.attention, buffers, source, (layer.input_norm, layer.eps))
        attend(layer.attention, buffers, cache)
        if single:
            feed_one_row(layer, buffers)
            continue
        last = index + 1 == len(layers)
        next_norm, next_eps = (
            (weights.norm, weights.eps) if last else (layers[index + 1].input_norm, layers[index + 1].eps)
        )
        feed_few_rows(layer, buffers, next_norm, next_eps)
    predict(weights, buffers)
    buffers.positions.add_(1)


def experts_hit(weights: Weights, buffers: Buffers) -> list[int]:
    """Return how many experts of each layer the last step read."""
    counts = []
    for layer in weights.layers:
        if layer.rule is not None:
            ids = buffers.take(f"ids {id(layer)}", buffers.rows, layer.rule.chosen, dtype=torch.int32)
            counts.append(int(ids.unique().numel()))
    return counts
