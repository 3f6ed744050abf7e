"""Calling functions: what the model is told, what it may write, and what clients get of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_support import MODEL, RunningServer

from deepseek_vl2.serve.api.schemas import ChatRequest
from deepseek_vl2.serve.api.structured import closed
from deepseek_vl2.serve.api.tools import CallReader, ToolUse
from deepseek_vl2.serve.api.turns import conversation_turns

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "Hello"}]
COLORS = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
PAINT = {"type": "function", "function": {"name": "paint", "description": "Paint it.", "parameters": COLORS}}
STOP = {"type": "function", "function": {"name": "stop_painting"}}
ANSWER = '<tool_call>\n{"name": "paint", "arguments": {"color":"red"}}\n</tool_call>'


def ask(client: Any, messages: Any = HELLO, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "max_tokens": 400, **options})


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": MODEL, "messages": HELLO, **fields})


# ---------------------------------------------------------------- reading answers


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_are_read_however_the_answer_is_cut(size: int) -> None:
    tricky = json.dumps({"a": 'x } ] " </tool_call> <tool_call> \\', "b": [{"c": "{"}]})
    answer = (
        f'Let < me <tool see.\n<tool_call>\n{{"name": "one", "arguments": {tricky}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "two", "arguments": {}}\n</tool_call>'
    )
    reader, shown, pieces = CallReader(), "", ["", ""]
    for start in range(0, len(answer), size):
        text, deltas = reader.push(answer[start : start + size], finished=start + size >= len(answer))
        shown += text
        for delta in deltas:
            pieces[delta.index] += delta.arguments
    assert shown == reader.text == "Let < me <tool see.\n"
    assert [call.name for call in reader.calls] == ["one", "two"]
    assert pieces == [call.arguments for call in reader.calls] == [tricky, "{}"]
    assert len({call.id for call in reader.calls}) == 2


def test_what_looks_like_the_beginning_of_a_call_is_text_at_the_end() -> None:
    reader = CallReader()
    assert reader.push("a <tool_") == ("a ", []) and reader.push("ca", finished=True) == ("<tool_ca", [])


# ---------------------------------------------------------------- what the model is told


def test_the_prompt_tells_of_functions_calls_and_results() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Paint."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "paint", "arguments": '{"color":"red"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "It is red."},
        {"role": "user", "content": "Thanks."},
    ]
    asked = request(messages=messages, tools=[PAINT, STOP])
    turns = conversation_turns(asked.messages, ToolUse.of(asked))
    texts = ["".join(part.text for part in turn.parts) for turn in turns]
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert texts[0].startswith("Be brief.\n\nBe kind.\n\nYou may call functions.")
    assert '{"name": "paint", "description": "Paint it.", "parameters":' in texts[0]
    assert '\n{"name": "stop_painting"}\n' in texts[0]
    assert texts[2] == ANSWER
    assert texts[3] == '<tool_response>\n{"name": "paint", "content": "It is red."}\n</tool_response>\nThanks.'


@pytest.mark.parametrize(
    ("fields", "said", "silent"),
    [
        ({}, "otherwise answer in words", "at most"),
        ({"tool_choice": "required"}, "Answer with a call.", "in words"),
        ({"tool_choice": {"type": "function", "function": {"name": "paint"}}}, "a call of paint", "stop_painting"),
        ({"parallel_tool_calls": False}, "one function at most", "Answer with"),
        ({"tool_choice": allowed("auto", "paint")}, "otherwise answer in words", "stop_painting"),
        ({"tool_choice": allowed("required", "paint")}, "Answer with a call.", "stop_painting"),
    ],
)
def test_the_prompt_says_what_is_asked_for(fields: Any, said: str, silent: str) -> None:
    told = ToolUse.of(request(tools=[PAINT, STOP], **fields)).instructions()
    assert said in told and silent not in told


def test_without_use_of_tools_the_model_is_told_nothing() -> None:
    assert not ToolUse.of(request(tools=[PAINT], tool_choice="none")) and not ToolUse.of(request(tools=[]))


# ---------------------------------------------------------------- what the model may write


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({}, ["Hello <b>.", f"I do. {ANSWER}", f"{ANSWER}\n{ANSWER}"], [f"{ANSWER} Done.", "<tool_call>paint"]),
        ({"parallel_tool_calls": False}, [ANSWER], [f"{ANSWER}\n{ANSWER}"]),
        ({"tool_choice": "required"}, [ANSWER], ["Hello", f" {ANSWER}"]),
        ({"tool_choice": allowed("required", "stop_painting")}, [], [ANSWER]),
        (
            {"tool_choice": {"type": "function", "function": {"name": "stop_painting"}}},
            ['<tool_call>\n{"name": "stop_painting", "arguments": {}}\n</tool_call>'],
            [ANSWER, '<tool_call>\n{"name": "stop_painting", "arguments": {"a":1}}\n</tool_call>'],
        ),
        ({"response_format": {"type": "json_object"}}, ['{"a":1}', ANSWER], ["Hello", "[1]"]),
        ({}, [], [ANSWER.replace(old, new) for old, new in (("red", "green"), ('"}', '","x":1}'), ("paint", "p"))]),
    ],
)
def test_the_grammar(server: RunningServer, fields: Any, good: list[str], bad: list[str]) -> None:
    compiler, tokenizer = server.server.generator.compiler, server.server.generator.builder.processor.tokenizer
    asked = request(tools=[PAINT, STOP], **fields)
    grammar = ToolUse.of(asked).grammar(asked)

    def follows(text: str) -> bool:
        matcher = compiler.constraint(grammar.kind, grammar.text).matcher
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    assert [text for text in good if not follows(text)] == [] and [text for text in bad if follows(text)] == []


def test_objects_are_closed_only_where_that_changes_nothing_but_unnamed_properties() -> None:
    inner = {"type": "object", "properties": {"b": {}}}
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": inner}}, "$defs": {"d": inner}}
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "type": "object",
        "properties": {"a": {"type": "array", "items": shut}},
        "$defs": {"d": shut},
        "additionalProperties": False,
    }
    for open_on_purpose in (
        {**inner, "additionalProperties": True},
        {**inner, "required": ["c"]},
        {"allOf": [inner, {"properties": {"c": {}}}]},
        {**inner, "anyOf": [inner, {"properties": {"c": {}}}]},
        {"type": "object"},
        True,
    ):
        assert closed(open_on_purpose) == open_on_purpose


# ---------------------------------------------------------------- what clients get


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_calls(client: Any, choice: Any, seed: int) -> None:
    options: Any = {"tools": [PAINT], "tool_choice": choice, "seed": seed, "n": 2, "logprobs": True}
    whole = ask(client, **options)
    for answer in whole.choices:
        assert answer.message.content is None
        assert 1 <= len(answer.message.tool_calls) <= 16
        for call in answer.message.tool_calls:
            assert call.type == "function" and call.function.name == "paint"
            assert json.loads(call.function.arguments)["color"] in ("red", "blue")
        assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
    calls: dict[tuple[int, int], list[str]] = {}
    reasons, tokens = {}, 0
    for chunk in ask(client, stream=True, **options):
        for part in chunk.choices:
            assert not part.delta.content
            tokens += len(part.logprobs.content) if part.logprobs else 0
            reasons[part.index] = part.finish_reason or reasons.get(part.index)
            for call in part.delta.tool_calls or []:
                if call.id:
                    assert call.type == "function"
                    calls[part.index, call.index] = [call.function.name, ""]
                calls[part.index, call.index][1] += call.function.arguments
    assert calls == {
        (answer.index, i): [call.function.name, call.function.arguments]
        for answer in whole.choices
        for i, call in enumerate(answer.message.tool_calls)
    }
    assert reasons == {answer.index: answer.finish_reason for answer in whole.choices}
    assert 0 < tokens <= sum(len(answer.logprobs.content) for answer in whole.choices)


def test_an_answer_in_words(client: Any) -> None:
    answer = ask(client, tools=[PAINT], max_tokens=6, seed=1)
    assert answer.choices[0].message.content and answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "length"
    assert ask(client, tools=[PAINT], tool_choice="none", max_tokens=6, seed=1).choices[0].message.content


def test_a_call_that_is_cut_is_told_as_far_as_it_came(client: Any) -> None:
    answer = ask(client, tools=[PAINT], tool_choice="required", max_tokens=24)
    assert answer.choices[0].finish_reason == "length"
    for call in answer.choices[0].message.tool_calls or []:
        assert '{"color":'.startswith(call.function.arguments[:9])


def test_a_conversation_with_calls_goes_on(client: Any) -> None:
    called = ask(client, tools=[PAINT], tool_choice="required", parallel_tool_calls=False).choices[0].message
    (call,) = called.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "Done."}]}
    answer = ask(client, [*HELLO, called.model_dump(), result], tools=[PAINT], max_tokens=5)
    assert answer.choices[0].message.content is not None


def test_a_schema_that_cannot_be_enforced_is_followed_as_far_as_it_can_unless_strict(client: Any) -> None:
    numbers = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 2}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"n": numbers}, "required": ["n"]}}
    tools = [{"type": "function", "function": function}]
    call = ask(client, tools=tools, tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls[0]
    assert set(json.loads(call.function.arguments)["n"]) <= {1, 2}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        ask(client, tools=[{"type": "function", "function": {**function, "strict": True}}], tool_choice="required")
