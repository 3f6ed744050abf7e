"""Prefill: a whole prompt through the language model, over static buffers, so that it can be captured and replayed.

The host launches a layer's operations more slowly than the device runs them; replaying a captured graph of them costs
the host next to nothing. Dense products and attention itself are the model's own modules; kernels take what lies
between: norms and sums, rotations, the cache, the choice of experts. Prompts are padded on the right to the next
multiple of `STEP` tokens: causal attention hides padding there from every token, and the decoding steps that follow
overwrite what it left in the cache.

Shape suffixes: B rows, T tokens of the prompt with its padding, H hidden size.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.attention import DeepseekV2Attention, eager_attention_forward
from ..models.cache import CACHE_NAME
from ..models.generation import SampleCall
from ..models.modeling_deepseek import DeepseekV2ForCausalLM
from ..models.modeling_deepseek_vl_v2 import DeepseekVLV2ForCausalLM
from ..models.moe import DeepseekV2Experts, DeepseekV2MoE
from ..ops.triton import norm, prefill_experts, rope, router
from ..ops.triton.router import NOAUX_TC
from . import experts
from .cuda_graphs import CapturedGraph
from .decode import DecodeBuffers
from .weights import read_router_config

STEP = 128
# Beyond this many tokens the device takes longer than the host needs to launch.
MAX_TOKENS = 4096
# Of each session, which itself is one of few. Captured graphs share the memory of what they compute in between.
MAX_GRAPHS = 4

KNOWN = {
    "attention_mask", "cache_position", "images", "images_seq_mask", "images_spatial_crop", "inputs_embeds",
    "logits_to_keep", CACHE_NAME, "position_ids", "use_cache",
}  # fmt: skip


@dataclass
class PrefillInputs:
    """What a prefill reads beside the session's buffers: embeddings, [B, T, H], and the last token's index, [1]."""

    embeds: torch.Tensor
    last: torch.Tensor


class PrefillCache:
    """Takes the place of a model's cache: writes each layer's part into the session's, and hands the prompt's back.

    Fields:
        caches: pools of each layer.
        slots: index in the pools for each of N = B * T tokens, int64.
        cos: cosines at each token's position, [N, P], and ``sin``.
    """

    def __init__(self, buffers: DecodeBuffers, length: int) -> None:
        places = torch.arange(length, device=buffers.starts.device)
        self.caches = buffers.caches
        self.slots = (buffers.starts[:, None] + places).flatten()
        self.cos, self.sin = (part[:length].repeat(buffers.rows, 1) for part in (buffers.cos, buffers.sin))

    def update(self, keys: torch.Tensor, values: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write all tokens: rotated keys [B, 1, T, P] and latents [B, 1, T, R]; or keys and values."""
        pools = self.caches[index]
        if len(pools) == 1:
            pools[0].index_copy_(0, self.slots, torch.cat((values, keys), dim=-1).flatten(0, 2))
        else:
            for pool, part in zip(pools, (keys, values), strict=True):
                pool.index_copy_(0, self.slots, part.transpose(1, 2).flatten(0, 1))
        return keys, values


def attend(module: Any, normed: torch.Tensor, rotation: Any, cache: PrefillCache) -> torch.Tensor:
    """Return a layer's attention output, [B, T, H], as its module computes it."""
    if not isinstance(module, DeepseekV2Attention):
        return attend_to_heads(module, normed, cache)
    if module.q_lora_rank is not None or module.prefers_absorbed(normed, None):
        return module(normed, rotation, None, cache)[0]
    shape, cos, sin = normed.shape[:2], cache.cos, cache.sin
    query = module.q_proj(normed).view(-1, module.num_heads, module.qk_head_dim)
    rope.rotate_heads_(query, cos, sin)
    weights, compressed = module.kv_a_layernorm, module.kv_a_proj_with_mqa(normed).flatten(0, 1)
    latent, key_rope = rope.cache_latents(
        compressed, weights.weight, weights.variance_epsilon, cos, sin, cache.slots, cache.caches[module.layer_idx][0]
    )
    expanded = module.kv_b_proj(latent).view(len(query), module.num_heads, -1)
    key = rope.concat_keys(expanded, key_rope, module.qk_nope_head_dim)
    value = expanded[..., module.qk_nope_head_dim :]
    return module.o_proj(sdpa(module, *(part.unflatten(0, shape).transpose(1, 2) for part in (query, key, value))))


