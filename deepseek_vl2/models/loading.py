"""Loading a checkpoint: checked against its config first, then read once, each tensor into its place."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate import infer_auto_device_map
from torch import nn
from transformers import PretrainedConfig
from transformers.generation import GenerationConfig

from .checkpoint import StoredTensors, check_shapes, conversion_rules, find_files, released_shapes

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
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


class CheckpointLoadingMixin:
    """``from_pretrained`` for directories and repositories in the released layout."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint in the released layout; arguments as in transformers.

        Of those, ``dtype`` (or ``torch_dtype``), ``device_map``, ``attn_implementation`` ("sdpa", "eager",
        "flash_attention_2", ...) and ``vision_attention_backend`` ("sdpa", "eager", "xformers") are the usual ones.

        Raises:
            ValueError: tensors are missing, extra or of another shape; each is named. With
                ``ignore_mismatched_sizes=True`` the checkpoint is not checked.
            FileNotFoundError: the index names a shard that is not there.
        """
        source, options = pretrained_model_name_or_path, dict(kwargs)
        stored = cls._open_checkpoint(source, options)
        if stored is None:
            result = super().from_pretrained(source, *model_args, **options)  # type: ignore[misc]
        else:
            # transformers maps the files into memory and fuses the experts in a second copy; read by us, each tensor
            # goes into its place, and host memory stays near the checkpoint's size.
            result = super().from_pretrained(None, *model_args, state_dict=stored.fused(), **options)  # type: ignore[misc]
        model = result[0] if isinstance(result, tuple) else result
        if stored is not None:
            model.name_or_path = model.config.name_or_path = str(source)
            model._weight_conversions = conversion_rules()  # what saving reverses; loading did without
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
    def _open_checkpoint(cls, source: Any, options: dict[str, Any]) -> StoredTensors | None:
        """Check a checkpoint against its config and return its tensors; put the config into ``options``.

        Returns ``None`` for what is left to transformers: other formats, special requests, weights on the disk.
        """
        if source is None or any(options.get(name) is not None for name in SPECIAL_OPTIONS):
            return None
        if options.get("ignore_mismatched_sizes") or options.get("use_safetensors") is False:
            return None
        hub = hub_options(options)
        files = find_files(source, **hub)
        if files is None:
            return None
        config = options.get("config")
        if not isinstance(config, PretrainedConfig):
            config = cls.config_class.from_pretrained(source if config is None else config, **hub)  # type: ignore[attr-defined]
            for name in [name for name in options if hasattr(config, name) and name not in ("dtype", "torch_dtype")]:
                setattr(config, name, options.pop(name))
        if getattr(config, "quantization_config", None) is not None:
            return None
        options["config"] = config
        cls.complete_config(config, source, hub)
        stored = StoredTensors(files)
        with torch.device("meta"):
            model: Any = cls(config)  # type: ignore[call-arg]
        check_shapes(released_shapes(model, config), stored.shapes, source)
        automatic = all(options.get(name) in (None, "auto") for name in ("dtype", "torch_dtype"))
        if automatic and config.dtype is None and stored.dtype is not None:
            options["dtype"] = stored.dtype
        return stored if stays_in_memory(model, options) else None
