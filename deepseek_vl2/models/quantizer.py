"""Weight-only quantization through transformers: its config, which layers it packs, and the quantizer that does so."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .calibration import Calibration
from .checkpoint import conversion_rules
from .moe import DeepseekV2Experts
from .quantization import BLOCK, GROUP_SIZES, KINDS, Kind, WeightFormat, fit_format
from .quantized_checkpoint import PackedFile, file_state
from .quantized_config import HEAD, file_config
from .quantized_layers import PackedExperts, PackedLinear, packed_layers, set_module

METHOD = "deepseek_vl2"
DEFAULT_GROUP = 64
# But kv_b_proj: latent attention multiplies queries and outputs by it, head by head, in 16 bits, so a packed one is
# held twice; and vLLM reads it as a plain one where a prompt has cached tokens before it.
LINEAR = re.compile(
    r"(^|.*\.)layers\.\d+\.(self_attn\.(q|k|v|o|q_a|q_b)_proj|self_attn\.kv_a_proj_with_mqa"
    r"|mlp\.(shared_experts\.)?(gate|up|down)_proj)"
)
STACKED = re.compile(r"\.(q|k|v|gate|up)_proj$")
EXPERT_PARTS = ("gate_up_proj", "down_proj")

Formats = dict[str, WeightFormat]


class WeightOnlyConfig(QuantizationConfigMixin):
    """Asks ``from_pretrained`` for packed weights: of attention, MLPs, shared and routed experts.

    Vision tower, projector, gates, embeddings, norms and kv_b_proj keep their dtype, and so does the head without
    ``head``.

    Args:
        weights: "int4", "int8" (a scale for each output channel) or "fp8" (e4m3).
        group_size: columns that share a scale of int4: 32, 64 or 128. A matrix whose columns it does not divide gets
            smaller groups, of 16 at least, or else int8.
        block: fp8 has a scale for each block of 128 x 128 weights rather than for each output channel.
        head: kind of the output head: "int8" or "fp8", or "int4"; ``None``: it stays as it is.
        calibration: the processor's batches of one prompt each, or a `Calibration` of such: int4 is then packed so that
            products with what these give stay near, layer by layer.

    Raises:
        ValueError: an unknown kind or group size, or an option of another kind.
    """

    def __init__(
        self,
        weights: Kind = "int4",
        group_size: int | None = None,
        block: bool = False,
        head: Kind | None = None,
        calibration: Calibration | Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        for kind in (weights, *([] if head is None else [head])):
            if kind not in KINDS:
                raise ValueError(f"Weights can be quantized to {', '.join(KINDS)}, not to {kind!r}.")
        if group_size is not None and (weights != "int4" or group_size not in GROUP_SIZES):
            raise ValueError(
                f"Groups are of int4 alone, and of {', '.join(map(str, GROUP_SIZES))} columns, "
                f"not {group_size} of {weights}."
            )
        if block and weights != "fp8":
            raise ValueError(f"Blocks of {BLOCK} x {BLOCK} are of fp8 alone, not of {weights}.")
        self.quant_method: Any = METHOD
        self.weights = weights
        self.group_size = (group_size or DEFAULT_GROUP) if weights == "int4" else 0
        self.block = block
        self.head = head
        self.calibration: Calibration | None = None
        self.calibrate_with(calibration)
        # Known once a checkpoint is at hand: the format of every packed matrix, and the dtype of their scales.
        self.formats: Formats = {}
        self.scale_dtype: torch.dtype | None = None

    @classmethod
    def of_file(cls, file: PackedFile) -> WeightOnlyConfig:
        """Return what describes the packed weights of a file."""
        wanted = file.wanted
        config = cls(wanted.kind, block=wanted.block)
        config.group_size = wanted.group_size
        config.formats = file.formats
        config.scale_dtype = file.scale_dtype
        return config

    def copy(self) -> WeightOnlyConfig:
        """Return the same request, of no checkpoint yet."""
        return WeightOnlyConfig(
            self.weights,
            self.group_size if self.weights == "int4" else None,
            self.block,
            self.head,
            self.calibration,
        )

    def calibrate_with(self, calibration: Calibration | Sequence[Mapping[str, Any]] | None) -> None:
        """Have int4 matrices packed for samples.

        Raises:
            ValueError: nothing is packed as int4.
        """
        if calibration is not None and "int4" not in (self.weights, self.head):
            raise ValueError(f"Calibration is of int4 alone: {self.weights} rounds each weight to the nearest it has.")
        if calibration is None or isinstance(calibration, Calibration):
            self.calibration = calibration
        else:
            self.calibration = Calibration(calibration)

    @property
    def wanted(self) -> WeightFormat:
        """The format of matrices that it suits."""
        return WeightFormat(self.weights, self.group_size, self.block)

    def to_dict(self) -> dict[str, Any]:
        """Return what a saved config.json says: the description that compressed-tensors gives such weights."""
        return file_config(self.formats)


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # code loaded from a checkpoint directory is a second copy
    register_quantization_config(METHOD)(WeightOnlyConfig)


def plan_formats(model: nn.Module, config: WeightOnlyConfig) -> Formats:
    """Return the format of every matrix to pack, by the name of its layer, or of the experts and their part.

    Raises:
        ValueError: the head shall be packed, and is the embedding too.
    """
    formats: Formats = {}
    for name, module in model.named_modules():
        if isinstance(module, DeepseekV2Experts):
            widths = (module.hidden_size, module.inner_size)
            for part, width in zip(EXPERT_PARTS, widths, strict=True):
                wanted = config.wanted
                if wanted.block and module.inner_size % BLOCK:
                    wanted = WeightFormat("fp8")  # a block would hold rows of two matrices
                formats[f"{name}.{part}"] = fit_format(wanted, width)
        elif isinstance(module, nn.Linear) and LINEAR.fullmatch(name):
            wanted = config.wanted
            if wanted.block and module.out_features % BLOCK and STACKED.search(name):
                wanted = WeightFormat("fp8")  # vLLM stacks these, and a block would hold rows of two of them
            formats[name] = fit_format(wanted, module.in_features)
        elif isinstance(module, nn.Linear) and config.head and name.rpartition(".")[2] == HEAD:
            model_config: Any = model.config
            if model_config.get_text_config().tie_word_embeddings:
                raise ValueError("The head is the embedding too (tie_word_embeddings) and cannot be quantized.")
            group = (config.group_size or DEFAULT_GROUP) if config.head == "int4" else 0
            formats[name] = fit_format(WeightFormat(config.head, group), module.in_features)
    return formats


def matrix_shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """Return the unpacked shape of a matrix that `plan_formats` names: [O, I], of experts [E, O, I]."""
    is_experts = isinstance(model.get_submodule(name.rpartition(".")[0]), DeepseekV2Experts)
    return tuple(model.get_parameter(name if is_experts else f"{name}.weight").shape)


def replace_layers(model: nn.Module, formats: Mapping[str, WeightFormat], scale_dtype: torch.dtype | None) -> None:
    """Put layers over packed weights, whose values are still to come, in the places of a model's own."""
    for name, module in list(model.named_modules()):
        if isinstance(module, DeepseekV2Experts) and f"{name}.{EXPERT_PARTS[0]}" in formats:
            parts = {part: formats[f"{name}.{part}"] for part in EXPERT_PARTS}
            sizes = (module.num_experts, module.hidden_size, module.inner_size)
            experts = PackedExperts(*sizes, module.act_fn, parts, scale_dtype)
            experts.config = module.config
            set_module(model, name, experts)
        elif isinstance(module, nn.Linear) and name in formats:
            columns, rows = module.in_features, module.out_features
            set_module(model, name, PackedLinear(columns, rows, formats[name], module.bias is not None, scale_dtype))


