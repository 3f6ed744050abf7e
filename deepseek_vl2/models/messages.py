"""Messages: the roles they may have, OpenAI-style content as text with image tags, and the Jinja chat template."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from urllib.request import url2pathname

from .image_download import download, is_address, shortened

Message = Mapping[str, Any]
Role = Literal["user", "assistant", "system"]

IMAGE_TOKEN = "<image>"
IMAGE_PLACEHOLDER = "<image_placeholder>"  # what older examples of the model card write instead of <image>
# Stands behind the first character of a tag that is text and no image, so that it is neither split at nor tokenized as
# one. A word joiner: it cannot be seen, and nobody writes it there.
ESCAPE = "\u2060"
GROUNDING_TOKENS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
CHAT_TOKENS = ("<|User|>", "<|Assistant|>")
SYSTEM_ROLES = ("system", "deepseekapi-sys")
USER_ROLES = ("user", "User", "<|User|>")
ASSISTANT_ROLES = ("assistant", "Assistant", "<|Assistant|>")

# The same prompt as the processor writes for a conversation. An image part becomes <image>, and a newline
# follows it unless white space or nothing does: that is how the model's own prompts look. A tag inside a text part is
# text: see `escape_tags`. The generation marks say what is an answer, for trainers that ask for a mask of its tokens.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- if message['content'] is string -%}
    {%- set content = message['content'] -%}
  {%- else -%}
    {%- set parts = namespace(text='', after_image=false) -%}
    {%- for part in (message['content'] or []) -%}
      {%- if part['type'] in ('image', 'image_url', 'input_image') -%}
        {%- set parts.text = parts.text + ('\\n' if parts.after_image else '') + '<image>' -%}
        {%- set parts.after_image = true -%}
      {%- elif part['type'] in ('text', 'input_text') -%}
        {%- if part['text'] -%}
          {%- set glue = '\\n' if parts.after_image and part['text'][0] not in ' \\t\\r\\n' else '' -%}
          {%- set literal = part['text'].replace('<image>', '<\\u2060image>') -%}
          {%- set literal = literal.replace('<image_placeholder>', '<\\u2060image_placeholder>') -%}
          {%- set parts.text = parts.text + glue + literal -%}
          {%- set parts.after_image = false -%}
        {%- endif -%}
      {%- else -%}
        {{- raise_exception('Unknown type of content part: ' + part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set content = parts.text -%}
  {%- endif -%}
  {%- set content = content.replace('<image_placeholder>', '<image>').strip() -%}
  {%- if role in ('system', 'deepseekapi-sys') -%}
    {%- if not loop.first -%}{{- raise_exception('A system message must come first.') -}}{%- endif -%}
    {{- content -}}
  {%- elif role in ('user', 'User', '<|User|>') -%}
    {{- '<|User|>: ' + content + '\\n\\n' if content else '<|User|>:' -}}
    {%- if add_generation_prompt or not loop.last -%}{{- '<|Assistant|>:' -}}{%- endif -%}
  {%- elif role in ('assistant', 'Assistant', '<|Assistant|>') -%}
    {%- if '<image>' in content -%}{{- raise_exception('An assistant turn cannot show images.') -}}{%- endif -%}
    {%- generation -%}
      {{- content -}}
      {%- if not loop.last or (content and not add_generation_prompt) -%}{{- eos_token -}}{%- endif -%}
    {%- endgeneration -%}
  {%- else -%}
    {{- raise_exception('Unknown role: ' + role) -}}
  {%- endif -%}
{%- endfor -%}
"""


def is_own_template(template: str | None) -> bool:
    """Whether a chat template is this one, also as it was saved before it marked the answers."""

    def bare(text: str) -> str:
        return "".join(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text).split())

    return isinstance(template, str) and bare(template) == bare(CHAT_TEMPLATE)


def escaped(tag: str) -> str:
    """Return how a tag that is text is written."""
    return tag[:1] + ESCAPE + tag[1:]


def escape_tags(text: str, image_token: str = IMAGE_TOKEN) -> str:
    """Return a text in which image tags are text: no image belongs to them, and they are tokenized letter by letter."""
    for tag in (image_token, IMAGE_PLACEHOLDER):
        text = text.replace(tag, escaped(tag))
    return text


def message_role(message: Message, tags: Sequence[str], number: int = 1) -> Role:
    """Return who speaks.

    Args:
        message: its ``role`` is a tag of the template or one of the usual names.
        tags: the prompt template's tags of user and assistant.
        number: of the message, counted from 1.

    Raises:
        ValueError: an unknown role.
    """
    role = message.get("role")
    if role == tags[0] or role in USER_ROLES:
        return "user"
    if role == tags[1] or role in ASSISTANT_ROLES:
        return "assistant"
    if role in SYSTEM_ROLES:
        return "system"
    own = ", ".join(map(repr, tags))
    raise ValueError(f"Unknown role {role!r} in message {number}: expected user, assistant or system (or {own}).")


