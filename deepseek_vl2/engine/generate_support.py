"""Which calls of transformers' ``generate`` the engine takes, and why not the others; the log says so once."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import logits_process as processors

from ..models.cache import CACHE_NAME, GrowingLayer
from ..models.generation import SampleCall

logger = logging.getLogger(__name__)

# What transformers' processors of these kinds are among the parameters, and the attribute that holds the value.
PROCESSORS: dict[type, tuple[str, str]] = {
    processors.TemperatureLogitsWarper: ("temperature", "temperature"),
    processors.TopKLogitsWarper: ("top_k", "top_k"),
    processors.TopPLogitsWarper: ("top_p", "top_p"),
    processors.MinPLogitsWarper: ("min_p", "min_p"),
    processors.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    processors.MinNewTokensLengthLogitsProcessor: ("min_tokens", "min_new_tokens"),
    processors.MinLengthLogitsProcessor: ("min_tokens", "min_length"),  # transformers sets both; it counts the prompt
}
# What a call may bring for the model beside its prompt.
KNOWN = {
    "attention_mask", "cache_position", "images", "images_seq_mask", "images_spatial_crop", "inputs_embeds",
    "logits_to_keep", "past_key_values", "cache", "position_ids", "use_cache", "image_tokens_checked",
}  # fmt: skip


@cache
def say_once(reason: str) -> None:
    """Log why a call takes transformers' own loop, once for each reason."""
    logger.info("generate takes transformers' own loop: %s.", reason)


def unsupported_reason(call: SampleCall) -> str | None:
    """Return why the engine does not take a call of ``generate``, or ``None``."""
    config, kwargs, language = call.generation_config, call.model_kwargs, getattr(call.model, "language", call.model)
    wanted = ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")
    for name in wanted:
        if getattr(config, name, None):
            return f"{name} was asked for"
    if call.synced_gpus or getattr(config, "is_assistant", False):
        return "the call is part of distributed or assisted generation"
    if not kwargs.get("use_cache", True) or torch.is_grad_enabled() or language.training:
        return "there is no cache, or the model is being trained"
    if getattr(call.stopping_criteria, "max_length", None) is None:
        return "there is no maximum length"
    if torch.is_autocast_enabled(call.input_ids.device.type) or torch.compiler.is_compiling():
        return "autocast or compilation is on"
    cache_: Any = kwargs.get(CACHE_NAME)
    if type(cache_) is not DynamicCache or any(type(x) not in (DynamicLayer, GrowingLayer) for x in cache_.layers):
        return f"the cache is a {type(cache_).__name__} of a kind of its own"
    if unknown := [name for name, value in kwargs.items() if name not in KNOWN and value is not None]:
        return f"the call has arguments of its own: {', '.join(unknown)}"
    return (
        unsupported_processor(call)
        or unsupported_positions(kwargs)
        or unsupported_cache(cache_, kwargs, call.input_ids)
    )


def unsupported_processor(call: SampleCall) -> str | None:
    """Return why a call's processors are more than parameters."""
    for processor in call.logits_processor:
        if type(processor) not in PROCESSORS:
            return f"a {type(processor).__name__} is among the processors"
        if getattr(processor, "prompt_ignore_length", None) is not None:
            return "a repetition penalty leaves the prompt out"
        if getattr(processor, "filter_value", -torch.inf) != -torch.inf:
            return "a warper has a filter value of its own"
        if getattr(processor, "min_tokens_to_keep", 1) != 1:
            return "a warper keeps several tokens in any case"
    return None


def unsupported_cache(held: Any, kwargs: dict[str, Any], input_ids: torch.Tensor) -> str | None:
    """Return why what a given cache holds cannot be taken over."""
    length = int(held.get_seq_length())
    if not getattr(held, "is_private", False) and input_ids.shape[0] > 1:
        return "several rows share a cache of the caller's"
    if length == 0:
        return None
    mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    total = embeds.shape[1] if embeds is not None else input_ids.shape[1]
    if mask is not None and mask.shape[1] != total:
        return "the attention mask covers other tokens than the prompt's"
    return None if length < total else "the cache holds all of the prompt"


def unsupported_positions(kwargs: dict[str, Any]) -> str | None:
    """Return why positions are not those of the tokens counted without padding."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and mask.dim() != 2:
        return "the attention mask is not [rows, tokens]"
    marked = kwargs.get("images_seq_mask")
    if mask is not None and marked is not None and mask.shape == marked.shape:
        real = mask.bool()
        if bool((marked.bool().to(mask.device) & ~real).any() & real.any(dim=1).all()):
            return "the attention mask hides tokens of an image"
    if positions is None:
        return None
    if positions.dim() != 2:
        return "the positions are not [rows, tokens]"
    length = positions.shape[1]
    if mask is None:
        counted = torch.arange(length, device=positions.device)
        whole = kwargs[CACHE_NAME].get_seq_length() == 0 and bool((positions == counted).all())
        return None if whole else "positions were given"
    usual = (mask.long().cumsum(-1) - 1)[:, -length:]
    real = mask.bool()[:, -length:]
    same = usual.shape == real.shape == positions.shape and bool(((positions == usual) | ~real).all())
    return None if same else "positions were given"
