"""The HTTP server around the application: how it listens, and how it stops."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn

from deepseek_vl2.cli.addresses import check_address

from .app import Server
from .connections import BoundedProtocol, ConnectionCounter

ABORT_SECONDS = 10  # for last words, after which connections are cut


class HttpServer(uvicorn.Server):
    """uvicorn's server, which ends requests that take too long to finish by an answer, never by silence.

    Args:
        config: uvicorn's.
        abort: ends the requests at work, with an answer each.
        seconds: for what runs to be finished after the first signal; a second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, abort: Callable[[], Awaitable[None]], seconds: float) -> None:
        super().__init__(config)
        self.abort = abort
        self.seconds = seconds
        self.hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal."""
        if self.should_exit and not self.hurried:
            self.hurried = True
            self._captured_signals.append(sig)
        else:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen.

        Raises:
            OSError: another program has taken the port while the model was loaded.
        """
        if sockets is None and self.config.fd is None and self.config.uds is None:
            check_address(self.config.host, self.config.port)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs, as far as there is time."""
        watcher = asyncio.create_task(self._abort_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            watcher.cancel()

    async def _abort_in_time(self) -> None:
        end = asyncio.get_running_loop().time() + self.seconds
        while not self.hurried and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.1)  # a signal's handler may do no more than set a flag
        await self.abort()


def http_server(server: Server, seconds: float = 120.0, **options: Any) -> HttpServer:
    """Return what serves an application.

    Args:
        server: the model with its application.
        seconds: time to finish after a signal.
        **options: uvicorn's.
    """
    limits = server.settings.connections
    config = uvicorn.Config(
        server.app,
        http=functools.partial(BoundedProtocol, counter=ConnectionCounter(limits)),  # type: ignore[arg-type]
        ws="none",
        timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=int(seconds + ABORT_SECONDS),
        server_header=False,
        **options,
    )
    return HttpServer(config, server.abort, seconds)
