"""Ray Serve with two replicas of nano behind one address: answers as ours, conversations that stay, one that dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from ray_support import actors_of, loopback_cluster
from server_support import data_url, image_part, wait_until

from deepseek_vl2.utils.io import load_pretrained_model, nano_is_installed

pytest.importorskip("ray.serve")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not nano_is_installed(), reason="nano is not installed"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc"),
]

KEY = "of-the-test"
SERVER = ["--device", "cpu", "--dtype", "float32", "--slots", "4", "--max-length", "1100", "--max-images", "2"]
COLORS = ("red", "blue", "green", "white", "black", "yellow", "orange", "purple", "brown", "pink", "gray", "cyan")


class Application:
    """The application that runs, as its clients see it."""

    def __init__(self, cluster: Any, port: int) -> None:
        self.cluster = cluster
        self.url = f"http://127.0.0.1:{port}"

    def ask(
        self, path: str, body: Any = None, method: str | None = None, key: str = KEY
    ) -> tuple[int, dict[str, str], Any]:
        """Send a request; returns status, headers and answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                status, found, text = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            status, found, text = error.code, error.headers, error.read()
        is_json = found.get("content-type", "").startswith("application/json")
        return status, {name.lower(): value for name, value in found.items()}, json.loads(text) if is_json else text

    def replicas(self) -> list[int]:
        """Return the replicas' processes."""
        nodes = [self.cluster.head_node, *self.cluster.worker_nodes]
        return [process for node in nodes for process in actors_of(node, "ServeReplica:default:model")]


def picture(color: str) -> str:
    """Return a plain picture as a data URL."""
    return data_url(Image.new("RGB", (40, 30), color))


def chat(*content: Any, **fields: Any) -> dict[str, Any]:
    """Return a request for a few tokens."""
    messages = [{"role": "user", "content": list(content)}]
    return {"model": "nano", "messages": messages, "max_tokens": 6, "temperature": 0, **fields}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    """Run two replicas, one on each node."""
    import ray
    from ray import serve

    from deepseek_vl2.integrations.ray.app import build

    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        patch.setenv("DEEPSEEK_VL2_API_KEY", KEY)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        with loopback_cluster(num_cpus=2) as cluster:
            ray.init(address=cluster.address, log_to_driver=False)
            try:
                serve.start(http_options={"host": "127.0.0.1", "port": port})
                options = {"min_replicas": 2, "max_replicas": 2, "gpus": 0, "cpus": 0.8, "max_body_mib": 1}
                serve.run(build({"model": "nano", "options": SERVER, **options}), name="default")
                yield Application(cluster, port)
            finally:
                serve.shutdown()
                ray.shutdown()


def test_it_answers_as_one_server_does(application: Application) -> None:
    tokenizer, processor, model = load_pretrained_model("nano", device="cpu", dtype=torch.float32)
    asked = chat(image_part(picture("red")), text("Which colour?"))
    status, headers, answer = application.ask("/v1/chat/completions", asked)
    assert status == 200 and headers["x-replica"]
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}, text("Which colour?")],
        }
    ]
    inputs = processor(conversations=conversation)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    expected = processor.decode([id_ for id_ in ids if id_ != tokenizer.eos_token_id])
    assert answer["choices"][0]["message"]["content"] == expected


def test_a_picture_stays_on_one_replica(application: Application) -> None:
    found: dict[str, set[str]] = {}
    for words in ("Which colour?", "Is it round?", "What else?"):
        for color in COLORS:
            _, headers, _ = application.ask("/v1/chat/completions", chat(image_part(picture(color)), text(words)))
            found.setdefault(color, set()).add(headers["x-replica"])
    assert all(len(replicas) == 1 for replicas in found.values())
    assert len(set.union(*found.values())) == 2, "both are used"


def test_a_stream_comes_as_it_is_written(application: Application) -> None:
    asked = chat(text("Hello"), stream=True, max_tokens=12)
    status, headers, events = application.ask("/v1/chat/completions", asked)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = [line for line in events.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]" and len(lines) > 4


def test_a_response_is_found_where_it_is_kept(application: Application) -> None:
    for words in ("one", "two", "three"):
        status, _, first = application.ask("/v1/responses", {"model": "nano", "input": words, "max_output_tokens": 4})
        assert status == 200
        later = {"model": "nano", "input": "more", "previous_response_id": first["id"], "max_output_tokens": 4}
        status, headers, second = application.ask("/v1/responses", later)
        assert status == 200 and headers["x-replica"] == first["id"].split("_")[1] == second["id"].split("_")[1]
        assert application.ask(f"/v1/responses/{first['id']}")[2]["id"] == first["id"]
        assert application.ask(f"/v1/responses/{first['id']}", method="DELETE")[2]["deleted"] is True
        assert application.ask(f"/v1/responses/{first['id']}")[0] == 404


def test_errors_have_the_form_that_clients_know(application: Application) -> None:
    assert application.ask("/v1/models")[2]["data"][0]["id"] == "nano"
    assert application.ask("/health")[2] == {"status": "ok"}
    for path, body, key, expected in (
        ("/v1/chat/completions", chat(text("Hi")), "another", 401),
        ("/v1/models", None, "another", 401),
        ("/v1/chat/completions", chat(text("x" * (2 << 20))), KEY, 413),
        ("/v1/chat/completions", {"model": "nano"}, KEY, 400),
        ("/v1/nothing", None, KEY, 404),
        ("/metrics", None, KEY, 404),
    ):
        status, _, answer = application.ask(path, body, key=key)
        assert status == expected and answer["error"]["message"], (path, status, answer)


def test_a_replica_that_dies_is_replaced_and_nobody_waits_for_it(application: Application) -> None:
    first, *others = application.replicas()
    assert len(others) == 1
    os.kill(first, signal.SIGKILL)
    for color in COLORS:
        status, _, answer = application.ask("/v1/chat/completions", chat(image_part(picture(color)), text("What?")))
        assert status == 200, answer
    wait_until(lambda: len(set(application.replicas()) - {first}) == 2, seconds=120)
