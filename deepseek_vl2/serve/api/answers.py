"""The event loop's side of the engine: submitting requests for answers, and waiting for what comes of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import anyio
from starlette.requests import Request

from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.kv_cache import OutOfTokens
from deepseek_vl2.engine.request import Delta, Event
from deepseek_vl2.engine.request import Request as EngineRequest
from deepseek_vl2.engine.status import EngineStopped, QueueFull

from .errors import ApiError
from .grammar import GrammarError

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
            raise self.error() from error

    def error(self) -> ApiError:
        """Return what a client is told whose time ran out."""
        return ApiError(504, f"The request was not done within the {self.seconds:g} seconds allowed.", code="timeout")


async def unless_disconnected(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Do some work as long as the client listens.

    Raises:
        Disconnected: it left; the work was cancelled.
        Exception: what reading its connection raised; the work was cancelled.
    """
    scope = anyio.CancelScope()

    async def watch() -> None:
        try:
            while (await request.receive())["type"] != "http.disconnect":
                pass
        finally:
            scope.cancel()

    watcher = asyncio.create_task(watch())  # a group's end would go through the event loop before the first token
    try:
        with scope:
            return await work()
    finally:
        watcher.cancel()
    watcher.result()  # it ended, since nothing else cancels the work
    raise Disconnected


class Mailbox:
    """Brings events from the engine's thread to the event loop: those of a whole step by one wake-up."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: deque[tuple[Callable[[Event], None], Event]] = deque()
        self._woken = False

    def sink(self, take: Callable[[Event], None]) -> Callable[[Event], None]:
        """Return what the engine calls, so that ``take`` is called in the loop."""

        def deliver(event: Event) -> None:
            self._events.append((take, event))
            if not self._woken:
                self._woken = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    self.loop.call_soon_threadsafe(self._empty)

        return deliver

    def _empty(self) -> None:
        self._woken = False  # first: what is added from here on wakes the loop again, or is seen below
        while self._events:
            take, event = self._events.popleft()
            take(event)


class Answers:
    """The answers to one request, as they are written.

    What has come since the reader looked last comes to it as one piece, so that a reader that is slow, or wants the
    whole only, costs little.

    Args:
        engine: who writes them.
        deadline: when they must be done.
        mailbox: brings what the engine tells.
    """

    def __init__(self, engine: Engine, deadline: Deadline, mailbox: Mailbox) -> None:
        self.engine = engine
        self.deadline = deadline
        self.mailbox = mailbox
        self.requests: list[EngineRequest] = []
        self.completion_tokens: dict[int, int] = {}
        self.first_token_seconds: float | None = None
        self.unfinished = 0
        self._held: dict[int, Delta] = {}
        self._error: Exception | None = None
        self._running = 0
        self._patient = False
        self._late = False
        self._timer: asyncio.TimerHandle | None = None  # one for all tokens: a scope for each would cost more than it
        self._wake = asyncio.Event()

    def sink(self, index: int) -> Callable[[Event], None]:
        """Return what the engine calls for one of the answers."""
        return self.mailbox.sink(lambda event: self._take(index, event))

    def submit(self, requests: list[EngineRequest]) -> None:
        """Hand the requests to the engine.

        Raises:
            ApiError: the queue is full, or the engine does not work.
        """
        self._running = len(requests)
        try:
            self.engine.submit(requests)
        except QueueFull as error:
            raise ApiError(429, f"The server is busy: {error} Try again later.", code="queue_full") from error
        except EngineStopped as error:
            raise ApiError(503, "The server is shutting down.") from error
        self.requests = requests
        self.unfinished = len(requests)

    def cancel(self) -> None:
        """Stop what is not finished."""
        if self._timer is not None:
            self._timer.cancel()
        for request in self.requests:
            if self.engine.holds(request):
                self.engine.cancel(request)

    def _take(self, index: int, event: Event) -> None:
        """Note what the engine tells; in the event loop."""
        if not isinstance(event, Delta):
            self._error = self._error or event.error
        else:
            if self.first_token_seconds is None:
                self.first_token_seconds = self.deadline.elapsed()
            held = self._held.get(index)
            if held is None:
                self._held[index] = event
            else:
                held.tokens.extend(event.tokens)  # a list of its own
                told = (held.text + event.text, held.tokens)
                self._held[index] = Delta(*told, event.completion_tokens, event.finish_reason, event.stop)
            self._running -= event.finish_reason is not None
        if self._error is not None or not self._patient or not self._running:
            self._wake.set()

    def _watch_time(self) -> None:
        if self._timer is None and (left := self.deadline.left()) is not None:
            self._timer = self.mailbox.loop.call_later(left, self._be_late)

    def _be_late(self) -> None:
        self._late = True
        self._wake.set()

    async def next(self, whole: bool = False) -> tuple[int, Delta]:
        """Return what came next, and of which answer; ``whole``: once everything has come.

        Raises:
            ApiError: an answer failed, or time ran out.
        """
        self._patient = whole
        while self._error is None and not (self._held and not (whole and self._running)):
            if self._late:
                raise self.deadline.error()
            self._wake.clear()
            self._watch_time()
            await self._wake.wait()
        if self._error is not None and not self._held:
            raise answer_error(self._error)
        if self._error is not None and whole:
            raise answer_error(self._error)
        index = next(iter(self._held))
        delta = self._held.pop(index)
        self.completion_tokens[index] = delta.completion_tokens
        self.unfinished -= delta.finish_reason is not None
        return index, delta

    async def whole(self) -> list[Delta]:
        """Return each answer once all of them are done; raises as `next` does."""
        found = [await self.next(whole=True) for _ in self.requests]
        return [delta for _, delta in sorted(found, key=lambda pair: pair[0])]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield what comes until all answers are done."""
        while self.unfinished:
            yield await self.next()


def answer_error(error: Exception) -> ApiError:
    """Return what a client is told of an answer that failed."""
    if isinstance(error, EngineStopped):
        found = ApiError(503, "The server is shutting down.")
    elif isinstance(error, GrammarError):
        found = ApiError(400, str(error))
    elif isinstance(error, OutOfTokens):
        found = ApiError(400, f"The prompt is too long for this server. {error}", "messages", "context_length_exceeded")
    else:
        found = ApiError(500, "The server failed to write this answer.")
    found.__cause__ = error
    return found
