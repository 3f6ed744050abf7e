"""What an engine counts, and why it takes no requests."""

from __future__ import annotations

from dataclasses import dataclass


class QueueFull(Exception):
    """More requests wait than may."""


class EngineStopped(Exception):
    """The engine takes no requests: it was stopped, or its thread has died."""


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
