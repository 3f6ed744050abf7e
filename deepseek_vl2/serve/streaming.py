"""One answer as a stream of text: a worker thread runs the model, and the reader takes pieces as they come.

A reader that stops reading stops the model; an error of the model reaches the reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from deepseek_vl2.models import DeepseekVLV2ForCausalLM

FinishReason = Literal["stop", "length", "cancelled"]
GREEDY_BELOW = 1e-5  # dividing logits by less overflows, and picks the likeliest token all the same
REPLACEMENT = "\ufffd"


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
        logits_processors: more of transformers' processors, such as a grammar's; they run before sampling.

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
    logits_processors: Sequence[LogitsProcessor] = ()

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


class StopWordFilter:
    """Pass a stream of text on up to the first stop word, holding back what may be the beginning of one."""

    def __init__(self, stop_words: Sequence[str]) -> None:
        self.stop_words = [word for word in stop_words if word]
        self.pending = ""
        self.stop_word: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop word was said."""
        return self.stop_word is not None

    def push(self, text: str) -> str:
        """Add text to the stream; return what can be shown."""
        self.pending += text
        found = [(self.pending.index(word), -len(word), word) for word in self.stop_words if word in self.pending]
        if found:
            start, _, self.stop_word = min(found)
            shown, self.pending = self.pending[:start], ""
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


class TokenDecoder:
    """Turn token ids into text one by one, holding back a character until its last byte has come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.window: list[int] = []  # tokens since the text last ended with a whole character
        self.shown = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        self.window.append(token)
        text = self._text()
        # The bytes of an unfinished character decode to one replacement character, at the very end.
        whole = not text.endswith(REPLACEMENT)
        certain = text if whole else text[:-1]
        new, self.shown = certain[self.shown :], max(self.shown, len(certain))
        if whole:
            self.window, self.shown = [], 0
        return new

    def flush(self) -> str:
        """Return what was held back, at the end of the answer."""
        rest = self._text()[self.shown :]
        self.window, self.shown = [], 0
        return rest

    def _text(self) -> str:
        return self.tokenizer.decode(self.window, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class SeededSampler(LogitsProcessor):
    """Sample with random numbers of its own, so that answers in other threads neither disturb nor repeat it.

    Adding Gumbel noise to the logits makes their largest a sample of their softmax: ``generate`` runs without
    sampling, and its argmax is the sampled token. So no global random state is read or moved.

    Args:
        temperature, top_k, top_p: see `GenerationOptions`.
        seeds: of the random numbers of each row, so that a row in a batch gets what it gets alone.
    """

    def __init__(self, temperature: float, top_k: int, top_p: float, seeds: Sequence[int]) -> None:
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k > 0:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.seeds = seeds
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores, [B, vocabulary], whose largest is the sampled token."""
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        warped = self.warpers(input_ids, scores.float())
        noise = torch.empty_like(warped)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return warped - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


class _Done(Exception):
    """The answer is over: raised through ``generate``, it stops the model before its next step."""


