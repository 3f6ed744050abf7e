"""Server-sent events that tell a silent client that its answer still comes, and end when it leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

CLIENT_LEFT = 499  # what nginx calls it; nobody is there to read it
OUT_OF_TIME = 504
PING = b": ping\n\n"  # a comment, which clients skip


def now() -> float:
    """Return the event loop's time; anyio asks which library runs first, for each token of a stream."""
    return asyncio.get_running_loop().time()


class EventStream(Response):
    """A stream of server-sent events, which ends when the client leaves.

    Args:
        events: the events, those of a moment together; nothing where there are none.
        close: called at the end, however it comes.
        seconds: when it ends all the same, for a client that stays and reads nothing; ``None`` for never.
        ping_seconds: silence after which a comment is sent.
        outcome: returns the status that a stream stands for which was sent to its end.

    Attributes:
        on_end: is told what became of the stream, as a status.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        seconds: float | None = None,
        ping_seconds: float = 10.0,
        outcome: Callable[[], int] = lambda: 200,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.close = close
        self.seconds = seconds
        self.ping_seconds = ping_seconds
        self.outcome = outcome
        self.on_end: Callable[[int], None] | None = None
        self.last_sent = 0.0
        self.sending = asyncio.Lock()  # anyio's goes through the event loop each time
        self.ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        status = CLIENT_LEFT
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch, receive, group.cancel_scope)
                group.start_soon(self._ping, send)
                end = None if self.seconds is None else now() + self.seconds
                if end is not None:
                    group.cancel_scope.deadline = end
                with contextlib.suppress(OSError):  # the client left while it was written to
                    async for events in self.events:
                        if events:
                            await self._send(send, events)
                    await self._send(send, b"", more=False)
                    status = self.outcome()
                group.cancel_scope.cancel()
            if status == CLIENT_LEFT and end is not None and now() >= end:
                status = OUT_OF_TIME
        except Exception:
            status = 500
            raise
        finally:
            self.close()
            if self.on_end is not None:
                self.on_end(status)

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        async with self.sending:
            if self.ended:  # while a ping waited for its turn: nothing may follow the end
                return
            self.ended = not more
            await send({"type": "http.response.body", "body": body, "more_body": more})
            self.last_sent = now()

    async def _ping(self, send: Send) -> None:
        self.last_sent = now()
        while True:
            await anyio.sleep_until(self.last_sent + self.ping_seconds)
            if now() >= self.last_sent + self.ping_seconds:
                with contextlib.suppress(OSError):
                    await self._send(send, PING)

    @staticmethod
    async def _watch(receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()
