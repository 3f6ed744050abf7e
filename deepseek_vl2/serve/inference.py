"""Answers as a stream of text.

Source of the function names: ``serve/inference.py`` of the original package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.conversation import Conversation
from deepseek_vl2.serve.streaming import AsyncTextStream, GenerationOptions, TextStream
from deepseek_vl2.utils.io import load_pretrained_model

__all__ = [
    "AsyncTextStream",
    "GenerationOptions",
    "TextStream",
    "agenerate",
    "convert_conversation_to_prompts",
    "deepseek_generate",
    "generate",
    "load_model",
]

ORIGINAL_TOP_K = 50  # what transformers sampled among when the original ran, unless told otherwise


def load_model(
    model_path: str | Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedTokenizerBase, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor]:
    """Load a checkpoint for inference on the best device there is; returns tokenizer, model and processor."""
    tokenizer, processor, model = load_pretrained_model(model_path, dtype=dtype)
    return tokenizer, model, processor


def convert_conversation_to_prompts(conversation: Conversation) -> tuple[list[dict[str, Any]], Image.Image | None]:
    """Turn the demo's conversation into messages.

    Args:
        conversation: turns of user and assistant; a user's turn is a text or a (text, images) pair.

    Returns:
        The messages, and the last image shown (``None`` when there was none).
    """
    messages: list[dict[str, Any]] = []
    last_image = None
    for index, (role, content) in enumerate(conversation.messages):
        if index % 2:
            messages.append({"role": role, "content": content or ""})
            continue
        text, images = content if isinstance(content, tuple) else (content, [])
        last_image = images[-1] if images else last_image
        messages.append({"role": role, "content": text, "images": images})
    return messages, last_image


def _options(
    max_gen_len: int,
    temperature: float,
    repetition_penalty: float,
    top_p: float,
    stop_words: Sequence[str],
    chunk_size: int,
    seed: int | None,
) -> GenerationOptions:
    """Return the original's arguments as options: the penalty counts only while sampling, and eos is shown."""
    return GenerationOptions(
        max_new_tokens=max_gen_len,
        temperature=temperature,
        top_p=top_p,
        top_k=ORIGINAL_TOP_K,
        repetition_penalty=repetition_penalty if temperature > 0 else 1.0,
        seed=seed,
        stop=tuple(stop_words),
        prefill_chunk_size=None if chunk_size == -1 else chunk_size,
        keep_eos=True,
    )


def generate(
    vl_gpt: DeepseekVLV2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prepare_inputs: Mapping[str, Any],
    max_gen_len: int = 256,
    temperature: float = 0,
    repetition_penalty: float = 1.1,
    top_p: float = 0.95,
    stop_words: Sequence[str] = (),
    chunk_size: int = -1,
    seed: int | None = None,
) -> TextStream:
    """Return the answer to a processed prompt as an iterator over its pieces.

    Closing the iterator stops the generation after the token at work. The text of the end token is part of the stream,
    as in the original; name it in ``stop_words``, or build a `TextStream` with `GenerationOptions`, to leave it out.

    Args:
        vl_gpt: the model.
        tokenizer: its tokenizer.
        prepare_inputs: what the processor returned, on the model's device.
        max_gen_len: most tokens of the answer.
        temperature: 0 for the most likely answer; above, the temperature to sample with.
        repetition_penalty: used while sampling.
        top_p: used while sampling.
        stop_words: texts that end the answer; they are not yielded, nor any part of them.
        chunk_size: tokens a chunk of the prefill; -1 for all at once.
        seed: of this answer's own random numbers; by default drawn from torch's global generator.

    Raises:
        ValueError: an argument out of its range, or a batch of several conversations.
        Exception: whatever the generation raised, while iterating.
    """
    options = _options(max_gen_len, temperature, repetition_penalty, top_p, stop_words, chunk_size, seed)
    return TextStream(vl_gpt, tokenizer, prepare_inputs, options)


def agenerate(
    vl_gpt: DeepseekVLV2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prepare_inputs: Mapping[str, Any],
    max_gen_len: int = 256,
    temperature: float = 0,
    repetition_penalty: float = 1.1,
    top_p: float = 0.95,
    stop_words: Sequence[str] = (),
    chunk_size: int = -1,
    seed: int | None = None,
) -> AsyncTextStream:
    """Return the answer as an asynchronous iterator, for ``async for``; arguments and errors as in `generate`."""
    options = _options(max_gen_len, temperature, repetition_penalty, top_p, stop_words, chunk_size, seed)
    return AsyncTextStream(vl_gpt, tokenizer, prepare_inputs, options)


def deepseek_generate(
    conversations: Sequence[Mapping[str, Any]],
    vl_gpt: DeepseekVLV2ForCausalLM,
    vl_chat_processor: DeepseekVLV2Processor,
    tokenizer: PreTrainedTokenizerBase,
    stop_words: Sequence[str],
    max_length: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.1,
    chunk_size: int = -1,
    seed: int | None = None,
) -> TextStream:
    """Return the answer to a conversation as an iterator over its pieces; arguments as in `generate`.

    Args:
        conversations: messages, whose ``images`` are PIL images or paths.
        vl_chat_processor: the model's processor.
        max_length: most tokens of the answer.
        others: see `generate`.

    Raises:
        ValueError, FileNotFoundError: see the processor and `generate`.
    """
    prepare_inputs = vl_chat_processor(conversations=conversations).to(vl_gpt.device)
    return generate(
        vl_gpt,
        tokenizer,
        prepare_inputs,
        max_gen_len=max_length,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        top_p=top_p,
        stop_words=stop_words,
        chunk_size=chunk_size,
        seed=seed,
    )
