"""Errors in the shape that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any

import anyio
from pydantic_core import ErrorDetails, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
MOST_ERRORS = 1000
DRAINED_BYTES = 64 << 20
DRAIN_SECONDS = 3.0


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: the HTTP status.
        message: what is wrong, and what to do next.
        param: which field of the request is meant.
        code: OpenAI's name for the error, where there is one.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


class LingeringResponse(JSONResponse):
    """A response to a request whose body was not read to its end.

    A connection that is closed on a client that still sends may cost it the response. So the response goes out first,
    and then what still comes is read and thrown away, for a while and up to a size.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, then drain the request."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        drained = 0
        with anyio.move_on_after(DRAIN_SECONDS):
            while drained < DRAINED_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    break
                drained += len(message.get("body", b""))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_response(error: ApiError) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def unread_body_response(error: ApiError) -> JSONResponse:
    """Return an error as the response to a request that is still being sent; the connection ends with it."""
    return LingeringResponse(error.body(), status_code=error.status, headers={**error.headers, "Connection": "close"})


async def handle_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with an `ApiError`."""
    assert isinstance(error, ApiError)
    unread = request.method == "POST" and not getattr(request.state, "body_read", False)
    return unread_body_response(error) if unread else error_response(error)


def _place(error: ErrorDetails) -> str:
    """Return where in the request an error is, without the branches of unions that pydantic names."""
    parts: list[str] = []
    for part in map(str, error["loc"]):
        branch = "[" in part or part == "str" or part.startswith(("constrained-", "function-")) or part[:1].isupper()
        if not branch and parts[-1:] != [part]:  # a union's tag stands before a field of the same name
            parts.append(part)
    return ".".join(parts)


def from_validation(failed: ValidationError) -> ApiError:
    """Return the clearest of pydantic's errors: of the branches of a union, those that got furthest."""
    if failed.error_count() > MOST_ERRORS:  # to describe them all takes longer than to find them
        return ApiError(400, f"The request has {failed.error_count():,} wrong or unknown fields.")
    errors = failed.errors(include_url=False, include_context=False, include_input=False)
    depth = max(len(error["loc"]) for error in errors)
    furthest = [error for error in errors if len(error["loc"]) == depth]
    error, place = furthest[0], _place(furthest[0])
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown field {place!r}: this server does not support it.", place, "unknown_parameter")
    reasons = dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in furthest if _place(e) == place)
    reason = ", or: ".join(reasons)
    if place:
        return ApiError(400, f"{place}: {reason}.", place)
    names_a_field = "_" in reason.partition(" ")[0]
    return ApiError(400, f"{reason}." if names_a_field else f"{reason[0].upper()}{reason[1:]}.")
