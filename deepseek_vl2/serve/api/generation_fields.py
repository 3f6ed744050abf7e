"""The fields of a request that say how its answer is written; all endpoints that generate share them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from .tool_schemas import WHOLE, Strict

MAX_STOP_WORDS = 16
MAX_STOP_TOKENS = 64
MAX_CHOICES = 1024
MAX_BIASED_TOKENS = 1024
MAX_LABELS = 64
# Below this a temperature means the most likely token: dividing by it would overflow.
LOWEST_TEMPERATURE = 1e-4

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE]
StopWord = Annotated[str, Field(min_length=1, max_length=256)]
# The OpenAPI page says how many tokens, choices and positions the served model has, where these marks stand.
TOKEN_MARK, TEXT_MARK, LENGTH_MARK, CHOICES_MARK = "x-token", "x-text-token", "x-length", "x-choices"
TokenId = Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={TOKEN_MARK: True}), WHOLE]
Number = Annotated[int, Field(ge=1, json_schema_extra={CHOICES_MARK: True}), WHOLE]
LogitBias = Annotated[
    dict[str, float],
    Field(
        max_length=MAX_BIASED_TOKENS,
        json_schema_extra={
            "propertyNames": {TOKEN_MARK: True},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
    ),
]
Choice = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


# Fields of which each gives the answer a form.
FORMS = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "regex")


class StreamOptions(Strict):
    """How to stream; what is not known here changes no answer, and is taken."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="With include_usage: counts in every event.")
    include_obfuscation: bool | None = Field(default=None, description="Taken; nothing is padded.")


class StructuredOutputs(Strict):
    """vLLM's description of what the answer must be: exactly one of json, json_object, regex, choice and grammar."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json", description="A JSON schema.")
    json_object: bool | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Choices | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = Field(default=None, description="Lark, or GBNF.")
    whitespace_pattern: str | None = Field(default=None, description="Of JSON; default: no white space.")
    disable_any_whitespace: bool | None = Field(default=None, description="Of JSON; false allows white space.")
    disable_additional_properties: bool | None = Field(
        default=None, description="Close every object that names properties."
    )
    disable_fallback: bool | None = Field(default=None, description="Taken; there is one backend.")


class GenerationFields(Strict):
    """How an answer is written, beyond what each endpoint names by itself."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: StopWord | Annotated[list[StopWord], Field(max_length=MAX_STOP_WORDS, fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    # Beyond OpenAI's fields, as vLLM names them.
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = Field(
        default=None, description="0 and -1: all tokens."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    ignore_eos: bool | None = Field(
        default=None, description="Write max_tokens tokens, whatever they are; for measuring."
    )
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = Field(default=None, description="A JSON schema.")
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    guided_choice: Choices | None = None
    guided_grammar: Annotated[str, Field(min_length=1)] | None = None
    guided_whitespace_pattern: str | None = None
    # This server's own.
    regex: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The whole answer matches this."
    )
    json_whitespace: bool | None = Field(default=None, description="Allow line breaks and indentation in JSON answers.")
    # What leaves the answer as it is.
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_LABELS)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    priority: Annotated[int, WHOLE] | None = None
    guided_decoding_backend: str | None = None
    spaces_between_special_tokens: bool | None = None

    @field_validator("logit_bias")
    @classmethod
    def _bias_ids_and_range(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and str(int(token)) == token):
                raise ValueError(f"{token[:20]!r} is not a token id")
            if not -100 <= value <= 100:
                raise ValueError(f"the bias {value} of token {token} is not between -100 and 100")
        return bias

    @model_validator(mode="after")
    def _one_form(self) -> GenerationFields:
        given = self.forms()
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(given)}: an answer has one form")
        if given and self.ignore_eos:
            raise ValueError(f"ignore_eos cannot be used with {given[0]}: a finished answer ends there")
        return self

    def forms(self) -> list[str]:
        """Return the names of the fields given that constrain the answer."""
        return [name for name in FORMS if getattr(self, name) is not None]

    @property
    def stop_words(self) -> tuple[str, ...]:
        """Return the stop words."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


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
    strict: bool | None = Field(default=None, description="Every schema is enforced, whatever stands here.")


class JsonSchemaFormat(Strict):
    """An answer that is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
