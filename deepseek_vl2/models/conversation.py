"""Prompt templates: how the turns of a conversation become one string.

Source: ``conversation.py`` of the original package, which follows FastChat's.
"""

from __future__ import annotations

import dataclasses
from enum import IntEnum, auto
from typing import Any

from .config_fields import FieldError

END_OF_SENTENCE = "<｜end▁of▁sentence｜>"


class SeparatorStyle(IntEnum):
    """How a template joins roles, messages and separators."""

    DeepSeek = auto()
    DeepSeekV2 = auto()
    PLAIN = auto()
    ALIGNMENT = auto()


@dataclasses.dataclass
class Conversation:
    """A prompt template together with the messages said so far.

    Attributes:
        name: name in the registry.
        system_template: format of the system message, with ``{system_message}``.
        system_message: text of the system message.
        roles: tags of the user and of the assistant.
        messages: ``[role, text]`` pairs; an empty text asks for that role's answer.
        offset: number of example messages at the front.
        sep_style: how everything is joined.
        sep: ends a user turn.
        sep2: ends an assistant turn.
        stop_str: strings that end an answer.
        stop_token_ids: ids that end an answer.
    """

    name: str
    system_template: str = "{system_message}"
    system_message: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    messages: list[list[Any]] = dataclasses.field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.DeepSeek
    sep: str = "\n"
    sep2: str = ""
    stop_str: list[str] | None = None
    stop_token_ids: list[int] | None = None

    def get_prompt(self) -> str:
        """Return the conversation as one string, ready to be tokenized."""
        system = self.system_template.format(system_message=self.system_message)
        if self.sep_style == SeparatorStyle.DeepSeek:
            return (system + self.sep if system else "") + self._tagged_turns()
        if self.sep_style == SeparatorStyle.DeepSeekV2:
            return (system + self.sep if system else "") + self._sft_turns()
        if self.sep_style == SeparatorStyle.PLAIN:
            return self._bare_turns(user_text=None)
        if self.sep_style == SeparatorStyle.ALIGNMENT:
            return self._bare_turns(user_text="<image>\n")
        raise ValueError(f"Unknown separator style: {self.sep_style!r}.")

    def _separator(self, index: int) -> str:
        return self.sep2 if index % 2 else self.sep

    def _tagged_turns(self) -> str:
        turns = (
            f"{role}: {text}{self._separator(index)}" if text else f"{role}:"
            for index, (role, text) in enumerate(self.messages)
        )
        return "".join(turns)

    def _sft_turns(self) -> str:
        # Only the role "User" opens a turn, whatever the template's own tags are: so it is in the original.
        turns = (
            f"<｜sft▁begin｜>\n{text}{self.sep}" if role == "User" else f"{text}{self.sep2}"
            for role, text in self.messages
            if text
        )
        return "".join(turns)

    def _bare_turns(self, user_text: str | None) -> str:
        turns = []
        for index, (_, content) in enumerate(self.messages):
            if not content:
                continue
            text = content[0] if isinstance(content, tuple) else content
            if user_text is not None and index % 2 == 0:
                text = user_text
            turns.append(text + self._separator(index))
        return "".join(turns)

    def set_system_message(self, system_message: str) -> None:
        """Replace the system message."""
        self.system_message = system_message

    def append_message(self, role: str, message: Any) -> None:
        """Append a turn; an empty ``message`` asks ``role`` for its answer."""
        self.messages.append([role, message])

    def update_last_message(self, message: Any) -> None:
        """Fill in the last turn, usually with the model's answer."""
        self.messages[-1][1] = message

    def reset_message(self) -> None:
        """Forget all turns."""
        self.messages = []

    def to_gradio_chatbot(self) -> list[list[Any]]:
        """Return the turns as ``[user, assistant]`` pairs."""
        texts = [text for _, text in self.messages[self.offset :]]
        return [[user, texts[2 * i + 1] if 2 * i + 1 < len(texts) else None] for i, user in enumerate(texts[::2])]

    def to_openai_api_messages(self) -> list[dict[str, Any]]:
        """Return the turns as OpenAI chat messages."""
        system = self.system_template.format(system_message=self.system_message)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
        for index, (_, text) in enumerate(self.messages[self.offset :]):
            if index % 2 == 0:
                messages.append({"role": "user", "content": text})
            elif text is not None:
                messages.append({"role": "assistant", "content": text})
        return messages

    def copy(self) -> Conversation:
        """Return a copy whose turns can change without changing this one."""
        return dataclasses.replace(self, messages=[list(message) for message in self.messages])

    def dict(self) -> dict[str, Any]:
        """Return name, system message, roles and turns as a plain dict."""
        return {
            "template_name": self.name,
            "system_message": self.system_message,
            "roles": self.roles,
            "messages": self.messages,
            "offset": self.offset,
        }


conv_templates: dict[str, Conversation] = {}


def register_conv_template(template: Conversation, override: bool = False) -> None:
    """Add a template to the registry.

    Raises:
        ValueError: the name is taken and ``override`` is not set.
    """
    if not override and template.name in conv_templates:
        raise ValueError(f"A conversation template named {template.name!r} is registered already.")
    conv_templates[template.name] = template


def get_conv_template(name: str) -> Conversation:
    """Return a fresh copy of the template of that name.

    Raises:
        ValueError: no template has that name.
    """
    if name not in conv_templates:
        raise FieldError(f"Unknown conversation template {name!r}: expected one of {', '.join(conv_templates)}.")
    return conv_templates[name].copy()


register_conv_template(
    Conversation(
        name="deepseek",
        roles=("<|User|>", "<|Assistant|>"),
        sep_style=SeparatorStyle.DeepSeek,
        sep="\n\n",
        sep2=END_OF_SENTENCE,
        stop_token_ids=[100001],
        stop_str=["User:", END_OF_SENTENCE],
    )
)
register_conv_template(
    Conversation(
        name="deepseekv2",
        roles=("|<User>|", "|<Assistant>|"),
        sep_style=SeparatorStyle.DeepSeekV2,
        sep="\n<｜sft▁end｜>",
        sep2=END_OF_SENTENCE,
        stop_token_ids=[100001],
        stop_str=["User:", END_OF_SENTENCE],
    )
)
for _name, _style in (("plain", SeparatorStyle.PLAIN), ("alignment", SeparatorStyle.ALIGNMENT)):
    register_conv_template(
        Conversation(
            name=_name,
            system_template="",
            roles=("", ""),
            sep_style=_style,
            sep="",
            stop_token_ids=[100001],
            stop_str=["</s>"],
        )
    )
