"""One answer as a stream of text, written by the model's engine.

A reader that stops reading stops the model; an error of the model reaches the reader.
"""

from __future__ import annotations

import asyncio
import math
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from deepseek_vl2.engine.detokenizer import token_bytes_of
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.holder import engine_of
from deepseek_vl2.engine.prompts import prompt_of
from deepseek_vl2.engine.request import Delta, Event, Request
from deepseek_vl2.engine.sampling_params import SamplingParams
from deepseek_vl2.models import DeepseekVLV2ForCausalLM

FinishReason = Literal["stop", "length", "cancelled"]
GREEDY_BELOW = 1e-5  # dividing logits by less overflows, and picks the likeliest token all the same


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated.

    Fields:
        max_new_tokens: most tokens of the answer.
        temperature: 0 for the likeliest token each time; above, the temperature to sample with.
        top_p: sample among the likeliest tokens that hold this share of the probability.
        top_k: sample among this many likeliest tokens; 0 for all.
        repetition_penalty: divides the odds of tokens that prompt or answer hold already; 1 for none.
        seed: of this answer's own random numbers; by default drawn from torch's global generator, so that
            ``torch.manual_seed`` makes a script reproducible.
        stop: texts that end the answer; neither they nor parts of them are shown.
        prefill_chunk_size: tokens of the prompt to read at a time, which bounds the memory of a long one.
        keep_eos: show the text of the token that ends the answer.

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    prefill_chunk_size: int | None = None
    keep_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (no sampling) or above, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or above, not {self.top_k}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must fit into 64 bits, but is {self.seed}.")
        if self.prefill_chunk_size is not None and self.prefill_chunk_size < 1:
            raise ValueError(f"prefill_chunk_size must be at least 1, not {self.prefill_chunk_size}.")
        if isinstance(self.stop, str):
            raise ValueError("stop must be a list of texts, not one text.")


@dataclass
class Answer:
    """A whole answer and how it came about.

    Fields:
        text: what was shown.
        finish_reason: "stop" (the model was done, or said a stop word), "length" or "cancelled".
        prompt_tokens: tokens of the prompt, those of images included.
        completion_tokens: tokens generated, the end token included.
        seed: the seed that was sampled with; ``None`` without sampling.
        stop_word: the stop word that ended the answer.
    """

    text: str = ""
    finish_reason: FinishReason = "cancelled"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seed: int | None = None
    stop_word: str | None = None


def answer_params(options: GenerationOptions, ends: Iterable[int], seed: int | None) -> SamplingParams:
    """Return options as the engine takes them.

    Args:
        options: the options.
        ends: ids that end an answer.
        seed: of its random numbers; ``None`` where nothing is sampled.
    """
    return SamplingParams(
        max_tokens=options.max_new_tokens,
        temperature=0.0 if options.temperature <= GREEDY_BELOW else options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=0 if seed is None else seed,
        stop=tuple(text for text in options.stop if text),
        stop_token_ids=frozenset(ends),
        show_stop_tokens=options.keep_eos,
        ignore_eos=True,
    )


def model_ends(model: DeepseekVLV2ForCausalLM) -> list[int]:
    """Return the ids that end an answer, as ``generate`` would."""
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


