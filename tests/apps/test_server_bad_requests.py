"""Two hundred requests that are wrong in some way: each gets a clear 4xx, and the server goes on."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from server_support import MODEL, RunningServer, chat_body, data_url, image_part, make_server, picture, wait_until

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.serve.api.settings import ImageLimits

PATH = "/v1/chat/completions"
LIMITS = ImageLimits(max_images=3, max_bytes=200_000, max_pixels=1_000_000, allow_urls=True, seconds=2)
DATA = "data:image/png;base64,"


@pytest.fixture(scope="module")
def server(
    golden_model: Callable[..., DeepseekVLV2ForCausalLM], processor: DeepseekVLV2Processor
) -> Iterator[RunningServer]:
    """Run a server with tight limits."""
    limits: Any = {"images": LIMITS, "max_body_bytes": 1_000_000, "body_seconds": 1.5, "max_choices": 4}
    with make_server(golden_model("small"), processor, **limits) as running:
        yield running


def post(server: RunningServer, body: bytes, content_type: str | None = "application/json") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        headers = {} if content_type is None else {"Content-Type": content_type}
        connection.request("POST", PATH, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def check(status: int, answer: Any, expected: tuple[int, ...] = (400,)) -> None:
    assert status in expected and "error" in answer, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10 and "Traceback" not in error["message"]


def encoded(data: bytes) -> str:
    return DATA + base64.b64encode(data).decode()


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    """Return a PNG file that says it has that size, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def good_file(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(64, 64).save(file, kind)
    return file.getvalue()


def bad_files() -> dict[str, bytes]:
    whole = good_file()
    jpeg = good_file("JPEG")
    files = {
        "text": b"this is no image",
        "html": b"<html><body>404</body></html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "pdf": b"%PDF-1.4 1 0 obj",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "zero": b"\0" * 100,
        "bomb": png(60_000, 60_000, zlib.compress(b"\0" * 1000)),
        "large bomb": png(200_000, 200_000, zlib.compress(b"\0" * 1000)),
        "just too many pixels": png(1001, 1000, zlib.compress(b"\0" * (3003 * 1000 + 1000), 9)),
        "no width": png(0, 10),
        "no data": png(10, 10),
        "data of another size": png(100, 100, zlib.compress(b"\0" * 50)),
        "text bomb": png(4, 4, b"", b"\0\x0f\xff\xffzTXt"),
        "gif": b"GIF89a" + b"\xff" * 30,
        "tiff": b"II*\0\xff\xff\xff\xff",
        "webp": b"RIFF\x10\0\0\0WEBPVP8 " + b"\xff" * 8,
        "bmp": b"BM" + b"\xff" * 60,
        "jpeg header": b"\xff\xd8\xff\xe0",
    }
    files.update({f"png cut at {n}": whole[:n] for n in (8, 20, 33, 40, len(whole) // 2)})
    files.update({f"jpeg cut at {n}": jpeg[:n] for n in (2, 10, 100, 300, len(jpeg) // 2)})
    return files


def bad_urls() -> list[str]:
    payload = base64.b64encode(good_file()).decode()
    urls = ["", " ", "x", "file:///etc/passwd", "/etc/passwd", "ftp://example.com/a.png", "javascript:alert(1)"]
    urls += [DATA, "data:", "data:image/png", "data:image/png,rawbytes", "data:image/png;base64", DATA + "%%%"]
    urls += [DATA + payload[:40], DATA + payload[:-2] + "\n!!", DATA + "===", DATA + "a", DATA + "é" * 8]
    urls += [DATA + payload.replace("A", "*"), DATA + "A" * 300_000, "DATA:image/png;base64," + "?" * 40]
    urls += ["http://", "http:///x.png", "https://user:pass@example.com/a.png", "http://[::1", "http://exa mple/a"]
    private = ["127.0.0.1", "localhost", "0.0.0.0", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254"]
    private += ["[::1]", "[::]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fc00::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"]
    private += ["2130706433", "0x7f.1", "224.0.0.1", "255.255.255.255", "100.64.0.1"]
    return urls + [f"http://{host}/a.png" for host in private] + ["http://no-such-host.invalid/a.png"]


def messages(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bad_messages() -> list[dict[str, Any]]:
    text, image = {"type": "text", "text": "x"}, image_part(data_url(picture()))
    found = [{"messages": value} for value in (None, [], {}, "hi", 5, [None], ["hi"], [[]], [{}])]
    found += [
        messages({"role": role, "content": "x"}) for role in ("tool", "function", "", None, 5, "User", "<|User|>")
    ]
    found += [messages(user(value)) for value in (None, 5, [], {}, [None], ["x"], [5], True, [[text]])]
    found += [messages(user([part])) for part in ({}, {"type": "text"}, {"type": "text", "text": 5}, {"type": None})]
    found += [
        messages(user([{"type": kind, kind: {}}])) for kind in ("input_audio", "file", "video_url", "refusal", "image")
    ]
    found += [
        messages(user([{"type": "image_url", "image_url": value}])) for value in (None, "x", 5, {}, {"url": None})
    ]
    found += [messages(user([{"type": "image_url", "image_url": {"url": data_url(picture()), "detail": "huge"}}]))]
    found += [messages(user([image] * 4)), messages({"role": "system", "content": [image]}, user("x"))]
    found += [
        messages({"role": "assistant", "content": [image]}, user("x")),
    ]
    found += [
        messages(user("x"), {"role": "system", "content": "late"}, user("y")),
        messages({"role": "system", "content": "x"}),
    ]
    found += [
        messages({**user("x"), "name": 5}),
        messages({**user("x"), "tool_call_id": "a"}),
        messages({"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}, user("x")),
        messages({"role": "assistant", "content": None, "tool_calls": [{"id": 5}]}, user("x")),
        messages(user("x"), {"role": "tool", "content": "x", "tool_call_id": "nobody's"}),
        messages({**user("x"), "tool_calls": [{}]}),
        messages({**user("x"), "z": 1}),
    ]
    found += [
        messages(user("word " * 2000)),
        messages(user("x" * 900_000)),
    ]
    low = {"type": "image_url", "image_url": {"url": data_url(picture()), "detail": "low"}}
    return [*found, messages(user([low, image]))]


def bad_tools() -> list[list[dict[str, Any]]]:
    def tool(**function: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", **function}}

    wrong: list[Any] = [{"type": "foo"}, {"type": "array"}, {"properties": 5}, {"properties": {"a": {"$ref": "#/no"}}}]
    strict = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    return [
        *([tool(parameters=schema)] for schema in wrong),
        *([tool(name=name)] for name in ("", "a b", "x" * 65, 5)),
        [tool(), tool()],
        [tool(parameters=strict, strict=True)],
        [tool()] * 129,
    ]


def bad_fields() -> list[dict[str, Any]]:
    wrong: dict[str, tuple[Any, ...]] = {
        "model": (None, 5, [], ""),
        "n": (0, -1, 5, 1.5, "2", True),
        "max_tokens": (0, -1, 1.5, "4", [4]),
        "max_completion_tokens": (0, "4", 5),
        "temperature": (-0.1, 2.1, "hot", [1], True),
        "top_p": (-0.1, 1.1, "x"),
        "seed": (1.5, "1", 2**63, -(2**63) - 1),
        "stop": ("", [""], 5, [5], ["x"] * 17, "x" * 300, {"a": 1}),
        "presence_penalty": (2.1, "x"),
        "frequency_penalty": (-2.1, None.__class__.__name__),
        "repetition_penalty": (0, -1, 3),
        "logit_bias": ([], "x", {"a": 1}, {"1": 101}, {"1": "x"}, {"-1": 1}, {"99999999": 1}, {"²": 1}),
        "logprobs": (1, "yes", 5),
        "top_logprobs": (1, 21, -1),
        "stream": ("yes", 1, []),
        "stream_options": ({"include_usage": True}, 5),
        "response_format": ("json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_object", "x": 1}),
        "regex": ("(", "[", "*", "", 5, "(?=a)b", r"(a)\1", "x" * 200_000),
        "tools": ([{"type": "function"}], {}, "x", [{"type": "web_search"}], *bad_tools()),
        "tool_choice": (
            "required",
            {"type": "function"},
            {"type": "function", "function": {"name": "f"}},
            {"type": "x"},
        ),
        "functions": ([{"name": "f"}],),
        "audio": ({"voice": "x"},),
        "modalities": (["audio"],),
        "prediction": ({"type": "content"},),
        "reasoning_effort": (5,),
        "verbosity": ("high",),
        "web_search_options": ({},),
        "store": ("yes",),
        "top_k": (-2, 1.5, "x"),
        "min_p": (-0.1, 1.1),
        "min_tokens": (-1, 5, 2**31),
        "stop_token_ids": (5, ["x"], [-1], [99_999_999], [1] * 65),
        "guided_json": ("{", "5", {"type": "foo"}, {"not": {}}),
        "guided_regex": ("(", ""),
        "guided_choice": ([], [""], "x", [5]),
        "guided_grammar": ("", "no grammar", "start: nowhere", "root ::= nowhere", 'start: "a'),
        "structured_outputs": ({}, {"regex": "a", "json": {}}, {"regex": "("}, {"unheard_of": 1}, {"json": "{"}),
        "chat_template_kwargs": (
            {"chat_template": "x"},
            {"add_generation_prompt": "no"},
            {"add_generation_prompt": True, "continue_final_message": True},
            [],
        ),
        "continue_final_message": ("yes", 1),
        "add_generation_prompt": (0,),
        "skip_special_tokens": (False,),
        "include_stop_str_in_output": (True,),
        "prompt_logprobs": (1,),
        "unheard_of": (1, None),
        "user": (5,),
        "metadata": ({"a": 5}, "x"),
        "grounding": ("yes",),
        "best_of": (2,),
        "echo": (True,),
    }
    found = [{name: value} for name, values in wrong.items() for value in values]
    schemas: list[Any] = [
        None,
        5,
        "x",
        [],
        {"type": "foo"},
        {"$ref": "#/nowhere"},
        {"$ref": "http://x/y"},
        {"enum": []},
    ]
    schemas += [{"type": "array", "uniqueItems": True}, {"not": {}}, {"type": "string", "pattern": "("}, {"type": 5}]
    schemas += [{"type": "string", "minLength": 5, "maxLength": 2}, {"properties": []}, {"anyOf": 5}]
    deep: Any = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    for schema in [*schemas, deep]:
        form = {"name": "x", "schema": schema}
        found.append({"response_format": {"type": "json_schema", "json_schema": form}})
    found.append({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}})
    found.append({"response_format": {"type": "json_object"}, "regex": "a"})
    found.append({"max_tokens": 3, "max_completion_tokens": 4})
    return found


def bad_bodies() -> list[bytes]:
    whole = json.dumps(chat_body()).encode()
    nested = b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return [
        *(b"", b" ", b"null", b"5", b'"x"', b"[]", b"{}", b"{", b"}", b"\0", b"\xff\xfe", b"NaN", b"{'model': 'x'}"),
        *(whole[:-1], whole[:20], whole + whole, whole + b"x", nested, b"[" * 100_000),
        whole.replace(b"Hello", b"\xff\xff"),
        whole.replace(b"Hello", b"\\ud800"),
        whole.replace(b"4", b"1e999"),
        whole.replace(b'"max_tokens": 4', b'"temperature": NaN'),
        whole.replace(b'"max_tokens": 4', b'"temperature": Infinity'),
        b"model=golden&messages=hello",
        b"<xml/>",
    ]


CASES: list[tuple[str, bytes]] = []
for _index, _body in enumerate(bad_bodies()):
    CASES.append((f"body {_index}", _body))
for _index, _fields in enumerate([*bad_fields(), *bad_messages()]):
    CASES.append((f"fields {_index}", json.dumps({**chat_body(), **_fields}).encode()))
for _name, _file in bad_files().items():
    CASES.append((_name, json.dumps(chat_body([image_part(encoded(_file))])).encode()))
for _index, _url in enumerate(bad_urls()):
    CASES.append((f"url {_index}", json.dumps(chat_body([image_part(_url)])).encode()))
for _name in ("model", "messages"):
    CASES.append((f"no {_name}", json.dumps({k: v for k, v in chat_body().items() if k != _name}).encode()))


def test_bad_requests_are_refused_and_the_server_goes_on(server: RunningServer) -> None:
    assert len(CASES) >= 200
    wrong = []
    for name, body in CASES:
        status, answer = post(server, body)
        try:
            check(status, answer, (400, 404))
        except AssertionError as error:
            wrong.append((name, body[:300], str(error)[:300]))
    assert not wrong
    assert post(server, json.dumps(chat_body()).encode())[0] == 200
    wait_until(lambda: server.engine.busy == 0, 5)  # the last answer is told before its slot is free
    assert server.engine.healthy and server.engine.stats.failed == 0


HALF_OF_THE_PIXELS = png(800, 800, zlib.compress(b"\0" * 800 * 2401))  # and a little more


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"functions": [{}]}, "does not support 'functions'"),
        ({"tools": [{}]}, "tools.0.type: Field required"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function: Field required"),
        ({"top_logprobs": 1}, "top_logprobs needs logprobs"),
        ({"unheard_of": 1}, "Unknown field 'unheard_of'"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        (messages({"role": "tool", "content": "x"}), "messages.0: a message needs tool_call_id"),
        (messages({"role": "function", "content": "x"}), "messages.0.role: Input should be 'system'"),
        (messages(user([image_part("file:///etc/passwd")])), "must be a data URL"),
        (messages(user([image_part(encoded(png(60_000, 60_000)))])), "too many pixels"),
        (messages(user([image_part(encoded(HALF_OF_THE_PIXELS))] * 2)), "a request together may have 1,000,000"),
        (messages(user([image_part("http://169.254.169.254/latest")])), "not on the public internet"),
        ({"logit_bias": {"999999": 1}}, "there is no token 999999"),
        ({"regex": "("}, "unclosed group"),
        ({"guided_regex": "[^\\s\\S]"}, "This regex cannot be used: no text satisfies it."),
        ({"guided_json": {"$ref": "#"}}, "This json_schema cannot be used: no text satisfies it."),
        ({"guided_grammar": "start: start"}, "This grammar cannot be used: no text satisfies it."),
        (messages({**user("x"), "refusal": "no"}), "a message of role 'user' cannot hold a refusal"),
        (messages(user([{"type": "refusal", "refusal": "no"}])), "a message of role 'user' cannot hold a refusal"),
        ({"min_tokens": 5}, "min_tokens is 5, but the answer may have 4 tokens"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "Give one of guided_regex, guided_choice"),
    ],
)
def test_messages_say_what_is_wrong(server: RunningServer, fields: dict[str, Any], said: str) -> None:
    status, answer = post(server, json.dumps({**chat_body(), **fields}).encode())
    check(status, answer)
    assert said in answer["error"]["message"]


def test_other_types_than_json_are_refused(server: RunningServer) -> None:
    body = json.dumps(chat_body()).encode()
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        check(*post(server, body, kind), (415,))
    assert post(server, body, "application/json; charset=utf-8")[0] == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "GZIP"])
def test_compressed_bodies_are_told_from_what_is_no_json(server: RunningServer, coding: str) -> None:
    body = json.dumps(chat_body()).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        for name, expected in ((coding, 415), ("identity", 200)):
            connection.request("POST", PATH, body, {"Content-Type": "application/json", "Content-Encoding": name})
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == expected, answer
            assert expected == 200 or "must not be compressed" in answer["error"]["message"]


def test_other_methods_and_paths(server: RunningServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for method, path, expected in (("GET", PATH, 405), ("POST", "/v1/embeddings", 404), ("DELETE", "/v1/models", 405)):
        connection.request(method, path)
        response = connection.getresponse()
        check(response.status, json.loads(response.read()), (expected,))
    connection.close()


def test_a_body_that_says_it_is_too_large(server: RunningServer) -> None:
    check(*post(server, json.dumps(chat_body("x" * 1_100_000)).encode()), (413,))


def raw(server: RunningServer, head: str) -> socket.socket:
    stream = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    stream.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{head}\r\n".encode())
    return stream


def read_status(stream: socket.socket) -> int:
    return int(stream.recv(65536).split(b" ")[1])


def test_an_endless_body(server: RunningServer) -> None:
    """Chunks without end and without a declared length: the answer comes while the client still sends."""
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    with raw(server, "Transfer-Encoding: chunked\r\n") as stream:
        for _ in range(40):  # 1.3 MB, just over the limit
            stream.sendall(chunk)
        assert read_status(stream) == 413


def test_a_body_that_never_comes(server: RunningServer) -> None:
    with raw(server, "Content-Length: 500\r\n") as silent, raw(server, "Content-Length: 500\r\n") as slow:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(8):  # a byte now and then is no better
                slow.sendall(b"x")
                time.sleep(0.3)
        assert read_status(silent) == 408
        assert read_status(slow) == 408
        assert time.monotonic() - start < 10


def test_nonsense_instead_of_http(server: RunningServer) -> None:
    for nonsense in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\0" * 100):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as stream:
            stream.sendall(nonsense)
            stream.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                stream.recv(1000)
    assert post(server, json.dumps(chat_body()).encode())[0] == 200


def test_images_of_many_kinds_are_taken(server: RunningServer) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        body = chat_body([image_part(data_url(picture(40, 40), kind))], max_tokens=1)
        assert post(server, json.dumps(body).encode())[0] == 200
    gray = Image.new("LA", (30, 30))
    assert post(server, json.dumps(chat_body([image_part(data_url(gray))], max_tokens=1)).encode())[0] == 200
    assert MODEL in json.dumps(body)
