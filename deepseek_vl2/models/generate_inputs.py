"""What ``generate`` is given, looked at before any work goes into it: here a mistake has a name.

Shape suffixes: B batch, T sequence, H width of the language model, V tiles, S their side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.generation import GenerationConfig

from .config_fields import SHARE, is_whole
from .views import ByteTiles, Pictures

# Of ``generate`` itself; transformers hands them on to the model.
NOT_FOR_FORWARD = ("tokenizer", "assistant_tokenizer")


def describe(value: Any) -> str:
    """Return what something is, for an error."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {list(value.shape)}".removeprefix("torch.")
    return type(value).__name__


def _can_be_read(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can be looked at: it has some, and nothing is being traced or captured."""
    if tensor.device.type == "meta" or torch.compiler.is_compiling() or not tensor.numel():
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _finite_rows(values: torch.Tensor) -> torch.Tensor:
    """Return where the last dimension holds finite numbers alone; one pass over them, and nothing is kept."""
    low, high = values.detach().aminmax(dim=-1)
    return low.isfinite() & high.isfinite()  # what is no number is both


def check_finite_embeds(inputs_embeds: torch.Tensor, attention_mask: Any) -> None:
    """Raise ``ValueError`` for embeddings, [B, T, H], that hold NaN or infinity: any answer to them would be noise.

    On a GPU that is one pass over them before the prompt is read, when the mask is waited for all the same.
    """
    if not _can_be_read(inputs_embeds) or inputs_embeds.element_size() < 2:
        return
    finite_BT = _finite_rows(inputs_embeds)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == finite_BT.shape:
        finite_BT = finite_BT | ~attention_mask.to(finite_BT.device).bool()
    if not bool(finite_BT.all()):
        row, token = (~finite_BT).nonzero()[0].tolist()
        raise ValueError(
            f"inputs_embeds hold NaN or infinity, first at token {token} of row {row}: no answer can come of them."
        )


def check_finite_tiles(images: Any, images_spatial_crop: Any) -> None:
    """Raise ``ValueError`` for tiles, [B, V, 3, S, S], that are NaN or infinite; those that fill a row up are not seen.

    Args:
        images: tiles; of another shape: they are named elsewhere.
        images_spatial_crop: tiles across and down of each image, [B, images, 2].
    """
    if not isinstance(images, torch.Tensor) or not isinstance(images_spatial_crop, torch.Tensor):
        return
    crop = images_spatial_crop
    if images.dim() != 5 or crop.dim() != 3 or len(crop) != len(images) or not images.is_floating_point():
        return
    if not _can_be_read(images) or not _can_be_read(crop) or images.element_size() < 2:
        return
    views_B = (crop.prod(dim=-1) + crop[..., 0].gt(0)).sum(dim=-1).to(images.device)
    used_BV = torch.arange(images.shape[1], device=images.device) < views_B[:, None]
    finite_BV = _finite_rows(images.flatten(2)) | ~used_BV
    if not bool(finite_BV.all()):
        row, tile = (~finite_BV).nonzero()[0].tolist()
        raise ValueError(f"images hold NaN or infinity, first in tile {tile} of row {row}.")


def check_kind_of_ids(input_ids: Any, call: str) -> None:
    """Raise ``ValueError`` for what are no token ids, [B, T]; ``call``: who takes them."""
    if isinstance(input_ids, Mapping):
        raise ValueError(f"Unpack what the processor returned: {call}(**inputs), not {call}(inputs).")
    if isinstance(input_ids, str):
        raise ValueError(f"{call} takes token ids, not a text: {call}(**processor(text=...)), or model.chat.")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or not len(input_ids):
        raise ValueError(f"input_ids must be a tensor of token ids, [rows, tokens], got {describe(input_ids)}.")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be whole numbers, got {describe(input_ids)}.")


def check_ids(input_ids: Any, vocab_size: int) -> None:
    """Raise ``ValueError`` for what are no token ids, [B, T], of a vocabulary."""
    check_kind_of_ids(input_ids, "generate")
    if not _can_be_read(input_ids):
        return
    low, high = torch.stack(input_ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids hold {wrong}, which is no token: the model's are 0 to {vocab_size - 1}.")


def check_embeds(inputs_embeds: Any, width: int) -> None:
    """Raise ``ValueError`` for what are no embeddings, [B, T, H], of a model's width."""
    if not isinstance(inputs_embeds, torch.Tensor) or inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width:
        raise ValueError(f"inputs_embeds must be [rows, tokens, {width}], got {describe(inputs_embeds)}.")
    if not inputs_embeds.is_floating_point():
        raise ValueError(f"inputs_embeds must be of floating point, got {describe(inputs_embeds)}.")


def check_forward(input_ids: Any, inputs_embeds: Any, attention_mask: Any, labels: Any, has_cache: bool) -> None:
    """Check kinds and shapes of a forward pass; the numbers are not looked at, which would wait for a device.

    Args:
        input_ids, inputs_embeds, attention_mask: see `check_prompt`; with a cache the mask covers its tokens too.
        labels: [B, T], or anything else than a tensor, which is not looked at.
        has_cache: there is one.

    Raises:
        ValueError: one is of another kind or shape; it is named.
    """
    if input_ids is not None:
        check_kind_of_ids(input_ids, "model")
    prompt = input_ids if inputs_embeds is None else inputs_embeds
    if prompt is None:
        return
    if not isinstance(prompt, torch.Tensor) or prompt.dim() < 2:
        raise ValueError(f"inputs_embeds must be [rows, tokens, width], got {describe(prompt)}.")
    shape = prompt.shape[:2]
    if not shape[1]:
        raise ValueError(f"There are no tokens in a prompt of {list(shape)}.")
    is_plain = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and not has_cache
    if is_plain and attention_mask.shape != shape:
        raise ValueError(f"attention_mask {list(attention_mask.shape)} does not fit a prompt of {list(shape)}.")
    if isinstance(labels, torch.Tensor):
        if labels.shape != shape:
            raise ValueError(f"labels {list(labels.shape)} do not fit a prompt of {list(shape)}.")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be token ids, or -100, got {describe(labels)}.")


def check_prompt(input_ids: Any, inputs_embeds: Any, attention_mask: Any, config: Any, fresh: bool = True) -> None:
    """Check the prompt of a call of ``generate``.

    Args:
        input_ids: [B, T], or ``None``.
        inputs_embeds: [B, T, H], or ``None``.
        attention_mask: [B, T], or ``None``.
        config: of the language model.
        fresh: no cache holds a part of the prompt.

    Raises:
        ValueError: one of them is of another kind or shape, ids are no tokens, or embeddings no finite numbers; what
            was given is named.
    """
    if input_ids is not None:
        check_ids(input_ids, config.vocab_size)
    if inputs_embeds is not None:
        check_embeds(inputs_embeds, config.hidden_size)
        check_finite_embeds(inputs_embeds, attention_mask)
    prompt = input_ids if inputs_embeds is None else inputs_embeds
    if attention_mask is None or prompt is None:
        return
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask must be a tensor, [rows, tokens], got {describe(attention_mask)}.")
    if fresh and attention_mask.dim() == 2 and attention_mask.shape != prompt.shape[:2]:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} does not fit a prompt of {list(prompt.shape[:2])}."
        )


