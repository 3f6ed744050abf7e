"""From a language model's modules to the weights that the kernels read, or to the reason why they cannot."""

from __future__ import annotations

from typing import Any

import torch

from ..models.attention import DeepseekV2MultiHeadAttention
from ..models.modeling_deepseek import DeepseekV2ForCausalLM
from ..models.moe import DeepseekV2MoE
from ..models.router import MoEGate
from ..ops.triton.decode_experts import ExpertWeights
from ..ops.triton.router import METHODS, RouterConfig
from .decode import AttentionWeights, DecoderWeights, LayerWeights


def read_attention(module: Any) -> AttentionWeights:
    """Return a layer's attention as the kernels take it."""
    if isinstance(module, DeepseekV2MultiHeadAttention):
        return AttentionWeights(
            projections=(module.q_proj.weight, module.k_proj.weight, module.v_proj.weight),
            out=module.o_proj.weight,
            scaling=module.scaling,
            heads=module.q_proj.weight.shape[0] // module.head_dim,
            key_heads=module.k_proj.weight.shape[0] // module.head_dim,
            size=module.head_dim,
        )
    return AttentionWeights(
        projections=(module.q_proj.weight, module.kv_a_proj_with_mqa.weight),
        out=module.o_proj.weight,
        scaling=module.scaling,
        heads=module.num_heads,
        key_heads=1,
        size=module.v_head_dim,
        kv_b=module.kv_b_proj.weight.view(module.num_heads, -1, module.kv_lora_rank),
        norm=module.kv_a_layernorm.weight,
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
    dense = [] if shared is None else [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight]
    routed = (mlp.experts.gate_up_proj, mlp.experts.down_proj) if moe else (None, None)
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
    """Return a model's weights as the kernels take them; the tensors are the model's own."""
    model, head = language.model, language.get_parameter("lm_head.weight")
    return DecoderWeights(
        embedding=model.embed_tokens.weight.detach(),
        layers=tuple(read_layer(layer) for layer in model.layers),
        norm=model.norm.weight,
        eps=model.norm.variance_epsilon,
        head=head,
    )


@torch.no_grad()
def rotary_tables(language: DeepseekV2ForCausalLM, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines, [capacity, rotated], as the model computes them."""
    weight = language.get_parameter("lm_head.weight")
    cos, sin = language.model.rotary_emb(torch.arange(capacity, device=weight.device)[None], weight.dtype)
    return cos[0], sin[0]
