"""The official ``openai`` client works unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from server_support import MODEL, RunningServer, data_url, image_part, make_server, picture

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

openai = pytest.importorskip("openai")

KEY = "a key"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(
    golden_model: Callable[..., DeepseekVLV2ForCausalLM], processor: DeepseekVLV2Processor
) -> Iterator[RunningServer]:
    """Run a server over the golden model of the base architecture."""
    with make_server(
        golden_model("base"), processor, api_keys=("another", KEY), engine={"max_length": 1600}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Any:
    """Return the official client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def ask(client: Any, messages: Any = HELLO, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, **options}
    )


def expected_text(server: RunningServer, processor: DeepseekVLV2Processor, conversation: Any, tokens: int) -> str:
    inputs = processor(conversations=conversation)
    output = server.server.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :])


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_plain(client: Any, server: RunningServer, processor: DeepseekVLV2Processor) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == expected_text(server, processor, HELLO, 8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == len(processor(conversations=HELLO)["input_ids"][0])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


@pytest.mark.parametrize("options", [{}, {"seed": 5, "temperature": 1.0}, {"n": 2, "seed": 1, "temperature": 1.0}])
def test_stream_is_whole(client: Any, options: dict) -> None:
    whole = ask(client, logprobs=True, **options)
    stream = ask(client, stream=True, stream_options={"include_usage": True}, logprobs=True, **options)
    texts = ["" for _ in whole.choices]
    tokens: list[list[str]] = [[] for _ in whole.choices]
    reasons: dict[int, str] = {}
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs:
                tokens[choice.index] += [entry.token for entry in choice.logprobs.content]
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [[entry.token for entry in choice.logprobs.content] for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


def test_images_in_several_turns_with_a_system_message(
    client: Any, server: RunningServer, processor: DeepseekVLV2Processor
) -> None:
    first, second = picture(300, 200), picture(60, 90, "blue")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part(data_url(first)), {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, image_part(data_url(second))]},
    ]
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat is this?", "images": [first]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "And <image>", "images": [second]},
    ]
    answer = ask(client, messages)
    assert answer.choices[0].message.content == expected_text(server, processor, conversation, 8)
    assert answer.usage.prompt_tokens > 842


def test_an_answer_can_be_sent_back(client: Any) -> None:
    answer = ask(client, extra_body={"grounding": True}).choices[0].message
    turns = [*HELLO, answer.model_dump(), {"role": "user", "content": "Go on"}]
    assert ask(client, turns).choices[0].message.content


def test_low_detail_takes_no_tiles(client: Any) -> None:
    url = {"url": data_url(picture(900, 400))}
    high, low = (
        ask(
            client, [{"role": "user", "content": [{"type": "image_url", "image_url": {**url, **detail}}]}], max_tokens=1
        )
        for detail in ({}, {"detail": "low"})
    )
    assert low.usage.prompt_tokens < 430 < high.usage.prompt_tokens


