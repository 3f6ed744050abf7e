"""bitsandbytes' quantizers for this model: its own layers for matrices, and `bnb_layers` for the fused experts."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import logging

from .bnb_layers import (
    BLOCK_4BIT,
    Bnb4bitExperts,
    Bnb8bitExperts,
    BnbExperts,
    bnb_linears,
    check_blocks,
    linear_of_odd_rows,
    unpack_bnb,
)
from .checkpoint import conversion_rules
from .checkpoint_check import first_names
from .moe import DeepseekV2Experts
from .quantized_layers import set_module
from .quantizer import LINEAR

logger = logging.get_logger(__name__)

METHODS = {"4bit": "deepseek_vl2_bnb_4bit", "8bit": "deepseek_vl2_bnb_8bit"}
EXPERTS: dict[str, type[BnbExperts]] = {"4bit": Bnb4bitExperts, "8bit": Bnb8bitExperts}


class WithExpertsConfig(BitsAndBytesConfig):
    """transformers' ``BitsAndBytesConfig``, whose quantizer packs the routed experts too."""

    packs_experts = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.is_quantizable():
            raise ValueError("BitsAndBytesConfig asks for nothing: set load_in_4bit or load_in_8bit.")
        self.quant_method: Any = METHODS["4bit" if self.load_in_4bit else "8bit"]

    @classmethod
    def of(cls, config: BitsAndBytesConfig) -> WithExpertsConfig:
        """Return the same request, experts included.

        Raises:
            ValueError: an option would leave weights as they are, or is not known here.
        """
        if config.llm_int8_has_fp16_weight or config.llm_int8_enable_fp32_cpu_offload:
            raise ValueError(
                "llm_int8_has_fp16_weight and llm_int8_enable_fp32_cpu_offload hold weights unpacked: leave them out."
            )
        if config.bnb_4bit_quant_storage != torch.uint8:
            raise ValueError("bnb_4bit_quant_storage is uint8 here: experts are held as bytes.")
        if config.load_in_4bit and config.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bnb_4bit_quant_type is nf4 or fp4, not {config.bnb_4bit_quant_type!r}.")
        options = config.to_dict()
        for name in ("quant_method", "_load_in_4bit", "_load_in_8bit"):
            options.pop(name, None)
        return cls(**options)


def with_experts(wanted: Any) -> Any:
    """Return a request for bitsandbytes, as a config or a dictionary, with the experts; any other as it is."""
    if isinstance(wanted, dict) and (wanted.get("load_in_4bit") or wanted.get("load_in_8bit")):
        wanted = BitsAndBytesConfig(**{name: value for name, value in wanted.items() if name != "quant_method"})
    return WithExpertsConfig.of(wanted) if isinstance(wanted, BitsAndBytesConfig) else wanted


class QuantizeExperts(ConversionOps):
    """Packs a part of a layer's experts, [E, O, I], once it is read."""

    def __init__(self, layers: ConversionOps, not_finite: list[str]) -> None:
        self.layers = layers  # bitsandbytes' own, for everything else
        self.not_finite = not_finite  # names to report: what is raised here, transformers only logs

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return the packed tensors of one parameter, by their full names."""
        found: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            module, part = get_module_from_name(model, name)
            weight = value[0] if isinstance(value, list) else value
            if not bool(weight.isfinite().all()):
                self.not_finite.append(name)
                weight = weight.nan_to_num()
            if isinstance(module, BnbExperts):
                tensors = module.quantized(part, weight)
                prefix = name.removesuffix(part)
                found.update({prefix + own: tensor for own, tensor in tensors.items()})
            else:
                found.update(self.layers.convert({name: weight}, model=model, **kwargs))
        return found


class WithExperts:
    """What both quantizers do to the model beside bitsandbytes' own."""

    kind = ""
    quantization_config: Any

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is to be packed once it is read."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, BnbExperts):
            return name in module.shapes
        return bool(super().param_needs_quantization(model, param_name, **kwargs))  # type: ignore[misc]

    def get_quantize_ops(self) -> ConversionOps:
        """Return what packs a parameter once it is read."""
        return QuantizeExperts(super().get_quantize_ops(), self.not_finite)  # type: ignore[misc]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from transformers.integrations import replace_with_bnb_linear

        self.not_finite: list[str] = []
        skipped = self.quantization_config.llm_int8_skip_modules or []
        for name, module in list(model.named_modules()):
            if isinstance(module, DeepseekV2Experts) and should_convert_module(name, skipped):
                with torch.device("meta"):
                    experts = EXPERTS[self.kind](module, self.quantization_config, model.dtype)
                set_module(model, name, experts.train(module.training))
        plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not LINEAR.fullmatch(n)]
        replace_with_bnb_linear(model, [*plain, *skipped], self.quantization_config, pre_quantized=False)
        for name, linear in bnb_linears(model):
            linear.plain_dtype = model.dtype
            if self.kind == "4bit":
                # Its product for such CPUs reorders the weight in place, and has no gradient from then on.
                linear.support_avx512bf16_for_cpu = False
                check_blocks(name, linear.out_features, linear.in_features)
                if linear.in_features % BLOCK_4BIT:
                    linear.__class__ = linear_of_odd_rows()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.not_finite:
            raise ValueError(f"The checkpoint has weights that are NaN or infinite, in {first_names(self.not_finite)}.")
        setattr(model, f"is_loaded_in_{self.kind}", True)  # PEFT looks for this
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        unpack_bnb(model, dtype)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        """Make an unpacked model one that was never packed, which saves in the released layout."""
        super().remove_quantization_config(model)  # type: ignore[misc]
        if hasattr(model, f"is_loaded_in_{self.kind}"):
            delattr(model, f"is_loaded_in_{self.kind}")
        model._weight_conversions = conversion_rules()

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return that the packed model cannot be saved; transformers then raises, and the log says what to do."""
        logger.warning(
            "Experts in bitsandbytes' formats have no files that others read: save adapters, merge them and save the "
            'result, or write a packed checkpoint with quantize="int4" or deepseek-vl2 quantize.'
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters over the packed weights can be trained."""
        return True


class Experts4bitQuantizer(WithExperts, Bnb4BitHfQuantizer):
    """bitsandbytes' nf4 and fp4, of attention, dense layers, shared and routed experts."""

    kind = "4bit"


class Experts8bitQuantizer(WithExperts, Bnb8BitHfQuantizer):
    """bitsandbytes' int8, of attention, dense layers, shared and routed experts."""

    kind = "8bit"


for _kind, _quantizer in (("4bit", Experts4bitQuantizer), ("8bit", Experts8bitQuantizer)):
    if METHODS[_kind] not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a checkpoint's own code is a second copy
        register_quantization_config(METHODS[_kind])(WithExpertsConfig)
    with contextlib.suppress(ValueError):
        register_quantizer(METHODS[_kind])(_quantizer)
