"""Loading a checkpoint: checked against its config first, then read once, each tensor into its place."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import infer_auto_device_map
from torch import nn
from transformers import PretrainedConfig
from transformers.generation import GenerationConfig

from .bnb_checkpoint import split_state
from .bnb_quantizer import METHODS, WithExpertsConfig, prepare_packed, with_experts
from .bundled import locate_bundled
from .calibration import CalibratedPacking
from .checkpoint import (
    OPTIONAL_TENSORS,
    StoredTensors,
    check_float,
    check_pickles,
    check_shapes,
    conversion_rules,
    find_files,
    released_shapes,
)
from .checkpoint_check import ADAPTER, check_config, check_finite
from .offloading import without_overlaps
from .parallel import check_heads
from .quantized_checkpoint import READABLE, PackedFile, logical_shapes, packed_while_read, packing_device
from .quantizer import WeightOnlyConfig, check_foreign, plan_formats

Loaded = TypeVar("Loaded", bound="CheckpointLoadingMixin")

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Of these a config has fields too, and the call's are the ones that count.
CALL_OPTIONS = ("dtype", "torch_dtype", "quantization_config")
QUANTIZED_ALREADY = "The checkpoint is quantized already: load it as it is, or quantize the released one."
SPECIAL_OPTIONS = ("state_dict", "gguf_file", "variant", "tp_plan", "distributed_config", "quantization_config")


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments of ``from_pretrained`` that say where in a hub or a cache to look."""
    return {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}


def stays_in_memory(model: nn.Module, options: dict[str, Any]) -> bool:
    """Whether a ``device_map`` is known to leave no weight on the disk."""
    device_map = options.get("device_map")
    if isinstance(device_map, dict):
        return "disk" not in device_map.values()
    if device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        return device_map != "disk"
    if torch.accelerator.is_available():
        return False  # transformers weighs the devices' memories against each other while it loads
    inferred = infer_auto_device_map(
        model, max_memory=options.get("max_memory"), no_split_module_classes=model._no_split_modules
    )
    return "disk" not in inferred.values()


def quantized_by(config: PretrainedConfig) -> str | None:
    """Return the method that a config.json says a checkpoint is quantized by, or ``None``."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    method = described.get("quant_method") if isinstance(described, dict) else described.quant_method
    return str(getattr(method, "value", method))


def dtype_of_scales(config: PretrainedConfig, stored: StoredTensors, options: dict[str, Any]) -> torch.dtype:
    """Return the dtype that the model will have where nothing is packed."""
    asked = options.get("dtype", options.get("torch_dtype"))
    if isinstance(asked, str) and asked != "auto":
        asked = getattr(torch, asked)
    if isinstance(asked, torch.dtype):
        return asked
    return config.dtype or stored.dtype or torch.get_default_dtype()


def check_no_flags(options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for arguments that older versions of transformers quantized by."""
    for name in ("load_in_4bit", "load_in_8bit"):
        if options.pop(name, None):
            kind = "int4" if name == "load_in_4bit" else "int8"
            raise ValueError(
                f"{name} is no argument of from_pretrained: pass quantization_config=WeightOnlyConfig({kind!r}) of "
                "deepseek_vl2.models.quantizer, which packs the experts too."
            )


def refuse_packed(source: Any, config: Any, options: list[str]) -> None:
    """Refuse to leave a packed checkpoint to transformers, which would give its experts random weights.

    Args:
        source: its directory or hub id.
        config: its config.
        options: arguments of ``from_pretrained`` because of which transformers would read it.

    Raises:
        ValueError: it is packed.
    """
    if source is not None and config is not None and (method := quantized_by(config)) is not None:
        raise ValueError(
            f"{source} is packed ({method}) and is read by this package alone: leave {', '.join(options)} out. "
            "device_map='auto' puts its layers on several GPUs; tp_plan and ep_size split released checkpoints."
        )


class Checkpoint(NamedTuple):
    """What is read of a checkpoint.

    Fields:
        state: tensors in the model's own names, which read themselves at ``value[...]``.
        is_packed: whether some are packed.
        files: the file of each stored tensor.
    """

    state: dict[str, Any]
    is_packed: bool
    files: dict[str, Path]


