"""Where a conversation ends for the model to go on: behind the assistant's tag, or within the last message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What a request cannot set through the template's variables.
RESERVED = ("chat_template", "tokenize", "messages", "tools", "documents")
SWITCHES = ("add_generation_prompt", "continue_final_message")
# The same, for whoever reads the OpenAPI page.
TEMPLATE_OPTIONS: dict[str, Any] = {"propertyNames": {"not": {"enum": [*RESERVED, *SWITCHES]}}}
ONE_ENDING: dict[str, Any] = {
    "anyOf": [
        {"properties": {"add_generation_prompt": {"enum": [False, None]}}},
        {"properties": {"continue_final_message": {"enum": [False, None]}}},
    ]
}


@dataclass(frozen=True)
class Ending:
    """How a conversation ends, in the words of transformers' chat templates.

    Attributes:
        add_generation_prompt: with the assistant's tag behind a user's turn.
        continue_final_message: within the last turn, whoever speaks.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False


def ending_of(options: dict[str, Any] | None, last_role: str, add_prompt: bool | None, go_on: bool | None) -> Ending:
    """Return how a conversation ends; a last message of the assistant's is gone on with, unless a request says else.

    Args:
        options: ``chat_template_kwargs``, which may say it too.
        last_role: of the last message.
        add_prompt: ``add_generation_prompt``.
        go_on: ``continue_final_message``.

    Raises:
        ValueError: the request contradicts itself, or sets what it cannot.
    """
    given = dict(zip(SWITCHES, (add_prompt, go_on), strict=True))
    for name, value in (options or {}).items():
        if name in RESERVED:
            raise ValueError(f"chat_template_kwargs cannot set {name!r}")
        if name in SWITCHES:
            if not isinstance(value, bool | None):
                raise ValueError(f"chat_template_kwargs.{name} must be true or false")
            given[name] = value if value is not None else given[name]
    if all(given.values()):
        raise ValueError("add_generation_prompt and continue_final_message cannot both be true")
    add_prompt, go_on = given.values()
    if add_prompt is not False and (last_role == "assistant" or go_on):
        add_prompt, go_on = False, True
    return Ending(add_prompt is not False, bool(go_on))
