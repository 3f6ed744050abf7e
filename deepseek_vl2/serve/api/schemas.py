"""What a chat request may say. Fields that would change the answer and are not supported are refused, never ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import from_json

from .endings import ONE_ENDING, TEMPLATE_OPTIONS, Ending, ending_of
from .errors import ApiError, from_validation
from .generation_fields import GenerationFields, Number, ResponseFormat, StreamOptions
from .json_size import MAX_VALUES, count_values
from .page_rules import all_of, needs, not_together
from .tool_schemas import MAX_TOOLS, WHOLE, Strict, Tool, ToolCall, ToolChoice, chosen_names

MAX_MESSAGES = 1024
MAX_PARTS = 256

# Fields of OpenAI's and vLLM's APIs that would change the answer, and the values of them that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "moderation": (None,),
    "background": (None, False),
    "prompt": (None,),
    "conversation": (None,),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "prompt_logprobs": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "return_tokens_as_token_ids": (None, False),
    "return_token_ids": (None, False),
    "documents": (None,),
    "chat_template": (None,),
    "mm_processor_kwargs": (None, {}),
    "logits_processors": (None, []),
    "kv_transfer_params": (None,),
    "vllm_xargs": (None, {}),
}


class TextPart(Strict):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str
    cache_control: Any = Field(default=None, description="Taken; it changes nothing.")


class ImageUrl(Strict):
    """Where an image is: a ``data:`` URL with base64, or an http(s) address where the server allows them."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "high", "low"] | None = Field(
        default=None, description="'low': one view of 384x384 pixels, no tiles; for all images of a request or none."
    )


class ImagePart(Strict):
    """An image of a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl | Annotated[str, Field(min_length=1)]
    cache_control: Any = Field(default=None, description="Taken; it changes nothing.")
    _place: str = PrivateAttr("")

    @property
    def url(self) -> str:
        """Return where the image is."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url

    @property
    def detail(self) -> str:
        """Return how closely it is to be looked at."""
        return "auto" if isinstance(self.image_url, str) else self.image_url.detail or "auto"

    @property
    def place(self) -> str:
        """Return the field of the request that holds the image."""
        return self._place

    def at(self, place: str) -> ImagePart:
        """Remember which field of the request holds the image; returns the part."""
        self._place = place
        return self


class RefusalPart(Strict):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]
Calls = Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)]
Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


def _of_roles(roles: list[str], content: dict[str, Any], call: str, required: list[str]) -> dict[str, Any]:
    """Return what JSON Schema says of a message of some roles."""
    fields: dict[str, Any] = {"role": {"enum": roles}, "content": content, "tool_call_id": {"type": call}}
    if "assistant" not in roles:
        fields |= {"tool_calls": {"maxItems": 0}, "refusal": {"type": "null"}}
    return {"properties": fields, "required": required}


def _parts_of(*kinds: str) -> dict[str, Any]:
    return {"items": {"properties": {"type": {"enum": list(kinds)}}}}


_SOME_CONTENT = {"type": ["string", "array"], "minItems": 1}
# What `Message` checks beyond the types of its fields, for whoever reads the OpenAPI page.
_FIT_THEIR_ROLES: list[Any] = [
    _of_roles(["user"], {**_SOME_CONTENT, **_parts_of("text", "image_url")}, "null", ["content"]),
    _of_roles(["system", "developer"], {**_SOME_CONTENT, **_parts_of("text")}, "null", ["content"]),
    _of_roles(["assistant"], _parts_of("text", "refusal"), "null", []),
    _of_roles(["tool"], {**_SOME_CONTENT, **_parts_of("text")}, "string", ["content", "tool_call_id"]),
]


class Message(Strict):
    """A turn of the conversation."""

    model_config = ConfigDict(json_schema_extra={"anyOf": _FIT_THEIR_ROLES})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = Field(default=None, description="null for an assistant alone.")
    tool_calls: Calls | None = Field(default=None, description="Of an assistant.")
    tool_call_id: str | None = Field(default=None, description="Of a tool: the call that this answers.")
    name: str | None = Field(default=None, description="Taken; it changes nothing.")
    cache_control: Any = Field(default=None, description="Taken; it changes nothing.")
    # What clients send back with an answer of the server's, or of another's.
    refusal: str | None = Field(default=None, description="Of an assistant: what it said instead of an answer.")
    annotations: list[Any] | None = Field(default=None, description="Of an earlier answer; not read.")
    audio: None = None
    function_call: None = None
    reasoning_content: str | None = Field(default=None, description="Of an earlier answer; not read.")
    provider_specific_fields: Any = Field(default=None, description="Of an earlier answer; not read.")
    grounding: Any = Field(default=None, description="Of an earlier answer; not read.")

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts):
            raise ValueError(f"a message of role {self.role!r} cannot show images; put them into a user's message")
        refusals = isinstance(self.content, list) and any(isinstance(part, RefusalPart) for part in self.content)
        if self.role != "assistant" and (refusals or self.refusal is not None):
            raise ValueError(f"a message of role {self.role!r} cannot hold a refusal")
        if self.role != "assistant" and not self.parts:
            raise ValueError(f"a message of role {self.role!r} needs a content")
        if self.role != "assistant" and self.tool_calls:
            raise ValueError(f"a message of role {self.role!r} cannot have tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a message needs tool_call_id where its role is 'tool', and nowhere else")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Return the content as parts; a refusal is what the assistant said."""
        content = [] if self.content is None else self.content
        given: list[Part] = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        if self.refusal:
            given = [*given, RefusalPart(type="refusal", refusal=self.refusal)]
        return [TextPart(type="text", text=p.refusal) if isinstance(p, RefusalPart) else p for p in given]

    @property
    def text(self) -> str:
        """Return the content's text."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