def messages_to_conversation(
    messages: Sequence[Message], image_token: str, read_source: Callable[[Message], Any] | None = None
) -> list[dict[str, Any]]:
    """Turn messages with OpenAI-style content parts into a conversation with image tags.

    Image tags inside text parts are text, and escaped; those in a content that is a text stand for images.

    Args:
        messages: each with ``role`` and ``content``: a text, or a list of parts.
        image_token: the tag that an image part becomes.
        read_source: what an image part shows; by default `image_source`, with http addresses downloaded.

    Raises:
        ValueError: a part of unknown type, an image part without a source, or details that differ.
    """
    read = read_source or _load_source
    found = [{**message, **_flatten_content(message, image_token, read)} for message in check_messages(messages)]
    is_low_conversation(found)
    return found


DETAILS = (None, "auto", "high", "low")
LOW = "low_detail_images"  # of a message: how many of its parts ask for it
# How people name what a message shows, where they do not know that it is `images`; else they would be answered without.
MISNAMED = (
    "image", "image_url", "image_urls", "image_path", "image_paths", "image_file", "img", "imgs", "picture", "pictures",
    "photo", "photos", "pixel_values", "audio", "audios", "video", "videos",
)  # fmt: skip


def check_messages(messages: Any) -> Sequence[Message]:
    """Return a conversation; raise ``ValueError`` where it is no list of messages."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(
            "A conversation is a list of messages, such as [{'role': 'user', 'content': 'Hello'}], got "
            f"{_shown(messages)}."
        )
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"A message is a dict with role and content, got {_shown(message)}.")
        misnamed = next((name for name in MISNAMED if message.get(name) is not None), None)
        if misnamed is not None:
            raise ValueError(
                f"A message has {misnamed!r}, which is not read: list its pictures under 'images', with an image tag "
                "for each in the content, or put them into the content as parts."
            )
    return messages


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {shortened(repr(value))}"


def listed_images(message: Message) -> list[Any]:
    """Return the images that a message lists; raise ``ValueError`` where it holds no list."""
    images = message.get("images")
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        what = repr(images) if isinstance(images, (str, os.PathLike)) else type(images).__name__
        raise ValueError(f"images of a message is a list: write [{shortened(what)}] for one image.")
    return list(images)


def is_low(part: Message) -> bool:
    """Whether an image part asks for one view of 384 pixels, no tiles; raise ``ValueError`` for unknown details."""
    source = part.get("image_url")
    detail = (source.get("detail") if isinstance(source, Mapping) else None) or part.get("detail")
    if detail not in DETAILS:
        raise ValueError(f"detail of an image must be 'auto', 'high' or 'low', got {_shown(detail)}.")
    return detail == "low"


def is_low_conversation(conversation: Sequence[Message]) -> bool:
    """Whether all images of a conversation are to be seen as one view each.

    Args:
        conversation: what `messages_to_conversation` returned.

    Raises:
        ValueError: some are and some are not.
    """
    low = sum(message.get(LOW) or 0 for message in conversation)
    images = sum(len(message.get("images") or []) for message in conversation)
    if 0 < low < images:
        raise ValueError("detail must be 'low' for all images of a conversation or for none.")
    return low > 0


def _flatten_content(message: Message, image_token: str, read_source: Callable[[Message], Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {"content": content, "images": listed_images(message)}
    if not isinstance(content, Sequence):
        whole = shortened(str(dict(message)))
        raise ValueError(f"A message needs a content, a text or a list of parts, got {_shown(content)}: {whole}.")
    text, after_image, low = "", False, 0
    images = listed_images(message)
    for part in content:
        if not isinstance(part, Mapping):
            raise ValueError(
                f"A content part is a dict such as {{'type': 'text', 'text': 'Hello'}}, got {_shown(part)}."
            )
        kind = part.get("type")
        if kind in ("image", "image_url", "input_image"):
            images.append(read_source(part))
            low += is_low(part)
            text += ("\n" if after_image else "") + image_token
            after_image = True
        elif kind in ("text", "input_text"):
            said = part.get("text")
            if not isinstance(said, str):
                raise ValueError(f"A text part needs its text under text, got {_shown(said)}.")
            if said:
                glue = "\n" if after_image and said[0] not in " \t\r\n" else ""
                text += glue + escape_tags(said, image_token)
                after_image = False
        else:
            raise ValueError(f"Unknown type of content part: {kind!r}; expected text, image or image_url.")
    return {"content": text, "images": images, **({LOW: low} if low else {})}


def path_of(source: str) -> str:
    """Return the path that a ``file://`` address names; any other text as it is."""
    return url2pathname(source[7:].removeprefix("localhost")) if source[:7].lower() == "file://" else source


def image_source(part: Message) -> Any:
    """Return what an OpenAI-style image part names: a path, an address, bytes, a data URL or a PIL image."""
    for name in ("image", "path", "url", "image_url"):
        source = part.get(name)
        if source is None:
            continue
        if isinstance(source, Mapping):
            source = source.get("url")
        return path_of(source) if isinstance(source, str) else source
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64']}"
    raise ValueError("An image part needs its source under image, path, url, image_url or base64.")


def _load_source(part: Message) -> Any:
    source = image_source(part)
    if isinstance(source, str) and is_address(source):
        return download(source)
    return source
