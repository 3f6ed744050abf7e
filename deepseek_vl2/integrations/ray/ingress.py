"""The one address of the Ray Serve application: takes requests, and has a replica answer each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from deepseek_vl2.serve.api.errors import ApiError, error_response, unread_body_response
from deepseek_vl2.serve.api.guard import check_api_key

from .affinity import route_of
from .asgi import Head, HttpRequest

KEY_VARIABLE = "DEEPSEEK_VL2_API_KEY"
ATTEMPTS = 3
CLIENT_LEFT = 499
OF_A_CONNECTION = (b"connection", b"keep-alive", b"transfer-encoding")
METRICS = "Counts are each replica's own: Ray exports ray_serve_* at the metrics port of every node instead."


class Ingress:
    """Reads a request, finds out which replica knows its picture or conversation, and hands its answer on.

    Args:
        replicas: the handle of the replicas.
        max_body_bytes: size of a request's body.
    """

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self.replicas = replicas.options(stream=True)
        self.max_body_bytes = max_body_bytes
        self.keys = tuple(key.strip() for key in [os.environ.get(KEY_VARIABLE, "")] if key.strip())

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            body = await self._read(request)
        except ApiError as error:
            return unread_body_response(error)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        try:
            if request.url.path == "/metrics":
                raise ApiError(404, METRICS)
            return await self._forward(request, body)
        except ApiError as error:
            return error_response(error)

    async def _read(self, request: Request) -> bytes:
        """Return the body, of whoever has a key.

        Raises:
            ApiError: there is no key, or the body is too large.
        """
        if request.method == "POST" and request.url.path != "/ping":
            check_api_key(request, self.keys)  # before a stranger's body takes memory; the replica checks all requests
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.max_body_bytes:
                raise ApiError(413, f"The body is larger than {self.max_body_bytes >> 20} MiB.")
            parts.append(part)
        return b"".join(parts)

    async def _forward(self, request: Request, body: bytes) -> Response:
        """Return a replica's response; as long as nothing of it has come, another replica may be asked.

        Raises:
            ApiError: there is too much to do, or replicas died.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        asked, route = as_request(request, body), route_of(request.url.path, body)
        for _ in range(ATTEMPTS):
            parts = self.replicas.answer.remote(asked, affinity=route.affinity, replica=route.replica)
            try:
                head = await anext(aiter(parts))
            except BackPressureError:
                raise ApiError(429, "All replicas are busy. Try again later.", code="queue_full") from None
            except (RayActorError, ReplicaUnavailableError):
                continue
            except DeploymentUnavailableError:
                break
            except BaseException:
                parts.cancel()
                raise
            assert isinstance(head, Head)
            return as_response(head, parts)
        raise ApiError(503, "No replica could answer. Try again later.")


def as_request(request: Request, body: bytes) -> HttpRequest:
    """Return a request as it goes to a replica."""
    client = None if request.client is None else (request.client.host, request.client.port)
    headers = [(name.lower(), value) for name, value in request.headers.raw]
    return HttpRequest(
        request.method, request.scope["path"], request.scope["query_string"], request.url.scheme, headers, client, body
    )


def as_response(head: Head, parts: Any) -> Response:
    """Return a response whose body comes from a replica; when its client leaves, the replica is told."""

    async def rest() -> AsyncIterator[bytes]:
        try:
            async for part in parts:
                yield part
        finally:
            with contextlib.suppress(Exception):  # it has ended
                parts.cancel()

    response = StreamingResponse(rest(), status_code=head.status)
    response.raw_headers = [(name, value) for name, value in head.headers if name.lower() not in OF_A_CONNECTION]
    return response
