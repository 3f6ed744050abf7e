"""A model's engine, kept with the model."""

from __future__ import annotations

import threading
from typing import Any

from .engine import Engine
from .fingerprint import Watch
from .scheduler import EngineOptions

NAME = "_engine_holder"


class EngineHolder:
    """The engine of one language model, and what the model was when it was made. Copies of a model begin without."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.options = EngineOptions()
        self.fingerprint: Watch | None = None
        self.settings: tuple[Any, ...] = ()
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineHolder:
        return EngineHolder()

    def __reduce__(self) -> tuple[type[EngineHolder], tuple[()]]:
        return EngineHolder, ()

    def get(self, language: Any) -> Engine:
        """Return the engine; a new one where the model's modules or weights are others than it was made for."""
        with self.lock:
            settings = (language.config._attn_implementation, getattr(language.config, "_experts_implementation", None))
            same = self.fingerprint is not None and settings == self.settings and self.fingerprint.holds()
            if self.engine is None or not same or not self.engine.healthy:
                self.fingerprint = None
                self.engine = Engine(language, self.options)
                self.fingerprint, self.settings = Watch(language), settings
            return self.engine


def holder_of(language: Any) -> EngineHolder:
    """Return a language model's holder."""
    held: EngineHolder | None = vars(language).get(NAME)
    if held is None:
        held = EngineHolder()
        object.__setattr__(language, NAME, held)
    return held


def engine_of(model: Any, options: EngineOptions | None = None) -> Engine:
    """Return the engine that answers for a model; all that asks of the model shares it.

    Args:
        model: a `DeepseekVLV2ForCausalLM` or its language model, in evaluation mode.
        options: bounds; an engine with others is replaced. ``None``: as they are.
    """
    language = getattr(model, "language", model)
    held = holder_of(language)
    with held.lock:
        if options is not None and options != held.options:
            held.options, held.engine = options, None
        return held.get(language)


def release(model: Any) -> None:
    """Free the KV cache and the captured graphs kept for a model."""
    vars(getattr(model, "language", model)).pop(NAME, None)
