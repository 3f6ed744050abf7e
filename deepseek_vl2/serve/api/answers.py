"""The event loop's side of the engine: submitting a request's jobs, and waiting for what comes of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import anyio
from starlette.requests import Request

from .engine import Engine, EngineStopped, QueueFull
from .errors import ApiError
from .grammar import GrammarError
from .sequence import Delta, Event, Job, Sink
from .text import ShownToken

T = TypeVar("T")


class Disconnected(Exception):
    """The client left."""


class Deadline:
    """A moment by which a request must be done.

    Args:
        seconds: from now; ``None`` for never.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.start = time.monotonic()

    def left(self) -> float | None:
        """Return the seconds that are left."""
        return None if self.seconds is None else max(0.0, self.start + self.seconds - time.monotonic())

    def elapsed(self) -> float:
        """Return the seconds since the request came."""
        return time.monotonic() - self.start

    @contextlib.contextmanager
    def enforced(self):  # type: ignore[no-untyped-def]
        """Turn running out of time, within the block, into an `ApiError`."""
        try:
            with anyio.fail_after(self.left()):
                yield
        except TimeoutError as error:
            message = f"The request was not done within the {self.seconds:g} seconds allowed."
            raise ApiError(504, message, code="timeout") from error


async def unless_disconnected(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Do some work as long as the client listens.

    Raises:
        Disconnected: it left; the work was cancelled.
    """
    outcome: list[T] = []
    failure: list[Exception] = []

    async def watch(scope: anyio.CancelScope) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch, group.cancel_scope)
        try:
            outcome.append(await work())
        except Exception as error:  # raised below, outside of the group, which would wrap it
            failure.append(error)
        group.cancel_scope.cancel()
    if failure:
        raise failure[0]
    if not outcome:
        raise Disconnected
    return outcome[0]


class Answers:
    """The answers to one request, as they are written.

    Args:
        engine: who writes them.
        deadline: when they must be done.
    """

    def __init__(self, engine: Engine, deadline: Deadline) -> None:
        self.engine = engine
        self.deadline = deadline
        self.jobs: list[Job] = []
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.completion_tokens: dict[int, int] = {}
        self.first_token_seconds: float | None = None
        self.unfinished = 0

    def sink(self, index: int) -> Sink:
        """Return what the engine calls for one of the answers."""
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return deliver

    def submit(self, jobs: list[Job]) -> None:
        """Hand the jobs to the engine.

        Raises:
            ApiError: the queue is full, or the engine does not work.
        """
        try:
            self.engine.submit(jobs)
        except QueueFull as error:
            raise ApiError(429, f"The server is busy: {error} Try again later.", code="queue_full") from error
        except EngineStopped as error:
            raise ApiError(503, "The server is shutting down.") from error
        self.jobs = jobs
        self.unfinished = len(jobs)

    def cancel(self) -> None:
        """Stop what is not finished."""
        for job in self.jobs:
            self.engine.cancel(job)

    async def next(self) -> tuple[int, Delta]:
        """Return what came next, and of which answer.

        Raises:
            ApiError: an answer failed, or time ran out.
        """
        with self.deadline.enforced():
            index, event = await self.events.get()
        if not isinstance(event, Delta):
            if isinstance(event.error, EngineStopped):
                raise ApiError(503, "The server is shutting down.") from event.error
            if isinstance(event.error, GrammarError):
                raise ApiError(400, str(event.error)) from event.error
            raise ApiError(500, "The server failed to write this answer.") from event.error
        if self.first_token_seconds is None:
            self.first_token_seconds = self.deadline.elapsed()
        self.completion_tokens[index] = event.completion_tokens
        self.unfinished -= event.finish_reason is not None
        return index, event

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield what comes until all answers are done."""
        while self.unfinished:
            yield await self.next()

    async def gather(self) -> list[tuple[str, list[ShownToken], str]]:
        """Return text, tokens and finish reason of each answer once all are done.

        Raises:
            ApiError: one of them failed.
        """
        count = len(self.jobs)
        texts, reasons = [""] * count, [""] * count
        tokens: list[list[ShownToken]] = [[] for _ in range(count)]
        async for index, delta in self:
            texts[index] += delta.text
            tokens[index] += delta.tokens
            reasons[index] = delta.finish_reason or ""
        return list(zip(texts, tokens, reasons, strict=True))
