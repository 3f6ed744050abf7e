"""From a language model's modules to the weights that the kernels read, or to the reason why they cannot."""

from __future__ import annotations

from typing import Any

import torch

from ..models.attention import DeepseekV2MultiHeadAttention
from ..models.modeling_deepseek import DeepseekV2ForCausalLM
from ..models.moe import DeepseekV2MoE
from ..models.quantized_layers import PackedExperts, PackedLinear, PackedModule, dense_weight
from ..models.router import MoEGate
from ..ops.triton.decode_experts import ExpertWeights
from ..ops.triton.router import METHODS, RouterConfig
from ..ops.triton.weights import QuantWeight, Weight
from .decoder_weights import AttentionWeights, DecoderWeights, LayerWeights


def read_packed(module: PackedModule, name: str) -> QuantWeight:
    """Return a packed matrix as the kernels take it."""
    fmt = module.formats[name]
    return QuantWeight(*module.packed(name), fmt.group_size, fmt.block)


def read_linear(module: Any) -> Weight:
    """Return a linear layer's weight."""
    weight: Weight = read_packed(module, "weight") if isinstance(module, PackedLinear) else module.weight
    return weight


def read_experts(module: Any) -> tuple[Weight, Weight]:
    """Return the weights of a layer's routed experts."""
    if isinstance(module, PackedExperts):
        return read_packed(module, "gate_up_proj"), read_packed(module, "down_proj")
    return module.gate_up_proj, module.down_proj


def read_attention(module: Any) -> AttentionWeights:
    """Return a layer's attention as the kernels take it.

    A packed kv_b_proj is unpacked, once: it is absorbed into queries and outputs, head by head.
    """
    if isinstance(module, DeepseekV2MultiHeadAttention):
        return AttentionWeights(
            projections=(read_linear(module.q_proj), read_linear(module.k_proj), read_linear(module.v_proj)),
            out=read_linear(module.o_proj),
            scaling=module.scaling,
            heads=module.q_proj.out_features // module.head_dim,
            key_heads=module.k_proj.out_features // module.head_dim,
            size=module.head_dim,
        )
    norm = module.kv_a_layernorm.weight
    return AttentionWeights(
        projections=(read_linear(module.q_proj), read_linear(module.kv_a_proj_with_mqa)),
        out=read_linear(module.o_proj),
        scaling=module.scaling,
        heads=module.num_heads,
        key_heads=1,
        size=module.v_head_dim,
        kv_b=dense_weight(module.kv_b_proj, norm.dtype).view(module.num_heads, -1, module.kv_lora_rank),
        norm=norm,
        eps=module.kv_a_layernorm.variance_epsilon,
    )


def read_router_config(gate: MoEGate) -> RouterConfig:
    """Return how a gate selects experts."""
    return RouterConfig(
        num_experts=gate.n_routed_experts,
        top_k=gate.top_k,
        sigmoid=gate.scoring_func == "sigmoid",
        method=METHODS[gate.topk_method],
        num_groups=gate.n_group,
        topk_groups=gate.topk_group,
        norm_topk_prob=bool(gate.norm_topk_prob) and gate.top_k > 1,
        scale=float(gate.routed_scaling_factor),
    )


def read_layer(module: Any) -> LayerWeights:
    """Return a layer as the kernels take it."""
    mlp, moe = module.mlp, isinstance(module.mlp, DeepseekV2MoE)
    shared = mlp.shared_experts if moe else mlp
    dense = [] if shared is None else [read_linear(p) for p in (shared.gate_proj, shared.up_proj, shared.down_proj)]
    routed = read_experts(mlp.experts) if moe else (None, None)
    return LayerWeights(
        input_norm=module.input_layernorm.weight,
        attention=read_attention(module.self_attn),
        post_norm=module.post_attention_layernorm.weight,
        eps=module.input_layernorm.variance_epsilon,
        experts=ExpertWeights(*routed, *dense),
        gate=mlp.gate.weight if moe else None,
        bias=mlp.gate.e_score_correction_bias if moe and mlp.gate.topk_method == "noaux_tc" else None,
        routing=read_router_config(mlp.gate) if moe else None,
    )


@torch.no_grad()
def read_weights(language: DeepseekV2ForCausalLM) -> DecoderWeights:
    """Return a model's weights as the kernels take them: the model's own tensors, but for a packed kv_b_proj."""
    model = language.model
    return DecoderWeights(
        embedding=model.embed_tokens.weight.detach(),
        layers=tuple(read_layer(layer) for layer in model.layers),
        norm=model.norm.weight,
        eps=model.norm.variance_epsilon,
        head=read_linear(language.lm_head),
    )


@torch.no_grad()
def rotary_tables(language: DeepseekV2ForCausalLM, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines, [capacity, rotated], as the model computes them."""
    device, dtype = read_linear(language.lm_head).device, language.model.embed_tokens.weight.dtype
    cos, sin = language.model.rotary_emb(torch.arange(capacity, device=device)[None], dtype)
    return cos[0], sin[0]
