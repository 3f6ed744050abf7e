"""Reading a request's body, however long it would like to be."""

from __future__ import annotations

import anyio
from starlette.requests import Request

from .errors import ApiError


def check_content_type(request: Request) -> None:
    """Take JSON alone: what a web page can send to a local server without asking for permission is not JSON.

    Raises:
        ApiError: the body is something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"The body must be application/json, got {kind or 'no Content-Type'}.")


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """Return a request's body; it is counted while it comes, whatever its headers say.

    Raises:
        ApiError: it is too large, or did not come in time.
        ClientDisconnect: the client left.
    """
    too_large = ApiError(413, f"The body has more than the {max_bytes:,} bytes allowed.", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:18]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"The body did not come within {seconds:g} seconds.") from error
    request.state.body_read = True
    return bytes(body)
