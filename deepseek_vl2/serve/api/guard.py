"""What every request passes first, whatever its path."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Callable

import anyio
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response

# Names that no stranger can let point to this machine: they are not in the public domain name system.
LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".lan")
STOPPING = "The server is shutting down."


def host_name(header: str) -> str:
    """Return the name or address of a Host header, without its port and in lower case."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).rstrip(".")


def is_local_name(host: str) -> bool:
    """Whether a web page cannot have reached this server under that name by changing what its own name points to.

    Such a page's browser sends the page's name, which is one of the public domain name system; never an address, nor a
    name without a dot.
    """
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "." not in host or host.endswith(LOCAL_SUFFIXES)
    return True


def check_api_key(request: Request, keys: tuple[str, ...]) -> None:
    """Raise an `ApiError` for a request that bears none of the keys."""
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are bytes: some clients write other letters than ASCII in UTF-8, some in Latin-1.
    forms = given.strip().encode("latin-1"), given.strip().encode()
    # All of them are compared, each in constant time, so that the time tells nothing.
    matches = [secrets.compare_digest(form, key.encode()) for key in keys for form in forms]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(401, "Give a valid API key: 'Authorization: Bearer KEY'.", code="invalid_api_key")


class Guard:
    """ASGI middleware: checks the Host header, answers HEAD, and ends what runs when the server has to stop.

    Args:
        app: the application behind it.
        running: the requests at work.
        allowed_hosts: names that a request may be sent to, beside local ones; ``None`` for any.
    """

    def __init__(self, app: ASGIApp, running: RunningRequests, allowed_hosts: tuple[str, ...] | None = None) -> None:
        self.app = app
        self.running = running
        self.allowed_hosts = None if allowed_hosts is None else {host_name(host) for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refuse_host(scope)
        if refused is not None:
            await error_response(refused)(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; the server underneath leaves the body out
            scope = {**scope, "method": "GET"}
        await self.running.run(self.app, scope, receive, send)

    def _refuse_host(self, scope: Scope) -> ApiError | None:
        if self.allowed_hosts is None:
            return None
        host = host_name(next((v.decode("latin-1") for k, v in scope["headers"] if k == b"host"), ""))
        if is_local_name(host) or host in self.allowed_hosts:
            return None
        message = (
            f"This server does not answer under the name {host[:100]!r}: start it with --allowed-host {host[:100]}."
        )
        return ApiError(403, message, code="host_not_allowed")


class RunningRequests:
    """The requests at work, so that they can be ended."""

    def __init__(self) -> None:
        self._scopes: set[anyio.CancelScope] = set()
        self.stopping = False

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let an application handle a request; when it is ended, say so in the form that its client reads."""
        progress = Progress(send)
        with anyio.CancelScope() as cancel:
            self._scopes.add(cancel)
            try:
                await app(scope, receive, progress)
            finally:
                self._scopes.discard(cancel)
        if cancel.cancelled_caught and not progress.complete:
            await self._last_words(progress, scope, receive, send)

    @staticmethod
    async def _last_words(progress: Progress, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(503, STOPPING)
        if not progress.started:
            response = error_response(error)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
        elif progress.is_event_stream:
            body = b"data: " + json.dumps(error.body()).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": False})

    def end(self) -> None:
        """End all of them."""
        self.stopping = True
        for scope in list(self._scopes):
            scope.cancel()

    def __len__(self) -> int:
        return len(self._scopes)


class Progress:
    """Notes how far a response has come while it is sent."""

    def __init__(self, send: Callable[[Message], object]) -> None:
        self.send = send
        self.started = self.complete = self.is_event_stream = False

    async def __call__(self, message: Message) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start":
            self.started = True
            kinds = [value for name, value in message.get("headers", []) if name.lower() == b"content-type"]
            self.is_event_stream = any(value.startswith(b"text/event-stream") for value in kinds)
        await self.send(message)  # type: ignore[misc]
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
