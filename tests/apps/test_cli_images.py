"""Images that the command line is given: within a message, as paths, by their address."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deepseek_vl2.cli import images as cli_images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for name in ("a cat.png", "dog's.jpg", "plain.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def test_images_in_a_message(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures)
    cat, dog, plain = (str(pictures / name) for name in ("a cat.png", "dog's.jpg", "plain.png"))
    escaped = cat.replace(" ", r"\ ")
    split = cli_images.split_images
    assert split(cat) == ([cat], "")  # pasted bare
    assert split(f"'{cat}' ") == ([cat], "")
    assert split(f"What is {escaped} about?") == ([cat], "What is about?")
    assert split(f'Compare "{dog}" with plain.png.') == ([dog], "Compare with plain.png.")
    assert split("plain.png what is it?") == (["plain.png"], "what is it?")
    assert split(f"{(pictures / 'a cat.png').as_uri()} and '{plain}'") == ([cat, plain], "and")
    assert split("see https://example.com/x.png?y=1 now") == (["https://example.com/x.png?y=1"], "see now")
    assert split("no.png is not there, don't stop") == ([], "no.png is not there, don't stop")
    assert split("see https://example.com/page") == ([], "see https://example.com/page")


@pytest.fixture
def server(pictures: Path) -> Iterator[str]:
    """Serve a picture, an endless body, a page and an error on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/missing.png" else 200)
            self.end_headers()
            if self.path == "/plain.png":
                self.wfile.write((pictures / "plain.png").read_bytes())
            elif self.path == "/page.png":
                self.wfile.write(b"<html>")
            elif self.path == "/endless.png":
                try:
                    while True:
                        self.wfile.write(b"x" * 65536)
                except OSError:
                    return

        def log_message(self, *arguments: Any) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_port}"
    listener.shutdown()
    listener.server_close()


def test_images_by_address(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for proxy in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    assert cli_images.open_image(f"{server}/plain.png").size == (8, 8)
    with pytest.raises(ValueError, match=r"missing\.png cannot be downloaded: 404 Not Found"):
        cli_images.open_image(f"{server}/missing.png")
    with pytest.raises(ValueError, match=r"page\.png.*not an image"):
        cli_images.open_image(f"{server}/page.png")
    with pytest.raises(ValueError, match="larger than 1 MB"):
        cli_images.download(f"{server}/endless.png", most_bytes=1_000_000)
    with pytest.raises(ValueError, match="longer than 0 s"):
        cli_images.download(f"{server}/endless.png", most_seconds=0)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        cli_images.download("http://127.0.0.1:9/x.png")


@pytest.mark.parametrize(
    "line",
    ["word " * 100, "x" * 5000, "~5 apples", "it costs ~5 dollars", "~no_such_user/a", "a\0b", "~", "~/" + "a" * 300],
)
def test_a_line_that_is_no_path_is_a_line(line: str) -> None:
    assert cli_images.split_images(line) == ([], line.strip())


@pytest.mark.skipif(os.name == "nt", reason="the shell's escapes differ")
def test_home_is_expanded(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pictures))
    assert cli_images.open_image("~/plain.png").size == (8, 8)
