"""From a request's bytes to its response."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .answers import Answers, Deadline, Disconnected, unless_disconnected
from .body import check_content_type, read_body
from .engine import Engine
from .errors import ApiError
from .metrics import Metrics
from .sequence import Delta
from .settings import Settings

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # what nginx calls it; nobody is there to read it
LAST_WORDS_SECONDS = 5.0  # for the event that tells a reading client that time ran out


class EventStream(Response):
    """A stream of server-sent events, which ends when the client leaves.

    Args:
        events: the events.
        close: called at the end, however it comes.
        seconds: when it ends all the same, for a client that stays and reads nothing; ``None`` for never.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], seconds: float | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.close = close
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch, receive, group.cancel_scope)
                if self.seconds is not None:
                    group.cancel_scope.deadline = anyio.current_time() + self.seconds
                with contextlib.suppress(OSError):  # the client left while it was written to
                    async for event in self.events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                group.cancel_scope.cancel()
        finally:
            self.close()

    @staticmethod
    async def _watch(receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()


class ResponseWriter(Protocol):
    """Writes the response to one request."""

    def stream(self, first: tuple[int, Delta]) -> AsyncIterator[bytes]:
        """Yield the response as server-sent events."""

    async def whole(self) -> dict[str, Any]:
        """Return the response once all answers are done."""


class Endpoint(Protocol):
    """An endpoint that generates: from a request's body to the jobs that answer it."""

    def parse(self, body: bytes) -> Any:
        """Read a request."""

    def check(self, request: Any) -> None:
        """Check what a request says about this server's model and limits."""

    async def submit(self, request: Any, answers: Answers) -> ResponseWriter:
        """Hand the request's jobs to the engine."""


class GenerationService:
    """Serves the endpoints that generate, within limits that they share.

    Args:
        engine: the engine.
        metrics: counts.
        settings: what the operator decided.
    """

    def __init__(self, engine: Engine, metrics: Metrics, settings: Settings) -> None:
        self.engine = engine
        self.metrics = metrics
        self.settings = settings
        self.in_hand = 0

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[contextlib.ExitStack]:
        """Count a request from its body on; what is put on the stack outlives the block with a stream."""
        if self.in_hand >= self.settings.max_requests:
            raise ApiError(429, f"The server has {self.in_hand} requests in hand. Try again later.", code="queue_full")
        self.in_hand += 1
        stack = contextlib.ExitStack()
        stack.callback(self._release)
        try:
            yield stack
        except BaseException:
            stack.close()
            raise

    def _release(self) -> None:
        self.in_hand -= 1

    async def serve(self, request: Request, endpoint: Endpoint) -> Response:
        """Return an endpoint's response to a request.

        Raises:
            ApiError: with the status to answer.
        """
        deadline = Deadline(self.settings.request_seconds)
        answers = Answers(self.engine, deadline)

        def count(status: int) -> None:
            self.metrics.count(status, deadline.elapsed(), answers.first_token_seconds)

        try:
            with self._admitted() as stack:
                stack.callback(answers.cancel)
                response = await self._respond(request, endpoint, answers, stack)
        except ApiError as error:
            count(error.status)
            raise
        except (Disconnected, ClientDisconnect):
            count(CLIENT_LEFT)
            return Response(status_code=CLIENT_LEFT)
        except BaseException:
            count(500)
            raise
        if isinstance(response, EventStream):
            stack.callback(count, response.status_code)  # a stream is over when its last event is sent
        else:
            count(response.status_code)
        return response

    async def _respond(
        self, request: Request, endpoint: Endpoint, answers: Answers, stack: contextlib.ExitStack
    ) -> Response:
        check_content_type(request)
        body = await read_body(request, self.settings.max_body_bytes, self.settings.body_seconds)
        asked = await anyio.to_thread.run_sync(endpoint.parse, body)
        del body
        endpoint.check(asked)

        async def prepare() -> ResponseWriter:
            with answers.deadline.enforced():
                return await endpoint.submit(asked, answers)

        reply = await unless_disconnected(request, prepare)
        if asked.stream:
            # Only after the first token, so that what fails before has a status of its own.
            first = await unless_disconnected(request, answers.next)
            left = answers.deadline.left()
            return EventStream(reply.stream(first), stack.close, None if left is None else left + LAST_WORDS_SECONDS)
        response = JSONResponse(await unless_disconnected(request, reply.whole))
        stack.close()
        return response


def check_api_key(request: Request, keys: tuple[str, ...]) -> None:
    """Raise an `ApiError` for a request that bears none of the keys."""
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # All of them are compared, each in constant time, so that the time tells nothing.
    matches = [secrets.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(401, "Give a valid API key: 'Authorization: Bearer KEY'.", code="invalid_api_key")
