"""Prompts through the language model: new tokens of several sequences, packed, attention segment by segment.

Dense products and attention itself are PyTorch's; kernels take what lies between: norms and sums, rotations, the cache,
the choice of experts and their products. Whole prompts of about one length are padded to it and attend in one call. Of
others each attends by itself; see `row_layout`.

Shape suffixes: N tokens of all segments, H hidden size, P rotated part of a head, K keys of all segments, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..models.attention import DeepseekV2Attention
from ..models.cache import Segment, causal_mask
from ..models.moe import DeepseekV2MoE
from ..models.quantized_layers import PackedLinear
from ..ops.triton import linear, norm, prefill_experts, rope, router
from ..ops.triton.router import NOAUX_TC
from . import experts
from .row_layout import RowLayout, arrange_rows
from .rows import launching_on, to_device, upload
from .weights import read_experts, read_linear, read_router_config

Pools = Sequence[tuple[torch.Tensor, ...]]
Tables = dict[torch.device, tuple[torch.Tensor, torch.Tensor]]

# What more prompts than these attend to is copied in one launch: they are short.
FEW_COPIES = 8


@dataclass
class PackedTokens:
    """Where the tokens of a pass stand, on one device.

    Fields:
        segments: whose they are.
        slots_N: index in the pool of each.
        cos_NP: cosines of their positions, and ``sin_NP``.
        last: of each part, the index of the last token that is not padding; -1: all of it is. ``None``: there is none.
        part: rows of a part; the last one may have fewer. 0: all rows are one.
        windows: rows over which each segment attends, from its own first one on; ``None``: its own. They are all the
            same where the segments are parts.
        masks: of the segments that have cached tokens before them; made once a pass.
    """

    segments: Sequence[Segment]
    slots_N: torch.Tensor
    cos_NP: torch.Tensor
    sin_NP: torch.Tensor
    last: torch.Tensor | None = None
    part: int = 0
    windows: Sequence[int] | None = None
    masks: list[torch.Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.masks = [
            causal_mask(s.new, s.end, self.slots_N.device) if s.past and s.new > 1 else None for s in self.segments
        ]

    @property
    def has_past(self) -> bool:
        """Whether some segment has cached tokens before it."""
        return any(segment.past for segment in self.segments)

    @property
    def alike(self) -> bool:
        """Whether the segments are whole prompts of one length, padding included."""
        return self.part > 0 and not self.has_past


def run_linear(module: Any, x_NI: torch.Tensor) -> torch.Tensor:
    """Return a linear layer's output, [N, O]: packed weights are read by kernels, others by the layer itself."""
    if isinstance(module, PackedLinear):
        return linear.linear(x_NI, read_linear(module))
    out: torch.Tensor = module(x_NI)
    return out


# ---------------------------------------------------------------- attention


def attend(module: Any, normed_NH: torch.Tensor, tokens: PackedTokens, pool: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return a layer's attention output, [N, H]; its keys and values are written to the pool."""
    if isinstance(module, DeepseekV2Attention):
        query, keys, values = latent_queries_keys_values(module, normed_NH, tokens, pool[0])
    else:
        query, keys, values = head_queries_keys_values(module, normed_NH, tokens, pool)
    make_finite_(values, tokens)
    if tokens.alike:
        out = attend_alike(query, keys, values, tokens, module.scaling)
    else:
        out = attend_segments(query, keys, values, tokens, module.scaling)
    return run_linear(module.o_proj, out.flatten(1))


def make_finite_(values: torch.Tensor, tokens: PackedTokens) -> None:
    """Make values finite where windows reach over the rows of prompts behind: 0 times NaN, or infinity, is NaN.

    A prompt that has such rows gets no numbers all the same: their queries and keys are none.
    """
    prompts, length = len(tokens.segments), tokens.part
    if tokens.windows is None or prompts == 1:
        return
    reached = values[tokens.segments[0].new :]
    if tokens.alike:  # few rows of each but the first
        reached = values[length : prompts * length].unflatten(0, (prompts - 1, length))
        reached = reached[:, : tokens.windows[0] - length]
    reached.nan_to_num_()


def attend_alike(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: PackedTokens, scaling: float
) -> torch.Tensor:
    """Return the attention, [N, heads, size], of whole prompts of one length, in one call; see `attend_segments`."""
    prompts, length = len(tokens.segments), tokens.part
    window = length if tokens.windows is None else tokens.windows[0]

    def windows_of(rows: torch.Tensor) -> torch.Tensor:
        start, *strides = rows.stride()
        seen = rows.as_strided((prompts, window, *rows.shape[1:]), (length * start, start, *strides))
        return seen.transpose(1, 2)

    q, k, v = (windows_of(rows) for rows in (query, keys, values))
    grouped = q.shape[1] != k.shape[1]
    attended = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=scaling, enable_gqa=grouped)
    attended = attended.transpose(1, 2)
    if len(query) == prompts * length:  # and no window reaches farther
        return attended.flatten(0, 1)
    out = query.new_empty(len(query), query.shape[1], values.shape[-1])
    own = out[: prompts * length].unflatten(0, (prompts, length))
    if prompts > FEW_COPIES:
        own.copy_(attended[:, :length])
    else:  # memory as it is, four times as fast
        for rows, given in zip(own, attended, strict=True):
            rows.copy_(given[:length])
    out[prompts * length :] = 0
    return out


