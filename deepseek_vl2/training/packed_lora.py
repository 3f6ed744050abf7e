"""Low-rank adapters over packed weights (QLoRA): the weights stay packed and frozen, the adapters are plain.

Shape suffixes: L rows of one expert, E experts, H hidden size, R rank, O output channels, I input channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from deepseek_vl2.models.bnb_layers import BnbExperts, bnb_linears, dense_linear, unpack_bnb
from deepseek_vl2.models.checkpoint import conversion_rules
from deepseek_vl2.models.moe import DeepseekV2Experts
from deepseek_vl2.models.quantized_layers import (
    PackedExperts,
    PackedLinear,
    packed_experts_forward,
    packed_layers,
    set_module,
)
from deepseek_vl2.models.quantizer import EXPERT_PARTS


class PackedLoraLinear(Linear):
    """PEFT's adapter of a linear layer, over a packed one."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer as it was, or a plain one with the adapter's product added to its unpacked weight."""
        base: Any = self.get_base_layer()
        if not merge:
            return base
        dtype = base.weight_scale.dtype
        layer = base.dense(torch.float32)
        for name in adapter_names or self.active_adapters:
            layer.weight.data += self.get_delta_weight(name).float()
        check_finite(layer.weight, safe_merge)
        return layer.to(dtype)


class PackedLoraExperts(nn.Module, LoraLayer):
    """Adapters of all routed experts of a layer, each with matrices of its own, over packed weights."""

    adapter_layer_names = tuple(f"lora_{part}_{side}" for part in EXPERT_PARTS for side in "AB")
    other_param_names = ("r", "lora_alpha", "scaling")

    def __init__(
        self,
        base_layer: PackedExperts | BnbExperts,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter, which starts as nothing."""
        if r < 1 or config.lora_dropout > 0 or config.use_dora:
            raise ValueError("Adapters of experts need a rank of at least 1, and know neither dropout nor DoRA.")
        base: Any = self.get_base_layer()
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        sizes = {
            "gate_up_proj": (2 * base.intermediate_size, base.hidden_size),
            "down_proj": (base.hidden_size, base.intermediate_size),
        }
        kind = {"dtype": base.weight_dtype, "device": next(base.parameters()).device}
        for part, (rows, columns) in sizes.items():
            first = torch.empty(base.num_experts, r, columns, **kind)
            nn.init.uniform_(first, -(columns**-0.5), columns**-0.5)  # what PEFT's own start from
            second = torch.zeros(base.num_experts, rows, r, **kind)
            getattr(self, f"lora_{part}_A")[adapter_name] = nn.Parameter(first)
            getattr(self, f"lora_{part}_B")[adapter_name] = nn.Parameter(second)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _product(self, part: str, rows_LI: torch.Tensor, expert: int) -> torch.Tensor:
        base: Any = self.get_base_layer()
        out = base.product(part, rows_LI, expert)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            first, second = (getattr(self, f"lora_{part}_{side}")[name][expert] for side in "AB")
            out = out + (rows_LI.to(first.dtype) @ first.mT @ second.mT * self.scaling[name]).to(out.dtype)
        return out

    def run_expert(self, rows_LH: torch.Tensor, expert: int) -> torch.Tensor:
        """Return one expert's output with its adapters, [L, H] in and out."""
        gate, up = self._product("gate_up_proj", rows_LH, expert).chunk(2, dim=-1)
        base: Any = self.get_base_layer()
        return self._product("down_proj", base.act_fn(gate) * up, expert)

    def forward(self, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's experts, [N, H]; summed in float32."""
        base: Any = self.get_base_layer()
        return packed_experts_forward(self.run_expert, base.num_experts, hidden_NH, ids_NK, weights_NK)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the experts as they were, or plain ones with the adapters' products added."""
        base: Any = self.get_base_layer()
        if not merge:
            return base
        dtype = base.weight_dtype
        with torch.device("meta"):
            merged = DeepseekV2Experts(base.config)
        for part in EXPERT_PARTS:
            weight = base.dequantized(part, dtype)
            for name in adapter_names or self.active_adapters:
                first, second = (getattr(self, f"lora_{part}_{side}")[name].data for side in "AB")
                for expert in range(base.num_experts):  # one at a time: in float32 all would be twice the layer
                    delta = second[expert].float() @ first[expert].float() * self.scaling[name]
                    weight[expert] = (weight[expert].float() + delta).to(dtype)
            check_finite(weight, safe_merge)
            setattr(merged, part, nn.Parameter(weight, requires_grad=False))
        return merged.train(base.training)


def check_finite(weight: torch.Tensor, wanted: bool) -> None:
    """Raise ``ValueError`` for a merged weight that is not finite, where that is to be checked."""
    if wanted and not bool(weight.isfinite().all()):
        raise ValueError("A merged weight is not finite: the adapters have diverged.")


def know_packed_layers(config: Any) -> Any:
    """Tell PEFT's config how packed layers are adapted; returns it."""
    config._register_custom_module(
        {PackedLinear: PackedLoraLinear, PackedExperts: PackedLoraExperts, BnbExperts: PackedLoraExperts}
    )
    return config


def merge_bnb_linears(model: nn.Module) -> None:
    """Put plain layers with their adapters added in the places of adapted layers of bitsandbytes.

    PEFT itself would pack the sum again, which rounds the adapters away.

    Raises:
        ValueError: an adapter is no plain product (DoRA, a bias), or a merged weight is not finite.
    """
    adapted: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in adapted:
        base: Any = layer.get_base_layer()
        if not any(found is base for _, found in bnb_linears(base)):
            continue
        adapters = [
            each for each in layer.active_adapters if each in layer.lora_A and each not in layer.merged_adapters
        ]
        if any(layer.lora_variant.get(each) or layer.lora_bias.get(each) for each in adapters):
            raise ValueError(f"The adapter of {name} is no plain product (DoRA, or with a bias) and cannot be merged.")
        dense = dense_linear(base, torch.float32)
        for each in adapters:
            dense.weight.data += layer.get_delta_weight(each).float()
        check_finite(dense.weight, True)
        set_module(model, name, dense.to(base.plain_dtype))


def forget_packing(model: Any) -> None:
    """Make a merged model one that was never packed: what was not adapted is unpacked, and the config says so."""
    from deepseek_vl2.models.quantizer import unpack_layers

    if getattr(model, "hf_quantizer", None) is None:
        return
    if any(True for _ in packed_layers(model)):
        unpack_layers(model)
    unpack_bnb(model)
    model.hf_quantizer.remove_quantization_config(model)
    model._weight_conversions = conversion_rules()
