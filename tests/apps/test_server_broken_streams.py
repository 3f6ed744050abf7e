"""What goes wrong while a client is told of its answer: by a fault of the server, or of the connection."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from server_support import MODEL
from starlette.requests import Request

from deepseek_vl2.engine.request import Delta
from deepseek_vl2.serve.api.answers import Disconnected, unless_disconnected
from deepseek_vl2.serve.api.errors import ApiError
from deepseek_vl2.serve.api.event_stream import EventStream
from deepseek_vl2.serve.api.response_reply import ResponsesReply
from deepseek_vl2.serve.api.response_schemas import ResponsesRequest
from deepseek_vl2.serve.api.tools import ToolUse

FIRST = (0, Delta("Hello", [], 1))


class SecondPiece:
    """Answers of which a piece is still to come."""

    completion_tokens: dict[int, int] = {}

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        yield FIRST


def events_of(reply: ResponsesReply, first: Any) -> list[dict[str, Any]]:
    async def written() -> bytes:
        return b"".join([events async for events in reply.stream(first)])

    lines = asyncio.run(written()).decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("error", [ApiError(400, "The grammar cannot be followed."), KeyError("a fault")])
@pytest.mark.parametrize("first", [FIRST, None])
def test_a_stream_that_fails_begins_as_every_stream(
    error: Exception, first: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = ResponsesRequest(model=MODEL, input="Hello", stream=True)
    reply = ResponsesReply(request, [], MODEL, 3, SecondPiece(), None, ToolUse(), None)  # type: ignore[arg-type]

    def pieces(found: Any) -> list[bytes]:
        raise error

    monkeypatch.setattr(reply, "pieces", pieces)
    with caplog.at_level(logging.ERROR):
        events = events_of(reply, first)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert [event["sequence_number"] for event in events] == [0, 1, 2]
    told = events[-1]["response"]["error"]["message"]
    if isinstance(error, ApiError):
        assert told == error.message and reply.status == 400 and not caplog.records
    else:
        assert "failed to write" in told and reply.status == 500 and "a fault" in caplog.text


def test_a_stream_that_the_server_breaks_off_is_not_counted_as_left_by_its_client() -> None:
    counted: list[int] = []

    async def events() -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"
        raise KeyError("a fault")

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        pass

    stream = EventStream(events(), lambda: None)
    stream.on_end = counted.append
    with pytest.raises(Exception, match="unhandled errors"):
        asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 10))
    assert counted == [500]


def listened(receive: Any, seconds: float = 10.0) -> Any:
    """Return what comes of work that takes so many seconds for a client of such a connection."""

    async def work() -> str:
        await anyio.sleep(seconds)
        return "done"

    return asyncio.run(asyncio.wait_for(unless_disconnected(Request({"type": "http"}, receive), lambda: work()), 5))


def test_a_connection_that_cannot_be_read_ends_the_work_and_says_why() -> None:
    async def receive() -> Any:
        raise OSError("the connection is broken")

    with pytest.raises(OSError, match="is broken"):
        listened(receive)


def test_work_is_done_for_a_client_that_stays_and_ended_for_one_that_leaves() -> None:
    async def stay() -> Any:
        await anyio.sleep_forever()

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    assert listened(stay, 0.01) == "done"
    with pytest.raises(Disconnected):
        listened(leave)
