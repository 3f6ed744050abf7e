"""From the messages of a request to the turns of the model's conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import ApiError
from .schemas import ImagePart, Message, TextPart
from .tools import ToolUse, assistant_text, called_names, result_text

SYSTEM_ROLES = ("system", "developer")


@dataclass
class Turn:
    """A turn of the conversation, as the processor takes it."""

    role: str
    parts: list[TextPart | ImagePart] = field(default_factory=list)

    def add_text(self, text: str) -> None:
        """Add a text."""
        self.parts.append(TextPart(type="text", text=text))


def system_turn(messages: Sequence[Message], tools: ToolUse) -> list[Turn]:
    """Return the system messages at the front and the tools' instructions as one turn, where there is something."""
    texts = [message.text for message in messages] + ([tools.instructions()] if tools else [])
    return [Turn("system", [TextPart(type="text", text="\n\n".join(texts))])] if texts else []


def conversation_turns(messages: Sequence[Message], tools: ToolUse, field: str = "messages") -> list[Turn]:
    """Return the turns of a conversation.

    System messages at the front are joined. Calls are written into the assistant's turn as the model wrote them.
    Results of functions, and what the user says right after them, are one turn of the user.

    Args:
        messages: the conversation.
        tools: what may be called.
        field: the field of the request that holds the messages, for errors.

    Raises:
        ApiError: a system message that is not at the front, a result of a call that nobody made, or nothing to answer.
    """
    front = next((i for i, message in enumerate(messages) if message.role not in SYSTEM_ROLES), len(messages))
    turns = system_turn(messages[:front], tools)
    names = called_names(messages)
    after_result = False
    for index, message in enumerate(messages[front:], front):
        if message.role in SYSTEM_ROLES:
            reason = f"{field}: a system message must come first, but one is message {index + 1} of {len(messages)}."
            raise ApiError(400, reason, field)
        if message.role == "assistant":
            turns.append(Turn("assistant", [TextPart(type="text", text=assistant_text(message))]))
            after_result = False
            continue
        if not after_result:
            turns.append(Turn("user"))
        elif turns[-1].parts:
            turns[-1].add_text("\n")
        if message.role == "tool":
            turns[-1].add_text(result_text(called_name(message, names, field), message.text))
        else:
            turns[-1].parts += message.parts
        after_result = message.role == "tool"
    if front == len(messages):
        raise ApiError(400, "The last message must be a user's, or an assistant's to go on with.", field)
    return turns


def called_name(message: Message, names: dict[str, str], field: str) -> str:
    """Return the function whose result a message holds.

    Raises:
        ApiError: no message has that call.
    """
    name = names.get(message.tool_call_id or "")
    if name is None:
        missing = (message.tool_call_id or "")[:100]
        raise ApiError(400, f"{field}: no message has a call with the id {missing!r}.", field)
    return name
