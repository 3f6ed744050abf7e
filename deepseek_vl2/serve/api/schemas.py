"""What a request may say. Fields that would change the answer and are not supported are refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from .errors import ApiError, from_validation
from .json_size import MAX_VALUES, count_values

MAX_STOP_WORDS = 16
MAX_BIASED_TOKENS = 1024
MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_LABELS = 64
# Below this a temperature means the most likely token: dividing by it would overflow.
LOWEST_TEMPERATURE = 1e-4

# Fields of OpenAI's API that would change the answer, and the values of them that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),  # of tools, which are refused
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
}


class Strict(BaseModel):
    """A model that knows all of its fields and converts nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is: a ``data:`` URL with base64, or an http(s) address where the server allows them."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "high", "low"] | None = Field(
        None, description="'low': one view of 384x384 pixels, no tiles; for all images of a request or none."
    )


class ImagePart(Strict):
    """An image of a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    # What clients send back with an answer of the server's.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    grounding: Any = Field(None, description="Of an earlier answer; not read.")

    @model_validator(mode="after")
    def _only_users_show_images(self) -> Message:
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts):
            raise ValueError(f"a message of role {self.role!r} cannot show images; put them into a user's message")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Return the content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool | None = None


class TextFormat(Strict):
    """An answer without a form."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """An answer that is some JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A named JSON schema."""

    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="Every schema is enforced, whatever stands here.")


class JsonSchemaFormat(Strict):
    """An answer that is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StopWord = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(Strict):
    """The body of a chat completion request."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: StopWord | Annotated[list[StopWord], Field(max_length=MAX_STOP_WORDS, fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_BIASED_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    # Labels of a request, which leave the answer as it is.
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_LABELS)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Beyond OpenAI's fields.
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = Field(None, description="The whole answer matches this.")
    grounding: bool | None = Field(None, description="Add the answer's boxes as message.grounding.")
    ignore_eos: bool | None = Field(None, description="Write max_tokens tokens, whatever they are; for measuring.")

    @field_validator("logit_bias")
    @classmethod
    def _bias_ids_and_range(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ValueError(f"{token[:20]!r} is not a token id")
            if not -100 <= value <= 100:
                raise ValueError(f"the bias {value} of token {token} is not between -100 and 100")
        return bias

    @model_validator(mode="after")
    def _fields_fit_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.regex is not None:
            raise ValueError("give response_format or regex, not both")
        if self.ignore_eos and (formatted or self.regex is not None):
            raise ValueError("ignore_eos cannot be used with response_format or regex: a finished answer ends there")
        return self

    @property
    def stop_words(self) -> tuple[str, ...]:
        """Return the stop words."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        """Return the most tokens that the answer may have, where the request says so."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


def _refuse_unsupported(fields: dict[str, Any]) -> dict[str, Any]:
    for name, harmless in UNSUPPORTED.items():
        if name in fields and not any(
            fields[name] == value and type(fields[name]) is type(value) for value in harmless
        ):
            raise ApiError(400, f"This server does not support {name!r}; leave it out.", name, "unsupported_parameter")
    return {name: value for name, value in fields.items() if name not in UNSUPPORTED}


def parse_request(body: bytes) -> ChatRequest:
    """Read a request's body.

    Raises:
        ApiError: it is not JSON, or not a request this server can serve.
    """
    if count_values(body, MAX_VALUES) > MAX_VALUES:
        raise ApiError(400, f"The body holds more than the {MAX_VALUES:,} values allowed.", code="request_too_large")
    try:
        fields = from_json(body, allow_inf_nan=False, allow_partial=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ApiError(400, f"The body must be a JSON object, got {type(fields).__name__}.")
    try:
        return ChatRequest.model_validate(_refuse_unsupported(fields))
    except ValidationError as error:
        raise from_validation(error) from error
