"""Files, images and loading a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

import deepseek_vl2.models
from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.bundled import NO_NAME
from deepseek_vl2.models.checkpoint_check import check_config
from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.models.image_modes import WHITE, Background, check_background
from deepseek_vl2.models.messages import check_messages, listed_images
from deepseek_vl2.models.quantization import Kind
from deepseek_vl2.models.quantized_config import holds_fp8
from deepseek_vl2.models.quantizer import WeightOnlyConfig
from deepseek_vl2.utils.demo import DEMO_NAME, demo_checkpoint
from deepseek_vl2.utils.memory import STORED, check_fits, max_memory_map, model_sizes, parse_size, stored_sizes
from deepseek_vl2.utils.places import NANO_NAME

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek_vl_v2.DeepseekVLV2Config",
    "AutoModel": "modeling_deepseek_vl_v2.DeepseekVLV2ForCausalLM",
    "AutoModelForCausalLM": "modeling_deepseek_vl_v2.DeepseekVLV2ForCausalLM",
    "AutoModelForImageTextToText": "modeling_deepseek_vl_v2.DeepseekVLV2ForCausalLM",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_deepseek_vl_v2.DeepseekVLV2Processor"}


def default_device() -> str:
    """Return "cuda" or "mps" where there is one, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def nano_is_installed() -> bool:
    """Whether the small model "nano" ships with this installation."""
    return (files("deepseek_vl2") / "assets" / NANO_NAME / "config.json").is_file()


def resolve_model_path(model_path: str | Path) -> str | Path:
    """Return where a model is, for whatever names it.

    Args:
        model_path: "nano" (the small model that ships with the package), "demo" (the smallest, with random weights),
            a directory, or the id of a hub repository. A directory of one of those names is written "./nano".

    Returns:
        A directory, or the id of a hub repository as it is.

    Raises:
        FileNotFoundError: nano is not part of this installation, or what looks like a directory is not there.
        ValueError: the name is empty.
    """
    name = str(model_path)
    if not name.strip():
        raise ValueError(NO_NAME)
    if name == DEMO_NAME:
        return demo_checkpoint()
    if name == NANO_NAME:
        if not nano_is_installed():
            raise FileNotFoundError(
                f'This installation lacks the small model "{NANO_NAME}": install the package from a release. '
                f'"{DEMO_NAME}", with random weights, shows that everything runs.'
            )
        return Path(str(files("deepseek_vl2") / "assets" / NANO_NAME))
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or path.exists():
        raise FileNotFoundError(f"There is no checkpoint directory at {path}.")
    return name


def load_pretrained_model(
    model_path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantize: Kind | WeightOnlyConfig | None = None,
    max_memory: int | str | dict[int | str, int | str] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedTokenizerBase, DeepseekVLV2Processor, DeepseekVLV2ForCausalLM]:
    """Load a checkpoint for inference.

    Args:
        model_path: a directory in the released layout, the id of a hub repository, "nano" for the small model that
            ships with the package, or "demo" for a small checkpoint with random weights.
        device: where to put the model; by default a GPU where there is one.
        dtype: dtype of the weights; of those that are not packed, with ``quantize``.
        quantize: "int8", "int4" or "fp8": pack the language model's matrices while they are read, experts included; a
            `WeightOnlyConfig` says more of it. A checkpoint that is quantized already needs none.
        max_memory: most bytes on the device (or on each GPU, with ``device_map``), such as "16GB"; or a dictionary, as
            accelerate takes it. By default what is free.
        **kwargs: more arguments of ``from_pretrained``, such as ``attn_implementation`` or ``device_map`` (which
            then decides instead of ``device``).

    Returns:
        The tokenizer, the processor and the model, in evaluation mode.

    Raises:
        ValueError: the checkpoint does not fit its config, or a file of it is damaged or another model's, or it is
            more than the device holds.
        OSError: there is no checkpoint at that path, or one of its files is missing.
    """
    source = resolve_model_path(model_path)
    if isinstance(source, Path):
        check_config(source, DeepseekVLV2Config.model_type)
    processor = DeepseekVLV2Processor.from_pretrained(source)
    if isinstance(quantize, str):
        quantize = WeightOnlyConfig(quantize)
    if quantize is not None:
        kwargs["quantization_config"] = quantize
    place = torch.device(device or default_device())
    if place.type == "mps":
        refuse_fp8(source, quantize)
    if isinstance(max_memory, dict):
        kwargs["max_memory"] = max_memory
    elif kwargs.get("device_map") is None:
        refuse_what_does_not_fit(source, place, dtype, quantize, max_memory)
    elif max_memory is not None:
        kwargs["max_memory"] = max_memory_map(parse_size(max_memory))
    model = DeepseekVLV2ForCausalLM.from_pretrained(source, dtype=dtype, **kwargs).eval()
    if kwargs.get("device_map") is None:
        model = model.to(place)
    return processor.tokenizer, processor, model


