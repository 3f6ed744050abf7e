"""bitsandbytes' quantizers for this model: its own layers for matrices, and `bnb_layers` for the fused experts."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
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

from .bnb_checkpoint import PackedTensors, file_shapes, file_state, read_packed
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
from .checkpoint import StoredTensors, check_shapes, conversion_rules
from .checkpoint_check import first_names
from .moe import DeepseekV2Experts
from .quantized_layers import set_module
from .quantizer import LINEAR

METHODS = {"4bit": "deepseek_vl2_bnb_4bit", "8bit": "deepseek_vl2_bnb_8bit"}
EXPERTS: dict[str, type[BnbExperts]] = {"4bit": Bnb4bitExperts, "8bit": Bnb8bitExperts}


class WithExpertsConfig(BitsAndBytesConfig):
    """transformers' ``BitsAndBytesConfig``, whose quantizer packs the routed experts too."""

    packs_experts = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.is_quantizable():
            raise ValueError("BitsAndBytesConfig asks for nothing: set load_in_4bit or load_in_8bit.")
        self.quant_method: Any = METHODS[self.kind]
        self.packed: PackedTensors | None = None  # of a file whose weights are packed already

    @property
    def kind(self) -> str:
        """Which of the two quantizers it asks for."""
        return "4bit" if self.load_in_4bit else "8bit"

    @classmethod
    def of_file(cls, described: Any) -> WithExpertsConfig:
        """Return what a config.json says of a packed model.

        Raises:
            ValueError: it asks for nothing, or for what is not known here.
        """
        content = described if isinstance(described, dict) else described.to_dict()
        wanted = with_experts({name: value for name, value in content.items() if not name.startswith("_")})
        if not isinstance(wanted, WithExpertsConfig):
            raise ValueError("The checkpoint's quantization_config says neither load_in_4bit nor load_in_8bit.")
        return wanted

    def to_dict(self) -> dict[str, Any]:
        """Return what a saved config.json says."""
        return {name: value for name, value in super().to_dict().items() if name != "packed"}

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
        for name in ("quant_method", "_load_in_4bit", "_load_in_8bit"):  # the last two under their other names too
            options.pop(name, None)
        return cls(**options)


def with_experts(wanted: Any) -> Any:
    """Return a request for bitsandbytes, as a config or a dictionary, with the experts; any other as it is."""
    if isinstance(wanted, dict) and (wanted.get("load_in_4bit") or wanted.get("load_in_8bit")):
        wanted = BitsAndBytesConfig(**{name: value for name, value in wanted.items() if name != "quant_method"})
    return WithExpertsConfig.of(wanted) if isinstance(wanted, BitsAndBytesConfig) else wanted


class ReadPacked(ConversionOps):
    """Reads a parameter that the file holds packed."""

    def __init__(self, layers: ConversionOps, packed: PackedTensors, not_finite: list[str]) -> None:
        self.layers = layers  # transformers' own, for linear layers
        self.packed = packed
        self.not_finite = not_finite

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return the packed tensors of one parameter, by their full names."""
        found: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            if self.packed.not_finite(name):
                self.not_finite.append(name)
            device = (value[0] if isinstance(value, list) else value).device
            found.update(read_packed(name, model, self.packed, device, self.layers))
        return found


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


def replace_layers(model: Any, config: WithExpertsConfig) -> None:
    """Put bitsandbytes' layers, whose weights are still to come, in the places of a model's own.

    Raises:
        ValueError: a matrix is not made up of whole blocks.
    """
    from transformers.integrations import replace_with_bnb_linear

    skipped = config.llm_int8_skip_modules or []
    for name, module in list(model.named_modules()):
        if isinstance(module, DeepseekV2Experts) and should_convert_module(name, skipped):
            with torch.device("meta"):
                experts = EXPERTS[config.kind](module, config, model.dtype)
            set_module(model, name, experts.train(module.training))
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not LINEAR.fullmatch(n)]
    replace_with_bnb_linear(model, [*plain, *skipped], config, pre_quantized=False)
    for name, linear in bnb_linears(model):
        linear.plain_dtype = model.dtype
        if config.kind == "4bit":
            # Its product for such CPUs reorders the weight in place, and has no gradient from then on.
            linear.support_avx512bf16_for_cpu = False
            check_blocks(name, linear.out_features, linear.in_features)
            if linear.in_features % BLOCK_4BIT:
                linear.__class__ = linear_of_odd_rows()


def prepare_packed(model: Any, described: Any, stored: StoredTensors, source: Any) -> WithExpertsConfig:
    """Put bitsandbytes' layers into a model on the meta device, as a file holds them, and check that it does.

    Args:
        model: of plain layers.
        described: the ``quantization_config`` of the file's config.json.
        stored: the file's tensors.
        source: where they are from, for errors.

    Raises:
        ValueError: it is no description, or tensors are missing, extra or of another shape.
        ImportError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            'The checkpoint is packed by bitsandbytes, which is not installed: pip install "bitsandbytes>=0.50".'
        )
    wanted = WithExpertsConfig.of_file(described)
    replace_layers(model, wanted)
    check_shapes(file_shapes(model, stored), stored.shapes, source)
    return wanted


class WithExperts:
    """What both quantizers do to the model beside bitsandbytes' own."""

    kind = ""
    quantization_config: Any

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ``ValueError`` where a map leaves weights on the host beside a GPU, or on the disk."""
        device_map = kwargs.get("device_map")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else {str(device_map)}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "bitsandbytes' weights cannot wait on the host or the disk, and max_memory or the device_map leaves "
                'some there: give the devices more memory, or use WeightOnlyConfig("int4") of '
                "deepseek_vl2.models.quantizer, whose layers may wait on the host."
            )
        super().validate_environment(*args, **kwargs)  # type: ignore[misc]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is to be packed once it is read."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, BnbExperts):
            return name in module.shapes
        return bool(super().param_needs_quantization(model, param_name, **kwargs))  # type: ignore[misc]

    def get_quantize_ops(self) -> ConversionOps:
        """Return what packs a parameter once it is read, or reads it packed."""
        packed = self.quantization_config.packed
        if packed is not None:
            from transformers.integrations import bitsandbytes as transformers_bnb

            name = f"Bnb{self.kind}Deserialize"  # one for each kind, which only newer releases return by a method
            return ReadPacked(getattr(transformers_bnb, name)(self), packed, self.not_finite)
        return QuantizeExperts(super().get_quantize_ops(), self.not_finite)  # type: ignore[misc]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.not_finite: list[str] = []
        replace_layers(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.packed = None
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

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors of a file, see `bnb_checkpoint`."""
        return file_state(model), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return that the model can be saved."""
        return True

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
