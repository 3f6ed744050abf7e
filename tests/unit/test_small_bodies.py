"""Small bodies are parsed where they are read; what may take long, or would be in the engine's way, is not."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable

import pytest
from starlette.requests import Request

from deepseek_vl2.engine.launching import Launching
from deepseek_vl2.serve.api.body import SMALL_BYTES, SMALL_VALUES, BodyReader, is_small
from deepseek_vl2.serve.api.errors import ApiError
from deepseek_vl2.serve.api.schemas import ChatRequest, parse_body
from deepseek_vl2.serve.api.settings import Settings

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + "Ab+/" * (SMALL_BYTES // 8)}}


def chat(content: object) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()


def thread_that_parses(body: bytes, launching: Launching) -> str:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body}

    async def read() -> str:
        scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
        reader = BodyReader(Settings("m"), launching)
        return await reader.read(Request(scope, receive), lambda given: threading.current_thread().name)

    return asyncio.run(read())


def test_a_body_with_a_picture_is_parsed_in_the_event_loop() -> None:
    assert thread_that_parses(chat([PICTURE]), Launching()) == threading.current_thread().name


@pytest.mark.parametrize("body", [chat("x" * SMALL_BYTES), chat("," * SMALL_VALUES)], ids=["long", "many values"])
def test_a_larger_one_is_parsed_elsewhere(body: bytes) -> None:
    assert thread_that_parses(body, Launching()) != threading.current_thread().name


def test_nothing_is_parsed_in_the_event_loop_while_the_engine_launches() -> None:
    launching = Launching()
    with launching:
        assert thread_that_parses(chat([PICTURE]), launching) != threading.current_thread().name


@pytest.mark.parametrize(
    "fill",
    [
        lambda size: chat('"' * ((size - 100) // 2)),
        lambda size: chat("\ud83d\ude00" * ((size - 100) // 12)),
        lambda size: b'{"model":"m","messages":[{"role":"user","content":"x"}],"seed":' + b"1" * (size - 100) + b"}",
        lambda size: b'{"model":"m","messages":[],"top_p":0.' + b"1" * (size - 100) + b"}",
        lambda size: json.dumps({"model": "m", "messages": [], "x" * (size - 100): 1}).encode(),
        lambda size: b" " * size,
        lambda size: b"[" * SMALL_VALUES,
    ],
    ids=["quotes", "surrogates", "integer", "fraction", "name", "spaces", "depth"],
)
def test_a_small_body_takes_no_time_whatever_it_holds(fill: Callable[[int], bytes]) -> None:
    body, times = fill(SMALL_BYTES), []
    assert is_small(body)
    for _ in range(5):
        start = time.thread_time()
        try:
            parse_body(body, ChatRequest, lambda model: None)
        except ApiError as error:
            assert error.status == 400
        times.append(time.thread_time() - start)
    assert min(times) < 0.02
