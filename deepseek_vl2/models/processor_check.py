"""Whether the files of a checkpoint's processor can be read, and belong to its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint_check import read_json_object
from .configuration_deepseek_vl_v2 import DeepseekVLV2Config

PROCESSOR_CONFIG = "processor_config.json"
TEMPLATE = "chat_template.jinja"


def check_processor_files(directory: Path) -> None:
    """Raise ``ValueError`` for a processor's file that cannot be read; it is named."""
    if (directory / PROCESSOR_CONFIG).is_file():
        read_json_object(directory / PROCESSOR_CONFIG)
    if (directory / TEMPLATE).is_file():
        try:
            (directory / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{directory / TEMPLATE} is not UTF-8 text.") from error


def _config_of(directory: Path) -> DeepseekVLV2Config | None:
    """Return a checkpoint's config; ``None`` where there is none of this model."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    content = read_json_object(path)
    if content.get("model_type") != DeepseekVLV2Config.model_type:
        return None
    return DeepseekVLV2Config.from_dict(content)


def image_settings(directory: Path) -> dict[str, Any]:
    """Return how a checkpoint's images are cut, as its model's config tells; nothing where there is none."""
    config = _config_of(directory)
    if config is None:
        return {}
    settings: dict[str, Any] = {
        "patch_size": config.vision_config.patch_size,
        "downsample_ratio": config.projector_config.downsample_ratio,
    }
    side = config.vision_config.image_size
    if config.candidate_resolutions and config.candidate_resolutions[0][0] == side:
        settings["candidate_resolutions"] = config.candidate_resolutions
    return settings


def check_processor(processor: Any, directory: Path) -> None:
    """Check that a processor cuts images as its model's tower takes them, and marks them with the model's token.

    Raises:
        ValueError: it does not; both values are named.
    """
    config = _config_of(directory)
    if config is None:
        return
    path = directory / PROCESSOR_CONFIG
    pairs = {
        "patch_size": (processor.patch_size, config.vision_config.patch_size),
        "downsample_ratio": (processor.downsample_ratio, config.projector_config.downsample_ratio),
        "the side of candidate_resolutions' first": (processor.image_size, config.vision_config.image_size),
    }
    for name, (own, models) in pairs.items():
        if own != models:
            raise ValueError(f"{path} is another model's: {name} is {own}, and {models} in config.json.")
    if config.image_token_id is not None and processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"{directory / 'tokenizer.json'} is another model's tokenizer: {processor.image_token} has the id "
            f"{processor.image_token_id}, in config.json it has {config.image_token_id}."
        )
