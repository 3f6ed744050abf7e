"""Wrong requests to every endpoint: each gets a clear 4xx for little work, and others the server's health meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from server_support import MODEL, RunningServer, assert_prompt, data_url, health_times, make_server, picture

from deepseek_vl2 import nano_path
from deepseek_vl2.serve.api.settings import GrammarLimits
from deepseek_vl2.utils.io import load_pretrained_model

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
PATHS = (CHAT, COMPLETIONS, RESPONSES, TOKENIZE, DETOKENIZE)
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 2},
    RESPONSES: {"input": "Hello", "max_output_tokens": 2},
    TOKENIZE: {"prompt": "Hello"},
    DETOKENIZE: {"tokens": [1, 2]},
}
GENERATED: dict[str, tuple[Any, ...]] = {
    "temperature": (-1e-9, 2.0001, 10**400, "1", [], {}),
    "top_p": (-1, 2, 1e308, "x"),
    "top_k": (-2, 2**31, 1.5, 10**30),
    "min_p": (-1e-9, 1.1, []),
    "min_tokens": (-1, 10**6, 10**400),
    "seed": (2**63, 10**400, 1.5, "1"),
    "stop": ("", [""], [[]], {"a": 1}, ["x"] * 17, "x" * 257),
    "stop_token_ids": ([-1], [400], [2**31], [10**400], ["1"], [None], [[1]], 1, {"1": 1}, [1] * 65, [True]),
    "logit_bias": ({"400": 1}, {"-1": 1}, {"01": 1}, {"1.0": 1}, {"": 1}, {"1": 101}, {"1": "1"}, {"1": None},
                   {str(i): 1 for i in range(1025)}, {"9" * 400: 1}, {"١": 1}, [[1, 1]], [{}]),
    "presence_penalty": (2.1, -10**400, "x"),
    "frequency_penalty": (-2.1, [1]),
    "repetition_penalty": (0, -1, 2.1, 10**400),
    "ignore_eos": ("x", 1),
    "structured_outputs": ({}, [], "x", {"regex": "(", "x": 1}, {"choice": []}, {"json": "{"}, {"grammar": "x"},
                           {"regex": "a", "choice": ["a"]}, {"json": {"type": []}}, {"json": {"$ref": "#/$defs/x"}}),
    "guided_json": ("[", "null", [], 5, {"type": "integer", "minimum": "x"}, {"properties": {"a": 5}},
                    {"allOf": [{"type": "string"}, {"type": "integer"}]}),
    "guided_regex": ("", "(", "a{1000000}", "(?<=a)b", "\\p{Nowhere}", 5),
    "guided_choice": ([], [""], "a", [1], {"a": 1}),
    "guided_grammar": ("", "start: start", "x: y", 'start: "a" %import common.NUMBER2', "%%%", "\x00"),
    "regex": ("", "[", "(?P<a>x)(?P=a)"),
    "metadata": ({"a": 1}, [], {str(i): "x" for i in range(65)}),
    "stream": ("true", 1),
    "stream_options": ({"include_usage": True}, []),
    "model": (None, 5, "", "other", ["nano"]),
    "unheard_of": (1, None),
}  # fmt: skip
OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    COMPLETIONS: {
        "prompt": (None, 5, [], [[]], {}, [None], [[1], "x"], [1, "x"], [1.5], [-1], [400], [2**31], [10**400],
                   [[400]], [[1], [-1]], [True], [259], ["<image>"], "<image>", [1] * 5000, ["x"] * 65, "x" * 100_000),
        "n": (0, 9, 10**400, 1.5), "best_of": (0, 2, "2"), "max_tokens": (0, -1, 1.5, "2", True),
        "logprobs": (-1, 21, 1.5, True), "echo": (1, "x"), "suffix": ("x", 5), "prompt_logprobs": (1,),
        "response_format": ("json", {"type": "x"}, {"type": "json_schema"}), "add_special_tokens": (1,),
    },
    RESPONSES: {
        "input": (None, 5, [], {}, [None], ["x"], [5], [[]], [{"role": "x", "content": "y"}], [{"role": "user"}],
                  [{"role": "user", "content": 5}], [{"role": "user", "content": []}],
                  [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
                  [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}],
                  [{"role": "assistant", "content": [{"type": "input_image", "image_url": data_url(picture())}]}],
                  [{"type": "function_call_output", "call_id": "x", "output": "y"}], [{"type": "reasoning"}],
                  [{"type": "function_call", "call_id": "", "name": "a b", "arguments": "{"}],
                  [{"role": "system", "content": "x"}], [{"type": "item_reference", "id": "x"}]),
        "max_output_tokens": (0, "2", 1.5), "previous_response_id": (5, "nowhere", "x" * 300),
        "include": ("x", [5], ["x"] * 17), "truncation": ("auto",), "top_logprobs": (21, -1),
        "text": ("x", {"format": {"type": "x"}}, {"verbosity": "high"}), "tools": ([{"type": "web_search"}], [{}]),
        "tool_choice": ("required", {"type": "function", "name": "x"}), "instructions": (5,),
        "conversation": ("x",), "background": (True,),
    },
    TOKENIZE: {
        "prompt": (None, 5, [], ["x"], "x" * 1_000_000, "<image>"), "messages": ([], [{}], 5, [{"role": "user"}]),
        "tools": ([{}], [], 5), "chat_template_kwargs": ([], {"tokenize": False}, {"continue_final_message": 5}),
        "add_generation_prompt": (0, "x"), "return_token_strs": (1,), "model": ("other", 5), "unheard_of": (1,),
    },
    DETOKENIZE: {
        "tokens": (None, 5, "x", {}, [-1], [400], [2**31], [2**63], [10**400], [1.5], ["1"], [None], [[1]], [True],
                   [1] * 5000),
        "model": ("other", 5), "unheard_of": (1,),
    },
    CHAT: {
        "n": (0, 9, 10**400), "max_tokens": (0, -(10**400)),
        "top_logprobs": (400, 1), "prompt_logprobs": (0, 1, True), "logprobs": (1,),
        "messages": ([{"role": "user", "content": "x", "name": []}], [{"role": "user", "content": [{"type": "text"}]}],
                     [{"role": "tool", "content": "x", "tool_call_id": "x"}], [{"content": "x"}],
                     [{"role": "user", "content": "x"}] * 1025, [{"role": "user", "content": [
                         {"type": "image_url", "image_url": {"url": "x", "detail": []}}]}]),
        "add_generation_prompt": (0,), "continue_final_message": (0,),
    },
}  # fmt: skip
BODIES = (
    b"", b"\xef\xbb\xbf{}", b"[]", b"0", b'"x"', b"nul", b"{", b"}", b'{"model"', b'{"model":}', b"{'a':1}", b"{,}",
    b'{"a":1,}', b"\x00", b"\xff", b'{"a":"\xff"}', b'{"a":"\\ud800"}', b'{"a":"\\u12"}', b"[" * 50_000,
    b'{"a":' * 20_000, b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e99999}', b"1" * 100_000, b'{"":""}',
)  # fmt: skip


def cases() -> list[tuple[str, str, bytes]]:
    """Return what to send: a name, the path, the body."""
    found = []
    for path in PATHS:
        found += [(f"{path} body {index}", path, body) for index, body in enumerate(BODIES)]
        fields = {**(GENERATED if path.startswith("/v1") else {}), **OWN[path]}
        for name, values in fields.items():
            for index, value in enumerate(values):
                body = {"model": MODEL, **GOOD[path], name: value}
                if path == TOKENIZE and name in ("messages",):
                    del body["prompt"]
                found.append((f"{path} {name} {index}", path, json.dumps(body).encode()))
        for name in GOOD[path].keys() - {"max_tokens", "max_output_tokens"}:
            body = {key: value for key, value in {"model": MODEL, **GOOD[path]}.items() if key != name}
            found.append((f"{path} without {name}", path, json.dumps(body).encode()))
    return found


CASES = cases()
# What means nothing, and so is no mistake.
TAKEN = {f"{TOKENIZE} tools 1"}
# Of a processor, for one request and what runs beside it: another request, and the questions for health. Each grammar
# may take one.
MOST_SECONDS = 5


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Run a server of nano's."""
    _, processor, model = load_pretrained_model(nano_path(), device="cpu")
    limits: dict[str, Any] = {"grammars": GrammarLimits(seconds=1), "request_seconds": 60.0, "body_seconds": 3.0}
    with make_server(model, processor, engine={"max_length": 2000}, **limits) as running:
        yield running


