"""From a request's bytes to its response."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.request import Delta

from .answers import Answers, Deadline, Disconnected, Mailbox, unless_disconnected
from .body import BodyReader
from .errors import ApiError
from .event_stream import CLIENT_LEFT, EventStream
from .metrics import Metrics
from .settings import Settings

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 5.0  # for the event that tells a reading client that time ran out


class ResponseWriter(Protocol):
    """Writes the response to one request."""

    @property
    def status(self) -> int:
        """What a stream is counted as when it is over."""

    def stream(self, first: tuple[int, Delta] | None) -> AsyncIterator[bytes]:
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
        bodies: reads requests.
    """

    def __init__(self, engine: Engine, metrics: Metrics, settings: Settings, bodies: BodyReader) -> None:
        self.engine = engine
        self.bodies = bodies
        self.mailbox: Mailbox | None = None
        self.metrics = metrics
        self.settings = settings
        self.in_hand = 0

    @contextlib.contextmanager
    def admitted(self) -> Iterator[contextlib.ExitStack]:
        """Count a request; what is put on the stack outlives the block with a stream."""
        self._check_room()
        self.in_hand += 1
        stack = contextlib.ExitStack()
        stack.callback(self._release)
        try:
            yield stack
        except BaseException:
            stack.close()
            raise

    def _check_room(self) -> None:
        if self.in_hand >= self.settings.max_requests:
            raise ApiError(429, f"The server has {self.in_hand} requests in hand. Try again later.", code="queue_full")

    def _release(self) -> None:
        self.in_hand -= 1

    async def serve(self, request: Request, endpoint: Endpoint) -> Response:
        """Return an endpoint's response to a request.

        Raises:
            ApiError: with the status to answer.
        """
        deadline = Deadline(self.settings.request_seconds)
        if self.mailbox is None or self.mailbox.loop is not asyncio.get_running_loop():
            self.mailbox = Mailbox()
        answers = Answers(self.engine, deadline, self.mailbox)

        def count(status: int) -> None:
            self.metrics.count(status, deadline.elapsed(), answers.first_token_seconds)

        try:
            self._check_room()
            # Until its body has come, however slowly, a request takes nobody's place.
            asked = await self.bodies.read(request, endpoint.parse)
            with self.admitted() as stack:
                stack.callback(answers.cancel)
                response = await self._respond(request, endpoint, asked, answers, stack)
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
            response.on_end = count  # a stream is over when its last event is sent
        else:
            count(response.status_code)
        return response

    async def _respond(
        self, request: Request, endpoint: Endpoint, asked: Any, answers: Answers, stack: contextlib.ExitStack
    ) -> Response:
        endpoint.check(asked)

        async def work() -> tuple[ResponseWriter, Any]:
            with answers.deadline.enforced():
                reply = await endpoint.submit(asked, answers)
            # Of a stream the first token, so that what fails before has a status of its own; but not much later, since
            # clients and proxies give up a connection on which nothing comes.
            return reply, await (self._first(answers) if asked.stream else reply.whole())

        reply, found = await unless_disconnected(request, work)
        if asked.stream:
            left = answers.deadline.left()
            seconds = None if left is None else left + LAST_WORDS_SECONDS
            pings = self.settings.ping_seconds
            return EventStream(reply.stream(found), stack.close, seconds, pings, lambda: reply.status)
        response = JSONResponse(found)
        stack.close()
        return response

    async def _first(self, answers: Answers) -> tuple[int, Delta] | None:
        """Return what comes first; ``None`` when it takes long."""
        with anyio.move_on_after(self.settings.first_byte_seconds):
            return await answers.next()
        return None
