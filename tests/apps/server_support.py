"""What the server's tests share: a server in a thread, jobs that note what they are told, pictures as data URLs."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

for _name in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(_name)

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from deepseek_vl2.engine.scheduler import EngineOptions  # noqa: E402
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor  # noqa: E402
from deepseek_vl2.serve.api.app import Server  # noqa: E402
from deepseek_vl2.serve.api.connections import ConnectionCounter  # noqa: E402
from deepseek_vl2.serve.api.serving import http_server  # noqa: E402
from deepseek_vl2.serve.api.settings import Settings  # noqa: E402

MODEL = "golden"


def picture(width: int = 100, height: int = 50, color: str = "red") -> Image.Image:
    """Return a plain picture with a dark corner."""
    image = Image.new("RGB", (width, height), color)
    image.paste("black", (0, 0, width // 3, height // 3))
    return image


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    """Return a picture as a data URL."""
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(url: str) -> dict[str, Any]:
    """Return a content part that shows an image."""
    return {"type": "image_url", "image_url": {"url": url}}


def wait_until(condition: Any, seconds: float = 60) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class RunningServer:
    """A server in a thread of this process."""

    def __init__(self, server: Server, shutdown_seconds: float = 120.0) -> None:
        self.server = server
        self.engine = server.engine
        self.uvicorn = http_server(server, shutdown_seconds, host="127.0.0.1", port=0, log_level="warning")
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        torch.set_num_threads(1)
        self.uvicorn.run()

    @property
    def connections(self) -> ConnectionCounter:
        """Return who counts its connections."""
        return self.uvicorn.config.http.keywords["counter"]  # type: ignore[union-attr]

    @property
    def port(self) -> int:
        """Return the port it listens on."""
        return self.uvicorn.servers[0].sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RunningServer:
        self.thread.start()
        wait_until(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *exception: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(60)


def make_server(
    model: DeepseekVLV2ForCausalLM,
    processor: DeepseekVLV2Processor,
    *,
    engine: Any = None,
    shutdown_seconds: float = 120.0,
    **settings: Any,
) -> RunningServer:
    """Return a server to be entered."""
    bounds = {"max_batch": 4, "max_length": 1100, "queue_size": 64, "prefill_chunk": 512, **(engine or {})}
    cached = {"kv_cache_tokens": 4 * bounds["max_length"], "image_cache_bytes": 16 << 20, "share_prefixes": True}
    options = EngineOptions(**{**cached, **bounds})
    server = Server(model, processor, Settings(**{"model_name": MODEL, **settings}), options)
    return RunningServer(server, shutdown_seconds)


PATH = "/v1/chat/completions"


def post(server: RunningServer, body: Any, timeout: float = 120, **headers: str) -> tuple[int, Any]:
    """Post a request; returns status and answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("POST", PATH, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def get(server: RunningServer, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    """Ask for a path; the body is read into ``response.text``."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        response.text = response.read().decode()  # type: ignore[attr-defined]
        return response


def health_times(server: RunningServer, done: Callable[[], bool], seconds: float = 120) -> list[float]:
    """Ask for the server's health again and again until something is done; returns how long each answer took."""
    times, end = [], time.monotonic() + seconds
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=seconds)
    with contextlib.closing(connection):
        while not done() or len(times) < 20:
            assert time.monotonic() < end, "it did not end in time"
            begin = time.monotonic()
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            times.append(time.monotonic() - begin)
            time.sleep(0.02)
    return times


def assert_prompt(times: Sequence[float]) -> None:
    """Check that health was told within 100 ms.

    Client and server share a process here, and the machine others' work, which may keep a thread waiting for longer
    than that now and then. What this is about, an event loop that is held up, delays every answer, and by seconds: so
    nine of ten must be in time, and none may take long.
    """
    ordered = sorted(times)
    assert ordered[len(ordered) * 9 // 10] < 0.1, ordered[-10:]
    assert ordered[-1] < 1.5, ordered[-10:]


def chat_body(content: Any = "Hello", **fields: Any) -> dict[str, Any]:
    """Return the body of a request of one turn."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}
