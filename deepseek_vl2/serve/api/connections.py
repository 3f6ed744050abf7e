"""HTTP connections that strangers cannot hold for ever: bounds on their number, their silence and their slowness."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .settings import ConnectionLimits


class ConnectionCounter:
    """Counts the connections of a server, together and by address."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.open: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        """Count a connection, if there may be another one."""
        if self.open.total() >= self.limits.most or self.open[address] >= self.limits.per_address:
            return False
        self.open[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Forget a connection."""
        self.open[address] -= 1
        if self.open[address] <= 0:
            del self.open[address]


# A body may come in this many chunks of any size; more must hold so many bytes each on average. Each takes the event
# loop some 50 us, and thousands of them fit into what it reads at once.
FREE_CHUNKS, CHUNK_BYTES = 1024, 256
CHUNKS_TOO_SMALL = f"The body comes in too many small chunks: send {CHUNK_BYTES} bytes or more in each."


class ChunkCountingConnection(h11.Connection):
    """h11's state of a connection to a client, to which a body in thousands of small chunks is a protocol error."""

    chunks = chunk_bytes = 0
    reason = "Invalid HTTP request received."

    def next_event(self) -> Any:
        """Return what came next."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.chunk_bytes = 0
        elif isinstance(event, h11.Data):
            self.chunks += event.chunk_start
            self.chunk_bytes += len(event.data)
            if self.chunks > FREE_CHUNKS and self.chunk_bytes < CHUNK_BYTES * (
                self.chunks - 1
            ):  # the last may not be whole
                self.reason = CHUNKS_TOO_SMALL
                raise h11.RemoteProtocolError(self.reason)
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with bounds; its own errors have the shape of the server's others."""

    def __init__(self, *args: Any, counter: ConnectionCounter, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # As uvicorn makes its own.
        most = self.config.h11_max_incomplete_event_size
        sizes = {} if most is None else {"max_incomplete_event_size": most}
        self.conn: ChunkCountingConnection = ChunkCountingConnection(h11.SERVER, **sizes)
        self.counter = counter
        self.limits = counter.limits
        self.address = ""
        self.counted = False
        self.header_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    @property
    def serving(self) -> bool:
        """Whether a request is at work."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Take a connection, or refuse it."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.counted = self.counter.enter(self.address)
        if self.counted:
            self._watch_header()
        else:
            self._refuse(ApiError(429, "Too many connections are open. Close some.", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        super().connection_lost(exc)
        self._stop_timers()
        if self.counted:
            self.counted = False
            self.counter.leave(self.address)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; while it is not whole, what comes later wins no time."""
        if not self.counted:
            return
        super().data_received(data)
        if self.serving:
            self._stop_header_timer()
        elif self.header_timer is None and not self.transport.is_closing():
            self._watch_header()

    def on_response_complete(self) -> None:
        """Go on to the next request, which uvicorn waits for in silence only."""
        super().on_response_complete()
        if self.serving:
            self._stop_header_timer()

    def pause_writing(self) -> None:
        """Wait for a client that does not read."""
        super().pause_writing()
        self._stop_write_timer()
        self.write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or no HTTP that is taken here."""
        self._refuse(ApiError(400, self.conn.reason))

    def _watch_header(self) -> None:
        self.header_timer = self.loop.call_later(self.limits.header_seconds, self._header_is_late)

    def _header_is_late(self) -> None:
        self.header_timer = None
        if not self.serving and not self.transport.is_closing():
            self._refuse(ApiError(408, f"No request came within {self.limits.header_seconds:g} seconds."))

    def _refuse(self, error: ApiError) -> None:
        """Send an error, where none of a response has been sent, and close the connection."""
        body = json.dumps(error.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        head = h11.Response(status_code=error.status, headers=[*headers.items(), *error.headers.items()], reason=b"")
        try:
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # a response is under way, or over
            self.transport.abort()
        else:
            self.transport.close()
            # A client that reads nothing does not keep it open.
            self.write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def _stop_timers(self) -> None:
        self._stop_header_timer()
        self._stop_write_timer()

    def _stop_header_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def _stop_write_timer(self) -> None:
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None
