"""One walk over the turns of a conversation, from which it is printed, encoded, rendered and checked for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .conversation import SeparatorStyle, get_conv_template
from .messages import IMAGE_PLACEHOLDER, IMAGE_TOKEN, Message, Role, message_role


@dataclass(frozen=True)
class Turn:
    """What one message becomes.

    Fields:
        role: who speaks.
        name: the role as the message spells it.
        content: what is said, without white space around it, each image as its tag.
        text: what is tokenized: of a user the template's tags too, the assistant's included where its answer follows.
            Behind an assistant's text comes the token that ends an answer.
    """

    role: Role
    name: str
    content: str
    text: str

    def count_tags(self, image_token: str = IMAGE_TOKEN) -> int:
        """Return how many images are shown."""
        return self.text.count(image_token) if self.role == "user" else 0


def walk_turns(
    messages: Sequence[Message],
    template: str = "deepseek",
    image_token: str = IMAGE_TOKEN,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[Turn]:
    """Return the turns of a conversation.

    Args:
        messages: with texts as contents; see `messages_to_conversation`.
        template: name of the prompt template.
        image_token: the tag that stands for an image.
        add_generation_prompt: end a last user turn with the assistant's tag.
        continue_final_message: end a last user turn with its content, for the model to go on with.

    Raises:
        ValueError: an unknown role, a system message that is not first, or an image tag outside a user turn.
    """
    roles = get_conv_template(template).roles
    turns = []
    for number, message in enumerate(messages, start=1):
        role, name = message_role(message, roles, number), str(message["role"])
        content = str(message["content"]).replace(IMAGE_PLACEHOLDER, image_token).strip()
        if message.get("tool_calls"):
            raise ValueError(f"Message {number} calls tools, and the prompts of DeepSeek-VL2 have no place for tools.")
        if role == "system" and number > 1:
            raise ValueError(f"A system message must come first, but one is message {number} of {len(messages)}.")
        if role == "user":
            last = number == len(messages)
            text = _render_question(content, template, first=number == 1, tag=add_generation_prompt or not last)
            text = text.rstrip() if last and continue_final_message and not add_generation_prompt else text
        elif image_token in content:
            raise ValueError(
                f"Message {number} is the {role}'s ({name!r}) and holds {image_token}: only user turns show images."
            )
        else:
            text = content
        turns.append(Turn(role, name, content, text))
    return turns


def _render_question(content: str, template: str, first: bool, tag: bool) -> str:
    """Return a user turn, with the assistant's ``tag`` behind it; the template's own system message goes before it."""
    conv = get_conv_template(template)
    if not first:
        conv.set_system_message("")
    conv.append_message(conv.roles[0], content)
    conv.append_message(conv.roles[1], "")
    text = conv.get_prompt()
    return text if tag else text.removesuffix(f"{conv.roles[1]}:")


def render_turns(turns: Sequence[Turn], eos_token: str, unfinished: bool = False) -> str:
    """Return turns as the chat template writes them, without bos.

    Args:
        turns: what `walk_turns` returned.
        eos_token: ends each answer, but not a last one that is empty.
        unfinished: leave a last answer open, for the model to go on.
    """
    text = ""
    for index, turn in enumerate(turns):
        text += turn.text
        is_open = index == len(turns) - 1 and (unfinished or not turn.content)
        text += eos_token if turn.role == "assistant" and not is_open else ""
    return text


def print_turns(turns: Sequence[Turn], template: str, eos_token: str) -> str:
    """Return turns as a person reads them.

    That is what is tokenized, and a space in front of each answer. Where a system message leads, it is printed as the
    original package does: with its role, and the separators of all turns as if it were a user's.
    """
    conv = get_conv_template(template)
    if any(turn.role == "system" for turn in turns):
        names = {"user": conv.roles[0], "assistant": conv.roles[1]}
        for turn in turns:
            conv.append_message(names.get(turn.role, turn.name), turn.content)
        if turns[-1].role == "user" and turns[-1].text.endswith(f"{conv.roles[1]}:"):
            conv.append_message(conv.roles[1], "")
        return conv.get_prompt().strip()
    text = ""
    for index, turn in enumerate(turns):
        tagged = conv.sep_style == SeparatorStyle.DeepSeek and text.endswith(f"{conv.roles[1]}:")
        text += " " if turn.role == "assistant" and turn.content and tagged else ""
        text += turn.text
        ends = turn.role == "assistant" and (turn.content or index < len(turns) - 1)
        text += eos_token if ends else ""
    return text
