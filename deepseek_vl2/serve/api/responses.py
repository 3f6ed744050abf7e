"""The Responses API: its items as messages, its request as what the engine is asked."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from .answers import Answers
from .chat_endpoint import chat_grammar
from .errors import ApiError, from_validation
from .generation import Generator, sampling_params
from .response_reply import ResponsesReply
from .response_schemas import (
    AllowedFunctions,
    FunctionCallItem,
    FunctionOutputItem,
    InputImage,
    InputText,
    MessageItem,
    NamedFunction,
    RefusalText,
    ResponsesRequest,
    SchemaFormat,
)
from .response_store import ResponseStore
from .schemas import ChatRequest, ImagePart, ImageUrl, Message, Part, TextPart
from .tool_schemas import (
    AllowedToolChoice,
    AllowedTools,
    CalledFunction,
    Function,
    FunctionName,
    NamedToolChoice,
    Tool,
    ToolCall,
    ToolChoice,
)
from .tools import ToolUse
from .turns import conversation_turns


def message_parts(content: str | list[Any], place: str) -> list[Part]:
    """Return a message's content as a chat message has it."""
    if isinstance(content, str):
        return [TextPart(type="text", text=content)]
    parts: list[Part] = []
    for index, part in enumerate(content):
        if isinstance(part, InputImage):
            url = ImageUrl(url=part.image_url, detail=part.detail)
            parts.append(ImagePart(type="image_url", image_url=url).at(f"{place}.content.{index}.image_url"))
        else:
            assert isinstance(part, (InputText, RefusalText))
            parts.append(TextPart(type="text", text=part.text))
    return parts


def messages_of(request: ResponsesRequest) -> list[Message]:
    """Return a request's input as messages; calls that follow each other, or a text, are one of the assistant."""
    if isinstance(request.input, str):
        return [Message(role="user", content=request.input)]
    messages: list[Message] = []
    for index, item in enumerate(request.input):
        if isinstance(item, MessageItem):
            messages.append(Message(role=item.role, content=message_parts(item.content, f"input.{index}")))
        elif isinstance(item, FunctionCallItem):
            call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            if not messages or messages[-1].role != "assistant":
                messages.append(Message(role="assistant", content=None))
            messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]
        else:
            assert isinstance(item, FunctionOutputItem)
            text = item.output if isinstance(item.output, str) else "".join(part.text for part in item.output)
            messages.append(Message(role="tool", content=text, tool_call_id=item.call_id))
    return messages


def response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    """Return the form of the answer as a chat request says it."""
    form = request.text.format if request.text is not None else None
    if isinstance(form, SchemaFormat):
        return {"type": "json_schema", "json_schema": form.model_dump(exclude={"type"}, by_alias=True)}
    return None if form is None else form.model_dump()


def tool_choice(request: ResponsesRequest) -> ToolChoice | None:
    """Return which functions may or must be called as a chat request says it."""

    def named(function: NamedFunction) -> NamedToolChoice:
        return NamedToolChoice(type="function", function=FunctionName(name=function.name))

    choice = request.tool_choice
    if isinstance(choice, NamedFunction):
        return named(choice)
    if isinstance(choice, AllowedFunctions):
        allowed = AllowedTools(mode=choice.mode, tools=[named(function) for function in choice.tools])
        return AllowedToolChoice(type="allowed_tools", allowed_tools=allowed)
    return choice


def as_chat(request: ResponsesRequest, earlier: list[Message]) -> ChatRequest:
    """Return what a request would be as a chat request, without the instructions.

    Raises:
        ApiError: its fields contradict each other.
    """
    tools = [
        Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in request.tools or []
    ]
    shared = {name: getattr(request, name) for name in ("structured_outputs", *OWN_FORMS)}
    try:
        return ChatRequest(
            model=request.model,
            messages=[*earlier, *messages_of(request)],
            tools=tools or None,
            tool_choice=tool_choice(request),
            parallel_tool_calls=request.parallel_tool_calls,
            response_format=response_format(request),  # type: ignore[arg-type]
            ignore_eos=request.ignore_eos,
            **shared,
        )
    except ValidationError as error:
        raise from_validation(error) from error


OWN_FORMS = (
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern", "regex",
    "json_whitespace",
)  # fmt: skip


class ResponsesEndpoint:
    """Serves ``/v1/responses``.

    Args:
        generator: prepares requests for answers.
        store: keeps responses for later requests.
    """

    def __init__(self, generator: Generator, store: ResponseStore) -> None:
        self.generator = generator
        self.store = store

    def parse(self, body: bytes) -> ResponsesRequest:
        """Read a request; errors as `Generator.parse`."""
        return self.generator.parse(body, ResponsesRequest)

    def check(self, request: ResponsesRequest) -> None:
        """Check a request; errors as `Generator.check`."""
        self.generator.check(request)

    def _earlier(self, name: str | None) -> list[Message]:
        if name is None:
            return []
        found = self.store.get(name)
        if found is None:
            message = (
                f"There is no response {name[:100]!r} any more: this server keeps the last {self.store.most}, for "
                f"{self.store.seconds / 60:g} minutes. Send the whole conversation as input."
            )
            raise ApiError(404, message, "previous_response_id", "previous_response_not_found")
        return list(found.messages)

    async def submit(self, request: ResponsesRequest, answers: Answers) -> ResponsesReply:
        """Prepare the prompt and hand a request to the engine.

        Raises:
            ApiError: prompt or grammar cannot be used, or the engine does not take it.
        """
        generator = self.generator
        chat = as_chat(request, self._earlier(request.previous_response_id))
        messages = chat.messages
        if request.instructions is not None:
            messages = [Message(role="system", content=request.instructions), *messages]
        tools = ToolUse.of(chat)
        (constraint,) = await generator.constraints(bool(tools or chat.forms()), lambda: chat_grammar(chat, tools), 1)
        prepared = await generator.builder.build(conversation_turns(messages, tools, "input"), "input")
        max_tokens = generator.max_tokens(len(prepared.prompt), request, request.max_output_tokens, "input")
        grammar = None if constraint is None else (lambda: constraint)
        logprobs = (request.top_logprobs or 0) if request.wants_logprobs else None
        params = sampling_params(request, max_tokens, logprobs=logprobs, grammar=grammar)
        answers.submit([generator.request(params, prepared.prompt, answers.sink(0))])
        store = None if request.store is False else self.store
        name, token_bytes = generator.settings.model_name, generator.token_bytes
        return ResponsesReply(request, chat.messages, name, len(prepared.prompt), answers, token_bytes, tools, store)
