"""Streams that wait, are left or cut off, and a server that has to stop before all is done."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server_support import PATH, RunningServer, chat_body, get, make_server, post, wait_until

from deepseek_vl2.serve.api.settings import GrammarLimits

LONG = {"max_tokens": 3000, "ignore_eos": True}
SLOTS: dict[str, Any] = {"max_batch": 1, "max_length": 4000, "queue_size": 8}


def send(server: RunningServer, body: dict[str, Any], cut: int = 0) -> socket.socket:
    """Send a request, or all of it but its last bytes."""
    data = json.dumps(body).encode()
    stream = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    stream.sendall(head.encode() + data[: len(data) - cut])
    return stream


def read_until(stream: socket.socket, mark: bytes, count: int = 1) -> bytes:
    received = b""
    while received.count(mark) < count:
        piece = stream.recv(65536)
        assert piece, received[-500:]
        received += piece
    return received


def read_all(stream: socket.socket) -> bytes:
    received = b""
    while piece := stream.recv(65536):
        received += piece
    return received


def counted(server: RunningServer) -> dict[str, int]:
    """Return the numbers of requests by status."""
    text = get(server, "/metrics").text  # type: ignore[attr-defined]
    lines = [line for line in text.splitlines() if line.startswith("deepseek_vl2_requests_total{")]
    return {line.split('"')[1]: int(float(line.split()[-1])) for line in lines}


def test_a_stream_begins_before_its_first_token(demo: Any) -> None:
    with make_server(*demo, engine=SLOTS, first_byte_seconds=0.2, ping_seconds=0.2) as server:
        busy = send(server, chat_body(stream=True, **LONG))
        read_until(busy, b"data: ")
        waiting = send(server, chat_body(stream=True, max_tokens=3, ignore_eos=True))
        received = read_until(waiting, b": ping\n\n", 2)
        assert b"200 OK" in received and b'"role":"assistant"' in received and b'"finish_reason":"' not in received
        assert server.engine.waiting == 1
        busy.close()
        received += read_until(waiting, b"[DONE]")
        waiting.close()
        events = [line for line in received.split(b"\n\n") if b'"finish_reason":"length"' in line]
        assert len(events) == 1
        wait_until(lambda: server.engine.busy == 0)
        wait_until(lambda: counted(server) == {"499": 1, "200": 1})


def test_an_answer_within_a_second_keeps_its_status(demo: Any) -> None:
    with make_server(*demo, engine={**SLOTS, "queue_size": 0}) as server:
        busy = send(server, chat_body(stream=True, **LONG))
        read_until(busy, b"data: ")
        assert post(server, chat_body(stream=True))[0] == 429
        busy.close()


def test_streams_are_counted_as_what_became_of_them(demo: Any) -> None:
    with make_server(*demo, engine={**SLOTS, "max_batch": 8}) as server:
        streams = [send(server, chat_body(stream=True, **LONG)) for _ in range(3)]
        for stream in streams:
            read_until(stream, b"data: ", 2)
            stream.close()
        wait_until(lambda: counted(server) == {"499": 3})
        with send(server, chat_body(stream=True)) as stream:
            read_until(stream, b"[DONE]")
        wait_until(lambda: counted(server) == {"499": 3, "200": 1})
    with make_server(*demo, engine=SLOTS, request_seconds=1.0) as server:
        with send(server, chat_body(stream=True, **LONG)) as stream:
            assert b"timeout_error" in read_until(stream, b"timeout_error")
        wait_until(lambda: counted(server) == {"504": 1})


def test_sixty_four_streams_of_which_half_are_killed(demo: Any) -> None:
    choose = random.Random(0)

    def ask(number: int) -> str | None:
        stream = send(server, chat_body(f"Question {number}", stream=True, max_tokens=40, ignore_eos=True))
        with contextlib.closing(stream):
            received = read_until(stream, b"data: ", 1 + choose.randrange(3))
            if number % 2:
                return None
            received += read_until(stream, b"[DONE]") if b"[DONE]" not in received else b""
            assert b'"finish_reason":"length"' in received
            return "whole"

    with make_server(*demo, engine={"max_batch": 8, "max_length": 300, "queue_size": 64}) as server:
        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(ask, range(64)))
        assert found.count("whole") == 32
        wait_until(lambda: server.engine.busy == 0 and server.server.service.in_hand == 0)
        wait_until(lambda: sum(counted(server).values()) == 64)
        assert set(counted(server)) <= {"200", "499"} and counted(server)["200"] >= 32
        assert server.engine.healthy and server.engine.stats.failed == 0
        assert post(server, chat_body())[0] == 200


@pytest.mark.parametrize("way", ["time", "signals"])
def test_stopping_ends_in_answers(demo: Any, way: str, caplog: pytest.LogCaptureFixture) -> None:
    costly = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer", "multipleOf": 7777777}}}
    seconds = 0.5 if way == "time" else 100.0
    settings: Any = {"grammars": GrammarLimits(seconds=60), "first_byte_seconds": 0.1}
    with make_server(*demo, engine=SLOTS, shutdown_seconds=seconds, **settings) as server:
        stream = send(server, chat_body(stream=True, **LONG))
        read_until(stream, b"data: ", 2)
        queued = send(server, chat_body(stream=True, **LONG))
        read_until(queued, b"data: ")
        others = {
            "whole": send(server, chat_body(**LONG)),
            "half a body": send(server, chat_body("x" * 1000), cut=500),
            "grammar": send(server, chat_body(response_format=costly)),
        }
        wait_until(lambda: len(server.server.running) == 5 and server.engine.waiting == 2)
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING):
            server.uvicorn.handle_exit(signal.SIGTERM, None)
            if way == "signals":
                time.sleep(0.3)
                assert server.thread.is_alive()
                server.uvicorn.handle_exit(signal.SIGTERM, None)
            for name, connection in others.items():
                received = read_all(connection)
                head, _, body = received.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503") and b"application/json" in head, (name, received)
                assert json.loads(body)["error"]["message"] == "The server is shutting down.", name
            for one in (stream, queued):
                received = read_all(one)
                (event,) = [line for line in received.split(b"\n\n") if b'"error"' in line]
                assert json.loads(event.partition(b"data: ")[2])["error"]["type"] == "server_error"
                assert received.endswith(b"0\r\n\r\n") and b"[DONE]" not in received
            server.thread.join(20)
        assert not server.thread.is_alive() and time.monotonic() - begin < 20
        wrong = [record.getMessage() for record in caplog.records if record.exc_info or "ASGI" in record.getMessage()]
        assert not wrong
        assert not [thread for thread in threading.enumerate() if thread.name == "engine" and thread.is_alive()]


def test_stopping_does_not_wait_for_a_step_that_takes_long(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_server(*demo, engine=SLOTS, shutdown_seconds=0.2) as server:
        monkeypatch.setattr("deepseek_vl2.serve.api.app.LAST_WORDS_SECONDS", 0.2)
        begun, go_on = threading.Event(), threading.Event()

        def slow_stop() -> None:
            begun.set()
            go_on.wait(20)

        with send(server, chat_body(stream=True, **LONG)) as stream:
            read_until(stream, b"data: ", 2)
            with send(server, chat_body(**LONG)) as whole:
                wait_until(lambda: server.engine.waiting == 1)
                stop = server.engine.stop
                monkeypatch.setattr(server.engine, "stop", slow_stop)
                server.uvicorn.should_exit = True
                assert begun.wait(20)
                assert read_all(whole).startswith(b"HTTP/1.1 503")
                assert b'"server_error"' in read_all(stream)
        go_on.set()
        server.thread.join(20)
        stop()
        assert not server.thread.is_alive()
