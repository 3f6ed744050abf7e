"""Many clients, clients that leave, and an operator who stops the server."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from server_support import MODEL, chat_body, make_server, wait_until

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

PATH = "/v1/chat/completions"
LONG = {"max_tokens": 3000, "ignore_eos": True}


def post(port: int, body: dict[str, Any], timeout: float = 60) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def begin_stream(port: int, **fields: Any) -> socket.socket:
    """Return a connection on which an answer has begun to come."""
    body = json.dumps(chat_body(stream=True, **{**LONG, **fields})).encode()
    stream = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    stream.sendall(head.encode() + body)
    assert b"200 OK" in stream.recv(300)
    return stream


def test_thirty_two_clients_lose_nothing(
    golden_model: Callable[..., DeepseekVLV2ForCausalLM], processor: DeepseekVLV2Processor
) -> None:
    def ask(number: int) -> tuple[int, str]:
        status, answer = post(server.port, chat_body(f"Question {number % 8}", temperature=0, max_tokens=6), 120)
        return status, answer["choices"][0]["message"]["content"]

    with make_server(golden_model("tiny"), processor, engine={"max_batch": 8}) as server:
        alone = [ask(number) for number in range(8)]
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(ask, range(64)))
        assert found == alone * 8
        wait_until(lambda: server.engine.busy == 0, 5)  # the last answer is told before its slot is free
        assert server.engine.stats.finished == 72


def test_a_full_queue_answers_429(demo: Any) -> None:
    with make_server(*demo, engine={"max_batch": 1, "queue_size": 1, "max_length": 4000}) as server:
        first = begin_stream(server.port)
        second = threading.Thread(target=post, args=(server.port, chat_body(max_tokens=2)))
        second.start()
        wait_until(lambda: server.engine.waiting == 1)
        status, answer = post(server.port, chat_body())
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        first.close()
        second.join(60)
        assert not second.is_alive()
        assert post(server.port, chat_body())[0] == 200


def test_clients_that_leave_free_their_slots(demo: Any) -> None:
    with make_server(*demo, engine={"max_batch": 4, "max_length": 4000, "queue_size": 8}) as server:
        engine = server.engine
        post(server.port, chat_body())
        process, sizes = psutil.Process(), []
        for _ in range(3):
            for _ in range(2):
                streams = [begin_stream(server.port, n=2) for _ in range(2)]
                assert engine.busy == 4
                for stream in streams:
                    stream.close()
                wait_until(lambda: engine.busy == 0)
            gc.collect()
            sizes.append(process.memory_info().rss)
        assert engine.stats.cancelled == 24
        assert server.server.service.in_hand == 0
        # Allocators keep what was once theirs: the later rounds may not grow by more than noise.
        assert sizes[-1] - sizes[0] < 20 << 20


def test_a_client_that_leaves_before_its_answer_is_whole(demo: Any) -> None:
    with make_server(*demo, engine={"max_batch": 1, "queue_size": 4, "max_length": 4000}) as server:

        def leave() -> None:
            with pytest.raises(OSError):
                post(server.port, chat_body(**LONG), 1.0)

        impatient, also = threading.Thread(target=leave), threading.Thread(target=leave)
        impatient.start()
        wait_until(lambda: server.engine.busy == 1)
        also.start()
        wait_until(lambda: server.engine.waiting == 1)
        for thread in (impatient, also):
            thread.join()
        wait_until(lambda: server.engine.busy == 0 and server.server.service.in_hand == 0, 20)
        assert server.engine.stats.cancelled == 2 and server.engine.stats.finished == 0


def test_time_runs_out(demo: Any) -> None:
    with make_server(*demo, engine={"max_batch": 1, "max_length": 4000}, request_seconds=1.0) as server:
        status, answer = post(server.port, chat_body(**LONG))
        assert (status, answer["error"]["type"]) == (504, "timeout_error")
        stream = begin_stream(server.port)
        received = b""
        while piece := stream.recv(65536):
            received += piece
            if b"timeout_error" in received:
                break
        assert b"[DONE]" not in received
        wait_until(lambda: server.engine.busy == 0)


def metrics_of(server: Any) -> dict[str, str]:
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_a_stream_is_counted_when_it_is_over(demo: Any) -> None:
    with make_server(*demo) as server:
        body = json.dumps(chat_body(max_tokens=200, ignore_eos=True, stream=True)).encode()
        asked = urllib.request.Request(f"{server.url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        begin = time.monotonic()
        with urllib.request.urlopen(asked) as response:
            response.read()
        took = time.monotonic() - begin
        values = metrics_of(server)
        # Most of the time is behind the first token, at which the response begins.
        assert float(values["deepseek_vl2_request_seconds_sum"]) > took / 2
        assert values["deepseek_vl2_request_seconds_count"] == "1.0"


def test_metrics_and_health(demo: Any) -> None:
    with make_server(*demo) as server:
        post(server.port, chat_body(max_tokens=3, ignore_eos=True))
        post(server.port, chat_body(n=0))
        values = metrics_of(server)
        assert values['deepseek_vl2_requests_total{status="200"}'] == "1.0"
        assert values['deepseek_vl2_requests_total{status="400"}'] == "1.0"
        assert values["deepseek_vl2_generated_tokens_total"] == "3.0"
        # The client has its answer a moment before the slot is free.
        wait_until(lambda: metrics_of(server)["deepseek_vl2_slots_busy"] == "0.0")
        assert values["deepseek_vl2_first_token_seconds_count"] == "1.0"
        server.engine.stop()
        status, answer = post(server.port, chat_body())
        assert (status, answer["error"]["message"]) == (503, "The server is shutting down.")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{server.url}/health")


def test_cors_and_keys(demo: Any) -> None:
    with make_server(*demo, cors_origins=("https://page.example",), api_keys=("secret",)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        connection.request("OPTIONS", PATH, headers={**headers, "Access-Control-Request-Headers": "authorization"})
        allowed = connection.getresponse()
        allowed.read()
        assert allowed.getheader("access-control-allow-origin") == "https://page.example"
        connection.request("GET", "/health")  # open, for those who watch it
        assert connection.getresponse().read() == b'{"status":"ok"}'
        for path in ("/v1/models", "/metrics", PATH):
            for key in (None, "Bearer wrong", "secret", "Basic secret", "Bearer secret2", "Bearer \xe9"):
                connection.request(
                    "POST" if path == PATH else "GET", path, headers={"Authorization": key} if key else {}
                )
                response = connection.getresponse()
                assert response.status == 401 and "API key" in json.loads(response.read())["error"]["message"]
                connection.close()


def start_process(*options: str) -> tuple[subprocess.Popen, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepseek_vl2.serve.api", "demo", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--served-model-name", MODEL, *options], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    def healthy() -> bool:
        assert process.poll() is None, "the server did not start"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return True
        time.sleep(0.2)
        return False

    wait_until(healthy, 120)
    return process, port


def test_sigterm_finishes_what_runs() -> None:
    process, port = start_process("--slots", "1", "--log-level", "warning")
    try:
        answers: list[Any] = []
        body = chat_body(max_tokens=20, ignore_eos=True)
        clients = [threading.Thread(target=lambda: answers.append(post(port, body, 120))) for _ in range(3)]
        stream = begin_stream(port, max_tokens=100)
        for client in clients:
            client.start()
        time.sleep(0.3)  # they wait for the one slot
        process.send_signal(signal.SIGTERM)
        received = b""
        while b"[DONE]" not in received:
            piece = stream.recv(65536)
            assert piece, "the stream was cut off"
            received += piece
        for client in clients:
            client.join(120)
        assert [status for status, _ in answers] == [200, 200, 200]
        assert all(answer["usage"]["completion_tokens"] == 20 for _, answer in answers)
        assert process.wait(30) == 0
        with pytest.raises(OSError):
            post(port, body)
    finally:
        process.kill()


@pytest.mark.slow
def test_sigterm_does_not_wait_for_ever() -> None:
    process, port = start_process(
        "--slots", "1", "--shutdown-seconds", "1", "--dtype", "float32", "--log-level", "error"
    )
    try:
        stream = begin_stream(port, max_tokens=1500)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert time.monotonic() - start < 20
        stream.close()
    finally:
        process.kill()


def test_running_servers_leave_no_threads(demo: Any) -> None:
    def engines() -> int:
        return sum(thread.name == "engine" for thread in threading.enumerate())

    before = engines()
    for _ in range(2):
        with make_server(*demo):
            assert engines() == before + 1
    assert engines() == before
