"""The model behind the page: loading it in the background, and asking it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.utils import logging as transformers_logging

from deepseek_vl2.engine.holder import engine_of
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.models.quantized_layers import count_weights, packed_layers
from deepseek_vl2.serve.inference import generate
from deepseek_vl2.serve.streaming import Answer
from deepseek_vl2.serve.web.state import Settings
from deepseek_vl2.utils.io import load_pretrained_model
from deepseek_vl2.utils.places import DEMO_NAME, is_nano

IMAGE_CACHE_BYTES = 256 << 20  # the next question about a picture does not encode it again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadStatus:
    """How far loading is.

    Attributes:
        ready: the model answers.
        failed: it never will.
        text: one line for the visitor.
        fraction: 0 to 1, or ``None`` while nobody knows.
    """

    ready: bool = False
    failed: bool = False
    text: str = ""
    fraction: float | None = None


@dataclass(frozen=True)
class Prompt:
    """A conversation made ready for the model.

    Attributes:
        inputs: what `Backend.stream` takes.
        dropped: how many of the oldest turns were left out.
    """

    inputs: Any
    dropped: int = 0


class Pieces(Protocol):
    """An answer as it comes, such as a `TextStream`."""

    @property
    def answer(self) -> Answer:
        """What is known of it: why it ended."""

    def __iter__(self) -> Iterator[str]: ...

    def cancel(self) -> None:
        """Stop the model after the token at work; from any thread. The iterator then ends."""

    def close(self) -> None:
        """Stop the model and wait until it has."""


class Backend(Protocol):
    """What the demo needs of a model."""

    def status(self) -> LoadStatus:
        """Return how far loading is."""

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the model; return whether it is there. ``ValueError``: it never will."""

    def prepare(self, messages: Sequence[Mapping[str, Any]], budget: int) -> Prompt:
        """Make a prompt of at most ``budget`` tokens. ``ValueError``: the last question alone is longer."""

    def stream(self, prompt: Prompt, settings: Settings) -> Pieces:
        """Return the answer, to be iterated over."""


class _Meter:
    """Passes a progress bar of transformers on, and tells how far it is."""

    def __init__(self, bar: Any, items: Any, total: float | None, report: Callable[[float], None]) -> None:
        self.bar, self.items, self.total, self.report = bar, items, total, report
        self.done = 0.0

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update(1)

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bar, name)

    def update(self, count: float = 1) -> None:
        self.done += count
        self.bar.update(count)
        if self.total:
            self.report(min(1.0, self.done / self.total))


@contextlib.contextmanager
def _watch_loading(report: Callable[[float], None]) -> Iterator[None]:
    """Report transformers' progress while it loads weights, from 0 to 1."""

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        items: Any = args[0] if args else options.get("iterable")
        total = options.get("total") or (len(items) if hasattr(items, "__len__") else None)
        return _Meter(factory(*args, **options), items, total, report)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class ModelBackend:
    """A checkpoint, loaded in a thread of its own so that the page is up at once.

    Args:
        model_path: a directory, a hub id, or a name that `load_pretrained_model` knows.
        where: arguments of `load_pretrained_model` that say where and in how many bits the model is loaded.
        dtype: dtype of the weights.
        chunk_size: tokens a chunk of the prefill; -1 for all at once.
    """

    def __init__(
        self,
        model_path: str,
        where: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        chunk_size: int = -1,
    ) -> None:
        self.model_path, self.where, self.dtype, self.chunk_size = model_path, dict(where or {}), dtype, chunk_size
        self._status = LoadStatus(text="Loading the model")
        self._settled = threading.Event()
        self._loaded: Any = None

    def start(self) -> None:
        """Begin to load."""
        threading.Thread(target=self._load, name="demo-loading", daemon=True).start()

    def _load(self) -> None:
        begin = time.monotonic()
        try:
            with _watch_loading(self._report):
                loaded = load_pretrained_model(self.model_path, dtype=self.dtype, **self.where)
            engine_of(loaded[2], EngineOptions(share_prefixes=True, image_cache_bytes=IMAGE_CACHE_BYTES))
            self._loaded = loaded
            self._status = LoadStatus(ready=True, text=self._describe(self._loaded[2]), fraction=1.0)
            logger.info("loaded %s in %.1f s", self._status.text, time.monotonic() - begin)
        except Exception as error:  # shown on the page, where whoever waits for the model looks
            mistake = isinstance(error, (ValueError, OSError))  # of whoever named the model: no place in the program
            logger.error("loading %s failed: %s", self.model_path, error, exc_info=not mistake)
            self._status = LoadStatus(failed=True, text=f"{self.model_path} could not be loaded: {error}")
        finally:
            self._settled.set()

    def _describe(self, model: Any) -> str:
        size = count_weights(model)
        packed = {str(fmt.kind) for _, layer in packed_layers(model) for fmt in layer.formats.values()}
        dtype = " and ".join([*sorted(packed), str(model.dtype).removeprefix("torch.")])
        toy = " · random weights: the answers are noise" if self.model_path == DEMO_NAME else ""
        toy = " · a toy: it knows drawn shapes and printed words alone" if is_nano(self.model_path) else toy
        return f"{self.model_path} · {_count(size)} parameters · {dtype} · {model.device}{toy}"

    def _report(self, fraction: float) -> None:
        self._status = LoadStatus(text=f"Loading the weights of {self.model_path}", fraction=fraction)

    def status(self) -> LoadStatus:
        """Return how far loading is."""
        return self._status

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the model; return whether it is there.

        Raises:
            ValueError: it could not be loaded.
        """
        self._settled.wait(timeout)
        if self._status.failed:
            raise ValueError(self._status.text)
        return self._settled.is_set()

    def prepare(self, messages: Sequence[Mapping[str, Any]], budget: int) -> Prompt:
        """Process a conversation, without its oldest turns where it is longer than ``budget`` tokens.

        Raises:
            ValueError: the last question alone is longer.
        """
        _, processor, _ = self._loaded
        for dropped in range((len(messages) + 1) // 2):
            inputs = processor(conversations=messages[2 * dropped :])
            length = inputs["input_ids"].shape[1]
            if length <= budget:
                return Prompt(inputs, dropped)
        raise ValueError(
            f"The question and its pictures take {length:,} tokens, more than the {budget:,} that the prompt may have: "
            "raise 'Prompt tokens' in the settings, send fewer or smaller pictures (up to two are read in detail, more "
            "take 421 tokens each), or shorten the text."
        )

    def stream(self, prompt: Prompt, settings: Settings) -> Pieces:
        """Return the answer, to be iterated over."""
        tokenizer, processor, model = self._loaded
        return generate(
            model,
            tokenizer,
            prompt.inputs,
            max_gen_len=settings.new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            stop_words=processor.new_chat_template().stop_str or [],
            chunk_size=self.chunk_size,
            seed=settings.seed,
        )


def _count(number: int) -> str:
    """Return a number of parameters as people say it: 3.4 B, 12.3 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