def check_settings(setting: Callable[[str], Any], generation_config: Any) -> None:
    """Raise ``ValueError`` for settings of another kind than ``generate`` takes; it checks the ranges of most itself.

    Args:
        setting: returns a setting of the call, by its name.
        generation_config: of the call.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig, got {describe(generation_config)}.")
    most = setting("max_new_tokens")
    if most is not None and not is_whole(most):
        raise ValueError(f"max_new_tokens must be a whole number, got {most!r}.")
    for name in ("num_beams", "num_return_sequences"):
        value = setting(name)
        if value is not None and (not is_whole(value) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = setting(name)
        several = isinstance(value, (list, tuple))
        wrong = [i for i in (value if several else [value]) if i is not None and not isinstance(i, torch.Tensor)]
        if any(not is_whole(i) for i in wrong):
            raise ValueError(f"{name} must be a token's id, got {value!r}.")
    for name in ("top_p", "typical_p"):  # beyond 1 they would do nothing
        value = setting(name)
        if value is not None and not SHARE.allows(value):
            raise ValueError(f"{name} must be {SHARE}, got {value!r}.")
    stop = setting("stop_strings")
    if stop is not None and (not stop or not all(isinstance(each, str) and each for each in stop)):
        raise ValueError(f"stop_strings must be texts that are not empty, got {stop!r}.")


def check_image_numbers(images: Any, images_seq_mask: Any, images_spatial_crop: Any) -> None:
    """Raise ``ValueError`` for tiles that are no normalised pixels, or tilings that are no whole numbers."""
    given = {"images": images, "images_seq_mask": images_seq_mask, "images_spatial_crop": images_spatial_crop}
    for name, value in given.items():
        if value is not None and not isinstance(value, (torch.Tensor, ByteTiles, Pictures)):
            raise ValueError(
                f"{name} must be a tensor as the processor returns it, got {describe(value)}: the processor makes "
                "tiles of pictures, with return_tensors='pt'."
            )
    if isinstance(images, torch.Tensor) and not images.is_floating_point():
        raise ValueError(
            f"images must be tiles as the processor returns them, of floating point, got {describe(images)}: the "
            "processor takes pictures of bytes."
        )
    crop = images_spatial_crop
    if crop is not None and (crop.is_floating_point() or crop.is_complex()):
        raise ValueError(f"images_spatial_crop must be whole numbers, got {describe(crop)}.")
    if crop is not None and (crop.dim() != 3 or crop.shape[2] != 2):
        raise ValueError(f"images_spatial_crop must be [rows, images, 2], got {describe(crop)}.")


def check_unseen_images(input_ids: torch.Tensor, image_token_id: int) -> None:
    """Raise ``ValueError`` for ids with image tokens, given to the language model alone."""
    if not _can_be_read(input_ids):
        return
    tokens = int((input_ids == image_token_id).sum())
    if tokens:
        raise ValueError(
            f"The prompt has {tokens} image tokens, which the language model alone does not see: give inputs_embeds, "
            "of the whole model's prepare_inputs_embeds, or call the whole model's generate."
        )
