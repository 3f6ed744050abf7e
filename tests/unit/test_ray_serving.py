"""The parts of the Ray Serve application that need no Ray: what belongs together, and requests between processes."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from deepseek_vl2.integrations.ray.affinity import Route, ranked, route_of, within_bounds
from deepseek_vl2.integrations.ray.asgi import Head, HttpRequest, respond
from deepseek_vl2.integrations.ray.ingress import Ingress
from deepseek_vl2.serve.api import errors
from deepseek_vl2.serve.api.response_store import ResponseStore, new_id, replica_of

CHAT = "/v1/chat/completions"
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
REPLICAS = [f"replica{number}" for number in range(8)]


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def chat(*messages: Any, **fields: Any) -> Route:
    return route_of(CHAT, json.dumps({"model": "m", "messages": list(messages), **fields}).encode())


def test_all_questions_about_a_picture_belong_together() -> None:
    first = chat(user(PICTURE, words("What is this?")))
    assert first.affinity is not None and first.replica is None
    answer = {"role": "assistant", "content": "A dot."}
    assert chat(user(PICTURE, words("What is this?")), answer, user(words("And now?"))) == first
    assert chat({"role": "system", "content": "Be brief."}, user(words("Look:"), PICTURE), temperature=1) == first
    other = {"type": "image_url", "image_url": {"url": "data:image/png;base64,BBBB"}}
    assert chat(user(other, words("What is this?"))) != first
    assert chat(user(PICTURE), answer, user(other)) == first, "the first picture is in every turn"
    parts = [{"type": "input_image", "image_url": PICTURE["image_url"]["url"]}, {"type": "input_text", "text": "?"}]
    asked = json.dumps({"input": [{"role": "user", "content": parts}]}).encode()
    assert route_of("/v1/responses", asked) == first


def test_conversations_without_a_picture_belong_together_by_their_first_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    first = chat(system, {"role": "user", "content": "Tell me a tale."})
    later = [{"role": "assistant", "content": "No."}, {"role": "user", "content": "Please."}]
    assert chat(system, {"role": "user", "content": "Tell me a tale."}, *later) == first
    assert chat(system, {"role": "user", "content": "Another one."}) != first
    assert route_of("/v1/completions", b'{"prompt": "a"}') != route_of("/v1/completions", b'{"prompt": "b"}')


@pytest.mark.parametrize(
    "body",
    [b"", b"no JSON", b"[1]", b"{}", b'{"messages": []}', b'{"messages": 0}', b'{"messages": [{"role": "system"}]}',
     b"[" * 100_000, b'{"messages": [' + b"0," * 40_000 + b"0]}", b'{"prompt": "\xff"}', b'{"messages": null}'],
)  # fmt: skip
def test_what_cannot_be_read_goes_anywhere(body: bytes) -> None:
    assert route_of(CHAT, body) == Route()


def test_a_response_goes_where_it_is_kept() -> None:
    store = ResponseStore(1, 1000, 1.0, "abc123")
    name = store.new_id()
    assert replica_of(name) == "abc123" and replica_of(new_id()) is None
    assert route_of(f"/v1/responses/{name}", b"") == Route(replica="abc123")
    assert route_of("/v1/responses", json.dumps({"previous_response_id": name}).encode()) == Route(replica="abc123")
    alone = route_of("/v1/responses", json.dumps({"previous_response_id": new_id(), "input": "x"}).encode())
    assert alone.replica is None and alone.affinity is not None


def test_a_replica_that_goes_moves_only_what_was_on_it() -> None:
    keys = [f"key{number}" for number in range(400)]
    before = {key: ranked(key, REPLICAS)[0] for key in keys}
    assert min(Counter(before.values()).values()) > 20, "all have their share"
    after = {key: ranked(key, REPLICAS[1:])[0] for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != REPLICAS[0])
    assert ranked("key", REPLICAS) == ranked("key", REPLICAS[::-1])


def test_a_busy_replica_is_passed_over() -> None:
    order = ["a", "b", "c"]
    assert within_bounds(order, {"a": 16}, 16) == order
    assert within_bounds(order, {"a": 17, "b": 3}, 16) == ["b", "c", "a"]
    assert within_bounds(order, {"a": 40, "b": 40, "c": 39}, 0) == ["c", "a", "b"]


# ---------------------------------------------------------------- requests between processes


def request_of(path: str, body: bytes = b"", method: str = "POST") -> HttpRequest:
    headers = [(b"host", b"localhost"), (b"content-length", str(len(body)).encode())]
    return HttpRequest(method, path, b"a=1", "http", headers, ("127.0.0.1", 5), body)


def application(seen: list[str]) -> FastAPI:
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, Any]:
        client = request.client
        assert client is not None
        return {"body": (await request.body()).decode(), "query": str(request.query_params), "client": client.host}

    @app.post("/endless")
    async def endless(request: Request) -> StreamingResponse:
        async def numbers() -> Any:
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0)
            finally:
                seen.append("ended")

        return StreamingResponse(numbers())

    @app.post("/fails")
    async def fails() -> None:
        raise KeyError("of the application")

    return app


async def collect(app: Any, request: HttpRequest, most: int | None = None) -> tuple[Head, bytes]:
    """Return a response, or its first parts."""
    parts = respond(app, request)
    head = await anext(parts)
    assert isinstance(head, Head)
    body = b""
    async for part in parts:
        assert isinstance(part, bytes)
        body += part
        if most is not None and len(body) >= most:
            break
    await parts.aclose()  # type: ignore[attr-defined]
    return head, body


def test_an_application_answers_a_request_from_another_process() -> None:
    head, body = asyncio.run(collect(application([]), request_of("/echo", b"hello")))
    assert head.status == 200 and (b"content-type", b"application/json") in head.headers
    assert json.loads(body) == {"body": "hello", "query": "a=1", "client": "127.0.0.1"}
    head, _ = asyncio.run(collect(application([]), request_of("/fails")))
    assert head.status == 500


def test_an_application_whose_client_left_ends() -> None:
    seen: list[str] = []
    head, body = asyncio.run(asyncio.wait_for(collect(application(seen), request_of("/endless"), most=3), 20))
    assert head.status == 200 and body == b"xxx" and seen == ["ended"]


class Parts:
    """What a handle returns: parts of a response, or an error."""

    def __init__(self, *parts: Any) -> None:
        self.parts = iter(parts)
        self.cancelled = False

    def __aiter__(self) -> Parts:
        return self

    async def __anext__(self) -> Any:
        part = next(self.parts, None)
        if part is None:
            raise StopAsyncIteration
        if isinstance(part, Exception):
            raise part
        return part

    def cancel(self) -> None:
        self.cancelled = True


def ingress(*answers: Parts, key: str = "") -> tuple[Any, list[dict[str, Any]]]:
    """Return the address's application before replicas that give these answers, and what they are asked."""
    left, asked = list(answers), []

    def remote(request: HttpRequest, **wanted: Any) -> Parts:
        asked.append({"body": request.body, "path": request.path, **wanted})
        return left.pop(0)

    handle = SimpleNamespace(answer=SimpleNamespace(remote=remote))
    made = Ingress(SimpleNamespace(options=lambda **options: handle), max_body_bytes=1 << 20)
    made.keys = (key,) if key else ()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (await made(Request(scope, receive)))(scope, receive, send)

    return app, asked


