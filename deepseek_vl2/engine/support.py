"""Whether the kernels run a model: asked once, when its engine is made; the first reason against it is the answer."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from ..models.attention import DeepseekV2Attention, DeepseekV2MultiHeadAttention
from ..models.loss import OutputHead
from ..models.modeling_deepseek import DeepseekV2DecoderLayer, DeepseekV2ForCausalLM
from ..models.moe import EXPERTS_IMPLEMENTATION, DeepseekV2Experts, DeepseekV2MLP, DeepseekV2MoE
from ..models.norm import DeepseekV2RMSNorm
from ..models.quantization import BLOCK, SMALLEST_GROUP, WeightFormat
from ..models.quantized_layers import PackedExperts, PackedLinear, PackedModule
from ..models.router import MoEGate
from ..ops import SWITCH, turned_off

# What the kernels keep in registers and shared memory whole.
MAX_HIDDEN = 8192
MAX_RANK = 512
MAX_HEAD = 256
MAX_EXPERTS = 256
MAX_TOP_K = 16
ROUTING_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")

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
    PackedExperts,
    PackedLinear,
)


def unsupported_reason(language: Any) -> str | None:
    """Return why the kernels do not run a language model, in a few words, or ``None``: they do."""
    embeddings = getattr(getattr(language, "model", None), "embed_tokens", None)
    weight, head = getattr(embeddings, "weight", None), getattr(language, "lm_head", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(head, (nn.Linear, PackedLinear)):
        return "the output head is neither a plain linear layer nor a packed one"
    return (
        unsupported_here()
        or unsupported_device(weight)
        or unsupported_settings(language)
        or unsupported_modules(language)
        or _unsupported_weights(language)
        or next((reason for layer in language.model.layers if (reason := _unsupported_shape(layer))), None)
    )


def unsupported_here() -> str | None:
    """Return why no kernels run in this process."""
    if turned_off():
        return f"{SWITCH} turns it off"
    return "Triton is not installed" if importlib.util.find_spec("triton") is None else None


def unsupported_device(weight: torch.Tensor) -> str | None:
    """Return why the kernels do not run where this weight lies."""
    if weight.device.type != "cuda" or torch.version.hip is not None:
        return f"the model is on {weight.device}, not on an NVIDIA GPU"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"the model is in {weight.dtype}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def unsupported_settings(language: Any) -> str | None:
    """Return why the kernels cannot follow a model's settings."""
    if type(language) is not DeepseekV2ForCausalLM:
        return f"a {type(language).__name__}, not a DeepseekV2ForCausalLM"
    if language.training:
        return "the model is in training mode"
    implementation = language.config._attn_implementation
    if implementation == "eager" or "flex" in implementation:
        return f"attn_implementation={implementation!r} was chosen"
    if (chosen := _experts_implementation(language)) != EXPERTS_IMPLEMENTATION:
        return f"another experts implementation was chosen: {chosen}"
    if language.model.rotary_emb.rope["rope_type"] == "dynamic":
        return "dynamic rotary frequencies change with the length"
    return None


def unsupported_modules(language: nn.Module) -> str | None:
    """Return why some module must be called, rather than its weights read."""
    every = torch.nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return "all modules have hooks"
    named = language.named_modules()
    return next((reason for name, module in named if (reason := _unsupported_module(name, module))), None)


def _unsupported_module(name: str, module: nn.Module) -> str | None:
    if (reason := unsupported_bypass(module)) is not None:
        return f"{name}: {reason}"
    if type(module) not in OWN_MODULES and any(p is not None for p in module._parameters.values()):
        return f"{name} is a {type(module).__name__}: quantized, adapted or replaced"
    if isinstance(module, nn.Linear | PackedLinear):
        bias = module._parameters.get("bias")
        return f"{name} has a bias" if bias is not None else _unsupported_format(name, module)
    if isinstance(module, PackedExperts) and (reason := _unsupported_format(name, module)) is not None:
        return reason
    if (
        isinstance(module, DeepseekV2MLP | DeepseekV2Experts | PackedExperts)
        and "silu" not in type(module.act_fn).__name__.lower()
    ):
        return f"{name} has another activation than SiLU"
    if isinstance(module, DeepseekV2Experts) and _experts_implementation(module) != EXPERTS_IMPLEMENTATION:
        return f"another experts implementation was chosen: {_experts_implementation(module)}"
    return None