def test_stop_words_are_never_half_printed(client: Any) -> None:
    text = ask(client, max_tokens=24).choices[0].message.content
    word = text[len(text) // 2 : len(text) // 2 + 5]
    before = text[: text.index(word)]
    whole = ask(client, max_tokens=24, stop=[word, "never said"])
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (before, "stop")
    shown = ""
    for chunk in ask(client, max_tokens=24, stop=word, stream=True):
        shown += chunk.choices[0].delta.content or ""
        assert before.startswith(shown)
    assert shown == before


def test_seeds(client: Any) -> None:
    def say(**options: Any) -> str:
        return ask(client, temperature=1.0, **options).choices[0].message.content

    assert say(seed=7) == say(seed=7) != say(seed=8)
    assert say() != say(), "without a seed no two answers are the same"
    two = ask(client, temperature=1.0, seed=7, n=2)
    assert [choice.message.content for choice in two.choices] == [say(seed=7), say(seed=8)]


def test_logprobs(client: Any) -> None:
    content = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 8
    for entry in content:  # greedy: the chosen one is the likeliest
        assert entry.token == entry.top_logprobs[0].token and entry.logprob == entry.top_logprobs[0].logprob
        assert [top.logprob for top in entry.top_logprobs] == sorted(t.logprob for t in entry.top_logprobs)[::-1]
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    assert not ask(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs


def test_bias_and_penalties(client: Any, processor: DeepseekVLV2Processor) -> None:
    wanted = processor.encode(" dog", bos=False)[0]
    assert ask(client, logit_bias={str(wanted): 100}).choices[0].message.content == " dog" * 8
    calmed = ask(client, logit_bias={str(wanted): 12}, frequency_penalty=2, max_tokens=20)
    assert 0 < calmed.choices[0].message.content.count(" dog") < 20
    once = ask(client, logit_bias={str(wanted): 100}, extra_body={"repetition_penalty": 2.0})
    assert once.choices[0].message.content.startswith(" dog")


def test_structured_output(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "blue"]},
            "sides": {"type": "integer", "minimum": 3, "maximum": 9},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["color", "sides", "tags"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = ask(client, response_format=form, max_tokens=400, temperature=1.0, seed=seed)
        shape = json.loads(answer.choices[0].message.content)
        assert answer.choices[0].finish_reason == "stop"
        assert shape["color"] in ("red", "blue") and 3 <= shape["sides"] <= 9 and set(shape["tags"]) <= {"a", "b"}
    some = ask(client, response_format={"type": "json_object"}, max_tokens=6).choices[0].message.content
    assert some.startswith("{")


def test_regex(client: Any) -> None:
    for seed in range(3):
        answer = ask(client, temperature=1.0, seed=seed, extra_body={"regex": r"(yes|no), \d{2}"}, max_tokens=30)
        word, number = answer.choices[0].message.content.split(", ")
        assert word in ("yes", "no") and len(number) == 2 and number.isdigit()
        assert answer.choices[0].finish_reason == "stop"


def test_grounding(client: Any) -> None:
    """Noise names no places; a pattern makes the model write some, and one that has its corners swapped."""
    pattern = r"A <\|ref\|>dog<\|/ref\|><\|det\|>\[\[0, 333, 999, 666\], \[9, 5, 1, 8\]\]<\|/det\|>\."
    messages = [{"role": "user", "content": [image_part(data_url(picture(200, 100))), {"type": "text", "text": "?"}]}]
    answer = ask(client, messages, extra_body={"regex": pattern, "grounding": True}, max_tokens=60)
    grounding = answer.choices[0].message.grounding
    (dog,) = grounding["objects"]
    assert dog["label"] == "dog" and dog["boxes"] == [[0, 333, 999, 666], [1, 5, 9, 8]]
    assert dog["image"] == 0 and dog["pixel_boxes"][0] == [0, 33, 200, 66]
    assert answer.choices[0].message.content[slice(*dog["span"])].startswith("<|ref|>dog")
    assert [problem["kind"] for problem in grounding["problems"]] == ["reversed"]
    stream = ask(client, messages, stream=True, extra_body={"regex": pattern, "grounding": True}, max_tokens=60)
    assert [chunk.choices[0].delta.model_extra for chunk in stream][-1]["grounding"] == grounding


def test_errors_are_the_clients_own(client: Any, server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support 'functions'"):
        ask(client, functions=[{"name": "f", "parameters": {}}])
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        ask(client, model="gpt")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, [{"role": "user", "content": "word " * 2000}])
    assert caught.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        stranger.models.list()


def test_async_clients_at_once(server: RunningServer, client: Any) -> None:
    """More clients than slots, streaming and not: each gets what it gets alone."""
    import asyncio

    alone = [ask(client, [{"role": "user", "content": f"Hello {i}"}]).choices[0].message.content for i in range(10)]

    async def one(asynchronous: Any, index: int) -> str:
        options: Any = {"model": MODEL, "messages": [{"role": "user", "content": f"Hello {index}"}]}
        options.update(max_tokens=8, temperature=0)
        if index % 2:
            return (await asynchronous.chat.completions.create(**options)).choices[0].message.content
        stream = await asynchronous.chat.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as asynchronous:
            return await asyncio.gather(*(one(asynchronous, index) for index in range(10)))

    assert asyncio.run(everyone()) == alone
