"""Attention of the language model: plain multi-head, and multi-head latent attention (MLA).

Shape suffixes: B batch, N attention heads, M key/value heads, T query positions, S key positions, H hidden size,
D head size, R rank of the latent, P rotated part of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backend import backend
from .cache import PackedCache, causal_mask
from .configuration_deepseek import DeepseekV2Config
from .cpu import is_bare, project, row_kernels
from .norm import DeepseekV2RMSNorm
from .quantized_layers import PackedLinear, dense_weight, is_bare_packed
from .rope import apply_rotary, split_interleaved_pairs, yarn_softmax_scale

Rotation = tuple[torch.Tensor, torch.Tensor]


def additive_mask(mask: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor | None:
    """Return a mask of any of transformers' forms as something to add to ``scores`` [B, N, T, S].

    ``None`` means causal; a 2-D mask marks the keys that are not padding (flash attention's form, one query only).
    """
    queries, keys = scores.shape[-2:]
    if mask is None:
        if queries == 1:
            return None
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    elif mask.dim() == 2:
        mask = mask[:, None, None, :].bool()
    if mask.dtype == torch.bool:
        lowest = torch.finfo(scores.dtype).min
        return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, lowest)
    return mask[..., :keys]


def add_mask(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the scores with a mask of any of transformers' forms applied."""
    additive = additive_mask(mask, scores)
    if additive is None:
        return scores
    masked = scores + additive
    # In float16 the lowest number and a score may add up to minus infinity, and a row of padding to NaN.
    return masked.clamp(min=torch.finfo(masked.dtype).min) if masked.dtype == torch.float16 else masked


def eager_attention_forward(
    module: nn.Module,
    query_BNTD: torch.Tensor,
    key_BMSD: torch.Tensor,
    value_BMSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by plain matrix products, softmax in float32; returns [B, T, N, D] and the weights [B, N, T, S]."""
    groups = query_BNTD.shape[1] // key_BMSD.shape[1]
    key = key_BMSD.repeat_interleave(groups, dim=1) if groups > 1 else key_BMSD
    value = value_BMSD.repeat_interleave(groups, dim=1) if groups > 1 else value_BMSD
    scores = add_mask(torch.matmul(query_BNTD, key.mT) * scaling, attention_mask)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query_BNTD.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def one_query_attention_forward(
    query_BN1D: torch.Tensor,
    key_BMSD: torch.Tensor,
    value_BMSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend from a single position, by matrix products with the keys on the left; returns [B, 1, N, D].

    On a CPU this reads the cache at the memory's speed; PyTorch's fused attention takes four times as long.
    """
    groups = query_BN1D.shape[1] // key_BMSD.shape[1]
    query_BMGD = query_BN1D.squeeze(2).unflatten(1, (-1, groups))
    scores_BMGS = torch.matmul(key_BMSD, query_BMGD.mT).mT * scaling
    if attention_mask is not None:  # one query sees all keys, unless some are padding
        scores_BMGS = add_mask(scores_BMGS, attention_mask)
    weights_BMGS = scores_BMGS.softmax(dim=-1, dtype=torch.float32).to(query_BN1D.dtype)
    return torch.matmul(weights_BMGS, value_BMSD).flatten(1, 2).unsqueeze(1)


def is_single_cpu_query(query_BNTD: torch.Tensor) -> bool:
    """Whether one position attends, on a CPU, outside of training and compilation."""
    on_cpu = query_BNTD.shape[2] == 1 and query_BNTD.device.type == "cpu"
    return on_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class DeepseekV2MultiHeadAttention(nn.Module):
    """Plain multi-head attention (with grouped keys and values where configured), as in Llama; tiny's attention.

    The cache holds rotated keys and values, each [B, M, S, D].
    """

    is_causal = True

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.attention_dropout = config.attention_dropout
        self.scaling = self.head_dim**-0.5 * yarn_softmax_scale(config.rope_parameters)
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries_keys_values(self, hidden_BTH: torch.Tensor, rotation: Rotation) -> Sequence[torch.Tensor]:
        """Return rotated queries, [B, N, T, D], rotated keys and values, [B, M, T, D]."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if (kernels := row_kernels()) is not None:
            out: Sequence[torch.Tensor] | None = None
            if all(is_bare(layer) and layer.bias is None for layer in layers):
                out = kernels.queries_keys_values(hidden_BTH, *(layer.weight for layer in layers), *rotation)
            elif all(map(is_bare_packed, layers)) and (engine := backend()) is not None:
                out = engine.run_packed_queries_keys_values(layers, hidden_BTH, rotation)
            if out is not None:
                return out
        query, key, value = (self._heads(project(layer, hidden_BTH)) for layer in layers)
        return apply_rotary(query, *rotation), apply_rotary(key, *rotation), value

    def forward(
        self,
        hidden_BTH: torch.Tensor,
        rotation: Rotation,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention's output [B, T, H] and, from the eager implementation, its weights."""
        query, key, value = self.queries_keys_values(hidden_BTH, rotation)
        if isinstance(past_key_values, PackedCache):
            out = self._attend_rows(query, key, value, past_key_values)
            if out is None:
                outs = [
                    self._attend(query[:, :, tokens], keys, values, _segment_mask(self, tokens, keys), **kwargs)[0]
                    for tokens, keys, values in past_key_values.append(key, value, self.layer_idx)
                ]
                out = torch.cat(outs, dim=1)
            return project(self.o_proj, out.flatten(2)), None
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return project(self.o_proj, out.flatten(2)), weights

    def _attend_rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: PackedCache
    ) -> torch.Tensor | None:
        """Attend from a single token of each sequence in one call, [1, T, N, D]; ``None`` where there is none."""
        kernels = row_kernels()
        if kernels is None or not cache.is_decoding or self.config._attn_implementation != "sdpa":
            return None
        keys, values = cache.append_tokens(key, value, self.layer_idx)
        out: torch.Tensor | None = kernels.attend_rows(query, keys, values, cache.starts, cache.lengths, self.scaling)
        return out

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the queries attend to, [B, T, N, D], and weights where they are computed."""
        name = self.config._attn_implementation
        if name == "sdpa" and is_single_cpu_query(query):
            kernels = row_kernels() if attention_mask is None else None
            out = None if kernels is None else kernels.attend(query, key, value, self.scaling)
            if out is None:
                out = one_query_attention_forward(query, key, value, attention_mask, self.scaling)
            return out, None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return out, weights


class DeepseekV2Attention(nn.Module):
    """Multi-head latent attention.

    Keys and values are low-rank: one latent of ``kv_lora_rank`` numbers and one rotated key of ``qk_rope_head_dim``
    numbers a position, shared by all heads, is all that is cached. There are two equal ways to attend:

    - expanded: ``kv_b_proj`` turns latents into keys and values of every head; the cheaper one for many queries;
    - absorbed: ``kv_b_proj`` is folded into the query and into the output, and all heads attend to the latents
      themselves; the cheaper one for few queries, and what the original computes.

    Source: section 2.1 of the DeepSeek-V2 paper; ``DeepseekV2Attention`` of the original package.
    """

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.attention_dropout = config.attention_dropout
        self.scaling = self.qk_head_dim**-0.5 * yarn_softmax_scale(config.rope_parameters)
        hidden, bias, query_width = config.hidden_size, config.attention_bias, self.num_heads * self.qk_head_dim
        self.q_lora_rank = config.q_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekV2RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = DeepseekV2RMSNorm(config.kv_lora_rank)
        expanded_width = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded_width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, hidden, bias=bias)

    def project_query(self, hidden_BTH: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unrotated part, [B, N, T, nope], and the rotated part, [B, N, T, P], of the queries."""
        if self.q_lora_rank is None:
            query = project(self.q_proj, hidden_BTH)
        else:
            query = project(self.q_b_proj, self.q_a_layernorm(project(self.q_a_proj, hidden_BTH)))
        query = query.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        nope, rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return nope, apply_rotary(split_interleaved_pairs(rope), *rotation)

    def project_latent(self, hidden_BTH: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is cached: the rotated key, [B, 1, T, P], and the latent, [B, 1, T, R]."""
        compressed = project(self.kv_a_proj_with_mqa, hidden_BTH).unsqueeze(1)
        latent, rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return apply_rotary(split_interleaved_pairs(rope), *rotation), self.kv_a_layernorm(latent)

    def can_absorb(self, hidden: torch.Tensor) -> bool:
        """Whether ``kv_b_proj`` is a weight here, bare or packed: not adapted, offloaded or distributed."""
        projection = self.kv_b_proj
        if type(projection) is PackedLinear:
            return projection.weight_packed.device == hidden.device
        return (
            type(projection) is nn.Linear
            and type(projection.weight) in (nn.Parameter, torch.Tensor)
            and projection.weight.is_floating_point()
            and projection.weight.device == hidden.device
        )

    def prefers_absorbed(self, hidden_BTH: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Choose between the two forms.

        Eager is always absorbed, in the original's order of operations; otherwise training is always expanded, through
        fused attention. For the rest the arithmetic decides: absorbed
        attention costs 2R - nope - v more products for each query and key, expansion R * (nope + v) for each key.
        """
        if not self.can_absorb(hidden_BTH):
            return False
        if self.config._attn_implementation == "eager":
            return True
        if self.training and torch.is_grad_enabled():
            return False  # the scores of all heads, kept for the backward pass, would outgrow all that is saved
        queries, values = hidden_BTH.shape[1], self.qk_nope_head_dim + self.v_head_dim
        if queries > 1 and not self._mask_is_4d_or_causal(attention_mask):
            return False
        return queries * (2 * self.kv_lora_rank - values) < self.kv_lora_rank * values

    def _mask_is_4d_or_causal(self, attention_mask: torch.Tensor | None) -> bool:
        if self.config._attn_implementation != "sdpa":
            return False
        return attention_mask is None or attention_mask.dim() == 4

    def attend_absorbed(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        key_rope_B1SP: torch.Tensor,
        latent_B1SR: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to the latents; returns [B, T, N, v] and the weights [B, N, T, S]."""
        into_latent, out_of_latent = self._absorbed_weights(query_nope.dtype)
        query_latent = self._through_heads(query_nope, into_latent)
        # All heads share the keys: heads times queries become the rows of one matrix product, and nothing is repeated.
        shape = (self.num_heads, query_rope.shape[2])
        rope_scores = torch.matmul(query_rope.flatten(1, 2), key_rope_B1SP[:, 0].mT)
        latent_scores = torch.matmul(query_latent.flatten(1, 2), latent_B1SR[:, 0].mT)
        scores = add_mask(((rope_scores + latent_scores) * self.scaling).unflatten(1, shape), attention_mask)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query_nope.dtype)
        weights = F.dropout(weights, p=self.attention_dropout, training=self.training)
        mixed = torch.matmul(weights.flatten(1, 2), latent_B1SR[:, 0]).unflatten(1, shape)
        return self._through_heads(mixed, out_of_latent.mT).transpose(1, 2), weights

    def _through_heads(self, x_BNTD: torch.Tensor, weight_NDE: torch.Tensor) -> torch.Tensor:
        """Multiply each head by its own matrix, [B, N, T, E].

        PyTorch would copy the matrices for every row of a batch; so the rows of a head become those of one product,
        but for "eager", which keeps the original's arithmetic.
        """
        rows = x_BNTD.shape[0]
        if rows == 1 or self.config._attn_implementation == "eager":
            return torch.matmul(x_BNTD, weight_NDE)
        product_NBTE = torch.bmm(x_BNTD.transpose(0, 1).flatten(1, 2), weight_NDE).unflatten(1, (rows, -1))
        return product_NBTE.transpose(0, 1)

    def attend_expanded(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        key_rope_B1SP: torch.Tensor,
        latent_B1SR: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to keys and values of every head; returns [B, T, N, v] and, from eager, the weights."""
        head = self.qk_nope_head_dim + self.v_head_dim
        expanded = self.kv_b_proj(latent_B1SR[:, 0]).unflatten(-1, (-1, head)).transpose(1, 2)
        key_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        query = torch.cat((query_nope, query_rope), dim=-1)
        key = torch.cat((key_nope, key_rope_B1SP.expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
        name = self.config._attn_implementation
        padded = "flash" in name and self.qk_head_dim > self.v_head_dim
        if padded:  # flash attention takes keys and values of one size only
            value = F.pad(value, (0, self.qk_head_dim - self.v_head_dim))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return (out[..., : self.v_head_dim] if padded else out), weights

    def forward(
        self,
        hidden_BTH: torch.Tensor,
        rotation: Rotation,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention's output [B, T, H] and, where they are computed, its weights."""
        query_nope, query_rope = self.project_query(hidden_BTH, rotation)
        key_rope, latent = self.project_latent(hidden_BTH, rotation)
        if isinstance(past_key_values, PackedCache):
            out = self._attend_rows(query_nope, query_rope, key_rope, latent, past_key_values, hidden_BTH)
            if out is None:
                outs = [
                    self._attend(
                        query_nope[:, :, tokens], query_rope[:, :, tokens], keys, latents,
                        _segment_mask(self, tokens, keys), hidden_BTH[:, tokens], **kwargs,
                    )[0]
                    for tokens, keys, latents in past_key_values.append(key_rope, latent, self.layer_idx)
                ]  # fmt: skip
                out = torch.cat(outs, dim=1)
            return project(self.o_proj, out.flatten(2)), None
        if past_key_values is not None:
            key_rope, latent = past_key_values.update(key_rope, latent, self.layer_idx)
        parts = (query_nope, query_rope, key_rope, latent)
        out, weights = self._attend(*parts, attention_mask, hidden_BTH, **kwargs)
        return project(self.o_proj, out.flatten(2)), weights

    def _attend_rows(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        key_rope: torch.Tensor,
        latent: torch.Tensor,
        cache: PackedCache,
        hidden_BTH: torch.Tensor,
    ) -> torch.Tensor | None:
        """Attend from a single token of each sequence in one call, [1, T, N, v]; ``None`` where there is none."""
        kernels = row_kernels()
        if kernels is None or not cache.is_decoding or self.config._attn_implementation != "sdpa":
            return None
        if not self.can_absorb(hidden_BTH):
            return None
        keys, latents = cache.append_tokens(key_rope, latent, self.layer_idx)
        into_latent, out_of_latent = self._absorbed_weights(query_nope.dtype)
        query_latent = torch.matmul(query_nope, into_latent)
        spans = (cache.starts, cache.lengths)
        mixed = kernels.attend_latents(query_latent, query_rope, latents[:, 0], keys[:, 0], *spans, self.scaling)
        return None if mixed is None else torch.matmul(mixed.transpose(1, 2), out_of_latent.mT).transpose(1, 2)

    def _absorbed_weights(self, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """Return what folds ``kv_b_proj`` into the queries, [N, nope, R], and into the outputs, [N, v, R]."""
        weight = dense_weight(self.kv_b_proj, dtype).view(self.num_heads, -1, self.kv_lora_rank)
        return weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)

    def _attend(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        key_rope: torch.Tensor,
        latent: torch.Tensor,
        attention_mask: torch.Tensor | None,
        hidden_BTH: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend in the form that suits the number of queries; see `attend_absorbed` and `attend_expanded`."""
        parts = (query_nope, query_rope, key_rope, latent)
        if self.prefers_absorbed(hidden_BTH, attention_mask):
            return self.attend_absorbed(*parts, attention_mask)
        return self.attend_expanded(*parts, attention_mask, **kwargs)


def _segment_mask(module: nn.Module, tokens: slice, keys: torch.Tensor) -> torch.Tensor | None:
    """Return the mask of a segment's new tokens; flash attention aligns causality with the last key by itself."""
    config: Any = module.config
    if "flash" in config._attn_implementation:
        return None
    return causal_mask(tokens.stop - tokens.start, keys.shape[2], keys.device)


def build_attention(config: DeepseekV2Config, layer_idx: int) -> nn.Module:
    """Return the kind of attention that the config asks for."""
    kind = DeepseekV2Attention if config.use_mla else DeepseekV2MultiHeadAttention
    return kind(config, layer_idx)
