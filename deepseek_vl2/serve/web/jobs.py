"""One model, several visitors: answers are made one after another, first come first served."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from deepseek_vl2.serve.web.backend import Backend, Pieces
from deepseek_vl2.serve.web.state import Settings

logger = logging.getLogger(__name__)

LOADING_POLL = 0.2  # seconds between two looks at a stop button while the model loads


class Stage(Enum):
    """Where a job is."""

    WAITING = "waiting"
    READING = "reading"
    WRITING = "writing"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(eq=False)
class Job:
    """An answer in the making. The line writes to it; pages look at it.

    Attributes:
        messages: the conversation.
        settings: how to answer.
        stage: where it is.
        ahead: how many jobs are before it, while it waits.
        text: what is written so far.
        dropped: how many of the oldest turns did not fit into the prompt.
        error: why it failed.
        cut: whether it ended at the most tokens it may have.
        stop: set when the visitor wants no more of it.
        pieces: the answer at work, to be cancelled.
        version: counts changes, so that a page knows when to draw anew.
    """

    messages: Sequence[Mapping[str, Any]]
    settings: Settings
    stage: Stage = Stage.WAITING
    ahead: int = 0
    text: str = ""
    dropped: int = 0
    error: str = ""
    cut: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    pieces: Pieces | None = None
    version: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be shown, though the model may still be at its last token."""
        return self.stop.is_set() or self.stage in (Stage.DONE, Stage.STOPPED, Stage.FAILED)

    def change(self, **values: Any) -> None:
        """Set fields, and count the change last: who sees the count sees the fields."""
        for name, value in values.items():
            setattr(self, name, value)
        self.version += 1


class JobLine:
    """Runs jobs one after another in a thread of its own.

    The thread belongs to the line and not to a page: a visitor who leaves, or a page that breaks, never keeps the
    model from the next one.

    Args:
        backend: what answers.
        waiting: most jobs behind the one at work.
    """

    def __init__(self, backend: Backend, waiting: int) -> None:
        self.backend = backend
        self.waiting = waiting
        self._jobs: deque[Job] = deque()  # the first is at work
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(self, messages: Sequence[Mapping[str, Any]], settings: Settings) -> Job:
        """Put a job at the end of the line.

        Raises:
            ValueError: the line is full.
        """
        with self._changed:
            if len(self._jobs) > self.waiting:
                raise ValueError(
                    f"The demo is busy: {self.waiting} requests are waiting already. Try again in a minute."
                )
            job = Job(messages, settings, ahead=len(self._jobs))
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="demo-jobs", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """End a job: at once when it waits, after the token at work when it runs."""
        job.stop.set()
        if job.pieces is not None:
            job.pieces.cancel()
        with self._changed:
            if job in self._jobs and job is not self._jobs[0]:
                self._jobs.remove(job)
                job.change(stage=Stage.STOPPED)
                self._renumber()

    def _renumber(self) -> None:
        for ahead, job in enumerate(self._jobs):
            if job.ahead != ahead:
                job.change(ahead=ahead)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
                job = self._jobs[0]
            self._run(job)
            with self._changed:
                self._jobs.popleft()
                self._renumber()

    def _run(self, job: Job) -> None:
        """Answer one job; whatever goes wrong ends in the job, where its visitor reads it."""
        try:
            while not job.stop.is_set() and not self.backend.wait(LOADING_POLL):
                pass
            if not job.stop.is_set():
                self._answer(job)
            job.change(stage=Stage.STOPPED if job.stop.is_set() else Stage.DONE)
        except (ValueError, FileNotFoundError) as error:  # something about the request
            job.change(stage=Stage.FAILED, error=str(error))
        except torch.OutOfMemoryError:
            logger.exception("out of memory")
            torch.cuda.empty_cache()
            job.change(
                stage=Stage.FAILED,
                error="The GPU's memory ran out: try fewer pictures, a shorter conversation or a shorter answer.",
            )
        except Exception as error:  # the thread must go on for the others
            logger.exception("an answer failed")
            job.change(stage=Stage.FAILED, error=f"The model failed with {type(error).__name__}: {error}")

    def _answer(self, job: Job) -> None:
        job.change(stage=Stage.READING)
        prompt = self.backend.prepare(job.messages, job.settings.history_tokens)
        job.change(dropped=prompt.dropped)
        job.pieces = self.backend.stream(prompt, job.settings)
        try:
            for piece in () if job.stop.is_set() else job.pieces:
                job.change(stage=Stage.WRITING, text=job.text + piece)
            job.change(cut=job.pieces.answer.finish_reason == "length")
        finally:
            job.pieces.close()
            job.pieces = None  # and with it the prompt's tensors