def attend_segments(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: PackedTokens, scaling: float
) -> torch.Tensor:
    """Return the attention, [N, heads, size], of each segment over its own tokens.

    A window reaches into the rows behind its segment, which no token of that sees; what they get there is overwritten
    by the next segment. Padding gets something too: it may not hold NaN, which values times 0 would spread.
    """
    out = query.new_empty(len(query), query.shape[1], values.shape[-1])
    first = first_key = end = 0
    for index, (segment, mask) in enumerate(zip(tokens.segments, tokens.masks, strict=True)):
        window = segment.new if tokens.windows is None else tokens.windows[index]
        end, end_key = first + window, first_key + (segment.end if tokens.has_past else window)
        parts = (query[first:end], keys[first_key:end_key], values[first_key:end_key])
        q, k, v = (part.unflatten(0, (1, -1)).transpose(1, 2) for part in parts)
        causal, grouped = mask is None and window > 1, q.shape[1] != k.shape[1]
        attended = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scaling, enable_gqa=grouped)
        out[first:end] = attended[0].transpose(0, 1)
        first, first_key = first + segment.new, first_key + (segment.end if tokens.has_past else segment.new)
    out[end:] = 0
    return out


def latent_queries_keys_values(
    module: Any, normed_NH: torch.Tensor, tokens: PackedTokens, pool_SC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated queries, [N, heads, size], and expanded keys and values of all segments, [K, heads, size]."""
    cos, sin = tokens.cos_NP, tokens.sin_NP
    query = run_linear(module.q_proj, normed_NH).view(-1, module.num_heads, module.qk_head_dim)
    rope.rotate_heads_(query, cos, sin)
    weights, compressed = module.kv_a_layernorm, run_linear(module.kv_a_proj_with_mqa, normed_NH)
    latent, key_rope = rope.cache_latents(
        compressed, weights.weight, weights.variance_epsilon, cos, sin, tokens.slots_N, pool_SC
    )
    if tokens.has_past:
        held = torch.cat([pool_SC[s.start : s.start + s.end] for s in tokens.segments])
        latent, key_rope = held[:, : module.kv_lora_rank], held[:, module.kv_lora_rank :].contiguous()
    expanded = run_linear(module.kv_b_proj, latent).view(len(latent), module.num_heads, -1)
    keys = rope.concat_keys(expanded, key_rope, module.qk_nope_head_dim)
    return query, keys, expanded[..., module.qk_nope_head_dim :]


def head_queries_keys_values(
    module: Any, normed_NH: torch.Tensor, tokens: PackedTokens, pool: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated queries, [N, heads, size], and keys and values of all segments, [K, key heads, size]."""
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (run_linear(p, normed_NH).view(len(normed_NH), -1, module.head_dim) for p in projections)
    for part in (query, key):
        rope.rotate_heads_(part, tokens.cos_NP, tokens.sin_NP, interleaved=False)
    for held, new in zip(pool, (key, value), strict=True):
        held.index_copy_(0, tokens.slots_N, new)
    if tokens.has_past:
        key, value = (torch.cat([held[s.start : s.start + s.end] for s in tokens.segments]) for held in pool)
    return query, key, value


# ---------------------------------------------------------------- layers


def run_mlp(mlp: Any, rows_NH: torch.Tensor) -> torch.Tensor:
    """Return what a dense MLP, of one layer or shared by all tokens, makes of rows, [N, H]."""
    gate, up = run_linear(mlp.gate_proj, rows_NH), run_linear(mlp.up_proj, rows_NH)
    return run_linear(mlp.down_proj, prefill_experts.silu_and_mul(gate, up))


def prefill_layer(
    layer: Any,
    hidden_NH: torch.Tensor,
    normed_NH: torch.Tensor,
    tokens: PackedTokens,
    pool: tuple[torch.Tensor, ...],
    following: Any,
) -> None:
    """Run one layer: the hidden states and their norm become its output and that one's norm by ``following``.

    As in the layer's own forward pass, but that each sum and the norm of it are one pass over memory, and that padding
    has no experts.
    """

    def add_and_norm(new: torch.Tensor, weights: Any) -> None:
        scale, eps = weights.weight, weights.variance_epsilon
        norm.fused_add_rms_norm(hidden_NH, None, None, new, scale, eps, hidden_NH, normed_NH)

    add_and_norm(attend(layer.self_attn, normed_NH, tokens, pool), layer.post_attention_layernorm)
    mlp = layer.mlp
    if not isinstance(mlp, DeepseekV2MoE):
        add_and_norm(run_mlp(mlp, normed_NH), following)
        return
    routing = read_router_config(mlp.gate)
    gate_fits = not routing.group_limited and mlp.gate.weight.dtype == normed_NH.dtype
    if not (gate_fits and experts.is_supported(mlp.experts, normed_NH)):
        add_and_norm(mlp(normed_NH[None])[0], following)
        return
    bias = mlp.gate.e_score_correction_bias if routing.method == NOAUX_TC else None
    ids, weights = router.route_tokens(
        normed_NH, mlp.gate.weight, bias, routing, tokens.last, tokens.part or len(normed_NH)
    )
    outputs, row_map = prefill_experts.permuted_experts(normed_NH, *read_experts(mlp.experts), ids)
    shared = None if mlp.shared_experts is None else run_mlp(mlp.shared_experts, normed_NH)
    scale, eps = following.weight, following.variance_epsilon
    norm.fused_add_rms_norm(hidden_NH, outputs, weights, shared, scale, eps, hidden_NH, normed_NH, row_map_P=row_map)


def first_norm(weights: Any, embeds_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a copy of the embeddings and their norm."""
    hidden, normed = torch.empty_like(embeds_NH), torch.empty_like(embeds_NH)
    scale, eps = weights.weight, weights.variance_epsilon
    norm.fused_add_rms_norm(embeds_NH, None, None, None, scale, eps, hidden, normed)
    return hidden, normed


def run_packed(
    language: Any, pools: Pools, tables: Tables, embeds_NH: torch.Tensor, segments: Sequence[Segment]
) -> torch.Tensor:
    """Run new tokens of several sequences; returns the logits of each segment's last one, [segments, V], float32.

    Layers may lie on several devices: hidden states follow them.
    """
    layers = language.model.layers
    layout = arrange_rows(segments)
    embeds_NH = layout.spread(embeds_NH)
    places = {device: place_tokens(segments, layout, device, tables[device]) for device in tables}
    device = layers[0].input_layernorm.weight.device
    with launching_on(device):
        hidden, normed = first_norm(layers[0].input_layernorm, embeds_NH.to(device).contiguous())
    norms = [layer.input_layernorm for layer in layers[1:]] + [language.model.norm]
    for layer, pool, following in zip(layers, pools, norms, strict=True):
        device = layer.input_layernorm.weight.device
        hidden, normed = hidden.to(device), normed.to(device)
        with launching_on(device):
            # The next layer's norm may lie on the next device: a copy of it, a few kilobytes, comes here.
            here = following if following.weight.device == device else MovedNorm(following, device)
            prefill_layer(layer, hidden, normed, places[device], pool, here)
    kept = normed.index_select(0, upload([layout.ends], normed.device)[0])
    return run_linear(language.lm_head, kept.to(read_linear(language.lm_head).device)).float()


class MovedNorm:
    """A norm's weight on another device."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self.weight = module.weight.to(device)
        self.variance_epsilon = module.variance_epsilon


def place_tokens(
    segments: Sequence[Segment], layout: RowLayout, device: torch.device, tables: tuple[torch.Tensor, torch.Tensor]
) -> PackedTokens:
    """Return where tokens stand, on a device; those of padding write to the pool's scratch tokens."""
    numbers = layout.number([[s.past for s in segments], [s.start + s.past for s in segments]])
    numbers = to_device(layout.spread(numbers.mT).mT.contiguous(), device)
    cos, sin = (table.index_select(0, numbers[0]) for table in tables)
    last = upload([layout.last], device)[0] if layout.padded else None
    return PackedTokens(segments, numbers[1].contiguous(), cos, sin, last, layout.part, layout.windows)
