"""The page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from deepseek_vl2.serve.web.backend import Backend
from deepseek_vl2.serve.web.events import DemoEvents
from deepseek_vl2.serve.web.examples import LOGO, Example
from deepseek_vl2.serve.web.jobs import JobLine
from deepseek_vl2.serve.web.limits import Limits
from deepseek_vl2.serve.web.rendering import status_html
from deepseek_vl2.serve.web.state import Chat, Settings

TITLE = "DeepSeek-VL2"
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
CACHE_SECONDS = 24 * 3600  # how long uploaded pictures and drawings stay on the disk
LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
HELP = """\
## How to ask

**For boxes**: write what to find and press **Find**, or ask a question and press **With boxes** for an answer that
points at what it speaks of. Boxes are drawn on the picture sent last; with several you choose under the answer.

**About several pictures**: `<image>` marks where each stands in the text; without it they stand in front. Up to two are
read in detail, more at 384 pixels each.
"""


@dataclass(frozen=True)
class Controls:
    """The components that events read and write."""

    chat: gr.State
    chatbot: gr.Chatbot
    box: gr.MultimodalTextbox
    regenerate: gr.Button
    remove: gr.Button
    anew: gr.Button
    find: gr.Button
    with_boxes: gr.Button
    picture: gr.Radio
    settings: list[gr.components.Component]

    @property
    def buttons(self) -> list[Any]:
        """What `DemoEvents.busy` and `DemoEvents.idle` switch."""
        return [self.box, self.regenerate, self.remove, self.anew, self.find, self.with_boxes, self.picture]


def theme() -> gr.themes.Base:
    """Return the page's colours and fonts; the fonts are the system's, so that none is fetched."""
    return gr.themes.Default(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
        radius_size=gr.themes.sizes.radius_lg,
    ).set(
        # at least 4.5 to 1 on every background that text lies on
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
    )


def _chat_examples(examples: Sequence[Example]) -> list[Any]:
    return [{"text": example.question, "display_text": example.title, "files": example.files} for example in examples]


def _settings(limits: Limits) -> list[Any]:
    """Add the parameters, in the order `DemoEvents.answer` takes them."""
    default = Settings()
    return [
        gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature", info="0: always the likeliest word"),
        gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p", info="Share of the likeliest words to choose from"),
        gr.Slider(1, 2, default.repetition_penalty, step=0.05, label="Repetition penalty"),
        gr.Slider(8, limits.new_tokens, default.new_tokens, step=8, label="Answer tokens", info="At most"),
        gr.Slider(
            512,
            limits.history_tokens,
            default.history_tokens,
            step=128,
            label="Prompt tokens",
            info="At most; older turns are left out",
        ),
        gr.Number(-1, minimum=-1, precision=0, label="Seed", info="-1: another one each time"),
    ]


def _controls(limits: Limits, examples: Sequence[Example]) -> Controls:
    """Add the components."""
    chat = gr.State(Chat())
    with gr.Sidebar(position="right", open=False, width=340, elem_id="settings"):
        gr.Markdown("## Settings", elem_id="settings_title")
        settings = _settings(limits)
        gr.Markdown(HELP)
    chatbot = gr.Chatbot(
        elem_id="chat",
        label="Conversation",
        show_label=False,
        container=False,
        scale=1,
        min_height=320,
        height="100%",
        layout="bubble",
        buttons=["copy"],
        feedback_options=None,
        latex_delimiters=LATEX,
        examples=_chat_examples(examples),
        placeholder="## Ask about pictures\nAttach, paste or drop some, or begin with an example.",
    )
    picture = gr.Radio(
        [], label="Boxes are drawn on", elem_id="picture", visible=False, interactive=True, container=True
    )
    box = gr.MultimodalTextbox(
        elem_id="box",
        label="Message",
        show_label=False,
        placeholder="Ask about pictures",
        file_types=FILE_TYPES,
        file_count="multiple",
        sources=["upload"],
        max_lines=8,
        max_plain_text_length=limits.characters + 1,  # beyond, pasted text would turn into a file
        autofocus=True,
    )
    with gr.Row(elem_id="ways"):
        find = gr.Button("Find", size="sm", variant="primary", min_width=80)
        with_boxes = gr.Button("With boxes", size="sm", variant="primary", min_width=80)
        gr.HTML("<span>find what you wrote, or answer with boxes</span>", elem_id="ways_hint", padding=False)
    with gr.Row(elem_id="buttons"):
        regenerate = gr.Button("Regenerate", size="sm", interactive=False, min_width=80)
        remove = gr.Button("Remove last turn", size="sm", interactive=False, min_width=80)
        anew = gr.Button("New conversation", size="sm", interactive=False, min_width=80)
    return Controls(chat, chatbot, box, regenerate, remove, anew, find, with_boxes, picture, settings)


def _connect(controls: Controls, events: DemoEvents) -> None:
    """Tie the components to what they do."""
    chat, chatbot, box = controls.chat, controls.chatbot, controls.box
    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    sent = [
        start(way, [box, chat], [chat, chatbot, box], **quick)
        for start, way in (
            (box.submit, events.ask),
            (controls.find.click, events.ask_to_find),
            (controls.with_boxes.click, events.ask_for_boxes),
        )
    ]
    again = controls.regenerate.click(events.ask_again, [chat], [chat, chatbot], **quick)
    for begun in (*sent, again):
        begun.then(events.busy, [chat], controls.buttons, **quick).then(
            events.answer, [chat, *controls.settings], [chat, chatbot], **quick
        ).then(events.idle, [chat], controls.buttons, **quick)
    box.stop(events.stop, None, None, queue=False, **quick)
    controls.remove.click(events.remove_last, [chat], [chat, chatbot], **quick).then(
        events.idle, [chat], controls.buttons, **quick
    )
    controls.anew.click(events.start_anew, None, [chat, chatbot, box], **quick).then(
        events.idle, [chat], controls.buttons, **quick
    )
    # of the visitor alone: what the page sets itself is drawn already
    controls.picture.input(events.choose_picture, [chat, controls.picture], [chat, chatbot], **quick)
    chatbot.example_select(events.take_example, None, [box], **quick)


def build_page(backend: Backend, limits: Limits | None = None) -> gr.Blocks:
    """Return the page, ready to be launched.

    Args:
        backend: what answers.
        limits: what visitors may ask for.
    """
    limits = limits or Limits()
    events = DemoEvents(backend, JobLine(backend, limits.waiting), limits)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_height=True, delete_cache=(3600, CACHE_SECONDS)) as page:
        with gr.Row(elem_id="header"):
            gr.HTML(f"<h1>{LOGO.read_text(encoding='utf-8')}{TITLE}</h1>", padding=False)
            status = gr.HTML(status_html(backend.status()), elem_id="status", padding=False)
        controls = _controls(limits, events.examples)
        _connect(controls, events)
        timer = gr.Timer(0.5)
        for look in (page.load, timer.tick):
            look(events.show_status, None, [status, timer], show_progress="hidden", api_visibility="private")
        page.unload(events.stop)
    # The line in front of the model is ours; Gradio's own would hide a waiting visitor's question.
    page.queue(default_concurrency_limit=None, api_open=False)
    return page