def refuse_fp8(source: str | Path, quantize: WeightOnlyConfig | None) -> None:
    """Raise ``ValueError`` for weights in fp8, asked for or stored, on a device that has no such numbers."""
    described = getattr(DeepseekVLV2Config.from_pretrained(source), "quantization_config", None)
    if "fp8" in (quantize and quantize.weights, quantize and quantize.head) or holds_fp8(described):
        raise ValueError("Apple's GPUs (mps) have no fp8 numbers: use int8 or int4 there, or device cpu.")


def refuse_what_does_not_fit(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    quantize: WeightOnlyConfig | None,
    max_memory: int | str | None,
) -> None:
    """Raise ``ValueError`` for a model that a device cannot hold, before anything of it is loaded."""
    limit = None if max_memory is None else parse_size(max_memory)
    config = DeepseekVLV2Config.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        sizes, precision = stored_sizes(config, source), STORED
    else:
        sizes = model_sizes(config, quantize)
        precision = quantize.weights if quantize is not None else str(dtype).removeprefix("torch.")
    check_fits(sizes, precision, device, str(source), limit)


def load_pil_images(conversations: Iterable[Mapping[str, Any]], background: Background = WHITE) -> list[Image.Image]:
    """Load the images that a conversation's messages name, in order.

    Args:
        conversations: messages; each may hold a list under ``images``: paths, bytes, data URLs or PIL images.
        background: the colour under transparent pixels; ``None`` drops their alpha, as the original package does.

    Returns:
        RGB images, turned upright as their EXIF orientation says.

    Raises:
        FileNotFoundError: a file is missing; the path is named.
        ValueError: a file is empty, truncated, not an image, or has too many pixels.
    """
    background = check_background(background)
    sources = [source for message in check_messages(list(conversations)) for source in listed_images(message)]
    return [load_image(source, background=background) for source in sources]


def load_json(filepath: str | Path) -> Any:
    """Return the content of a JSON file."""
    with open(filepath, encoding="utf-8") as file:
        return json.load(file)


def _update_json(path: Path, values: dict[str, Any]) -> None:
    content = load_json(path)
    content.update(values)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_with_code(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, directory: str | Path, **kwargs: Any
) -> None:
    """Save a model, its processor and the code that runs them into one directory.

    Whoever loads it with ``trust_remote_code=True``, through AutoModelForCausalLM, AutoModelForImageTextToText or
    AutoProcessor, needs the dependencies of this package and not the package.

    Args:
        model: the model.
        processor: its processor.
        directory: where to; created when it is not there.
        **kwargs: arguments of ``save_pretrained``, such as ``max_shard_size``.
    """
    directory = Path(directory)
    model.save_pretrained(directory, **kwargs)
    processor.save_pretrained(directory)
    code = Path(deepseek_vl2.models.__file__).parent
    for file in sorted(code.glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, directory / file.name)
    _update_json(directory / "config.json", {"auto_map": AUTO_MAP})
    _update_json(directory / "processor_config.json", {"auto_map": PROCESSOR_AUTO_MAP})