def attend_to_heads(module: Any, normed: torch.Tensor, cache: PrefillCache) -> torch.Tensor:
    """Return the output of plain multi-head attention, [B, T, H]."""
    shape, cos, sin = normed.shape[:2], cache.cos, cache.sin
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (linear(normed).view(normed.shape[0] * shape[1], -1, module.head_dim) for linear in projections)
    for part in (query, key):
        rope.rotate_heads_(part, cos, sin, interleaved=False)
    query, key, value = (part.unflatten(0, shape).transpose(1, 2) for part in (query, key, value))
    return module.o_proj(sdpa(module, query, *cache.update(key, value, module.layer_idx)))


def sdpa(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return causal attention of [B, N, T, D] each, [B, T, N * D]."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager_attention_forward)
    out, _ = function(module, query, key, value, None, scaling=module.scaling, dropout=0.0)
    return out.flatten(2)


def run_mlp(mlp: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return what a dense MLP, of one layer or shared by all tokens, makes of rows, [N, H]."""
    if "silu" not in type(mlp.act_fn).__name__.lower():
        return mlp(rows)
    return mlp.down_proj(prefill_experts.silu_and_mul(mlp.gate_proj(rows), mlp.up_proj(rows)))


def prefill_layer(
    layer: Any,
    hidden: torch.Tensor,
    normed: torch.Tensor,
    rotation: Any,
    cache: PrefillCache,
    following: Any,
    last: torch.Tensor,
) -> None:
    """Run one layer: ``hidden`` and its norm, [B, T, H] each, become its output and that one's norm by ``following``.

    As in the layer's own forward pass, but that each sum and the norm of it are one pass over memory, and that padding
    behind token ``last`` has no experts.
    """
    flat, flat_normed = hidden.flatten(0, 1), normed.flatten(0, 1)

    def add_and_norm(new: torch.Tensor, weights: Any) -> None:
        scale, eps = weights.weight, weights.variance_epsilon
        norm.fused_add_rms_norm(flat, None, None, new.view(flat.shape), scale, eps, flat, flat_normed)

    add_and_norm(attend(layer.self_attn, normed, rotation, cache), layer.post_attention_layernorm)
    mlp = layer.mlp
    if not isinstance(mlp, DeepseekV2MoE):
        add_and_norm(run_mlp(mlp, flat_normed), following)
        return
    routing = read_router_config(mlp.gate)
    if (
        routing.group_limited
        or mlp.gate.weight.dtype != normed.dtype
        or not experts.is_supported(mlp.experts, flat_normed)
    ):
        add_and_norm(mlp(normed), following)
        return
    bias = mlp.gate.e_score_correction_bias if routing.method == NOAUX_TC else None
    ids, weights = router.route_tokens(flat_normed, mlp.gate.weight, bias, routing, last, normed.shape[1])
    outputs, row_map = prefill_experts.permuted_experts(
        flat_normed, mlp.experts.gate_up_proj, mlp.experts.down_proj, ids
    )
    shared = None if mlp.shared_experts is None else run_mlp(mlp.shared_experts, flat_normed)
    scale, eps = following.weight, following.variance_epsilon
    norm.fused_add_rms_norm(flat, outputs, weights, shared, scale, eps, flat, flat_normed, row_map_P=row_map)


def run_prefill(language: Any, buffers: DecodeBuffers, given: PrefillInputs) -> None:
    """Run the layers: the session's caches are filled and its logits are those of the last token."""
    length, layers = given.embeds.shape[1], language.model.layers
    rotation = (buffers.cos[None, :length], buffers.sin[None, :length])
    hidden, normed, cache = (
        torch.empty_like(given.embeds),
        torch.empty_like(given.embeds),
        PrefillCache(buffers, length),
    )
    first = layers[0].input_layernorm
    norm.fused_add_rms_norm(
        given.embeds.flatten(0, 1), None, None, None, first.weight, first.variance_epsilon,
        hidden.flatten(0, 1), normed.flatten(0, 1),
    )  # fmt: skip
    norms = [layer.input_layernorm for layer in layers[1:]] + [language.model.norm]
    for layer, following in zip(layers, norms, strict=True):
        prefill_layer(layer, hidden, normed, rotation, cache, following, given.last)
    buffers.logits.copy_(language.lm_head(normed.index_select(1, given.last))[:, 0])


def new_graph(language: Any, buffers: DecodeBuffers, tokens: int) -> CapturedGraph:
    """Return the captured prefill of prompts of up to that many tokens a row."""
    weight = language.lm_head.weight
    with torch.inference_mode(False), torch.no_grad():  # later calls outside of inference mode write them too
        given = PrefillInputs(
            embeds=weight.new_zeros(buffers.rows, tokens, weight.shape[1]),
            last=torch.zeros(1, dtype=torch.long, device=weight.device),
        )
    model = weakref.ref(language)  # graphs are kept for as long as the model lives, not the other way round
    return CapturedGraph(given, lambda: run_prefill(model(), buffers, given))


def padded_length(tokens: int, capacity: int) -> int:
    """Return the length that a prompt is padded to, at most the capacity of the session's cache."""
    return min(-(-tokens // STEP) * STEP, capacity)


# ---------------------------------------------------------------- what is not for it


def unsupported_experts(language: Any) -> str | None:
    """Return why a model's experts cannot be captured: other forms than the kernels' may wait for the device."""
    weight = language.lm_head.weight
    if weight.device.type != "cuda":
        return None
    layers = [module for module in language.modules() if isinstance(module, DeepseekV2Experts)]
    return (
        None
        if all(experts.is_supported(layer, weight) for layer in layers)
        else "the experts are not for grouped products"
    )


def unsupported_bypassed(module: torch.nn.Module) -> str | None:
    """Return why a module's own call must not be gone around: hooks, or a forward pass of somebody else's."""
    name = type(module).__name__
    state: dict[str, Any] = vars(module)
    if state.get("_hf_hook") is not None or "forward" in state:
        return f"{name} is offloaded, or its forward pass was replaced"
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return f"{name} has forward hooks"
    every = torch.nn.modules.module
    return "all modules have hooks" if every._global_forward_hooks or every._global_forward_pre_hooks else None


def unsupported_prompt(call: SampleCall, language: Any) -> str | None:
    """Return why this call cannot use the captured prefill, beside what `runtime.unsupported_call` asks, or None."""
    kwargs, model = call.model_kwargs, call.model
    if type(model) not in (DeepseekV2ForCausalLM, DeepseekVLV2ForCausalLM):
        return f"a {type(model).__name__} may do more with a prompt"
    for module in (model, language, language.model):
        if (reason := unsupported_bypassed(module)) is not None:
            return reason
    if language.config._attn_implementation != "sdpa":
        return "another attention than sdpa was chosen"
    if torch.is_autocast_enabled(language.lm_head.weight.device.type) or torch.compiler.is_compiling():
        return "autocast or compilation is on"
    if unknown := [name for name, value in kwargs.items() if name not in KNOWN and value is not None]:
        return f"the call has arguments of its own: {', '.join(unknown)}"
    cache = kwargs[CACHE_NAME]
    if not getattr(cache, "is_private", False) or cache.get_seq_length() > 0:
        return "the cache is the caller's, or holds tokens"
    if call.generation_config.prefill_chunk_size is not None:
        return "the prompt is to be read in chunks"
    return unsupported_tokens(call, language)


def unsupported_tokens(call: SampleCall, language: Any) -> str | None:
    """Return why this prompt cannot use the captured prefill, or None."""
    ids, weight = call.input_ids, language.lm_head.weight
    mask, embeds = call.model_kwargs.get("attention_mask"), call.model_kwargs.get("inputs_embeds")
    if embeds is not None:
        if (embeds.dtype, embeds.device, embeds.shape[-1]) != (weight.dtype, weight.device, weight.shape[1]):
            return "the embeddings are of another kind than the weights"
        if ids.shape[1] not in (0, embeds.shape[1]):
            return "ids and embeddings differ in length"
    elif ids.device != weight.device or language.model.embed_tokens.weight.dtype != weight.dtype:
        return "the ids are on another device, or the embeddings of another dtype"
    rows, tokens = (ids if embeds is None else embeds).shape[:2]
    if tokens == 0 or rows * (-(-tokens // STEP) * STEP) > MAX_TOKENS:
        return f"the prompt is empty, or over {MAX_TOKENS} tokens with its padding"
    if mask is not None and (mask.shape != (rows, tokens) or not bool(mask.all())):
        return "there is padding"
    return None


def embeddings(call: SampleCall, language: Any) -> torch.Tensor:
    """Return the embeddings of a prompt as the model's forward pass makes them, [B, tokens, H]."""
    kwargs = call.model_kwargs
    if kwargs.get("inputs_embeds") is not None:
        return kwargs["inputs_embeds"]
    if call.model is language:
        return language.model.embed_tokens(call.input_ids)
    names = ("images", "images_seq_mask", "images_spatial_crop")
    return call.model.prepare_inputs_embeds(call.input_ids, **{name: kwargs.get(name) for name in names})