class _Run:
    """One answer on the engine, from the first piece asked for to its end.

    Whoever wants the next piece drives the engine (see `Engine.run_until`), and so all streams of the model go on
    together.
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Mapping[str, Any],
        options: GenerationOptions,
    ) -> None:
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[0] != 1:
            rows = "no input_ids" if ids is None else f"a batch of {ids.shape[0]}"
            raise ValueError(f"One conversation is streamed at a time, got {rows}: call model.generate for a batch.")
        self.model = model
        self.tokenizer = tokenizer
        self.inputs: Mapping[str, Any] | None = inputs
        self.options = options
        self.cancelled = False
        self.ended = False
        self.answer = Answer(prompt_tokens=int(ids.shape[1]))
        self.events: deque[Event] = deque()
        self.engine: Engine | None = None
        self.request: Request | None = None
        self.driving = threading.Lock()
        if options.temperature > GREEDY_BELOW:
            self.answer.seed = int(torch.randint(2**62, ()).item()) if options.seed is None else options.seed

    def _start(self, inputs: Mapping[str, Any]) -> None:
        """Submit the request. Its inputs are let go of: the stream may be kept for its answer."""
        self.inputs, options, ends = None, self.options, model_ends(self.model)
        prompt = prompt_of(self.model, inputs)
        self.answer.prompt_tokens = len(prompt)
        request = Request(
            prompt,
            answer_params(options, ends, self.answer.seed),
            self.events.append,
            token_bytes_of(self.tokenizer, () if options.keep_eos else ends),
            options.prefill_chunk_size,
        )
        self.engine = engine_of(self.model)
        self.engine.submit([request])
        self.request = request

    def next_piece(self) -> str | None:
        """Return the next piece of text; ``None`` at the end.

        Raises:
            Exception: what the model raised, once.
        """
        with self.driving:
            while not self.ended:
                if self.cancelled:
                    self.ended = True
                    self._leave()
                    break
                try:
                    if self.inputs is not None:
                        self._start(self.inputs)
                    assert self.engine is not None
                    self.engine.run_until(lambda: bool(self.events) or self.cancelled)
                    text = self._read()
                except BaseException:
                    self.ended = True
                    self._leave()
                    raise
                if text:
                    return text
            return None

    def _read(self) -> str:
        """Return the text of what has come."""
        text = ""
        while self.events:
            event = self.events.popleft()
            if not isinstance(event, Delta):
                traceback.clear_frames(event.error.__traceback__)  # whose locals would keep tensors
                raise event.error
            text += event.text
            self.answer.completion_tokens = event.completion_tokens
            if event.finish_reason is not None:
                self.answer.finish_reason, self.answer.stop_word = event.finish_reason, event.stop
                self.ended = True
                self._leave()
        self.answer.text += text
        return text

    def _leave(self) -> None:
        """Let go of the request, and of what it holds."""
        engine, request = self.engine, self.request
        self.request, self.inputs = None, None
        self.events.clear()
        if engine is not None and request is not None:
            engine.cancel(request)

    def cancel(self) -> None:
        """Stop the model after the token at work; from any thread."""
        self.cancelled = True
        engine, request = self.engine, self.request
        if engine is not None and request is not None:
            engine.cancel(request)

    def close(self) -> None:
        """Stop the model, and wait until it has."""
        engine, request = self.engine, self.request
        self.cancel()
        with self.driving:
            self.ended = True
            self._leave()
        if engine is not None and request is not None and engine.healthy:
            engine.run_until(lambda: not engine.holds(request))


class _Stream:
    """What the streams of threads and of event loops share: the run of one answer."""

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Mapping[str, Any],
        options: GenerationOptions,
    ) -> None:
        self._run = _Run(model, tokenizer, inputs, options)

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        return self._run.answer

    def cancel(self) -> None:
        """Ask the model to stop after the token at work; from any thread. The stream then ends by itself."""
        self._run.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self._run.cancel()


class TextStream(_Stream, Iterator[str]):
    """An iterator over the pieces of an answer.

    Work begins with the first piece asked for. `close` (also at the end of ``with``, or when nobody holds the stream
    any more) stops the model after the token at work and frees what it held. `answer` tells the rest: why the answer
    ended, tokens, seed. Errors of the model are raised by ``next``.
    """

    def __next__(self) -> str:
        piece = self._run.next_piece()
        if piece is None:
            raise StopIteration
        return piece

    def read(self) -> Answer:
        """Read to the end and return the whole answer."""
        for _ in self:
            pass
        return self.answer

    def close(self) -> None:
        """Stop the model and wait until it has; nothing can be read any more."""
        self._run.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


class AsyncTextStream(_Stream, AsyncIterator[str]):
    """`TextStream` for an event loop: ``async for piece in stream``. The loop never waits for the model.

    Cancelling the reading task stops the model after the token at work; `aclose` (also at the end of ``async with``)
    waits until it has.
    """

    async def __anext__(self) -> str:
        try:
            piece = await asyncio.to_thread(self._run.next_piece)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def read(self) -> Answer:
        """Read to the end and return the whole answer."""
        async for _ in self:
            pass
        return self.answer

    async def aclose(self) -> None:
        """Stop the model and wait until it has; nothing can be read any more."""
        self.cancel()
        await asyncio.to_thread(self._run.close)

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self.aclose()
