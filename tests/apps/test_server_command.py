"""The server's command line, and the bound of a stream that nobody reads."""

from __future__ import annotations

import argparse
import asyncio
import socket
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from deepseek_vl2.cli import addresses
from deepseek_vl2.cli.addresses import check_address
from deepseek_vl2.cli.options import whole_number
from deepseek_vl2.serve.api import command
from deepseek_vl2.serve.api.chat import EventStream
from deepseek_vl2.serve.api.decode_process import Decoders
from deepseek_vl2.serve.api.images import decode_images, image_error
from deepseek_vl2.serve.api.serving import http_server
from deepseek_vl2.serve.api.settings import ConnectionLimits, ImageLimits


def parsed(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_model_is_named_either_way_or_not_at_all() -> None:
    assert command.chosen_model(parsed()) == "nano"
    assert command.chosen_model(parsed("demo")) == "demo"
    assert command.chosen_model(parsed("--model", "demo")) == "demo"
    with pytest.raises(ValueError, match="Two models"):
        command.chosen_model(parsed("demo", "--model", "nano"))


def test_by_default_a_short_model_gets_the_room_it_has() -> None:
    assert command.room(None, 2048) == 2048
    assert command.room(None, 163_840) == command.MAX_LENGTH
    assert command.room(2048, 2048) == 2048
    with pytest.raises(ValueError, match="2049 exceeds the 2048"):
        command.room(2049, 2048)


def test_nano_is_served_with_nothing_but_the_command() -> None:
    server = command.build_server(parsed("--device", "cpu", "--slots", "1"))
    assert server.settings.model_name == "nano"
    assert server.engine.options.max_length == 2048


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--api_key", ""), "API key is empty"),
        (("--api_key", "good", "--api_key", " "), "API key is empty"),
        (("--device", "cuda:99"), "no device cuda:99"),
        (("--device", "teapot"), "no kind of device"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(parsed(*arguments)) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_times_are_finite(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("inf", "nan", "0"):
        with pytest.raises(SystemExit):
            parsed("--shutdown_seconds", text)


def test_what_is_no_image_is_told_as_such() -> None:
    with pytest.raises(type(image_error("", "")), match="not an image of a known format"):
        decode_images([("messages.0", b"<svg/>")], ImageLimits(), Decoders())


def test_a_client_that_stays_and_reads_nothing_holds_a_stream_only_so_long() -> None:
    closed = []

    async def events() -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()  # the client's window is full

    stream = EventStream(events(), lambda: closed.append(True), seconds=0.05)
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 10))
    assert closed == [True]


def test_no_ping_follows_the_end_of_a_stream() -> None:
    """A ping that came due while the end waited for the client's window."""
    sent: list[bytes] = []

    async def events() -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            if not message["more_body"]:
                await anyio.sleep(0.05)
            sent.append(message["body"])

    stream = EventStream(events(), lambda: None, ping_seconds=0.01)
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 10))
    assert sent == [b"data: {}\n\n", b""]


def test_ports_have_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    for text, says in (("65536", "they end at 65535"), ("-1", "negative"), ("x", "invalid")):
        with pytest.raises(SystemExit):
            parsed("--port", text)
        assert says in capsys.readouterr().err
    assert parsed("--port", "65535").port == 65_535
    with pytest.raises(argparse.ArgumentTypeError, match="at most 65535, not 65536"):
        whole_number(1, 65_535)("65536")


# ---------------------------------------------------------------- the address


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_an_address_is_looked_at_before_the_model_is_loaded(
    taken: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "build_server", lambda args: pytest.fail("loaded"))
    for arguments, words in (
        (("--host", "192.0.2.1"), "This machine has no address 192.0.2.1"),
        (("--host", "2001:db8::1"), "This machine has no address 2001:db8::1"),
        (("--host", "no such name"), "There is no address for the host 'no such name'"),
        (("--host", "x" * 70), "There is no address for the host"),
        (("--port", str(taken)), f"Port {taken} on 127.0.0.1 is in use"),
    ):
        assert command.main(parsed(*arguments)) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"deepseek-vl2 serve: error: {words}") and error.count("\n") == 1


def test_a_port_that_was_taken_while_the_model_was_loaded(taken: int, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("no request comes")

    async def abort() -> None:
        pass

    served: Any = SimpleNamespace(app=app, abort=abort, settings=SimpleNamespace(connections=ConnectionLimits()))
    with pytest.raises(OSError, match=f"Port {taken} on 127.0.0.1 is in use"):
        http_server(served, host="127.0.0.1", port=taken, lifespan="off").run()


def test_addresses_that_are_there() -> None:
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        check_address(host, 0)


def test_a_port_of_the_administrator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Guarded(socket.socket):
        def bind(self, address: Any) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(addresses.socket, "socket", Guarded)
    with pytest.raises(OSError, match=r"Port 80 on 127\.0\.0\.1 is not allowed to this user"):
        check_address("127.0.0.1", 80)