class CheckpointLoadingMixin:
    """``from_pretrained`` for directories and repositories in the released layout."""

    @classmethod
    def from_pretrained(
        cls: type[Loaded], pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Loaded:
        """Load a checkpoint in the released layout, or "nano"; arguments as in transformers.

        Of those, ``dtype`` (or ``torch_dtype``), ``device_map``, ``attn_implementation`` ("sdpa", "eager",
        "flash_attention_2", ...) and ``vision_attention_backend`` ("sdpa", "eager", "xformers") are the usual ones.
        ``quantization_config=WeightOnlyConfig(...)`` packs the weights while they are read, matrix by matrix;
        transformers' ``BitsAndBytesConfig`` packs them by bitsandbytes, experts included.

        Raises:
            ValueError: tensors are missing, extra or of another shape; each is named. With
                ``ignore_mismatched_sizes=True`` the checkpoint is not checked. Or a file is damaged, its weights are
                NaN, or the config is another model's.
            FileNotFoundError: a file is not there.
            ValueError: another quantizer was asked for, which would leave the experts as they are.
        """
        source, options = locate_bundled(pretrained_model_name_or_path), dict(kwargs)
        check_no_flags(options)
        found = cls._open_checkpoint(source, options)
        if found is None:
            check_pickles(source)
            result = super().from_pretrained(source, *model_args, **options)  # type: ignore[misc]
        else:
            # transformers maps the files into memory and fuses the experts in a second copy; read by us, each tensor
            # goes into its place, and host memory stays near the checkpoint's size.
            result = super().from_pretrained(None, *model_args, state_dict=found.state, **options)  # type: ignore[misc]
        model = result[0] if isinstance(result, tuple) else result
        if found is not None:
            model.name_or_path = model.config.name_or_path = str(source)
            if (Path(source) / ADAPTER).is_file():
                warnings.warn(f"{source} also holds an adapter ({ADAPTER}), which is not applied.", stacklevel=2)
            # What saving reverses; loading did without. Packed weights are saved as they are.
            model._weight_conversions = [] if found.is_packed else conversion_rules()
            check_finite(model, found.files, source, OPTIONAL_TENSORS)
            with contextlib.suppress(OSError):  # releases ship no generation_config.json
                model.generation_config = GenerationConfig.from_pretrained(source, **hub_options(options))
        model.freeze_unused()
        return result

    def freeze_unused(self) -> None:
        """Take the gradient from parameters that never run; loading replaces parameters by new ones."""

    @classmethod
    def complete_config(cls, config: PretrainedConfig, source: Any, hub: dict[str, Any]) -> None:
        """Fill in what a release's config.json lacks and its other files tell."""

    @classmethod
    def _open_checkpoint(cls, source: Any, options: dict[str, Any]) -> Checkpoint | None:
        """Check a checkpoint against its config and return its tensors; put the config into ``options``.

        Returns ``None`` for what is left to transformers: other formats, special requests, weights on the disk.
        """
        wanted = with_experts(options.get("quantization_config"))
        if wanted is not None:
            options["quantization_config"] = wanted
        special = [name for name in SPECIAL_OPTIONS if options.get(name) is not None]
        if isinstance(wanted, WeightOnlyConfig | WithExpertsConfig):
            special.remove("quantization_config")
        if isinstance(wanted, WeightOnlyConfig):
            # A copy: one config may load several models, each with formats of its own.
            options["quantization_config"] = wanted = wanted.copy()
        special += ["use_safetensors=False"] if options.get("use_safetensors") is False else []
        special += ["ignore_mismatched_sizes"] if options.get("ignore_mismatched_sizes") else []
        if source is None or special:
            config = cls._asked_config(source, options)
            if special != ["ignore_mismatched_sizes"]:
                check_foreign(wanted, config is None or bool(config.get_text_config().n_routed_experts))
            refuse_packed(source, config, special)
            if config is not None:
                check_heads(config.get_text_config().num_attention_heads, options)
            return None
        hub = hub_options(options)
        config = options.get("config")
        directory = Path(source) / options.get("subfolder", "")
        if config is None and directory.is_dir():
            check_config(directory, cls.config_class.model_type)  # type: ignore[attr-defined]
        files = find_files(source, **hub)
        if files is None:
            return None
        if not isinstance(config, PretrainedConfig):
            config = cls.config_class.from_pretrained(source if config is None else config, **hub)  # type: ignore[attr-defined]
            for name in [name for name in options if hasattr(config, name) and name not in CALL_OPTIONS]:
                setattr(config, name, options.pop(name))
        options["config"] = config
        cls.complete_config(config, source, hub)
        stored = StoredTensors(files)
        if quantized_by(config) in METHODS.values():
            return cls._open_bnb(config, stored, source, options)
        try:
            packed = cls._read_packed(config, stored, wanted)
        except ValueError as error:
            raise ValueError(f"{source} cannot be loaded as its config.json describes it: {error}") from error
        with torch.device("meta"):
            model: Any = cls(config)  # type: ignore[call-arg]
        if isinstance(options.get("device_map"), dict):
            options["device_map"] = without_overlaps(model, options["device_map"])
        shapes = stored.shapes if packed is None else logical_shapes(stored, packed.layers)
        check_shapes(released_shapes(model, config), shapes, source)
        if packed is None:
            check_float(stored)
        automatic = all(options.get(name) in (None, "auto") for name in ("dtype", "torch_dtype"))
        if automatic and config.dtype is None and stored.dtype is not None:
            options["dtype"] = stored.dtype
        if packed is not None:
            options["config"] = config = copy.deepcopy(config)  # the caller's own stays as it is
            del config.quantization_config
            wanted = options["quantization_config"] = WeightOnlyConfig.of_file(packed)
        elif isinstance(wanted, WeightOnlyConfig):
            wanted.formats = plan_formats(model, wanted)
            wanted.scale_dtype = dtype_of_scales(config, stored, options)
        # Packed weights transformers cannot read; their quantizers refuse a map that leaves some on the disk.
        is_packed = isinstance(wanted, WeightOnlyConfig | WithExpertsConfig)
        if not is_packed and not stays_in_memory(model, options):
            return None
        if packed is not None:
            return Checkpoint(packed.state, is_packed=True, files=stored.files)
        if isinstance(wanted, WeightOnlyConfig):
            state, dtype = stored.fused(), dtype_of_scales(config, stored, options)
            packed_for = None
            if wanted.calibration is not None:
                work = CalibratedPacking(model, state, wanted.formats, dtype, packing_device())
                packed_for = work.run(wanted.calibration)
            state = packed_while_read(state, wanted.formats, dtype, packed_for)
            return Checkpoint(state, is_packed=True, files=stored.files)
        return Checkpoint(stored.fused(), is_packed=is_packed, files=stored.files)

    @classmethod
    def _open_bnb(cls, config: PretrainedConfig, stored: StoredTensors, source: Any, options: dict[str, Any]) -> Any:
        """Return the tensors of a model that bitsandbytes packed before it was saved, as `_open_checkpoint` does.

        Raises:
            ValueError: they do not fit the config, or shall be quantized once more.
        """
        if options.get("quantization_config") is not None:
            raise ValueError(QUANTIZED_ALREADY)
        options["config"] = config = copy.deepcopy(config)  # the caller's own stays as it is
        described = config.quantization_config
        del config.quantization_config
        with torch.device("meta"):
            model: Any = cls(config)  # type: ignore[call-arg]
        options["quantization_config"] = wanted = prepare_packed(model, described, stored, source)
        state, wanted.packed = split_state(model, stored)
        return Checkpoint(state, is_packed=True, files=stored.files)

    @staticmethod
    def _read_packed(config: Any, stored: StoredTensors, wanted: Any) -> PackedFile | None:
        """Return the packed weights of a file, where its config says that there are some.

        Raises:
            ValueError: they are of a kind that is not read, or shall be quantized once more.
        """
        method = quantized_by(config)
        if method is None:
            return None
        if method not in READABLE:
            raise ValueError(
                f"The checkpoint is quantized by {method}, which this package does not read: it reads "
                f"{' and '.join(READABLE)}, or quantizes a released checkpoint itself."
            )
        if wanted is not None:
            raise ValueError(QUANTIZED_ALREADY)
        packed = PackedFile(stored)
        if not packed.formats:
            raise ValueError(
                "The checkpoint's config.json says that it is quantized, and its files hold no packed weight."
            )
        return packed

    @classmethod
    def _asked_config(cls, source: Any, options: dict[str, Any]) -> Any:
        config = options.get("config")
        if not isinstance(config, PretrainedConfig) and source is not None:
            config = cls.config_class.from_pretrained(source, **hub_options(options))  # type: ignore[attr-defined]
        return config
