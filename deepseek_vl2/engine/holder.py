"""A model's engine: made when it is first asked for, and made anew when the model is no longer what it was."""

from __future__ import annotations

from typing import Any

from .attached import attached, release
from .engine import Engine
from .fingerprint import ModuleFingerprint
from .scheduler import EngineOptions

__all__ = ["engine_of", "existing_engine", "release_model"]


def settings_of(language: Any) -> tuple[Any, ...]:
    """Return what can change a model's arithmetic without changing a module."""
    config = language.config
    return config._attn_implementation, getattr(config, "_experts_implementation", None), language.training


def engine_of(model: Any, options: EngineOptions | None = None) -> Engine:
    """Return the engine that answers for a model; all that asks of the model shares it.

    Args:
        model: a `DeepseekVLV2ForCausalLM` or its language model, in evaluation mode.
        options: bounds; an engine with others is replaced. ``None``: as they are.
    """
    language = getattr(model, "language", model)
    held = attached(language)
    with held.lock:
        values = held.values
        engine: Engine | None = values.get("engine")
        wanted = options or values.get("options") or EngineOptions()
        same = engine is not None and engine.healthy and wanted == values["options"]
        if not (same and values["settings"] == settings_of(language) and values["fingerprint"].matches()):
            values.clear()
            engine = Engine(language, wanted)
            values.update(
                engine=engine,
                options=wanted,
                settings=settings_of(language),
                fingerprint=ModuleFingerprint(language),
            )
        assert engine is not None
        return engine


def existing_engine(model: Any) -> Engine | None:
    """Return the engine that a model has, or ``None``."""
    language = getattr(model, "language", model)
    engine: Engine | None = attached(language).values.get("engine")
    return engine


def release_model(model: Any) -> None:
    """Free the KV cache and the captured graphs kept for a model."""
    release(getattr(model, "language", model))
    release(model)
