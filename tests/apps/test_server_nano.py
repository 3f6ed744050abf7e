"""nano behind the server: its answers are those of ``generate``, and what was seen is not computed again."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from server_support import MODEL, RunningServer, data_url, image_part, make_server

from deepseek_vl2.utils.io import load_pretrained_model, nano_is_installed

pytestmark = pytest.mark.skipif(not nano_is_installed(), reason="nano is not installed")

TABLE = Path(__file__).resolve().parents[2] / "images" / "table.png"
PICTURES = {"table": None, "red": "red", "blue": "blue"}
KINDS = (("What is this", "table"), ("Which colour", "red"), ("A tale, please, " * 20, ""), ("Hi", ""))
ASKED = [(f"{words} {number}?", picture) for number in range(4) for words, picture in KINDS]


def shown(name: str) -> Image.Image:
    """Return a picture."""
    color = PICTURES[name]
    return Image.open(TABLE).convert("RGB") if color is None else Image.new("RGB", (150, 100), color)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Run a server over nano whose rows are fewer than its clients, and whose chunks are short."""
    _, processor, model = load_pretrained_model("nano", device="cpu", dtype=torch.float32)
    bounds = {"max_batch": 10, "max_length": 1400, "prefill_chunk": 100, "prefill_tokens": 300}
    with make_server(model, processor, engine=bounds) as running:
        yield running


def post(server: RunningServer, text: str, picture: str, tokens: int) -> str:
    """Ask over HTTP, greedily."""
    parts: list[Any] = [image_part(data_url(shown(picture)))] if picture else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    body = {"model": MODEL, "messages": messages, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def by_generate(server: RunningServer, text: str, picture: str, tokens: int) -> str:
    """Return what ``generate`` answers."""
    processor, model = server.server.generator.builder.processor, server.server.model
    content: list[Any] = [{"type": "image", "image": shown(picture)}] if picture else []
    inputs = processor(conversations=[{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return processor.decode([id_ for id_ in answer if id_ != processor.tokenizer.eos_token_id])


def test_sixteen_clients_get_what_generate_gives(server: RunningServer) -> None:
    """Texts and pictures, in chunks, with rows that join and leave, and beginnings that are shared."""
    lengths = [4 + 3 * (index % 5) for index in range(len(ASKED))]
    expected = [by_generate(server, *asked, tokens) for asked, tokens in zip(ASKED, lengths, strict=True)]
    stats = server.engine.stats
    steps, tokens = stats.steps, stats.generated_tokens
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda pair: post(server, *pair[0], pair[1]), zip(ASKED, lengths, strict=True)))
    assert found == expected
    assert stats.steps - steps < (stats.generated_tokens - tokens) / 2, "they were written together"
    assert server.engine.scheduler.prefixes.hits > 0


def test_a_second_question_about_a_picture_is_answered_from_the_caches(server: RunningServer) -> None:
    engine = server.engine
    expected = [by_generate(server, text, "blue", 6) for text in ("What colour?", "Is it green?")]

    def counts() -> tuple[int, int, int]:
        return engine.images.misses, engine.scheduler.prefixes.hits, engine.stats.prompt_tokens

    misses, _, tokens = counts()
    assert post(server, "What colour?", "blue", 6) == expected[0]
    first = counts()
    assert first[0] == misses + 1
    assert post(server, "Is it green?", "blue", 6) == expected[1]
    second = counts()
    assert second[:2] == (first[0], first[1] + 1) and second[2] - first[2] < (first[2] - tokens) / 2
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    saved = next(line for line in text.splitlines() if line.startswith("deepseek_vl2_prefix_cache_tokens_saved_total"))
    assert float(saved.split()[1]) >= 32
