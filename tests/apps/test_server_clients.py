"""Programs that people have talk to the server as to any other: LangChain and LiteLLM.

The model is random: what it may write is bounded by the schemas, so that every answer is one that can be checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from server_support import MODEL, RunningServer, data_url, picture


class Color(BaseModel):
    """A color and how strong it is."""

    name: Literal["red", "blue"] = Field(description="Its name.")
    strength: Literal[1, 2, 3]


class Palette(BaseModel):
    """Two colors, of which one may be missing."""

    main: Color
    other: Color | None = None


# ---------------------------------------------------------------- LangChain


@pytest.fixture(scope="module")
def chat(server: RunningServer) -> Any:
    """Return LangChain's chat model."""
    langchain_openai = pytest.importorskip("langchain_openai")
    return langchain_openai.ChatOpenAI(
        model=MODEL, base_url=f"{server.url}/v1", api_key="none", max_tokens=300, max_retries=0, seed=1
    )


def test_langchain_speaks(chat: Any) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    image = {"type": "image_url", "image_url": data_url(picture())}
    messages = [
        SystemMessage("Be brief.", name="operator"),
        SystemMessage("Be kind."),
        HumanMessage([image, {"type": "text", "text": "What is it?", "cache_control": {"type": "ephemeral"}}]),
        AIMessage("Red."),
        HumanMessage("And this?", name="Ann"),
    ]
    answer = chat.invoke(messages, max_tokens=5, reasoning_effort="low", store=False)
    assert answer.content and answer.usage_metadata["output_tokens"] == 5
    pieces = list(chat.stream(messages, max_tokens=5, stream_usage=True))
    assert "".join(piece.content for piece in pieces) == answer.content
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 5


def test_langchain_binds_tools(chat: Any) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    @tool
    def mix(first: Literal["red", "blue"], second: Literal["red", "blue"]) -> str:
        """Mix two colors."""
        return f"{first} and {second}"

    for options in ({"tool_choice": "any"}, {"tool_choice": "mix"}, {"tool_choice": "any", "strict": True}):
        bound = chat.bind_tools([mix], parallel_tool_calls=False, **options)
        asked = [HumanMessage("Mix something.")]
        answer = bound.invoke(asked)
        (call,) = answer.tool_calls
        assert call["name"] == "mix" and set(call["args"]) == {"first", "second"} and not answer.invalid_tool_calls
        streamed: Any = None
        for piece in bound.stream(asked):
            streamed = piece if streamed is None else streamed + piece
        assert [{**call, "id": None} for call in streamed.tool_calls] == [{**call, "id": None}]
        result = mix.invoke(call)
        assert chat.bind_tools([mix]).invoke([*asked, answer, result], max_tokens=4).content is not None


@pytest.mark.parametrize("options", [{"method": "function_calling"}, {"method": "json_schema"}, {"strict": True}])
def test_langchain_reads_structured_answers(chat: Any, options: dict[str, Any]) -> None:
    model = chat.with_structured_output(Color, **options)
    for seed in range(3):
        color = model.invoke("A color?", seed=seed)
        assert isinstance(color, Color)
    assert isinstance(chat.with_structured_output(Palette, **options).invoke("Two colors?"), Palette)
    both = chat.with_structured_output(Color, include_raw=True, **options).invoke("A color?")
    assert both["parsing_error"] is None and isinstance(both["parsed"], Color)


def test_langchain_reads_json_schemas_and_typed_dicts(chat: Any) -> None:
    schema = {"title": "Color", "description": "A color.", **Color.model_json_schema()}
    schema["additionalProperties"] = False  # a random model would never stop to add some
    for method in ("function_calling", "json_schema"):
        answer = chat.with_structured_output(schema, method=method).invoke("A color?")
        assert Color.model_validate(answer)


def test_langchain_speaks_through_responses(server: RunningServer) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(
        model=MODEL, base_url=f"{server.url}/v1", api_key="none", max_tokens=200, max_retries=0, use_responses_api=True
    )
    answer = chat.invoke("Hello", max_tokens=5, temperature=0)
    assert answer.text
    assert "".join(piece.text for piece in chat.stream("Hello", max_tokens=5, temperature=0)) == answer.text
    bound = chat.bind_tools([Color], tool_choice="Color")
    assert Color.model_validate(bound.invoke("A color?").tool_calls[0]["args"])
    assert isinstance(chat.with_structured_output(Color, method="json_schema").invoke("A color?"), Color)


# ---------------------------------------------------------------- LiteLLM


@pytest.fixture(scope="module")
def lite(server: RunningServer) -> Callable[..., Any]:
    """Return LiteLLM's completion with the server's address."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches a list from the network
    litellm = pytest.importorskip("litellm")

    def ask(**options: Any) -> Any:
        given = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0, **options}
        return litellm.completion(model=f"openai/{MODEL}", api_base=f"{server.url}/v1", api_key="none", **given)

    return ask


def test_litellm_speaks(lite: Callable[..., Any]) -> None:
    answer = lite(user="me", metadata={"a": "b"}, top_k=5, stop=["never said"])
    assert answer.choices[0].message.content and answer.usage.completion_tokens == 5
    pieces = list(lite(stream=True, stream_options={"include_usage": True}))
    shown = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert shown == lite().choices[0].message.content


def test_litellm_calls_functions_and_sends_answers_back(lite: Callable[..., Any]) -> None:
    tools = [{"type": "function", "function": {"name": "paint", "parameters": Color.model_json_schema()}}]
    answer = lite(tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "paint" and Color.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Done."}
    again = lite(messages=[{"role": "user", "content": "Paint."}, message, result], tools=tools, temperature=0.5)
    assert again.choices[0].message is not None
    assert Color.model_validate_json(lite(response_format=Color, max_tokens=200).choices[0].message.content)
