"""Each decoding kernel against its plain form in float32, on the GPU, at a model's own shapes and weights.

Inputs are drawn anew, outputs are poisoned with NaN before. The figure is |out - plain| / |plain|.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from deepseek_vl2.engine.decoder_weights import DecoderWeights, LayerWeights
from deepseek_vl2.engine.self_check import unpacked
from deepseek_vl2.ops.triton import (
    decode_align,
    decode_experts,
    decode_experts_gemm,
    decode_experts_gemv,
    decode_gemm,
    decode_gemv,
    decode_mha,
    decode_mla,
    norm,
    router,
)
from deepseek_vl2.ops.triton.common import multiprocessors
from deepseek_vl2.ops.triton.decode_experts import ExpertWeights
from deepseek_vl2.ops.triton.weights import Weight

TOLERANCE = 1.2e-2  # bfloat16: half a step is 2^-9, and a chain of kernels rounds some five times
POSITION = 1450

Check = tuple[str, Callable[[], float]]


def error(out: torch.Tensor, plain: torch.Tensor) -> float:
    """Return the relative error; not a number where something was not written."""
    return float((out.double() - plain.double()).norm() / plain.double().norm())


class KernelChecks:
    """The checks of one model's kernels at one number of rows."""

    def __init__(self, weights: DecoderWeights, rows: int) -> None:
        self.weights, self.rows = weights, rows
        self.layer: LayerWeights = next(layer for layer in weights.layers if layer.routing is not None)
        self.dtype, self.device = weights.embedding.dtype, weights.head.device
        self.hidden = weights.head.shape[1]

    def draw(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Return random numbers in the model's dtype."""
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return memory full of NaN."""
        return torch.full(shape, float("nan"), device=self.device, dtype=dtype or self.dtype)

    def linear(self, weights: tuple[Weight, ...], normed: bool, residual: bool, float_out: bool) -> float:
        """Check a product of the rows with weights side by side."""
        width = sum(weight.shape[0] for weight in weights)
        x, norm_weight = self.draw(self.rows, weights[0].shape[1]), self.draw(weights[0].shape[1])
        added = self.draw(self.rows, width) if residual else None
        out = self.poisoned(self.rows, width, dtype=torch.float32 if float_out else None)
        fused = norm_weight if normed and self.rows == 1 else None
        if self.rows == 1:
            decode_gemv.linear_gemv(x[0], weights, out[0], fused, 1e-6, None if added is None else added[0])
        else:
            decode_gemm.linear_gemm(x, weights, out, added)
        wide = [exact for weight in weights if (exact := unpacked(weight)) is not None]
        plain_norm = None if fused is None else fused.float()
        plain = decode_gemv.norm_linear_plain(
            x.float(), wide, plain_norm, 1e-6, None if added is None else added.float()
        )
        return error(out, plain)

    def best(self) -> float:
        """Check that the likeliest of one row is found; 0 or 1."""
        head = self.weights.head
        x, out = self.draw(self.hidden), self.poisoned(head.shape[0], dtype=torch.float32)
        programs = -(-head.shape[0] // decode_gemv.gemv_blocks(head, head.shape[0])["BLOCK_N"])
        best = (
            self.poisoned(programs, dtype=torch.float32),
            torch.zeros(programs, dtype=torch.int32, device=self.device),
        )
        chosen = torch.full((1,), -1, device=self.device)
        decode_gemv.linear_gemv(x, [head], out, self.weights.norm, 1e-6, rounded=True, partials=best)
        decode_gemv.reduce_argmax(best, chosen)
        return float(out[chosen[0]] != out.max())

    def attention(self) -> float:
        """Check the layer's attention, from projections to heads; the worst of cache, queries and result."""
        return self._latent() if self.layer.attention.kv_b is not None else self._multihead()

    def _positions(self) -> torch.Tensor:
        return torch.randint(POSITION // 2, POSITION, (self.rows,), device=self.device).int()

    def _starts(self) -> torch.Tensor:
        return torch.arange(self.rows, device=self.device) * POSITION

    def _tables(self, rotated: int) -> tuple[torch.Tensor, torch.Tensor]:
        steps = 10000.0 ** (-torch.arange(rotated // 2, device=self.device) / (rotated // 2))
        angles = torch.outer(torch.arange(POSITION, device=self.device), steps).repeat(1, 2)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _latent(self) -> float:
        a, rows = self.layer.attention, self.rows
        assert a.kv_b is not None and a.norm is not None
        rank, rotated = a.kv_b.shape[2], a.projections[1].shape[0] - a.kv_b.shape[2]
        width = sum(weight.shape[0] for weight in a.projections)
        projected, positions = self.draw(rows, width), self._positions()
        (cos, sin), cache = self._tables(rotated), self.draw(rows, POSITION, rank + rotated)
        starts, pool = self._starts(), cache.flatten(0, 1)
        query = self.poisoned(rows, a.heads, rank + rotated)
        decode_mla.prepare(projected, a.kv_b, a.norm, a.eps, cos, sin, positions, starts, query, pool, True)
        at, split = positions.long(), a.heads * (a.unrotated + rotated)
        plain_query, plain_token = decode_mla.prepare_plain(
            projected[:, :split].unflatten(1, (a.heads, -1)).float(), projected[:, split:].float(), a.kv_b.float(),
            a.norm.float(), a.eps, cos[at].float(), sin[at].float(),
        )  # fmt: skip
        token = cache[torch.arange(rows, device=self.device), at]
        worst = max(error(query, plain_query), error(token, plain_token))
        splits = decode_mla.num_kv_splits(rows, a.heads, multiprocessors(query.device))
        partial = self.poisoned(rows, splits, a.heads, rank, dtype=torch.float32)
        share = self.poisoned(rows, splits, a.heads, dtype=torch.float32)
        decode_mla.attend_splits(query, pool, positions, starts, a.scaling, partial, share)
        out = self.poisoned(rows, a.heads, a.size)
        decode_mla.reduce_splits(partial, share, positions, out, a.kv_b)
        mixed = decode_mla.attend_plain(query.float(), cache.float(), positions, rank, a.scaling)
        plain = torch.einsum("bnr,nvr->bnv", mixed, a.kv_b[:, a.unrotated :].float())
        return max(worst, error(out, plain))

    def heads(self) -> float:
        """Check the products with each head's part of kv_b_proj for several rows."""
        kv_b, unrotated = self.layer.attention.kv_b, self.layer.attention.unrotated
        assert kv_b is not None
        count, _, rank = kv_b.shape
        x, out = self.draw(self.rows, count, unrotated), self.poisoned(self.rows, count, rank)
        decode_gemm.batched_gemm(x, kv_b[:, :unrotated].mT, out)
        worst = error(out, torch.einsum("bnd,ndr->bnr", x.float(), kv_b[:, :unrotated].float()))
        x, out = self.draw(self.rows, count, rank), self.poisoned(self.rows, count, kv_b.shape[1] - unrotated)
        decode_gemm.batched_gemm(x, kv_b[:, unrotated:], out)
        return max(worst, error(out, torch.einsum("bnr,nvr->bnv", x.float(), kv_b[:, unrotated:].float())))

    def _multihead(self) -> float:
        a, rows = self.layer.attention, self.rows
        projected, positions = self.draw(rows, (a.heads + 2 * a.key_heads) * a.size), self._positions()
        cos, sin = self._tables(a.size)
        key_pool, value_pool = (self.draw(rows * POSITION, a.key_heads, a.size) for _ in range(2))
        keys, values = (pool.unflatten(0, (rows, POSITION)).transpose(1, 2) for pool in (key_pool, value_pool))
        starts = self._starts()
        query = self.poisoned(rows, a.heads, a.size)
        decode_mha.rotate_and_write(projected, cos, sin, positions, starts, query, key_pool, value_pool)
        at, index = positions.long(), torch.arange(rows, device=self.device)
        q, k, v = projected.float().unflatten(1, (-1, a.size)).split([a.heads, a.key_heads, a.key_heads], dim=1)
        angles = (cos[at].float()[:, None], sin[at].float()[:, None])
        worst = max(
            error(query, decode_mha.rotate_halves_plain(q, *angles)),
            error(keys[index, :, at], decode_mha.rotate_halves_plain(k, *angles)),
            error(values[index, :, at], v),
        )
        splits = decode_mha.num_kv_splits(rows, a.heads, multiprocessors(query.device))
        partial = self.poisoned(rows, splits, a.heads, a.size, dtype=torch.float32)
        share = self.poisoned(rows, splits, a.heads, dtype=torch.float32)
        decode_mha.attend_splits(query, key_pool, value_pool, positions, starts, a.scaling, partial, share)
        out = self.poisoned(rows, a.heads, a.size)
        decode_mla.reduce_splits(partial, share, positions, out, step=decode_mha.kv_block(len(positions)))
        plain = decode_mha.attend_plain(query.float(), keys.float(), values.float(), positions, a.scaling)
        return max(worst, error(out, plain))

    def _wide(self) -> ExpertWeights:
        w = self.layer.experts
        parts = (w.gate_up, w.down, w.shared_gate, w.shared_up, w.shared_down)
        return ExpertWeights(*map(unpacked, parts))

    def experts(self) -> float:
        """Check the experts, from the hidden state before the norm to their sum."""
        layer, routing, rows = self.layer, self.layer.routing, self.rows
        assert routing is not None and layer.gate is not None
        x, inner, common = (
            self.draw(rows, self.hidden),
            layer.experts.intermediate_size,
            layer.experts.shared_intermediate_size,
        )
        ids = torch.zeros(rows, routing.top_k, dtype=torch.int32, device=self.device)
        topk_weights = self.poisoned(rows, routing.top_k, dtype=torch.float32)
        out, normed = self.poisoned(rows, self.hidden), self.poisoned(rows, self.hidden)
        logits = self.poisoned(rows, routing.num_experts, dtype=torch.float32)
        counters = torch.zeros(rows, dtype=torch.int32, device=self.device)
        residual = self.draw(rows, self.hidden, scale=0.01)  # small: it must not hide what is added to it
        if rows == 1:
            hidden = self.poisoned(routing.top_k * inner + common)
            router.route(
                x, layer.post_norm, layer.eps, layer.gate, layer.bias, routing, logits, counters, ids, topk_weights
            )
            decode_experts_gemv.gate_up_gemv(x[0], layer.post_norm, layer.eps, layer.experts, hidden, ids[0])
            decode_experts_gemv.down_gemv(hidden, layer.experts, residual[0], out[0], ids[0], topk_weights[0])
        else:
            router.route(
                x,
                layer.post_norm,
                layer.eps,
                layer.gate,
                layer.bias,
                routing,
                logits,
                counters,
                ids,
                topk_weights,
                normed,
            )
            tokens = decode_align.align_plain(ids, routing.num_experts, decode_align.tile_rows(layer.experts.gate_up))
            routed, shared = self.poisoned(rows, routing.top_k, inner), self.poisoned(rows, common)
            routed_out, shared_out = self.poisoned(rows, routing.top_k, self.hidden), self.poisoned(rows, self.hidden)
            decode_experts_gemm.gate_up_gemm(normed, layer.experts, routed, shared, tokens)
            decode_experts_gemm.down_gemm(routed, shared, layer.experts, routed_out, shared_out, tokens)
            norm.fused_add_rms_norm(
                residual, routed_out, topk_weights, shared_out, layer.post_norm, layer.eps, out, normed
            )
        return error(out, residual.float() + self._experts_plain(x, ids, topk_weights))

    def _experts_plain(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        wide, rows = self._wide(), []
        normed = norm.rms_norm_plain(x, self.layer.post_norm, self.layer.eps).float()
        for row in range(len(x)):  # one by one: the plain form gathers weights
            index = slice(row, row + 1)
            inner, common = decode_experts.gate_up_plain(normed[index], wide, ids[index])
            routed, shared = decode_experts.down_plain(inner, common, wide, ids[index])
            assert routed is not None
            total = (routed * topk_weights[index].unsqueeze(-1)).sum(1)
            rows.append(total if shared is None else total + shared)
        return torch.cat(rows)

    def route(self) -> float:
        """Check the choice of experts by their weights, sorted; ties may exchange ids."""
        layer, routing = self.layer, self.layer.routing
        assert routing is not None and layer.gate is not None
        x, normed = self.draw(self.rows, self.hidden), self.poisoned(self.rows, self.hidden)
        ids = torch.zeros(self.rows, routing.top_k, dtype=torch.int32, device=self.device)
        topk_weights = self.poisoned(self.rows, routing.top_k, dtype=torch.float32)
        logits = self.poisoned(self.rows, routing.num_experts, dtype=torch.float32)
        counters = torch.zeros(self.rows, dtype=torch.int32, device=self.device)
        router.route(
            x, layer.post_norm, layer.eps, layer.gate, layer.bias, routing, logits, counters, ids, topk_weights, normed
        )
        plain_normed, _, plain_shares = router.route_plain(
            x, layer.post_norm, layer.eps, layer.gate, layer.bias, routing
        )
        return max(error(normed, plain_normed), error(topk_weights.sort().values, plain_shares.sort().values))

    def checks(self) -> list[Check]:
        """Return the checks by name."""
        attention, head = self.layer.attention, self.weights.head
        checks: list[Check] = [
            ("norm and projections", lambda: self.linear(attention.projections, True, False, False)),
            ("attention", self.attention),
            ("output projection", lambda: self.linear((attention.out,), False, True, False)),
            ("experts", self.experts),
            ("route", self.route),
            ("head", lambda: self.linear((head,), True, False, True)),
        ]
        if self.rows == 1:
            checks.append(("likeliest token", self.best))
        elif attention.kv_b is not None:
            checks.append(("heads", self.heads))
        return checks
