"""One replica of the Ray Serve application: our server's application on an engine of its own."""

from __future__ import annotations

import contextlib
import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio.to_thread

from .asgi import Head, HttpRequest, respond

REPLICA_HEADER = b"x-replica"  # tells who looks for a fault, or for a cache, where an answer came from


class ModelReplica:
    """A model with its engine, which answers the requests that are sent to it.

    Args:
        options: of ``deepseek-vl2 serve``, as on a command line.

    Raises:
        ValueError, OSError: they are wrong, or the model cannot be loaded.
    """

    async def __init__(self, options: Sequence[str]) -> None:  # type: ignore[misc]
        from ray import serve

        from deepseek_vl2.serve.api.command import build_server

        self.name: str = serve.get_replica_context().replica_id.unique_id
        args = read_options(options)
        self.server = await anyio.to_thread.run_sync(lambda: build_server(args, replica=self.name))
        self.stack = contextlib.AsyncExitStack()
        await self.stack.enter_async_context(self.server.app.router.lifespan_context(self.server.app))

    async def answer(
        self, request: HttpRequest, affinity: str | None = None, replica: str | None = None
    ) -> AsyncIterator[Head | bytes]:
        """Yield the head of a response, then its body as it is written.

        Args:
            request: the request.
            affinity, replica: what the router sent it here for.
        """
        parts = respond(self.server.app, request)
        async with contextlib.aclosing(parts):  # type: ignore[type-var]
            async for part in parts:
                if isinstance(part, Head):
                    part = dataclasses.replace(part, headers=[*part.headers, (REPLICA_HEADER, self.name.encode())])
                yield part

    async def check_health(self) -> None:
        """Tell Ray Serve, by raising, that this replica is to be replaced.

        Raises:
            RuntimeError: the engine does not run.
        """
        if not self.server.engine.healthy:
            raise RuntimeError("The engine does not run.")

    async def __del__(self) -> None:
        """End what runs, when the replica is taken away."""
        if hasattr(self, "stack"):
            await self.server.abort()
            await self.stack.aclose()


def read_options(options: Sequence[str]) -> Namespace:
    """Return options of ``deepseek-vl2 serve``.

    Raises:
        ValueError: one is unknown or wrong, or is of the address, which Ray Serve has.
    """
    from deepseek_vl2.cli.main import as_declared
    from deepseek_vl2.serve.api.command import add_arguments

    parser = OptionParser(prog="options", add_help=False)
    add_arguments(parser)
    spelled = as_declared(list(options), parser._option_string_actions)
    taken = [name for name in ("--host", "--port", "--api_key") if name in {text.partition("=")[0] for text in spelled}]
    if taken:
        raise ValueError(
            f"{', '.join(taken)}: Ray Serve has the address (http_options), and keys come from the environment, as "
            "DEEPSEEK_VL2_API_KEY on every node."
        )
    return parser.parse_args(spelled)


class OptionParser(ArgumentParser):
    """Raises ``ValueError`` instead of ending the process."""

    def error(self, message: str) -> Any:
        """Raise what is wrong."""
        raise ValueError(f"options: {message}")
