"""Requests and responses as they go between the processes of a Ray Serve application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

LAST_WORDS_SECONDS = 5.0  # for an application whose client left, before it is cancelled


@dataclass(frozen=True)
class HttpRequest:
    """A request whose body has come.

    Fields:
        method, path, query, scheme: of its line.
        headers: names in lower case, and values.
        client: the address and port it came from.
        body: whole.
    """

    method: str
    path: str
    query: bytes
    scheme: str
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes

    def scope(self) -> dict[str, Any]:
        """Return the request as an ASGI scope."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": self.scheme,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": self.headers,
            "client": self.client,
            "server": None,
            "state": {},
        }


@dataclass(frozen=True)
class Head:
    """What a response begins with."""

    status: int
    headers: list[tuple[bytes, bytes]]


async def respond(app: Any, request: HttpRequest) -> AsyncIterator[Head | bytes]:
    """Let an ASGI application answer; yields the head, then the body as it is sent.

    Whoever stops asking for more has left: the application is told so.
    """
    parts: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
    left = asyncio.Event()
    given = False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            parts.put_nowait(Head(message["status"], list(message.get("headers", []))))
        elif message["type"] == "http.response.body" and message.get("body"):
            parts.put_nowait(bytes(message["body"]))

    task = asyncio.create_task(app(request.scope(), receive, send))
    task.add_done_callback(lambda done: parts.put_nowait(None))
    started = False
    try:
        while (part := await parts.get()) is not None:
            started = True
            yield part
        if not started:
            await task  # raises what went wrong
    finally:
        left.set()
        await _end(task)


async def _end(task: asyncio.Task[None]) -> None:
    """Let an application finish, for a while."""
    if not task.done():
        await asyncio.wait([task], timeout=LAST_WORDS_SECONDS)
        task.cancel()
    with contextlib.suppress(Exception, asyncio.CancelledError):  # it has been answered, or nobody listens
        await task
