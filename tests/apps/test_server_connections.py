"""Clients that are slow, silent, many, or from somewhere else than they say."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server_support import (
    PATH,
    RunningServer,
    assert_prompt,
    chat_body,
    get,
    health_times,
    make_server,
    post,
    wait_until,
)

from deepseek_vl2.serve.api import command
from deepseek_vl2.serve.api.body import BodyBudget
from deepseek_vl2.serve.api.errors import ApiError
from deepseek_vl2.serve.api.guard import host_name, is_local_name
from deepseek_vl2.serve.api.json_size import MAX_VALUES, count_values
from deepseek_vl2.serve.api.settings import ConnectionLimits

LIMITS = ConnectionLimits(most=300, per_address=200, header_seconds=1.0, idle_seconds=1.0, write_seconds=1.0)


@pytest.fixture(scope="module")
def server(demo: Any) -> Iterator[RunningServer]:
    """Run a server of few slots and short patience, which knows its own names alone."""
    limits: Any = {"connections": LIMITS, "max_requests": 8, "body_seconds": 8.0, "allowed_hosts": ("ok.example",)}
    with make_server(*demo, **limits) as running:
        yield running


def connect(server: RunningServer, data: bytes = b"") -> socket.socket:
    stream = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    stream.sendall(data)
    return stream


def read_all(stream: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := stream.recv(65536):
            received += piece
    return received


def error_in(received: bytes, status: int) -> dict[str, Any]:
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status}".encode()), received[:200]
    assert b"application/json" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


def test_bodies_that_hardly_come_take_nobodys_place(server: RunningServer) -> None:
    slow = [connect(server, HEAD + b"Content-Length: 500\r\n\r\n{") for _ in range(140)]
    try:
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.2):
                for stream in slow:
                    with contextlib.suppress(OSError):
                        stream.sendall(b" ")

        thread = threading.Thread(target=trickle)
        thread.start()
        begin = time.monotonic()
        assert [post(server, chat_body())[0] for _ in range(4)] == [200] * 4
        assert time.monotonic() - begin < 6, "they waited until the slow ones were given up"
        assert server.server.service.in_hand == 0
        assert_prompt(health_times(server, lambda: True))
    finally:
        stop.set()
        thread.join()
        for stream in slow:
            stream.close()
    wait_until(lambda: not server.server.bodies.budget.held)


def test_a_header_must_come_in_time(server: RunningServer) -> None:
    begin = time.monotonic()
    with contextlib.ExitStack() as opened:
        beginnings = (b"", b"GET /health HTTP/1.1\r\nHost: ", b"G")
        for stream in [opened.enter_context(connect(server, sent)) for sent in beginnings]:
            assert "within 1 second" in error_in(read_all(stream), 408)["message"]
    assert time.monotonic() - begin < 8


def test_a_byte_now_and_then_wins_no_time(server: RunningServer) -> None:
    with connect(server, b"GET /health HTTP/1.1\r\n") as stream:
        begin, received = time.monotonic(), b""
        stream.settimeout(0.2)
        while time.monotonic() - begin < 8 and not received:
            with contextlib.suppress(OSError):
                stream.sendall(b"X")
            with contextlib.suppress(TimeoutError):
                received = stream.recv(65536)
        stream.settimeout(10)  # the head may come alone
        error_in(received + read_all(stream), 408)


def test_a_connection_is_not_kept_for_ever(server: RunningServer) -> None:
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server, whole + whole) as stream:
        begin = time.monotonic()
        assert read_all(stream).count(b"200 OK") == 2
        assert time.monotonic() - begin < 8
    with connect(server, whole.replace(b"\r\n\r\n", b"\r\nContent-Length: 9000\r\n\r\n")) as stream:
        begin = time.monotonic()  # a body that nobody asked for, slowly
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 10:
                stream.sendall(b"x")
                time.sleep(0.2)
        assert time.monotonic() - begin < 9


def test_who_does_not_read_is_cut_off(server: RunningServer) -> None:
    stream = connect(server)
    with stream:
        wanted = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        threading.Thread(target=lambda: contextlib.suppress(OSError) and stream.sendall(wanted * 2000)).start()
        time.sleep(1)
        wait_until(lambda: not server.connections.open, 15)


def test_an_address_may_have_only_so_many_connections(another: Any) -> None:
    limits = ConnectionLimits(most=6, per_address=3)
    with make_server(*another, connections=limits) as server:
        streams = [connect(server) for _ in range(3)]
        wait_until(lambda: server.connections.open.total() == 3)
        with connect(server) as refused:
            assert "Too many connections" in error_in(read_all(refused), 429)["message"]
        streams.pop().close()
        wait_until(lambda: server.connections.open.total() == 2)
        assert get(server, "/health").status == 200
        for stream in streams:
            stream.close()
        wait_until(lambda: not server.connections.open)


def test_what_is_not_http_is_told_so_in_json(server: RunningServer) -> None:
    for nonsense in (b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000):
        with connect(server, nonsense) as stream:
            error_in(read_all(stream), 400)


# ---------------------------------------------------------------- bodies


def turns(*messages: Any) -> dict[str, Any]:
    return {**chat_body(), "messages": list(messages)}


def heavy_bodies() -> dict[str, bytes]:
    user = {"role": "user", "content": "x"}
    bodies: dict[str, Any] = {
        "zeros": turns(*[0] * 350_000),
        "empty": turns(*[{}] * 350_000),
        "parts": turns({"role": "user", "content": [0] * 350_000}),
        "grounding": turns({**user, "grounding": [[1, 2, 3, 4]] * 400_000}),
        "tools": {**chat_body(), "tools": [0] * 350_000},
        "stop": {**chat_body(), "stop": [0] * 350_000},
        "few but wrong": turns(*[0] * 1000),
        "many messages": turns(*[user] * 1100),
        "many parts": turns({"role": "user", "content": [{"type": "text", "text": "x"}] * 300}),
        "many fields": {**chat_body(), **{f"field{i}": 1 for i in range(30_000)}},
        "many fields of a message": turns({**user, **{f"field{i}": 1 for i in range(30_000)}}),
        "schema as text": {**chat_body(), "guided_json": "[" + "0," * 2_000_000 + "0]"},
        "grammar": {**chat_body(), "guided_grammar": "start: " + '"a" | ' * 300_000 + '"b"'},
    }
    return {name: json.dumps(body).encode() for name, body in bodies.items()}


def test_large_bodies_of_many_values_hold_nobody_up(server: RunningServer) -> None:
    bodies = heavy_bodies()
    with ThreadPoolExecutor(4) as pool:
        futures = {name: pool.submit(post, server, body, Host="localhost") for name, body in bodies.items()}
        times = health_times(server, lambda: all(future.done() for future in futures.values()))
    for name, future in futures.items():
        status, answer = future.result()
        assert status == 400, (name, answer)
        assert len(answer["error"]["message"]) < 1000, name
    assert_prompt(times)
    assert post(server, chat_body())[0] == 200


def chunked(body: bytes, size: int) -> bytes:
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


CHUNKED = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_body_in_chunks_of_a_byte_holds_nobody_up(server: RunningServer) -> None:
    flood = chunked(b" " * 100_000, 1)

    def send() -> bytes:
        with connect(server, CHUNKED.encode()) as stream:
            with contextlib.suppress(OSError):  # it is closed while this still sends
                stream.sendall(flood)
            return read_all(stream)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(send) for _ in range(2)]
        times = health_times(server, lambda: all(future.done() for future in futures))
    for future in futures:
        assert not future.result() or "too many small chunks" in error_in(future.result(), 400)["message"]
    assert_prompt(times)


@pytest.mark.parametrize(("length", "size"), [(900, 1), (300_000, 256), (300_000, 100_000)])
def test_chunks_as_clients_send_them_are_taken(server: RunningServer, length: int, size: int) -> None:
    body = json.dumps(chat_body(max_tokens=1)).encode()
    with connect(server, CHUNKED.encode() + chunked(body + b" " * (length - len(body)), size)) as stream:
        assert b" 200 " in stream.recv(1000)


def test_values_are_counted_outside_of_strings() -> None:
    def counted(value: Any) -> int:
        return count_values(value if isinstance(value, bytes) else json.dumps(value).encode(), 100)

    assert counted([1] * 50) == 50
    assert counted({"a": ",[{" * 1000}) == 1
    assert counted({"a": 'quoted \\" , \\\\' * 100, "b": [1, 2]}) == 4
    assert counted(b'["' + b"\\\\" * 200 + b'", ",,,' + b"," * 200 + b'"]') == 2
    assert counted([[]] * 1000) > 100
    assert counted(b'"' + b'\\"' * 500_000 + b"," * 200) > 100  # more quotes than anybody needs
    assert counted(b'"never ends' + b"," * 200) == 0
    assert MAX_VALUES > 20_000


def test_bodies_that_come_have_a_budget() -> None:
    budget = BodyBudget(100)
    with budget.share("a") as a, budget.share("b") as b, budget.share("a") as more:
        a(30)
        more(20)
        with pytest.raises(ApiError, match="Too many bodies"):
            more(1)  # one address may have half
        b(50)
    assert not budget.held


# ---------------------------------------------------------------- hosts, keys and browsers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "127.0.0.1", "127.0.0.1:8000", "[::1]:80", "box", "box.local", "")),
        *((host, 200) for host in ("ok.example", "OK.example:80", "a.localhost:1", "10.1.2.3")),
        *(
            (host, 403)
            for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.com")
        ),
    ],
)
def test_a_page_that_points_its_name_here_gets_nothing(server: RunningServer, host: str, status: int) -> None:
    for path in ("/health", "/v1/models"):
        answer = get(server, path, Host=host)
        assert answer.status == status
        if status == 403:
            assert "--allowed-host" in json.loads(answer.text)["error"]["message"]  # type: ignore[attr-defined]
    assert is_local_name(host_name(host)) == (status == 200 and "ok" not in host.lower())


def test_head_is_answered_like_get(server: RunningServer) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/openapi.json", "/version"):
        answer = get(server, path, "HEAD")
        assert (answer.status, answer.text) == (200, "")  # type: ignore[attr-defined]
        assert int(answer.headers["Content-Length"]) > 0
    assert get(server, "/nothing", "HEAD").status == 404
    assert get(server, PATH, "HEAD").status == 405


STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count,"
STAINLESS += "x-stainless-runtime,x-stainless-runtime-version,x-stainless-package-version,x-stainless-timeout,"
STAINLESS += "x-stainless-helper-method,openai-organization,openai-project,idempotency-key"


def test_a_browser_may_send_what_the_official_client_does(another: Any) -> None:
    with make_server(*another, cors_origins=("https://page.example",), api_keys=("schlüssel",)) as server:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": STAINLESS}
        answer = get(server, PATH, "OPTIONS", Origin="https://page.example", **asked)
        allowed = {name.strip().lower() for name in answer.headers["Access-Control-Allow-Headers"].split(",")}
        assert answer.status == 200 and allowed >= set(STAINLESS.split(","))
        assert get(server, PATH, "OPTIONS", Origin="https://other.example", **asked).status == 400
        refused = get(server, "/v1/models", Origin="https://page.example")
        assert refused.status == 401 and refused.headers["Access-Control-Allow-Origin"] == "https://page.example"
        for key in ("schlüssel".encode(), "schlüssel".encode("latin-1")):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            with contextlib.closing(connection):
                connection.putrequest("GET", "/v1/models")
                connection.putheader("Authorization", b"Bearer " + key)
                connection.endheaders()
                assert connection.getresponse().status == 200


def test_keys_as_files_and_secrets_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(command.KEY_VARIABLE, "from a file\n")
    assert command.api_keys([" one\r\n", "schlüssel"]) == ("one", "schlüssel", "from a file")
    with pytest.raises(ValueError, match="no header can bear"):
        command.api_keys(["two\nlines"])
    with pytest.raises(ValueError, match="is empty"):
        command.api_keys(["\n"])
