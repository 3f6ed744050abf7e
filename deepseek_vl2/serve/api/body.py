"""Reading a request's body, however long it would like to be, and however slowly it comes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request

from deepseek_vl2.engine.launching import Launching

from .errors import ApiError
from .json_size import count_separators
from .settings import Settings

# Such a body is parsed in the event loop, where it takes 2 ms at most, and less than changing threads twice mostly:
# one of a picture in base64, or of some text.
SMALL_BYTES, SMALL_VALUES = 1 << 19, 256
PARSING_THREADS = 2  # Python runs one at a time; the event loop is to be the next in turn
T = TypeVar("T")


def check_content_type(request: Request) -> None:
    """Take JSON alone: what a web page can send to a local server without asking for permission is not JSON.

    Raises:
        ApiError: the body is something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"The body must be application/json, got {kind or 'no Content-Type'}.")
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise ApiError(415, f"The body must not be compressed, but its Content-Encoding is {coding[:40]!r}.")


class BodyBudget:
    """The memory of bodies that are still coming; they are no requests yet, and take no request's place.

    Args:
        most_bytes: of all of them; one address may hold half.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held: Counter[str] = Counter()

    @contextlib.contextmanager
    def share(self, address: str) -> Iterator[Callable[[int], None]]:
        """Yield what is told of each piece of a body; the body's bytes are given back at the end of the block."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self.held.total() + size > self.most_bytes or 2 * (self.held[address] + size) > self.most_bytes:
                raise ApiError(503, "Too many bodies are coming at the same time. Try again later.", code="queue_full")
            self.held[address] += size
            taken += size

        try:
            yield take
        finally:
            self.held[address] -= taken
            if not self.held[address]:
                del self.held[address]


class BodyReader:
    """Reads the bodies of a server's requests.

    Args:
        settings: what they may be.
        launching: of the engine, which goes first.
    """

    def __init__(self, settings: Settings, launching: Launching) -> None:
        self.settings = settings
        self.launching = launching
        self.budget = BodyBudget(settings.body_bytes)
        self.limiter = anyio.CapacityLimiter(PARSING_THREADS)

    async def read(self, request: Request, parse: Callable[[bytes], T]) -> T:
        """Return what ``parse`` makes of a request's body; one that is large is parsed in another thread.

        Raises:
            ApiError: the body is not JSON, too large or too slow, or whatever ``parse`` raises.
            ClientDisconnect: the client left.
        """
        check_content_type(request)
        body = await read_body(request, self.settings.max_body_bytes, self.settings.body_seconds, self.budget)
        if not self.launching.active and is_small(body):
            return parse(body)

        def parse_later() -> T:
            self.launching.wait()
            return parse(body)

        return await anyio.to_thread.run_sync(parse_later, limiter=self.limiter)


def is_small(body: bytes) -> bool:
    """Whether a body is parsed in no time, whatever it holds."""
    return len(body) <= SMALL_BYTES and count_separators(body, 0, len(body)) <= SMALL_VALUES


async def read_body(request: Request, max_bytes: int, seconds: float, budget: BodyBudget) -> bytes:
    """Return a request's body; it is counted while it comes, whatever its headers say.

    Raises:
        ApiError: it is too large, or did not come in time, or too many others come.
        ClientDisconnect: the client left.
    """
    too_large = ApiError(413, f"The body has more than the {max_bytes:,} bytes allowed.", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:18]) > max_bytes:
        raise too_large
    body = bytearray()
    address = request.client.host if request.client else ""
    try:
        with budget.share(address) as take, anyio.fail_after(seconds):
            async for chunk in request.stream():
                take(len(chunk))
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"The body did not come within {seconds:g} seconds.") from error
    request.state.body_read = True
    return bytes(body)