class _TokenReader(BaseStreamer):
    """Read each new token as soon as the host has it: show its text, and end the generation when the answer is over.

    A streamer sees tokens that are on their way to the host anyhow; a stopping criterion would make the device wait
    once more for every token.
    """

    def __init__(self, run: _Run, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
        self.run = run
        self.ends = ends
        self.prompt_seen = False
        self.decoder = TokenDecoder(tokenizer)
        self.words = StopWordFilter(run.options.stop)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, at first, and then new tokens."""
        if self.run.cancelled.is_set():
            raise _Done
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.run.answer.completion_tokens += 1
            ended = token in self.ends
            if not ended or self.run.options.keep_eos:
                self.run.show(self.words.push(self.decoder.push(token)))
            if ended or self.words.stopped:
                self.run.answer.finish_reason = "stop"
                raise _Done

    def end(self) -> None:
        """Nothing: an answer that was stopped never gets here."""

    def finish(self) -> None:
        """Show what was held back, and note why the answer ended."""
        answer = self.run.answer
        if not self.words.stopped:
            self.run.show(self.words.push(self.decoder.flush()))
        if not self.words.stopped:
            self.run.show(self.words.flush())
        answer.stop_word = self.words.stop_word
        if self.words.stopped:
            answer.finish_reason = "stop"
        elif answer.finish_reason != "stop" and not self.run.cancelled.is_set():
            answer.finish_reason = "length"


class _Run:
    """One generation in a thread of its own. The thread knows this object alone, never the stream that reads it."""

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
        self.inputs = inputs
        self.options = options
        self.cancelled = threading.Event()
        self.answer = Answer(prompt_tokens=int(ids.shape[1]))
        self.error: BaseException | None = None
        self.emit: Callable[[str | None], None] = lambda piece: None
        self.thread: threading.Thread | None = None
        if options.temperature > GREEDY_BELOW:
            self.answer.seed = int(torch.randint(2**62, ()).item()) if options.seed is None else options.seed

    def start(self, emit: Callable[[str | None], None]) -> None:
        """Begin; ``emit`` gets each piece of text and at last ``None``, in the worker's thread."""
        self.emit = emit
        self.thread = threading.Thread(target=self._work, name="deepseek_vl2 generation", daemon=True)
        self.thread.start()

    def raise_error(self) -> None:
        """Raise what the model raised, once; the error is let go of, since its traceback knows this object."""
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    def show(self, text: str) -> None:
        """Hand a piece of text to the reader."""
        if text:
            self.answer.text += text
            self.emit(text)

    def _work(self) -> None:
        try:
            with _current_device(self.model.device):
                self._generate()
        except BaseException as error:  # raised again in the reader's thread
            traceback.clear_frames(error.__traceback__)  # whose locals would keep the cache's memory
            self.error = error
        finally:
            self.inputs = {}  # the stream may be kept for its answer: not for the pictures' tensors
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                self.emit(None)

    def _generate(self) -> None:
        ends = self.model.generation_config.eos_token_id
        reader = _TokenReader(self, self.tokenizer, set(ends if isinstance(ends, list) else [ends]))
        with contextlib.suppress(_Done):
            self.model.generate(**self.inputs, **self._settings(), streamer=reader)
        reader.finish()

    def _settings(self) -> dict[str, Any]:
        options = self.options
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": options.max_new_tokens}
        if options.repetition_penalty != 1:
            settings["repetition_penalty"] = options.repetition_penalty
        if options.prefill_chunk_size is not None:
            settings["prefill_chunk_size"] = options.prefill_chunk_size
        processors = list(options.logits_processors)
        if self.answer.seed is not None:
            processors.append(SeededSampler(options.temperature, options.top_k, options.top_p, [self.answer.seed]))
        if processors:
            settings["logits_processor"] = LogitsProcessorList(processors)
        return settings


def _current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one of this thread: custom kernels launch there, and a new thread begins at the first."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TextStream(Iterator[str]):
    """An iterator over the pieces of an answer.

    Work begins with the first piece asked for. `close` (also at the end of ``with``, or when nobody holds the stream
    any more) stops the model after the token at work and frees what it held. `answer` tells the rest: why the answer
    ended, tokens, seed. Errors of the model are raised by ``next``.
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Mapping[str, Any],
        options: GenerationOptions,
    ) -> None:
        self._run = _Run(model, tokenizer, inputs, options)
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._closed = False

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        return self._run.answer

    def __next__(self) -> str:
        if self._closed:
            raise StopIteration
        if self._run.thread is None:
            self._run.start(self._pieces.put)
        piece = self._pieces.get()
        if piece is not None:
            return piece
        self.close()
        self._run.raise_error()
        raise StopIteration

    def read(self) -> Answer:
        """Read to the end and return the whole answer."""
        for _ in self:
            pass
        return self.answer

    def cancel(self) -> None:
        """Ask the model to stop after the token at work; from any thread. The stream then ends by itself."""
        self._run.cancelled.set()

    def close(self) -> None:
        """Stop the model and wait until it has; nothing can be read any more."""
        self._closed = True
        self.cancel()
        if self._run.thread is not None:
            self._run.thread.join()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self.cancel()


class AsyncTextStream(AsyncIterator[str]):
    """`TextStream` for an event loop: ``async for piece in stream``. The loop never waits for the model.

    Cancelling the reading task stops the model after the token at work; `aclose` (also at the end of ``async with``)
    waits until it has.
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Mapping[str, Any],
        options: GenerationOptions,
    ) -> None:
        self._run = _Run(model, tokenizer, inputs, options)
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._ended = False  # the worker's last word was read
        self._closed = False

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        return self._run.answer

    async def _next_piece(self) -> str | None:
        piece = await self._pieces.get()
        self._ended = piece is None
        return piece

    async def __anext__(self) -> str:
        if self._closed or self._ended:
            raise StopAsyncIteration
        if self._run.thread is None:
            loop, pieces = asyncio.get_running_loop(), self._pieces
            self._run.start(lambda piece: _put_from_thread(loop, pieces, piece))
        try:
            piece = await self._next_piece()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if piece is not None:
            return piece
        self._run.raise_error()
        raise StopAsyncIteration

    async def read(self) -> Answer:
        """Read to the end and return the whole answer."""
        async for _ in self:
            pass
        return self.answer

    def cancel(self) -> None:
        """Ask the model to stop after the token at work; from any thread. The stream then ends by itself."""
        self._run.cancelled.set()

    async def aclose(self) -> None:
        """Stop the model and wait until it has; nothing can be read any more."""
        self._closed = True
        self.cancel()
        while self._run.thread is not None and not self._ended:
            await self._next_piece()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self.cancel()


def _put_from_thread(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[str | None], piece: str | None) -> None:
    loop.call_soon_threadsafe(pieces.put_nowait, piece)
