"""The Responses API, by the official client: text, images, functions, streams and what is kept."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from server_support import MODEL, RunningServer, data_url, picture

from deepseek_vl2.serve.api.response_store import ResponseStore
from deepseek_vl2.serve.api.schemas import Message

openai = pytest.importorskip("openai")


class Color(BaseModel):
    """A color."""

    name: Literal["red", "blue"]


TOOL = {
    "type": "function",
    "name": "paint",
    "parameters": {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]},
}


def ask(client: Any, content: Any = "Hello", **options: Any) -> Any:
    given = {"max_output_tokens": 6, "temperature": 0, **options}
    return client.responses.create(model=MODEL, input=content, **given)


def chat_text(client: Any, *messages: Any) -> str:
    answer = client.chat.completions.create(model=MODEL, messages=list(messages), max_tokens=6, temperature=0)
    return answer.choices[0].message.content


def test_a_text(client: Any) -> None:
    answer = ask(client, instructions="Be brief.", metadata={"a": "b"}, reasoning={"effort": "low"}, user="me")
    expected = chat_text(client, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"})
    assert answer.output_text == expected
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 6 and answer.usage.total_tokens == 6 + answer.usage.input_tokens
    assert answer.metadata == {"a": "b"} and answer.instructions == "Be brief." and answer.error is None
    (message,) = answer.output
    assert message.type == "message" and message.role == "assistant" and message.status == "incomplete"


def test_images_and_several_turns(client: Any) -> None:
    url = data_url(picture(60, 60))
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_image", "image_url": url, "detail": "low"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Red."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "And now?"}]},
    ]
    expected = chat_text(
        client,
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "And now?"},
    )
    answer = ask(client, items)
    assert answer.output_text == expected and answer.usage.input_tokens > 421
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,x"}]}])
    assert caught.value.param == "input.0.content.0.image_url"


def test_a_stream_tells_what_the_whole_says(client: Any) -> None:
    whole, text, kinds = ask(client), "", []
    for number, event in enumerate(ask(client, stream=True)):
        assert event.sequence_number == number
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == whole.output_text
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert event.response.output_text == text and event.response.usage == whole.usage
    with client.responses.stream(model=MODEL, input="Hello", max_output_tokens=6, temperature=0) as stream:
        for _ in stream:
            pass


def test_functions(client: Any) -> None:
    options: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 300}
    answer = ask(client, **options)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "paint" and answer.status == "completed"
    assert json.loads(call.arguments)["color"] in ("red", "blue")
    pieces, kinds = "", []
    for event in ask(client, stream=True, **options):
        kinds.append(event.type)
        pieces += event.delta if event.type == "response.function_call_arguments.delta" else ""
    assert pieces == call.arguments
    assert kinds[2] == "response.output_item.added" and kinds[-1] == "response.completed"
    assert kinds[-3:-1] == ["response.function_call_arguments.done", "response.output_item.done"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Done."}
    items = [{"role": "user", "content": "Paint."}, call.model_dump(exclude_none=True), result]
    assert ask(client, items).output_text
    assert ask(client, [result], previous_response_id=answer.id).output_text
    named = {"type": "function", "name": "paint"}
    for choice in (named, {"type": "allowed_tools", "mode": "required", "tools": [named]}):
        assert ask(client, **{**options, "tool_choice": choice}).output[0].name == "paint"


def test_structured_answers(client: Any) -> None:
    parsed = client.responses.parse(model=MODEL, input="A color?", text_format=Color, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Color)
    some = ask(client, text={"format": {"type": "json_object"}}).output_text
    assert some.startswith("{")
    assert ask(client, extra_body={"regex": "ab?"}, max_output_tokens=20).output_text in ("a", "ab")


def test_log_probabilities(client: Any) -> None:
    answer = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    tokens = answer.output[0].content[0].logprobs
    assert len(tokens) == 6 and all(len(token.top_logprobs) == 2 for token in tokens)
    assert "".join(token.token for token in tokens) == answer.output_text


def test_later_requests_go_on_from_kept_responses(client: Any, server: RunningServer) -> None:
    first = ask(client, instructions="Be brief.")
    second = ask(client, "Go on", previous_response_id=first.id)
    expected = chat_text(
        client,
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Go on"},
    )
    assert second.output_text == expected, "the instructions are of one request alone"
    third = ask(client, "And on", previous_response_id=second.id)
    assert third.usage.input_tokens > second.usage.input_tokens and third.previous_response_id == second.id
    assert client.responses.retrieve(second.id) == second
    client.responses.delete(second.id)
    for missing in (lambda: client.responses.retrieve(second.id), lambda: client.responses.delete(second.id)):
        with pytest.raises(openai.NotFoundError):
            missing()
    with pytest.raises(openai.NotFoundError, match="Send the whole conversation as input"):
        ask(client, "x", previous_response_id=second.id)
    unkept = ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        ask(client, "x", previous_response_id=unkept.id)


def test_errors_name_the_place(client: Any) -> None:
    for item, place in (({"role": "nobody"}, "role"), ({"type": "function_call", "call_id": "x", "name": 5}, "name")):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, [item])
        assert caught.value.param == f"input.0.{place}"


@pytest.mark.parametrize(
    "fields",
    [
        *({"input": value} for value in ([], 5, None, [5], [{"type": "item_reference"}], [{"role": "tool"}])),
        {"input": [{"role": "user", "content": []}]},
        {"input": [{"type": "function_call_output", "call_id": "nobody's", "output": "x"}]},
        {"input": [{"role": "system", "content": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
        {"input": [{"role": "assistant", "content": [{"type": "input_image", "image_url": data_url(picture())}]}]},
        *({name: True} for name in ("background", "conversation", "prompt", "unheard_of")),
        {"truncation": "auto"},
        {"text": {"verbosity": "low"}},
        {"tools": [{"type": "web_search"}]},
        {"tools": [TOOL, TOOL]},
        {"tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}},
        {"tools": [TOOL], "regex": "a"},
        {"max_output_tokens": 0},
        {"stream_options": {"include_obfuscation": True}},
    ],
)
def test_what_cannot_be_done_is_refused(client: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", cast_to=object, body={"model": MODEL, "input": "Hello", **fields})
    assert len(caught.value.body["message"]) > 10


def test_the_store_is_bounded() -> None:
    def fill(store: ResponseStore, *names: str) -> None:
        for name in names:
            store.put({"id": name}, [Message(role="user", content="x" * 1000)])

    few = ResponseStore(2, 10_000, 60)
    fill(few, "a", "b")
    assert few.get("a") is not None, "it is used: the other one goes first"
    fill(few, "c")
    assert len(few) == 2 and few.get("b") is None and few.get("a") is not None
    small = ResponseStore(100, 4000, 60)
    fill(small, "a", "b", "c", "d")
    assert len(small) == 2 and small.bytes <= 4000 and small.get("d") is not None
    assert small.remove("d") and not small.remove("d") and small.remove("c") and small.bytes == 0
    fill(small, "a")
    small.put({"id": "large"}, [Message(role="user", content="x" * 5000)])
    assert small.get("large") is None and small.get("a") is not None, "what is too large pushes nothing out"
    brief = ResponseStore(2, 10_000, -1)
    fill(brief, "a")
    assert brief.get("a") is None and brief.bytes == 0
    none = ResponseStore(0, 10_000, 60)
    fill(none, "a")
    assert len(none) == 0
