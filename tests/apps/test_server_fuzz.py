"""A property-based fuzz of the API against its OpenAPI page finds no 500."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from answerable import answerable
from server_support import MODEL, RunningServer, chat_body, make_server

from deepseek_vl2.serve.api.completions import CompletionRequest
from deepseek_vl2.serve.api.openapi import numbers_up_to
from deepseek_vl2.serve.api.response_schemas import ResponsesRequest
from deepseek_vl2.serve.api.schemas import ChatRequest
from deepseek_vl2.serve.api.tokenizing import DetokenizeRequest, TokenizeRequest
from deepseek_vl2.utils.demo import demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

# Of each path: what a request says, and the fields without a bound on which an answer takes seconds.
REQUESTS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "/v1/chat/completions": (ChatRequest, chat_body(), {"max_tokens", "max_completion_tokens"}),
    "/v1/completions": (CompletionRequest, {"model": MODEL, "prompt": "Hello", "max_tokens": 4}, {"max_tokens"}),
    "/v1/responses": (
        ResponsesRequest, {"model": MODEL, "input": "Hello", "max_output_tokens": 4}, {"max_output_tokens"}
    ),
    "/tokenize": (TokenizeRequest, {"prompt": "Hello"}, set()),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 2]}, set()),
}  # fmt: skip


NEEDED = {"top_logprobs": "logprobs", "stream_options": "stream"}


def few_fields(path: str) -> Any:
    """Return a strategy for the names of a few fields of a path's request."""
    kind, _, bounds = REQUESTS.get(path, (None, {}, set()))
    names = sorted(set(kind.model_fields) - bounds) if kind else []
    return strategies.sets(strategies.sampled_from(names), max_size=4) if names else strategies.just(set())


def few_of(path: str, body: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    """Return a path's usual request with what was generated for its prompt and for a few other fields."""
    prompts = {"messages", "prompt", "input", "tokens"}
    kept = kept | {NEEDED[name] for name in kept & set(NEEDED)}
    few = {name: value for name, value in body.items() if name in kept | prompts and value is not None}
    usual = {name: value for name, value in REQUESTS[path][1].items() if not (name in prompts and prompts & set(few))}
    return {**usual, **few, "model": MODEL}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Run a server over the demo model."""
    _, processor, model = load_pretrained_model(demo_checkpoint(), device="cpu")
    with make_server(model, processor, engine={"max_batch": 8, "max_length": 3000}, request_seconds=60.0) as running:
        yield running


def fuzz(server: RunningServer, examples: int, known_model: bool) -> int:
    """Send generated requests to every operation; returns how many were answered well.

    What is sent must be answered as the page says, and be refused where the page does not allow it. With a known model
    it must be accepted where the page does, once `answerable` has put right what no page can say.
    """
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = (not_a_server_error, status_code_conformance, response_schema_conformance)
    good = 0
    for result in api.get_all_operations():
        operation = result.ok()
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.path in REQUESTS:
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:

            @hypothesis.settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(
                case=operation.as_strategy(generation_mode=mode),
                kept=few_fields(operation.path),
                positive=strategies.just(mode.is_positive),
            )
            def run(case: Any, kept: set[str], positive: bool) -> None:
                nonlocal good
                path = case.operation.path
                if known_model and isinstance(case.body, dict):  # or nearly all would end at the model's name
                    case.body = body = few_of(path, case.body, kept)
                    if positive:
                        case.body = body = answerable(path, body, MODEL)
                response = case.call_and_validate(base_url=server.url, checks=checks, timeout=120)
                good += response.status_code == 200
                if known_model and positive and path in REQUESTS:
                    # What is well formed is answered, unless it is longer than the model's context.
                    refused = response.status_code == 400
                    too_long = refused and response.json()["error"]["code"] == "context_length_exceeded"
                    assert response.status_code == 200 or too_long, (path, body, response.text)

            run()
    return good


def test_the_page_describes_the_request(server: RunningServer) -> None:
    page = server.server.app.openapi()
    posted = {path for path, operations in page["paths"].items() if "requestBody" in operations.get("post", {})}
    assert posted == set(REQUESTS)
    for path, (kind, _, _) in REQUESTS.items():
        schema = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == set(kind.model_fields)
    parts = {"Message", "ImagePart", "TextPart", "Tool", "MessageItem", "FunctionOutputItem", "StructuredOutputs"}
    assert parts <= set(page["components"]["schemas"])


def test_a_short_fuzz_finds_no_500(server: RunningServer) -> None:
    assert fuzz(server, 6, known_model=True) > 5
    assert server.engine.healthy and server.engine.stats.failed == 0


def test_the_page_tells_the_limits_of_the_served_model(server: RunningServer) -> None:
    schemas = {
        path: operations["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        for path, operations in server.server.app.openapi()["paths"].items()
        if path in REQUESTS
    }
    size = server.server.model.config.language_config.vocab_size
    image = server.server.generator.builder.processor.image_token_id
    token = {"type": "integer", "minimum": 0, "maximum": size - 1}
    assert schemas["/detokenize"]["tokens"]["items"] == token
    assert schemas["/detokenize"]["tokens"]["maxItems"] == 3000
    _, _, tokens, several = schemas["/v1/completions"]["prompt"]["anyOf"]
    assert tokens["items"] == several["items"]["items"] == {**token, "not": {"const": image}}
    assert tokens["maxItems"] == several["items"]["maxItems"] == 2999
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        assert schemas[path]["stop_token_ids"]["anyOf"][0]["items"] == token
        biased = schemas[path]["logit_bias"]["anyOf"][0]
        pattern = re.compile(biased["propertyNames"]["pattern"])
        assert [bool(pattern.search(name)) for name in ("0", str(size - 1), str(size), "01", "-1", "")] == [
            True, True, False, False, False, False
        ]  # fmt: skip
        assert biased["additionalProperties"] == {"type": "number", "minimum": -100, "maximum": 100}
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert schemas[path]["n"]["anyOf"][0]["maximum"] == 8
    assert "x-" not in str(schemas)


@pytest.mark.parametrize("most", [0, 7, 10, 39, 399, 400, 1999, 102_399])
def test_a_pattern_of_numbers(most: int) -> None:
    pattern = re.compile(numbers_up_to(most))
    for number in {0, 1, 9, 10, 11, 99, 100, most // 2, most - 1, most, most + 1, 2 * most, 10 * most, 10**6}:
        assert bool(pattern.search(str(number))) == (0 <= number <= most), number


@pytest.mark.slow
@pytest.mark.parametrize("known_model", [True, False])
def test_a_long_fuzz_finds_no_500(server: RunningServer, known_model: bool) -> None:
    fuzz(server, 400, known_model)
    assert server.engine.healthy and server.engine.stats.failed == 0
