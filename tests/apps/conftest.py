"""Fixtures of the server's tests; what takes seconds to import is left to those who ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from server_support import RunningServer

    from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor


def _load_demo() -> Any:
    from deepseek_vl2.utils.demo import demo_checkpoint
    from deepseek_vl2.utils.io import load_pretrained_model

    _, processor, model = load_pretrained_model(demo_checkpoint(), device="cpu")
    return model, processor


@pytest.fixture(scope="module")
def demo() -> Any:
    """Return the demo model, whose steps take next to nothing, and its processor."""
    return _load_demo()


@pytest.fixture
def another() -> Any:
    """Return another demo model and its processor: a model has one engine, and so one server at a time."""
    return _load_demo()


@pytest.fixture(scope="module")
def server(
    golden_model: Callable[..., DeepseekVLV2ForCausalLM], processor: DeepseekVLV2Processor
) -> Iterator[RunningServer]:
    """Run a server over the golden model of the small architecture."""
    from server_support import make_server

    with make_server(golden_model("small"), processor, engine={"max_length": 1600}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Any:
    """Return the official client of a server without a key."""
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
