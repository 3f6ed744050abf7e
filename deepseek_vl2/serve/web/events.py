"""What the page's buttons do."""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.models.messages import GROUNDING_TOKENS
from deepseek_vl2.serve.web import rendering
from deepseek_vl2.serve.web.backend import Backend
from deepseek_vl2.serve.web.examples import examples_for
from deepseek_vl2.serve.web.jobs import Job, JobLine, Stage
from deepseek_vl2.serve.web.limits import Limits
from deepseek_vl2.serve.web.state import Chat, Settings, Turn
from deepseek_vl2.utils.prompts import grounded_prompt, locate_prompt

logger = logging.getLogger(__name__)

REDRAW_SECONDS = 0.08  # a page is sent at most this often: faster is no smoother to read


def refuse(message: object) -> None:
    """Tell the visitor that a request is not carried out, and why; the page stays as it is."""
    gr.Warning(html.escape(str(message)), title="Not sent", duration=12)


class DemoEvents:
    """Handlers for one page; each visitor's conversation comes in and goes out as a state.

    Args:
        backend: the model.
        line: the line in front of it.
        limits: what is accepted.
    """

    def __init__(self, backend: Backend, line: JobLine, limits: Limits) -> None:
        self.backend, self.line, self.limits = backend, line, limits
        self.examples = examples_for(getattr(backend, "model_path", ""))
        self._running: dict[str, Job] = {}  # by session

    # ------------------------------------------------------------ before an answer

    def ask(self, message: dict[str, Any], chat: Chat, request: gr.Request) -> tuple[Any, ...]:
        """Take a question into the conversation; when it is refused, the input is kept to be mended."""
        try:
            self._check_idle(request)
            chat.ask(message["text"] or "", message["files"], self.limits)
        except ValueError as error:
            refuse(error)
            return gr.skip(), gr.skip(), gr.skip()
        return chat, rendering.chat_messages(chat, "Starting"), {"text": "", "files": []}

    def ask_to_find(self, message: dict[str, Any], chat: Chat, request: gr.Request) -> tuple[Any, ...]:
        """Ask where the thing is that the visitor wrote."""
        return self._ask_as(locate_prompt, "Write what to find first.", message, chat, request)

    def ask_for_boxes(self, message: dict[str, Any], chat: Chat, request: gr.Request) -> tuple[Any, ...]:
        """Ask the visitor's question so that the answer points at what it speaks of."""
        return self._ask_as(grounded_prompt, "Write a question first.", message, chat, request)

    def _ask_as(
        self, form: Callable[[str], str], empty: str, message: dict[str, Any], chat: Chat, request: gr.Request
    ) -> tuple[Any, ...]:
        """Bring the visitor's words into a form that asks for boxes; one that has tags already is sent as it is."""
        text = (message["text"] or "").strip()
        try:
            if not text:
                raise ValueError(empty)
            if not any(tag in text for tag in GROUNDING_TOKENS):
                text = form(text)
        except ValueError as error:
            refuse(error)
            return gr.skip(), gr.skip(), gr.skip()
        return self.ask({**message, "text": text}, chat, request)

    def ask_again(self, chat: Chat, request: gr.Request) -> tuple[Any, ...]:
        """Forget the last answer, to have it made again."""
        try:
            self._check_idle(request)
            if not chat.turns:
                raise ValueError("There is no answer to make again yet.")
        except ValueError as error:
            refuse(error)
            return gr.skip(), gr.skip()
        chat.turns[-1].forget_answer()
        return chat, rendering.chat_messages(chat, "Starting")

    def _check_idle(self, request: gr.Request) -> None:
        if request.session_hash in self._running:
            raise ValueError("The last answer is still being written: wait for its end, or stop it.")

    @staticmethod
    def busy(chat: Chat) -> tuple[Any, ...]:
        """Show the controls as they are while an answer is made: a stop button, and nothing that changes the past."""
        if not chat.open:
            return (gr.skip(),) * 7
        controls = (gr.update(interactive=False) for _ in range(5))
        return gr.update(submit_btn=False, stop_btn=True), *controls, gr.update(visible=False)

    # ------------------------------------------------------------ the answer

    async def answer(
        self,
        chat: Chat,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        new_tokens: float,
        history_tokens: float,
        seed: float | None,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Write the answer to the last question, as it comes."""
        if not chat.open or request.session_hash in self._running:  # what came before was refused
            yield gr.skip(), gr.skip()
            return
        settings = Settings(
            temperature,
            top_p,
            repetition_penalty,
            int(new_tokens),
            int(history_tokens),
            None if seed is None or seed < 0 else int(seed),
        )
        turn, session = chat.turns[-1], str(request.session_hash)
        try:
            job = self.line.submit(chat.messages(), settings)
        except ValueError as error:
            turn.error, turn.open = str(error), False
            yield chat, rendering.chat_messages(chat)
            return
        self._running[session] = job
        try:
            async for _ in self._changes(job):
                turn.answer = job.text
                progress = rendering.progress_text(job, self.backend.status())
                yield chat, rendering.chat_messages(chat, progress, writing=True)
            await asyncio.to_thread(self._finish, chat, turn, job)
            yield chat, rendering.chat_messages(chat)
        finally:
            self.line.cancel(job)
            self._running.pop(session, None)

    async def _changes(self, job: Job) -> AsyncIterator[int]:
        """Yield whenever a job has changed, until it is finished."""
        seen = -1
        while not job.finished:
            if job.version != seen:
                seen = job.version
                yield seen
            await asyncio.sleep(REDRAW_SECONDS)

    def _finish(self, chat: Chat, turn: Turn, job: Job) -> None:
        """Write down what became of a job."""
        turn.answer, turn.error, turn.open = job.text, job.error, False
        notes = []
        if job.dropped:
            notes.append(f"Not read, for lack of room: the oldest turns, {job.dropped} of them.")
        if job.stop.is_set():
            notes.append("Stopped.")
        elif job.cut:
            notes.append(f"Cut off at {job.settings.new_tokens} tokens; the settings can raise that.")
        elif job.stage is Stage.DONE and not job.text.strip():
            notes.append("The model gave an empty answer.")
        try:
            self._draw(turn, chat.pictures())
        except (ValueError, OSError) as error:
            notes.append(f"The boxes could not be drawn: {error}")
        turn.note = " ".join(notes)

    def _draw(self, turn: Turn, pictures: list[str], number: int = 0) -> None:
        """Add the drawing of an answer's boxes, if there is a picture and there are boxes.

        Args:
            turn: of the answer.
            pictures: files of the conversation's pictures.
            number: which of them, counted from 1; 0: the last, in which the model was trained to find things.
        """
        if not pictures or "<|det|>" not in turn.answer:
            return
        image = load_image(pictures[number - 1], max_pixels=self.limits.pixels)
        drawing = rendering.draw_answer(turn.answer, image)
        if drawing is not None:
            turn.drawing = save_pil_to_cache(drawing, get_upload_folder(), name="boxes")
            turn.picture = number or len(pictures), len(pictures)
            turn.boxes = rendering.box_list(turn.answer, image.size, turn.picture)

    def choose_picture(self, chat: Chat, number: int | None, request: gr.Request) -> tuple[Any, ...]:
        """Draw the last answer's boxes on another of the conversation's pictures."""
        pictures = chat.pictures()
        if request.session_hash in self._running or not chat.turns or chat.turns[-1].picture is None:
            return gr.skip(), gr.skip()
        if number is None or not 1 <= int(number) <= len(pictures):
            return gr.skip(), gr.skip()
        try:
            self._draw(chat.turns[-1], pictures, int(number))
        except (ValueError, OSError) as error:
            refuse(error)
            return gr.skip(), gr.skip()
        return chat, rendering.chat_messages(chat)

    # ------------------------------------------------------------ after an answer

    def idle(self, chat: Chat, request: gr.Request) -> tuple[Any, ...]:
        """Show the controls as they are between answers."""
        if request.session_hash in self._running:
            return (gr.skip(),) * 7
        controls = [gr.update(interactive=bool(chat.turns)) for _ in range(3)]
        controls += [gr.update(interactive=True) for _ in range(2)]
        choices = rendering.picture_choices(chat)
        drawn = chat.turns[-1].picture if choices else None
        pictures = gr.update(visible=bool(choices), choices=choices, value=drawn[0] if drawn else None)
        return gr.update(submit_btn=True, stop_btn=False), *controls, pictures

    def stop(self, request: gr.Request) -> None:
        """End the visitor's running job, if any; also when the page is closed."""
        job = self._running.get(str(request.session_hash))
        if job is not None:
            self.line.cancel(job)

    @staticmethod
    def remove_last(chat: Chat) -> tuple[Any, ...]:
        """Take the last question and its answer out of the conversation."""
        if chat.turns:
            chat.turns.pop()
        return chat, rendering.chat_messages(chat)

    @staticmethod
    def start_anew() -> tuple[Any, ...]:
        """Begin another conversation."""
        return Chat(), [], {"text": "", "files": []}

    # ------------------------------------------------------------ the rest of the page

    def take_example(self, selected: gr.SelectData) -> Any:
        """Put an example into the input, where it can still be changed."""
        # By its number alone: a visitor may send other files' paths, and what is returned here, Gradio publishes.
        example = next((found for number, found in enumerate(self.examples) if number == selected.index), None)
        return gr.skip() if example is None else {"text": example.question, "files": example.files}

    def show_status(self) -> tuple[Any, ...]:
        """Show how far the model is loaded, until it is."""
        status = self.backend.status()
        return rendering.status_html(status), gr.Timer(active=not (status.ready or status.failed))
