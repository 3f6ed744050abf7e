"""Fetching images for strangers: the right file, and nothing from where it should not come."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import server_support  # noqa: F401  (skips where the extra is missing)

from deepseek_vl2.serve.api import download as module
from deepseek_vl2.serve.api.download import DownloadError, download, is_public, split_url
from deepseek_vl2.serve.api.settings import ImageLimits

OPEN = ImageLimits(allow_urls=True, allow_private=True, max_bytes=10_000, seconds=1.5)
STRICT = ImageLimits(allow_urls=True, max_bytes=10_000, seconds=1.5)


class Handler(BaseHTTPRequestHandler):
    """Serves what the tests need."""

    hosts: list[str] = []

    def log_message(self, *args: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        """Answer by path."""
        self.hosts.append(self.headers["Host"])
        path, _, rest = self.path[1:].partition("/")
        getattr(self, f"send_{path}")(rest)

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, rest: str) -> None:
        self._send(b"image", Content_Length="5")

    def send_closed(self, rest: str) -> None:
        self._send(b"image until the end")

    def send_cut(self, rest: str) -> None:
        self._send(b"image", Content_Length="500")

    def send_missing(self, rest: str) -> None:
        self._send(b"", 404)

    def send_large(self, rest: str) -> None:
        self._send(b"x" * 10_001, Content_Length="10001")

    def send_to(self, rest: str) -> None:
        self._send(b"", 302, Location=rest)

    def send_round(self, rest: str) -> None:
        self._send(b"", 301, Location="/round/")

    def send_nowhere(self, rest: str) -> None:
        self._send(b"", 302)

    def send_endless(self, rest: str) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b"x" * 4096)

    def send_slow(self, rest: str) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(40):
            self.wfile.write(b"x")
            time.sleep(0.1)


class QuietServer(ThreadingHTTPServer):
    """Does not tell of clients that leave."""

    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Run a web server and return its port."""
    with QuietServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def fetch(url: str, limits: ImageLimits = OPEN) -> bytes:
    return asyncio.run(download(url, limits))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((a, True) for a in ("8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808")),
        *((a, False) for a in ("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254")),
        *((a, False) for a in ("100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1")),
        *((a, False) for a in ("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1")),
        *((a, False) for a in ("64:ff9b::a00:1", "2002:a00:1::", "2001:db8::1", "::ffff:169.254.169.254")),
        # Site-local, unassigned, and IPv4 behind gateways, tunnels and translators.
        *((a, False) for a in ("fec0::1", "feff::1", "::127.0.0.1", "64:ff9b:1::7f00:1", "::ffff:0:10.0.0.1")),
        *((a, False) for a in ("2606:2800:220:1:0:5efe:10.0.0.1", "2606:2800:220:1:200:5efe:192.168.0.1")),
        *((a, False) for a in ("2001:0:4136:e378:8000:63bf:f5ff:fffe", "2002:7f00:1::1", "2002:808:808::1")),
        *((a, False) for a in ("3fff::1", "5f00::1", "4000::1", "100::1", "192.88.99.1", "192.0.0.8", "198.51.100.1")),
        *((a, True) for a in ("2606:2800:220:1:0:5efe:8.8.8.8", "::ffff:0:8.8.8.8", "2a00:1450:4001::1")),
    ],
)
def test_what_is_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "http://",
        "ftp://a/b",
        "file:///etc/passwd",
        "http://u@h/",
        "http://u:p@h/",
        "http://h:x/",
        "http://[::1",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(DownloadError):
        split_url(url)
    with pytest.raises(DownloadError):
        split_url("http://example.com/" + "a" * 5000)


def test_files_come(port: int) -> None:
    assert fetch(f"http://127.0.0.1:{port}/file/a b?c=d#e") == b"image"
    assert fetch(f"http://localhost:{port}/closed/") == b"image until the end"
    assert fetch(f"http://127.0.0.1:{port}/to//file/") == b"image"
    assert Handler.hosts[-1] == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing/", "status 404"),
        ("large/", "10,000 bytes"),
        ("endless/", "10,000 bytes"),
        ("slow/", "within 1.5 seconds"),
        ("cut/", "could not be fetched from its host"),
        ("round/", "redirects more than 3 times"),
        ("nowhere/", "status 302"),
        ("to/file:///etc/passwd", "not an http or https address"),
        ("to/gopher://127.0.0.1/", "not an http or https address"),
    ],
)
def test_what_does_not_come(port: int, path: str, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(DownloadError, match=said):
        fetch(f"http://127.0.0.1:{port}/{path}")
    assert time.monotonic() - start < 5


def test_private_addresses_are_refused_by_any_name(port: int) -> None:
    before = len(Handler.hosts)
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"):
        with pytest.raises(DownloadError):
            fetch(f"http://{host}:{port}/file/", STRICT)
    assert len(Handler.hosts) == before, "nobody was asked"


def test_errors_tell_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(module, "is_public", lambda address: True)
    said = set()
    for limits, url in ((OPEN, f"http://localhost:{port}/"), (STRICT, f"https://localhost:{port}/")):
        with pytest.raises(DownloadError) as failure:
            fetch(url, limits)
        said.add(str(failure.value))
        assert "127.0.0.1" not in str(failure.value) and str(port) not in str(failure.value)
    assert said == {"The image could not be fetched from its host."}


def test_a_redirect_is_checked_like_an_address(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    assert fetch(f"http://127.0.0.1:{port}/file/", STRICT) == b"image"
    with pytest.raises(DownloadError, match="not on the public internet"):
        fetch(f"http://127.0.0.1:{port}/to/http://127.0.0.2:{port}/file/", STRICT)


def test_a_name_is_resolved_once(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked and private when it is connected to gains nothing."""
    answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])
    asked = []

    def resolve(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        asked.append(host)
        address = next(answers) if host == "rebinding.example" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    assert fetch(f"http://rebinding.example:{port}/file/", STRICT) == b"image"
    assert asked.count("rebinding.example") == 1
    assert Handler.hosts[-1] == f"rebinding.example:{port}"
    with pytest.raises(DownloadError, match="not on the public internet"):
        fetch(f"http://rebinding.example:{port}/file/", STRICT)
