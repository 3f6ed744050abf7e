"""Low-rank adapters through PEFT: of attention, MLPs and fused experts, and of projector and vision tower."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import ProcessorMixin

from deepseek_vl2.models.bnb_layers import BnbExperts
from deepseek_vl2.models.modeling_deepseek_vl_v2 import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.quantized_layers import PackedExperts, PackedLinear, packed_layers

ATTENTION = "q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj"
MLP = "gate_proj|up_proj|down_proj"
MODULES = {
    "attention": rf"language\.model\.layers\.\d+\.self_attn\.({ATTENTION})",
    "mlp": rf"language\.model\.layers\.\d+\.mlp\.(shared_experts\.)?({MLP})",
    "projector": r"projector\.(layers(\.\d+)?|token_pooling_layer)",
    "vision": r"vision\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
}
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
PARTS = (*MODULES, "experts")
DEFAULT_PARTS = ("attention", "mlp", "experts")


def import_peft() -> Any:
    """Return the package peft.

    Raises:
        ImportError: it is not installed; the message says what to do.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError('Adapters need the package peft: pip install "deepseek_vl2[train]"') from error
    return peft


def target_modules(model: nn.Module, parts: tuple[str, ...]) -> list[str]:
    """Return the names of the linear layers that make up some of `PARTS`."""
    pattern = re.compile("|".join(f"({MODULES[part]})" for part in parts if part in MODULES) or r"(?!)")
    linear = (nn.Linear, PackedLinear)
    return [name for name, module in model.named_modules() if isinstance(module, linear) and pattern.fullmatch(name)]


def lora_config(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    parts: tuple[str, ...] = DEFAULT_PARTS,
) -> Any:
    """Return PEFT's config for adapters of some parts of a model; arguments and errors as for `add_lora`."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"Unknown parts for adapters: {unknown}; choose some of {', '.join(PARTS)}.")
    if rank < 1:
        raise ValueError(f"The rank of adapters must be at least 1, got {rank}.")
    wanted = "experts" in parts and has_experts(model)
    packed = packed_experts(model) if wanted else []
    experts = list(EXPERT_PARAMETERS) if wanted and not packed else None
    if dropout > 0 and wanted:
        raise ValueError(
            'Adapters of fused experts cannot drop out: set dropout to 0, or leave "experts" out of parts.'
        )
    modules = target_modules(model, parts) + packed
    if not modules and not experts:
        raise ValueError(f"The model has nothing to adapt in {', '.join(parts)}.")
    config = import_peft().LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=modules,
        target_parameters=experts,
        task_type="CAUSAL_LM",
    )
    return know_packed(model, config)


def packed_experts(model: nn.Module) -> list[str]:
    """Return the names of a model's packed experts, whichever way they are packed."""
    return [name for name, layer in model.named_modules() if isinstance(layer, PackedExperts | BnbExperts)]


def know_packed(model: nn.Module, config: Any) -> Any:
    """Tell PEFT's config of packed layers, where a model has some; returns it."""
    if not any(True for _ in packed_layers(model)) and not packed_experts(model):
        return config
    from .packed_lora import know_packed_layers

    return know_packed_layers(config)


def has_experts(model: nn.Module) -> bool:
    """Whether any layer is a mixture of experts."""
    return any(name.endswith(".mlp.experts") for name, _ in model.named_modules())


def add_lora(
    model: DeepseekVLV2ForCausalLM,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    parts: tuple[str, ...] = DEFAULT_PARTS,
) -> Any:
    """Freeze a model and add adapters that start as nothing; returns PEFT's model, which trains and generates.

    Args:
        model: the model; it is changed in place.
        rank: rank of the adapters; of the fused experts, each expert has adapters of its own.
        alpha: adapters are scaled by ``alpha / rank``; by default twice the rank.
        dropout: dropout before the adapters; must be 0 with "experts".
        parts: "attention", "mlp" (dense layers and shared experts), "experts" (the routed ones), "projector", "vision".

    Raises:
        ValueError: unknown parts, a rank below 1, dropout with experts, or nothing to adapt.
        ImportError: peft is not installed.
    """
    config = lora_config(model, rank, alpha, dropout, parts)
    return import_peft().get_peft_model(model, config)


def load_lora(model: DeepseekVLV2ForCausalLM, directory: str | Path, trainable: bool = False) -> Any:
    """Load adapters that ``save_pretrained`` wrote onto a model; returns PEFT's model.

    Args:
        model: the model that they were trained on.
        directory: where they are.
        trainable: go on training them.
    """
    peft = import_peft()
    config = peft.PeftConfig.from_pretrained(str(directory))
    config.inference_mode = not trainable
    config = know_packed(model, config)
    return peft.PeftModel.from_pretrained(model, str(directory), is_trainable=trainable, config=config)


def merge_lora(model: Any) -> DeepseekVLV2ForCausalLM:
    """Add the adapters to the weights and return the model itself; packed weights are unpacked.

    Raises:
        ValueError: a merged weight is not finite.
    """
    packed = getattr(model.get_base_model(), "hf_quantizer", None) is not None
    if packed:
        from .packed_lora import forget_packing, merge_bnb_linears

        merge_bnb_linears(model)
    merged: DeepseekVLV2ForCausalLM = model.merge_and_unload(safe_merge=True)
    if packed:
        forget_packing(merged)
    return merged


def merge_and_save(
    model: Any, processor: ProcessorMixin | None, directory: str | Path, **options: Any
) -> DeepseekVLV2ForCausalLM:
    """Merge adapters and save the model in the released layout, its processor beside it; returns the merged model.

    Args:
        model: what `add_lora` or `load_lora` returned.
        processor: saved too, unless ``None``.
        directory: where to.
        **options: as for ``save_pretrained``: ``max_shard_size`` and the like.
    """
    merged = merge_lora(model)
    merged.save_pretrained(directory, **options)
    if processor is not None:
        processor.save_pretrained(directory)
    return merged
