"""How a conversation looks on the page."""

from __future__ import annotations

import html
import re
from typing import Any

from PIL import Image

from deepseek_vl2.serve.web.backend import LoadStatus
from deepseek_vl2.serve.web.jobs import Job, Stage
from deepseek_vl2.serve.web.state import Chat, Turn
from deepseek_vl2.utils.drawing import color_of, draw_boxes, to_pixels
from deepseek_vl2.utils.grounding import GroundedObject, parse_grounding, plain_text

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
# how a tag begins whose end has not come yet
_OPEN_TAG = re.compile(r"<(?:\|(?:/?[a-z]*\|?)?)?\Z")
UNNAMED = "here"  # stands for boxes that the model gave no label


def escape(text: str) -> str:
    """Return text for a Markdown page that shows ``<`` as it is, outside code as within."""
    parts = _CODE.split(text)
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def _boxed(answer: str) -> list[GroundedObject]:
    return [found for found in parse_grounding(answer) if found.boxes]


def answer_markdown(answer: str, writing: bool = False) -> str:
    """Return an answer as Markdown: labels of boxes in the colours of their boxes, coordinates left to the drawing.

    Args:
        answer: the model's text.
        writing: more is to come, so that an unfinished tag at the end is no concern of the reader yet.
    """
    objects = _boxed(answer)
    labels = list(dict.fromkeys(found.label for found in objects))
    shown, end = "", 0
    for found in objects:
        start, stop = found.span
        red, green, blue = color_of(labels.index(found.label))
        label = html.escape(found.label or UNNAMED)
        shown += escape(answer[end:start])
        colour = f"{red}, {green}, {blue}"
        shown += f'<span class="ref" style="--box: rgb({colour}); --wash: rgba({colour}, 0.16)">{label}</span>'
        end = stop
    rest = answer[end:]
    if writing:
        rest = plain_text(_OPEN_TAG.sub("", rest))
    return shown + escape(rest)


def draw_answer(answer: str, image: Image.Image) -> Image.Image | None:
    """Return the picture with an answer's boxes drawn on it, or ``None`` when the answer has none."""
    objects = _boxed(answer)
    return draw_boxes(image, objects) if objects else None


def box_list(answer: str, size: tuple[int, int], picture: tuple[int, int] | None = None) -> str:
    """Return an answer's boxes and its text with all tags, as HTML to be unfolded.

    Args:
        answer: the model's text.
        size: (width, height) of the picture, in whose pixels the boxes are listed.
        picture: its number, counted from 1, and how many pictures there are.
    """
    items = [
        f"<li>{html.escape(found.label or UNNAMED)} <code>{', '.join(map(str, to_pixels(box, size)))}</code></li>"
        for found in _boxed(answer)
        for box in found.boxes
    ]
    count = "1 box" if len(items) == 1 else f"{len(items)} boxes"
    raw = html.escape(answer).replace("\n", "<br>")  # an empty line would end the HTML for Markdown
    return (
        f'<details class="boxes"><summary>{count} in pixels{_of_picture(picture)}</summary>Left, top, right, bottom:'
        f"<ul>{''.join(items)}</ul>The answer with its tags:<br><code>{raw}</code></details>"
    )


def _of_picture(picture: tuple[int, int] | None) -> str:
    """Return which picture is meant, where there are several."""
    return "" if picture is None or picture[1] < 2 else f" of picture {picture[0]} of {picture[1]}"


def picture_choices(chat: Chat) -> list[tuple[str, int]]:
    """Return the pictures that the last answer's boxes can be drawn on, each with its number; none without a choice."""
    if not chat.turns or chat.turns[-1].picture is None:
        return []
    numbers = range(1, chat.turns[-1].picture[1] + 1)
    return [(f"Picture {number}", number) for number in numbers] if len(numbers) > 1 else []


def progress_text(job: Job, loading: LoadStatus) -> str:
    """Return what stands in an answer's place before its first word."""
    if job.ahead:
        others = "1 request is" if job.ahead == 1 else f"{job.ahead} requests are"
        return f"Waiting: {others} before yours"
    if not loading.ready:
        return "Waiting for the model, which is still loading"
    return "Reading" if job.stage is Stage.READING else "Starting"


def _question_content(turn: Turn) -> list[Any]:
    return [*({"path": file, "alt_text": "attached picture"} for file in turn.images), escape(turn.question)]


def _answer_messages(turn: Turn, progress: str, writing: bool) -> list[dict[str, Any]]:
    content: list[Any] = []
    if turn.answer:
        content.append(answer_markdown(turn.answer, writing))
    elif progress:
        content.append(f'<span class="progress">{progress}</span>')
    if turn.drawing:
        which = _of_picture(turn.picture)
        if turn.picture and which:
            content.append(f'<span class="note">Boxes on picture {turn.picture[0]} of {turn.picture[1]}</span>')
        content.append({"path": turn.drawing, "alt_text": f"the answer's boxes{which or ' on the picture'}"})
    if turn.boxes:
        content.append(turn.boxes)
    if turn.note:
        content.append(f'<span class="note">{html.escape(turn.note)}</span>')
    if turn.error:
        content.append(f'<span class="failure">{html.escape(turn.error)}</span>')
    return [{"role": "assistant", "content": content}] if content else []


def chat_messages(chat: Chat, progress: str = "", writing: bool = False) -> list[dict[str, Any]]:
    """Return a conversation as the chat component takes it.

    Args:
        chat: the conversation.
        progress: what stands in place of the last answer until it begins.
        writing: the last answer is still being written.
    """
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(chat.turns):
        last = index == len(chat.turns) - 1
        messages.append({"role": "user", "content": _question_content(turn)})
        messages += _answer_messages(turn, progress if last else "", last and writing)
    return messages


def status_html(status: LoadStatus) -> str:
    """Return the line under the title: the model, or how far it is loaded."""
    text = html.escape(status.text)
    if status.ready:
        return f'<p class="model">{text}</p>'
    if status.failed:
        return f'<p class="failure" role="alert">{text}</p>'
    value = "" if status.fraction is None else f' value="{status.fraction:.3f}"'
    percent = "" if status.fraction is None else f" · {status.fraction:.0%}"
    return f'<label class="loading">{text}{percent}<progress max="1"{value}></progress></label>'