def processor_seconds(server: RunningServer) -> float:
    """Return what this process, its ended children and the processes that try grammars out took of a processor."""
    seconds = sum(os.times()[:4])
    for tried in server.server.grammars._processes:
        with contextlib.suppress(AttributeError, psutil.NoSuchProcess):  # not started yet; or ended, and counted above
            seconds += sum(psutil.Process(tried.process.pid).cpu_times()[:4])  # type: ignore[union-attr]
    return seconds


def send(port: int, path: str, body: bytes, method: str = "POST") -> tuple[int, Any]:
    """Send a request; returns status and answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    return response.status, json.loads(text) if text else None


def test_every_endpoint_refuses_what_is_wrong(server: RunningServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(CASES) > 400
    wrong = []

    def check(case: tuple[str, str, bytes]) -> None:
        name, path, body = case
        before = processor_seconds(server)
        status, answer = send(server.port, path, body)
        seconds = processor_seconds(server) - before
        if name in TAKEN:
            assert status == 200, (name, answer)
            return
        said = (answer.get("error") if isinstance(answer, dict) else None) or {}
        clear = set(said) == {"message", "type", "param", "code"} and 10 < len(said["message"]) < 1000
        if status not in (400, 404) or not clear or "Traceback" in str(said) or seconds > MOST_SECONDS:
            wrong.append((name, body[:200], status, str(answer)[:300], seconds))

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(check, case) for case in CASES]
        times = health_times(server, lambda: all(future.done() for future in futures))
        for future in futures:
            future.result()
    assert not wrong, wrong
    assert_prompt(times)
    for path in PATHS:
        assert send(server.port, path, json.dumps({"model": MODEL, **GOOD[path]}).encode())[0] == 200
    assert server.engine.healthy and server.engine.stats.failed == 0
    assert "Traceback" not in capfd.readouterr().err
