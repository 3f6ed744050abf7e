"""How a conversation looks on the page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from deepseek_vl2.serve.web.backend import LoadStatus
from deepseek_vl2.serve.web.jobs import Job, Stage
from deepseek_vl2.serve.web.state import Chat, Turn
from deepseek_vl2.utils.grounding import COLORS, GroundedObject, draw_boxes, parse_grounding, to_pixels

_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
# the tail of an answer that is still being written: a tag, or a list of boxes, whose end has not come
_OPEN_TAG = re.compile(r"(<\|det\|>(?:(?!<\|/det\|>).)*|<\|?[/a-z]*\|?)\Z", re.DOTALL)
_REFERENCE_TAG = re.compile(r"<\|/?(?:ref|grounding)\|>")


def escape(text: str) -> str:
    """Return text for a Markdown page that shows ``<`` as it is, outside code as within."""
    parts = _CODE.split(text)
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def _labels(objects: Sequence[GroundedObject]) -> list[str]:
    return list(dict.fromkeys(found.label for found in objects))


def answer_markdown(answer: str, writing: bool = False) -> str:
    """Return an answer as Markdown: labels of boxes in the colours of their boxes, coordinates left to the drawing.

    Args:
        answer: the model's text.
        writing: more is to come, so that an unfinished tag at the end is no concern of the reader yet.
    """
    objects = [found for found in parse_grounding(answer) if found.boxes]
    labels = _labels(objects)
    shown, end = "", 0
    for found in objects:
        start, stop = found.span
        number = labels.index(found.label) % len(COLORS)
        shown += escape(answer[end:start])
        shown += f'<span class="ref ref-{number}">{html.escape(found.label)}</span>'
        end = stop
    rest = answer[end:]
    if writing:
        rest = _REFERENCE_TAG.sub("", _OPEN_TAG.sub("", rest))
    return shown + escape(rest)


def draw_answer(answer: str, image: Image.Image) -> Image.Image | None:
    """Return the picture with an answer's boxes drawn on it, or ``None`` when the answer has none."""
    objects = [found for found in parse_grounding(answer) if found.boxes]
    return draw_boxes(image, objects) if objects else None


def box_table(answer: str, size: tuple[int, int]) -> str:
    """Return an answer's boxes as a Markdown table, in pixels of a picture of ``size`` (width, height)."""
    rows = ["| label | left | top | right | bottom |", "| --- | --: | --: | --: | --: |"]
    for found in parse_grounding(answer):
        label = escape(found.label).replace("|", "\\|")
        for box in found.boxes:
            rows.append(f"| {label} | " + " | ".join(str(side) for side in to_pixels(box, size)) + " |")
    return "\n".join(rows)


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
        content.append({"path": turn.drawing, "alt_text": "the picture with the answer's boxes"})
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


def reference_css() -> str:
    """Return a rule for each colour that `answer_markdown` names."""
    return "\n".join(f".ref-{number} {{ --box: {color}; }}" for number, color in enumerate(COLORS))
