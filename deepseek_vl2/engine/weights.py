"""From a language model's modules to the weights that the kernels read, or to the reason why they cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models.attention import DeepseekV2Attention, DeepseekV2MultiHeadAttention
from ..models.loss import OutputHead
from ..models.modeling_deepseek import DeepseekV2DecoderLayer, DeepseekV2ForCausalLM
from ..models.moe import EXPERTS_IMPLEMENTATION, DeepseekV2Experts, DeepseekV2MLP, DeepseekV2MoE, MoEGate
from ..models.norm import DeepseekV2RMSNorm
from ..ops.triton.decode_experts import ExpertWeights
from ..ops.triton.router import METHODS, RouterConfig
from .decode import AttentionWeights, DecoderWeights, LayerWeights

# What the kernels keep in registers and shared memory whole.
MAX_HIDDEN = 8192
MAX_RANK = 512
MAX_HEAD = 256
MAX_EXPERTS = 256
MAX_TOP_K = 16

OWN_MODULES = (
    nn.Embedding,
    nn.Linear,
    OutputHead,
    DeepseekV2Attention,
    DeepseekV2DecoderLayer,
    DeepseekV2Experts,
    DeepseekV2MLP,
    DeepseekV2MoE,
    DeepseekV2MultiHeadAttention,
    DeepseekV2RMSNorm,
    MoEGate,
)


def _unsupported_module(name: str, module: nn.Module) -> str | None:
    """Return why a module must be called, rather than its weights read."""
    # Looked up where they are set: a module that lacks an attribute takes long to say so.
    if module.__dict__.get("_hf_hook") is not None:
        return f"{name} is offloaded or dispatched by hooks"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has forward hooks"
    if type(module) not in OWN_MODULES and any(p is not None for p in module._parameters.values()):
        return f"{name} is a {type(module).__name__}: quantized, adapted or replaced"
    if isinstance(module, nn.Linear):
        return f"{name} has a bias" if module._parameters["bias"] is not None else None
    if isinstance(module, DeepseekV2MLP | DeepseekV2Experts) and "silu" not in type(module.act_fn).__name__.lower():
        return f"{name} has another activation than SiLU"
    if isinstance(module, DeepseekV2Experts) and _experts_implementation(module) != EXPERTS_IMPLEMENTATION:
        return f"another experts implementation was chosen: {_experts_implementation(module)}"
    return None


def _experts_implementation(module: nn.Module) -> str:
    config: Any = getattr(module, "config", None)
    return getattr(config, "_experts_implementation", None) or EXPERTS_IMPLEMENTATION


def _unsupported_weights(language: nn.Module) -> str | None:
    """Return why the weights are not what the kernels take."""
    parameters = list(language.parameters())
    if {type(p) for p in parameters} != {nn.Parameter}:
        return "some weights are quantized or distributed tensors"
    if len({(p.dtype, p.device) for p in parameters}) > 1:
        return "the weights are of several dtypes or on several devices"
    if not all(p.is_contiguous() for p in parameters):
        return "some weights are not contiguous"
    return None


def _unsupported_shape(layer: Any) -> str | None:
    """Return why a layer's sizes are beyond the kernels."""
    attention, mlp = layer.self_attn, layer.mlp
    if isinstance(attention, DeepseekV2Attention):
        if attention.q_lora_rank is not None:
            return "queries have a low rank (q_lora_rank)"
        if attention.kv_lora_rank > MAX_RANK:
            return f"kv_lora_rank is over {MAX_RANK}"
        sizes = [attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim]
    else:
        sizes = [attention.head_dim]
    if max(sizes) > MAX_HEAD:
        return f"heads are wider than {MAX_HEAD}"
    if isinstance(mlp, DeepseekV2MoE) and (mlp.gate.n_routed_experts > MAX_EXPERTS or mlp.gate.top_k > MAX_TOP_K):
        return f"more than {MAX_EXPERTS} experts, or {MAX_TOP_K} of a token"
    if layer.input_layernorm.weight.shape[0] > MAX_HIDDEN:
        return f"hidden_size is over {MAX_HIDDEN}"
    return None


def unsupported_settings(language: Any) -> str | None:
    """Return why the kernels cannot follow a model's settings: what can change with no module changing."""
    if type(language) is not DeepseekV2ForCausalLM:
        return f"a {type(language).__name__}, not a DeepseekV2ForCausalLM"
    if language.training:
        return "the model is in training mode"
    implementation = language.config._attn_implementation
    if implementation == "eager" or "flex" in implementation:
        return f"attn_implementation={implementation!r} was chosen"
    if _experts_implementation(language) != EXPERTS_IMPLEMENTATION:
        return f"another experts implementation was chosen: {_experts_implementation(language)}"
    return None


def unsupported_model(language: Any) -> str | None:
    """Return why the kernels cannot read this model, in a few words; ``None`` when they can."""
    if (reason := unsupported_settings(language)) is not None:
        return reason
    for name, module in language.named_modules():
        if (reason := _unsupported_module(name, module)) is not None:
            return reason
    if (reason := _unsupported_weights(language)) is not None:
        return reason
    if language.model.rotary_emb.rope["rope_type"] == "dynamic":
        return "dynamic rotary frequencies change with the length"
    return next((reason for layer in language.model.layers if (reason := _unsupported_shape(layer)) is not None), None)


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
