"""What a request to the Responses API may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from .generation_fields import GenerationFields, JsonObjectFormat, StreamOptions, TextFormat
from .page_rules import needs
from .schemas import MAX_MESSAGES, MAX_PARTS
from .tool_schemas import FUNCTION_NAME, MAX_TOOLS, WHOLE, Parameters, Strict


class InputText(Strict):
    """A piece of a message's text; ``output_text`` in an assistant's."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(default=None, description="Of an earlier answer; not read.")
    logprobs: list[Any] | None = Field(default=None, description="Of an earlier answer; not read.")


class InputImage(Strict):
    """An image of a user's message."""

    type: Literal["input_image"]
    image_url: str = Field(min_length=1, description="A data URL, or an address where the server allows them.")
    detail: Literal["auto", "high", "low"] | None = None
    file_id: None = None


class RefusalText(Strict):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """Return what it said."""
        return self.refusal


InputPart = Annotated[InputText | InputImage | RefusalText, Field(discriminator="type")]
InputParts = Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


_TEXTS = ["input_text", "output_text", "text"]


def _parts_of(*more: str) -> dict[str, Any]:
    return {"items": {"properties": {"type": {"enum": [*_TEXTS, *more]}}}}


# What `MessageItem` checks beyond the types of its fields, for whoever reads the OpenAPI page.
_FIT_THEIR_ROLES: list[Any] = [
    {"properties": {"role": {"enum": ["user"]}, "content": {"minItems": 1, **_parts_of("input_image")}}},
    {"properties": {"role": {"enum": ["system", "developer"]}, "content": {"minItems": 1, **_parts_of()}}},
    {"properties": {"role": {"enum": ["assistant"]}, "content": _parts_of("refusal")}},
]


class MessageItem(Strict):
    """A message."""

    model_config = ConfigDict(json_schema_extra={"anyOf": _FIT_THEIR_ROLES})

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | InputParts
    id: str | None = None
    status: ItemStatus | None = None
    phase: str | None = None

    @model_validator(mode="after")
    def _only_users_show_images(self) -> MessageItem:
        parts = [] if isinstance(self.content, str) else self.content
        if self.role != "user" and any(isinstance(part, InputImage) for part in parts):
            raise ValueError(f"a message of role {self.role!r} cannot show images; put them into a user's message")
        if self.role != "assistant" and any(isinstance(part, RefusalText) for part in parts):
            raise ValueError(f"a message of role {self.role!r} cannot hold a refusal")
        if self.role != "assistant" and not isinstance(self.content, str) and not parts:
            raise ValueError(f"a message of role {self.role!r} needs a content")
        return self


class FunctionCallItem(Strict):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=256)
    name: str = Field(max_length=64, pattern=FUNCTION_NAME)
    arguments: str
    id: str | None = None
    status: ItemStatus | None = None


class FunctionOutputItem(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=256)
    output: str | Annotated[list[InputText], Field(max_length=MAX_PARTS, fail_fast=True)]
    id: str | None = None
    status: ItemStatus | None = None


def kind_of(item: Any) -> str:
    """Return which kind of item a dict is, in brackets, as a branch of the union; a message need not say so."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return f"[{kind}]" if kind in ("function_call", "function_call_output") else "[message]"


Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[FunctionCallItem, Tag("[function_call]")]
    | Annotated[FunctionOutputItem, Tag("[function_call_output]")],
    Discriminator(kind_of),
]


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(max_length=64, pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: str = Field(max_length=64)


class AllowedFunctions(Strict):
    """The demand to call no others than some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


Choice = Literal["none", "auto", "required"] | Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")]


class SchemaFormat(Strict):
    """An answer that is JSON of a schema."""

    type: Literal["json_schema"]
    name: str = Field(max_length=64, pattern=FUNCTION_NAME)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict):
    """What the text of the answer is."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(GenerationFields):
    """The body of a request to the Responses API."""

    model_config = ConfigDict(json_schema_extra=needs("stream_options", "stream"))

    model: str
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(default=None, description="At most what fits.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = Field(default=None, max_length=256)
    include: Annotated[list[str], Field(max_length=16)] | None = Field(
        default=None,
        description="message.output_text.logprobs; what this server never has, such as reasoning, is not added.",
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    truncation: Literal["disabled"] | None = Field(default=None, description="A prompt that is too long is refused.")
    reasoning: dict[str, Any] | None = Field(default=None, description="Taken; this model does not reason apart.")
    max_tool_calls: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        default=None, description="Of built-in tools; there are none."
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    def forms(self) -> list[str]:
        """Return the names of the fields given that constrain the answer."""
        form = self.text.format if self.text is not None else None
        formatted = form is not None and form.type != "text"
        return [*["text.format"] * formatted, *super().forms()]

    @property
    def wants_logprobs(self) -> bool:
        """Whether log probabilities are to be told."""
        return "message.output_text.logprobs" in (self.include or []) or bool(self.top_logprobs)
