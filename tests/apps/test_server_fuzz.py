"""A property-based fuzz of the API against its OpenAPI page finds no 500."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server_support import MODEL, RunningServer, chat_body, make_server

from deepseek_vl2.serve.api.schemas import ChatRequest
from deepseek_vl2.utils.demo import demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

# Without a bound, an answer takes seconds.
OTHER_FIELDS = sorted(set(ChatRequest.model_fields) - {"max_tokens", "max_completion_tokens"})
FEW_FIELDS = strategies.sets(strategies.sampled_from(OTHER_FIELDS), max_size=4)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Run a server over the demo model."""
    _, processor, model = load_pretrained_model(demo_checkpoint(), device="cpu")
    with make_server(model, processor, engine={"max_batch": 8, "max_length": 300}, request_seconds=60.0) as running:
        yield running


def fuzz(server: RunningServer, examples: int, known_model: bool) -> int:
    """Send generated requests to every operation; returns how many were answered well."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = (not_a_server_error, status_code_conformance, response_schema_conformance)
    good = 0
    for result in api.get_all_operations():
        operation = result.ok()
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.method == "post":
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:

            @hypothesis.settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode), kept=FEW_FIELDS)
            def run(case: Any, kept: set[str]) -> None:
                nonlocal good
                if known_model and isinstance(case.body, dict):  # or nearly all would end at the model's name
                    few = {name: value for name, value in case.body.items() if name in kept}
                    case.body = {**chat_body(), **few, "model": MODEL}
                response = case.call_and_validate(base_url=server.url, checks=checks, timeout=120)
                good += response.status_code == 200

            run()
    return good


def test_the_page_describes_the_request(server: RunningServer) -> None:
    page = server.server.app.openapi()
    operation = page["paths"]["/v1/chat/completions"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(ChatRequest.model_fields)
    assert {"Message", "ImagePart", "TextPart"} <= set(page["components"]["schemas"])


def test_a_short_fuzz_finds_no_500(server: RunningServer) -> None:
    assert fuzz(server, 15, known_model=True) > 5
    assert server.engine.healthy and server.engine.stats.failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("known_model", [True, False])
def test_a_long_fuzz_finds_no_500(server: RunningServer, known_model: bool) -> None:
    fuzz(server, 400, known_model)
    assert server.engine.healthy and server.engine.stats.failed == 0