OK = Head(200, [(b"content-type", b"text/plain"), (b"connection", b"close"), (b"x-replica", b"one")])


def test_the_address_hands_on_what_a_replica_says() -> None:
    pytest.importorskip("ray.serve")
    body = json.dumps({"messages": [user(PICTURE)]}).encode()
    parts = Parts(OK, b"one", b"two")
    app, asked = ingress(parts)
    head, text = asyncio.run(collect(app, request_of(CHAT, body)))
    assert (head.status, text) == (200, b"onetwo") and head.headers == [OK.headers[0], OK.headers[2]]
    assert asked == [{"body": body, "path": CHAT, **route_of(CHAT, body)._asdict()}] and parts.cancelled


def test_a_replica_that_dies_before_it_says_anything_is_no_error() -> None:
    exceptions = pytest.importorskip("ray.exceptions")
    app, asked = ingress(Parts(exceptions.ActorDiedError()), Parts(OK, b"two"))
    head, text = asyncio.run(collect(app, request_of(CHAT, b"{}")))
    assert (head.status, text, len(asked)) == (200, b"two", 2)
    app, asked = ingress(*[Parts(exceptions.ActorDiedError()) for _ in range(3)])
    head, text = asyncio.run(collect(app, request_of(CHAT, b"{}")))
    assert head.status == 503 and "No replica" in json.loads(text)["error"]["message"]


def test_too_much_to_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("ray.serve.exceptions")
    busy = exceptions.BackPressureError(num_queued_requests=9, max_queued_requests=9)
    app, _ = ingress(Parts(busy))
    head, text = asyncio.run(collect(app, request_of(CHAT, b"{}")))
    assert head.status == 429 and json.loads(text)["error"]["code"] == "queue_full"


def routed(queued: dict[str, int], **wanted: Any) -> list[list[str]]:
    """Return the names of the replicas that the router chooses."""
    routing = pytest.importorskip("ray.serve.request_router") and pytest.importorskip(
        "deepseek_vl2.integrations.ray.routing"
    )
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in queued]

    class Router(routing.StickyRouter):  # type: ignore[misc,name-defined]
        replica_queue_len_cache = SimpleNamespace(get=lambda id_: queued[id_.unique_id])

        def __init__(self) -> None:
            self.initialize_state(imbalance=4)

    pending = SimpleNamespace(kwargs=wanted, routing_context=SimpleNamespace(should_backoff=False))
    chosen = asyncio.run(Router().choose_replicas(replicas, pending))
    assert pending.routing_context.should_backoff, "a full application is not asked without a pause"
    return [[replica.replica_id.unique_id for replica in rank] for rank in chosen]


def test_the_router_prefers_and_passes_over() -> None:
    names = ["a", "b", "c"]
    order = ranked("key", names)
    assert routed(dict.fromkeys(names, 0), affinity="key") == [[name] for name in order]
    assert routed({**dict.fromkeys(names, 0), order[0]: 5}, affinity="key")[0] == [order[1]]
    assert routed(dict.fromkeys(names, 0), replica="b", affinity="key") == [["b"]]
    gone = routed(dict.fromkeys(names, 0), replica="gone", affinity=None)
    assert sorted(name for rank in gone for name in rank) == names
    two, rest = routed(dict.fromkeys(names, 0), affinity=None, replica=None)
    assert len(two) == 2 and len(rest) == 1


def test_strangers_and_large_bodies_reach_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "DRAIN_SECONDS", 0.1)  # nothing follows here that could be read
    app, asked = ingress(key="right")
    head, text = asyncio.run(collect(app, request_of(CHAT, b"{}")))
    assert head.status == 401 and json.loads(text)["error"]["code"] == "invalid_api_key"
    app, _ = ingress()
    head, _ = asyncio.run(collect(app, request_of(CHAT, b"x" * (2 << 20))))
    assert head.status == 413
    head, text = asyncio.run(collect(app, request_of("/metrics", method="GET")))
    assert head.status == 404 and "metrics port" in json.loads(text)["error"]["message"]
    assert not asked