def _unsupported_format(name: str, module: nn.Module) -> str | None:
    """Return why the kernels do not read a module's packed weights."""
    if not isinstance(module, PackedModule):
        return None
    for part, fmt in module.formats.items():
        group = fmt.group_size
        if group and (group & (group - 1) or group < SMALLEST_GROUP):
            return f"{name} has groups of {group} columns"
        if fmt.block and isinstance(module, PackedExperts) and module.intermediate_size % BLOCK:
            return f"{name}.{part} has blocks across gates and ups"
    return None


def unsupported_bypass(module: nn.Module) -> str | None:
    """Return why a module's own call must not be gone around: hooks, or a forward pass of somebody else's.

    accelerate's hooks that only bring inputs to a module's device, as ``device_map`` leaves them, are no reason.
    """
    state: dict[str, Any] = vars(module)  # a module that lacks an attribute takes long to say so
    hook = state.get("_hf_hook")
    if hook is not None and not _only_moves_inputs(hook):
        return "it is offloaded"
    if "forward" in state and hook is None:
        return "its forward pass was replaced"
    return "it has forward hooks" if state["_forward_hooks"] or state["_forward_pre_hooks"] else None


def _only_moves_inputs(hook: Any) -> bool:
    return type(hook).__name__ == "AlignDevicesHook" and not (hook.offload or hook.offload_buffers)


def _experts_implementation(module: nn.Module) -> str:
    config: Any = getattr(module, "config", None)
    return getattr(config, "_experts_implementation", None) or EXPERTS_IMPLEMENTATION


def _unsupported_weights(language: Any) -> str | None:
    """Return why the weights are not what the kernels take."""
    parameters = list(language.parameters())
    if {type(p) for p in parameters} != {nn.Parameter}:
        return "some weights are quantized or distributed tensors"
    if len({p.dtype for p in _unpacked(language)}) > 1 or {p.device.type for p in parameters} != {"cuda"}:
        return "the weights are of several dtypes, or not all on GPUs"
    parts = (language.model.embed_tokens, language.model.norm, language.lm_head, *language.model.layers)
    if any(len({p.device for p in part.parameters()}) > 1 for part in parts):
        return "a layer lies on several devices"
    if not all(p.is_contiguous() for p in parameters):
        return "some weights are not contiguous"
    return None


def _unpacked(language: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are no part of a packed weight."""
    packed = [module for module in language.modules() if isinstance(module, PackedModule)]
    held = {id(part) for module in packed for name in module.formats for part in module.packed(name)}
    return [parameter for parameter in language.parameters() if id(parameter) not in held]


def _format(layer: Any) -> WeightFormat | None:
    return layer.format if isinstance(layer, PackedLinear) else None


def _unsupported_shape(layer: Any) -> str | None:
    """Return why a layer is beyond the kernels."""
    attention, mlp = layer.self_attn, layer.mlp
    shared = mlp.shared_experts if isinstance(mlp, DeepseekV2MoE) else mlp
    if shared is not None and _format(shared.gate_proj) != _format(shared.up_proj):
        return "gates and ups are of several formats"
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
    if isinstance(mlp, DeepseekV2MoE):
        if mlp.gate.n_routed_experts > MAX_EXPERTS or mlp.gate.top_k > MAX_TOP_K:
            return f"more than {MAX_EXPERTS} experts, or {MAX_TOP_K} of a token"
        if mlp.gate.topk_method not in ROUTING_METHODS or mlp.gate.scoring_func not in ("softmax", "sigmoid"):
            return f"experts are chosen by {mlp.gate.topk_method!r} of {mlp.gate.scoring_func!r} scores"
    if layer.input_layernorm.weight.shape[0] > MAX_HIDDEN:
        return f"hidden_size is over {MAX_HIDDEN}"
    return None