# A conversation of system messages alone asks for nothing.
_SOMEBODY_SPEAKS = {"contains": {"properties": {"role": {"enum": ["user", "assistant", "tool"]}}}}
Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True, json_schema_extra=_SOMEBODY_SPEAKS),
]
TemplateOptions = Annotated[
    dict[str, Any],
    Field(json_schema_extra=TEMPLATE_OPTIONS, description="Taken; this model's template has no other variables."),
]
GenerationPrompt = Annotated[
    bool | None, Field(description="Default: true. false: end the conversation behind the last message.")
]
ContinueFinalMessage = Annotated[
    bool | None,
    Field(description="Go on within the last message. Of one of the assistant's that is so without being asked for."),
]


class ChatRequest(GenerationFields):
    """The body of a chat completion request."""

    model_config = ConfigDict(
        json_schema_extra=all_of(
            ONE_ENDING,
            needs("stream_options", "stream"),
            needs("top_logprobs", "logprobs"),
            not_together("max_tokens", "max_completion_tokens"),
        )
    )

    model: str
    messages: Messages
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Number | None = None
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(default=None, description="At most what fits.")
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        default=None, description="The same as max_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="Default: true.")
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: GenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    grounding: bool | None = Field(default=None, description="Add the answer's boxes as message.grounding.")
    reasoning_effort: str | None = Field(default=None, description="Taken; this model does not reason apart.")
    include_reasoning: bool | None = Field(default=None, description="Taken; this model does not reason apart.")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        self.ending  # noqa: B018 - says what contradicts itself
        self._check_tools()
        for index, message in enumerate(self.messages):
            for number, part in enumerate(message.parts):
                if isinstance(part, ImagePart) and not part.place:
                    part.at(f"messages.{index}.content.{number}.image_url")
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        choice = self.tool_choice
        if not names and choice not in (None, "none", "auto"):
            raise ValueError("tool_choice needs tools")
        unknown = next((name for name in chosen_names(choice) if name not in names), None)
        if unknown is not None:
            raise ValueError(f"tool_choice names {unknown!r}, which is not among the tools")
        given = [*super().forms(), *["ignore_eos"] * bool(self.ignore_eos)]  # an answer in words may be JSON
        if names and choice != "none" and given:
            raise ValueError(f"{given[0]} cannot be used with tools: the calls have a form of their own")

    def forms(self) -> list[str]:
        """Return the names of the fields given that constrain the answer."""
        formatted = self.response_format is not None and self.response_format.type != "text"
        return [*["response_format"] * formatted, *super().forms()]

    @property
    def ending(self) -> Ending:
        """Return where the conversation ends."""
        role = self.messages[-1].role
        return ending_of(self.chat_template_kwargs, role, self.add_generation_prompt, self.continue_final_message)

    @property
    def wanted_tokens(self) -> int | None:
        """Return the most tokens that the answer may have, where the request says so."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


RequestT = TypeVar("RequestT", bound=Strict)


def refuse_unsupported(fields: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Return a request's fields without those that ask for nothing.

    Raises:
        ApiError: one of them asks for what this server does not do.
    """
    for name, harmless in UNSUPPORTED.items():
        if name in fields and name not in known:
            value = fields[name]
            if not any(value == nothing and type(value) is type(nothing) for nothing in harmless):
                message = f"This server does not support {name!r}; leave it out."
                raise ApiError(400, message, name, "unsupported_parameter")
    return {name: value for name, value in fields.items() if name not in UNSUPPORTED or name in known}


def parse_body(
    body: bytes, kind: type[RequestT], check_model: Callable[[str], None], most_values: int = MAX_VALUES
) -> RequestT:
    """Read a request's body.

    Args:
        body: the body.
        kind: what it is to hold.
        check_model: is told which model it asks for, before anything else is looked at.
        most_values: values that it may hold.

    Raises:
        ApiError: it is not JSON, or not a request this server can serve.
    """
    if count_values(body, most_values) > most_values:
        raise ApiError(400, f"The body holds more than the {most_values:,} values allowed.", code="request_too_large")
    try:
        fields = from_json(body, allow_inf_nan=False, allow_partial=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ApiError(400, f"The body must be a JSON object, got {type(fields).__name__}.")
    if isinstance(fields.get("model"), str):
        check_model(fields["model"])
    try:
        return kind.model_validate(refuse_unsupported(fields, set(kind.model_fields)))
    except ValidationError as error:
        raise from_validation(error) from error
