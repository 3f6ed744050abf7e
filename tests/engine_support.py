"""What tests of the engine share: requests that note what they are told, prompts, a running engine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.prompts import prompt_of
from deepseek_vl2.engine.request import Delta, Event, Prompt, Request
from deepseek_vl2.engine.sampling_params import SamplingParams
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor


def picture(width: int = 100, height: int = 50, color: str = "red") -> Image.Image:
    """Return a plain picture with a dark corner."""
    image = Image.new("RGB", (width, height), color)
    image.paste("black", (0, 0, width // 3, height // 3))
    return image


class Listener:
    """Notes what the engine tells about a request."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.reason: str | None = None
        self.error: Exception | None = None
        self.completion_tokens = 0
        self.done = threading.Event()
        self.begun = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Delta):
            self.ids += [token.token_id for token in event.tokens]
            self.completion_tokens = event.completion_tokens
            self.reason = event.finish_reason
        else:
            self.error = event.error
        self.begun.set()
        if self.reason or self.error:
            self.done.set()

    def wait(self, seconds: float = 120) -> Listener:
        """Wait for the end, and return self."""
        assert self.done.wait(seconds), "the request did not end"
        return self


def chat_prompt(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, text: str, images: Sequence[Image.Image] = ()
) -> Prompt:
    """Return the prompt of one user turn; the text has a tag for each image."""
    turn = {"role": "user", "content": text, "images": list(images)}
    return prompt_of(model, processor.process_one(conversations=[turn]))


def request(prompt: Prompt, tokens: int, **params: Any) -> tuple[Request, Listener]:
    """Return a request, greedy unless told otherwise, and its listener."""
    listener = Listener()
    return Request(prompt, SamplingParams(**{"max_tokens": tokens, "temperature": 0, **params}), listener), listener


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def running_engine(model: DeepseekVLV2ForCausalLM, **options: Any) -> Iterator[Engine]:
    """Run an engine of three rows in a thread of its own."""
    engine = Engine(model.language, EngineOptions(**{"max_batch": 3, "max_length": 600, **options}))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
