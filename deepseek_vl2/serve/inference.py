"""Answers as a stream of text.

Source of the function names: ``serve/inference.py`` of the original package.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.conversation import Conversation
from deepseek_vl2.utils.io import load_pretrained_model


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


class StopWordFilter:
    """Pass a stream of text on up to the first stop word, holding back what may be the beginning of one."""

    def __init__(self, stop_words: Sequence[str]) -> None:
        self.stop_words = [word for word in stop_words if word]
        self.pending = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text to the stream; return what can be shown."""
        self.pending += text
        starts = [self.pending.index(word) for word in self.stop_words if word in self.pending]
        if starts:
            self.stopped = True
            shown, self.pending = self.pending[: min(starts)], ""
            return shown
        held = max((self._overlap(word) for word in self.stop_words), default=0)
        cut = len(self.pending) - held
        shown, self.pending = self.pending[:cut], self.pending[cut:]
        return shown

    def flush(self) -> str:
        """Return what was held back, at the end of the stream."""
        shown, self.pending = self.pending, ""
        return shown

    def _overlap(self, word: str) -> int:
        """Return how many characters at the end of the pending text begin ``word``."""
        longest = min(len(word) - 1, len(self.pending))
        return next((n for n in range(longest, 0, -1) if self.pending.endswith(word[:n])), 0)


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


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
) -> Iterator[str]:
    """Yield the answer to a processed prompt, piece by piece.

    Closing the iterator stops the generation after the token at work.

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

    Raises:
        Whatever the generation raised.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    stop = threading.Event()
    errors: list[BaseException] = []
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
        }
    if chunk_size != -1:
        options["prefill_chunk_size"] = chunk_size

    def work() -> None:
        try:
            vl_gpt.generate(
                **prepare_inputs,
                max_new_tokens=max_gen_len,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_StopWhenSet(stop)]),
                **options,
            )
        except BaseException as error:  # handed to the reader below
            errors.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    words = StopWordFilter(stop_words)
    try:
        for piece in streamer:
            shown = words.push(piece)
            if shown:
                yield shown
            if words.stopped:
                return
        rest = words.flush()
        if rest:
            yield rest
    finally:
        stop.set()
        worker.join()
    if errors:
        raise errors[0]


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
) -> Iterator[str]:
    """Yield the answer to a conversation, piece by piece; arguments as in `generate`.

    Args:
        conversations: messages, whose ``images`` are PIL images or paths.
        vl_chat_processor: the model's processor.
        max_length: most tokens of the answer.
        others: see `generate`.

    Raises:
        ValueError, FileNotFoundError: see the processor.
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
    )
