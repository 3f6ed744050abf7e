"""Tools as a chat request describes them, and the calls that answers hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_TOOLS = 128
FUNCTION_NAME = r"^[A-Za-z0-9_-]+$"


class Strict(BaseModel):
    """A model that knows all of its fields and converts nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)


def whole_number(value: Any) -> Any:
    """Return ``4`` for ``4.0``, which is an integer in JSON, and anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(whole_number)


def check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of arguments; raise ``ValueError`` where it is not one of an object."""
    if schema.get("type", "object") != "object":
        raise ValueError("a function's arguments are an object: the schema's type must be 'object'")
    return schema


Parameters = Annotated[dict[str, Any], AfterValidator(check_parameters)]


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(max_length=64, pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: Parameters | None = Field(default=None, description="A JSON schema of an object; none: no arguments.")
    strict: bool | None = Field(default=None, description="Refuse a schema of which a part cannot be enforced.")


class Tool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function
    cache_control: Any = Field(default=None, description="Taken; it changes nothing.")


class FunctionName(Strict):
    """The function that must be called."""

    name: str = Field(max_length=64)


class NamedToolChoice(Strict):
    """The demand to call one function."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    """The functions that may be called, out of the request's tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolChoice(Strict):
    """The demand to call no others than some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["none", "auto", "required"] | Annotated[NamedToolChoice | AllowedToolChoice, Field(discriminator="type")]
)


def chosen_names(choice: str | NamedToolChoice | AllowedToolChoice | None) -> list[str]:
    """Return the functions that a choice names."""
    if isinstance(choice, NamedToolChoice):
        return [choice.function.name]
    return [tool.function.name for tool in choice.allowed_tools.tools] if isinstance(choice, AllowedToolChoice) else []


class CalledFunction(Strict):
    """A function and its arguments, as an answer named them."""

    name: str = Field(max_length=64, pattern=FUNCTION_NAME)
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, WHOLE] | None = Field(default=None, description="Of streamed calls; not read.")