def unpack_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put plain layers, with weights of that dtype, in the places of all packed ones."""
    for name, layer in list(packed_layers(model)):
        if isinstance(layer, PackedLinear):
            set_module(model, name, layer.dense(dtype))
        elif isinstance(layer, PackedExperts):
            set_module(model, name, unpack_experts(layer, dtype))


def unpack_experts(layer: Any, dtype: torch.dtype | None = None) -> DeepseekV2Experts:
    """Return plain experts with a layer's weights unpacked."""
    with torch.device("meta"):
        experts = DeepseekV2Experts(layer.config)
    for part in EXPERT_PARTS:
        setattr(experts, part, nn.Parameter(layer.dequantized(part, dtype), requires_grad=False))
    return experts.train(layer.training)


class WeightOnlyQuantizer(HfQuantizer):
    """Builds a model of packed layers, and saves it in compressed-tensors' layout.

    The loading of this package hands it packed tensors, quantized one by one as they were read: see `loading`.
    """

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ``ValueError`` where weights did not come through this package's loading, or would be on the disk."""
        device_map = kwargs.get("device_map")
        if device_map == "disk" or (isinstance(device_map, dict) and "disk" in device_map.values()):
            raise ValueError(
                "Packed weights are not left on the disk, and max_memory or the device_map leaves some there: give the "
                "devices more memory, or pack in fewer bits."
            )
        if not self.quantization_config.formats:
            raise ValueError(
                "Weights are packed while they are read from safetensors files into memory: load the checkpoint from "
                "its directory or hub id, without weights offloaded to the disk and without a tp_plan."
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        replace_layers(model, self.quantization_config.formats, self.quantization_config.scale_dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        unpack_layers(model, dtype)
        model._weight_conversions = conversion_rules()
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors of a file, in compressed-tensors' layout and the released names."""
        return file_state(model), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters over the packed weights can be trained."""
        return True


with contextlib.suppress(ValueError):  # registered by another copy of this file
    register_quantizer(METHOD)(WeightOnlyQuantizer)


def check_foreign(quantization: Any, has_experts: bool) -> None:
    """Refuse a quantizer that would leave the experts as they are.

    Args:
        quantization: transformers' config of another quantizer, or the dictionary of one.
        has_experts: whether the model has routed experts.

    Raises:
        ValueError: it has; the message says what to use.
    """
    if quantization is None or isinstance(quantization, WeightOnlyConfig) or not has_experts:
        return
    if getattr(quantization, "packs_experts", False):
        raise ValueError(
            "Experts are packed while they are read: load the checkpoint from its directory or hub id, from "
            "safetensors files and without a tp_plan."
        )
    name = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
    raise ValueError(
        f"{name} quantizes linear layers alone and would leave the routed experts, most of the weights, as they are: "
        f'use quantize="int4", "int8" or "fp8", or quantization_config=WeightOnlyConfig("int4") of '
        "deepseek_vl2.models.quantizer, which pack the experts too; adapters train over those (QLoRA)."
    )
