"""The engine: one model, one KV cache, one loop for everybody who wants answers from it.

Whoever waits for answers drives: `Engine.run_until` steps the engine in the caller's thread, and while one thread does
so others only wait, so that calls from several threads are batched together. A server lets a thread of the engine's own
drive (`start`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .kv_cache import OutOfTokens
from .request import Answer, Request
from .scheduler import EngineOptions
from .status import EngineStopped, QueueFull
from .steps import EngineSteps

logger = logging.getLogger(__name__)


class Engine(EngineSteps):
    """Writes the answers to many requests at once.

    A request gets what it would get alone: it sees its own tokens only, its choices depend on its own parameters and
    random numbers, and running together changes its logits by no more than the rounding of matrix products.

    Args:
        language: the language model, in evaluation mode; not kept alive.
        options: the bounds.
    """

    def __init__(self, language: Any, options: EngineOptions | None = None) -> None:
        super().__init__(language, options)
        self._answers: dict[int, Answer] = {}
        self._wake = threading.Condition()
        self._driver = threading.Lock()
        self._stopping = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------- asked from any thread

    @property
    def max_length(self) -> int | None:
        """Most tokens of a prompt and its answer together."""
        return self.options.max_length

    @property
    def healthy(self) -> bool:
        """Whether the engine takes requests."""
        return not self._stopping and (self._thread is None or self._thread.is_alive())

    @property
    def busy(self) -> int:
        """Answers being written, prompts at work included."""
        return self.scheduler.busy

    @property
    def cached_tokens(self) -> int:
        """Tokens held for the answers under way."""
        return sum(answer.cached for answer in [*self.scheduler.running, *self.scheduler.prefilling])

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all of them or none.

        Raises:
            QueueFull: they do not fit into the queue.
            EngineStopped: the engine does not work.
            ValueError: a prompt with its answer is longer than the engine allows.
        """
        for request in requests:
            length, most = len(request.prompt), self.options.max_length
            if length == 0:
                raise ValueError("The prompt is empty.")
            if most is not None and length + request.params.max_tokens > most:
                raise ValueError(f"{length} prompt tokens and max_tokens={request.params.max_tokens} exceed {most}.")
        answers = [Answer(request, self.eos_ids) for request in requests]
        with self._wake:
            if not self.healthy:
                raise EngineStopped("The engine does not run.") from self._error
            free = self.scheduler.max_batch - self.busy
            if self.options.queue_size is not None and self.waiting + len(answers) > self.options.queue_size + free:
                raise QueueFull(f"{self.waiting} requests are waiting.")
            self._new.extend(answers)
            self._answers.update((id(answer.request), answer) for answer in answers)
            self._wake.notify_all()

    def cancel(self, request: Request) -> None:
        """Forget a request; its room is free at once, or at the next step. Nothing more is delivered from then on."""
        with self._wake:
            request.cancelled = True
            self._wake.notify_all()
        if self._driver.acquire(blocking=False):  # nobody drives: there may be no next step
            try:
                self._drop_cancelled()
                self._drop_ended()
            finally:
                self._driver.release()

    def holds(self, request: Request) -> bool:
        """Whether a request is still at work, or waits."""
        return id(request) in self._answers

    def run_until(self, done: Callable[[], bool]) -> None:
        """Drive the engine, or wait while another thread does, until something is so.

        Raises:
            EngineStopped: the engine stopped before.
        """
        while not done():
            if not self.healthy:
                raise EngineStopped("The engine was stopped.") from self._error
            if self._driver.acquire(blocking=False):
                try:
                    with self._device_context():
                        if self._has_work():
                            self.step()
                        elif not done():
                            raise EngineStopped("The engine has nothing to do, and what was waited for has not come.")
                except BaseException as error:
                    self._fail_everything(error)
                    raise
                finally:
                    self._driver.release()
                    with self._wake:
                        self._wake.notify_all()
            else:
                with self._wake:
                    if not done():
                        self._wake.wait(timeout=0.1)

    def warm_up(self) -> None:
        """Capture decoding steps of all batch sizes and prompts of usual lengths: seconds on a GPU, nothing elsewhere.

        Without it each is captured when it is first needed, and the answers under way wait. A KV cache that grows
        makes what was captured void: `EngineOptions.kv_cache_tokens` gives it its size.
        """
        with self._driver, self._device_context(), torch.inference_mode():
            start = time.monotonic()
            try:
                scratch = self.kv_cache.allocate(self.options.prefill_tokens)
            except OutOfTokens:  # a pool that grows, or is small
                scratch = None
            try:
                self.runner.capture_all(self.rows, scratch)
            finally:
                if scratch is not None:
                    self.kv_cache.free(scratch)
            logger.debug("Steps and prompts were captured in %.1f s.", time.monotonic() - start)

    def start(self, prepare: Callable[[], None] | None = None) -> None:
        """Let a thread of the engine's own drive it.

        Args:
            prepare: called first, in that thread, and waited for: cuDNN and cuBLAS plan for each thread anew, so that
                `warm_up` elsewhere would leave that to the first answers.
        """
        if self._thread is not None:
            raise RuntimeError("The engine has a thread already: another server has started it.")
        prepared: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(prepare, prepared), name="engine", daemon=True)
        self._thread.start()
        try:
            prepared.result()
        except BaseException:
            self._thread = None
            raise

    def stop(self) -> None:
        """Stop after the step at work; what is not finished fails with `EngineStopped`."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
        with self._driver:
            self._fail_everything(EngineStopped("The engine was stopped."))

    def _run(self, prepare: Callable[[], None] | None, prepared: Future[None]) -> None:
        try:
            if prepare is not None:
                prepare()
        except BaseException as error:
            prepared.set_exception(error)
            return
        prepared.set_result(None)
        with self._driver:
            try:
                with self._device_context():
                    while self._wait_for_work():
                        self.step()
                        with self._wake:
                            self._wake.notify_all()  # threads that wait in `run_until`
            except BaseException as error:
                self._error = error
                logger.exception("The engine has died.")
            finally:
                self._stopping = True
                self._fail_everything(EngineStopped("The engine was stopped."))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._stopping and not self._has_work():
                self._wake.wait()
            return not self._stopping

    def _has_work(self) -> bool:
        return bool(self._new or self.scheduler.waiting or self.scheduler.busy or self._pending)

    def _device_context(self) -> AbstractContextManager[Any]:
        return self.placement.context() if self.placement is not None else nullcontext()

    def _fail_everything(self, error: BaseException) -> None:
        failure = error if isinstance(error, Exception) else EngineStopped("The engine was interrupted.")
        with self._wake:
            answers = [*self._new, *self.scheduler.waiting, *self.scheduler.prefilling, *self.scheduler.running]
            answers += [a for pending in self._pending for a in pending.answers]
            self._new, self._pending = [], []
        for answer in dict.fromkeys(answers):
            if not answer.finished:
                answer.fail(failure)
            self._end(answer)
        self.rows.arrange([])
        self._batch = None

    # ---------------------------------------------------------------- for the steps

    def _tell_waiting(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _take_new(self) -> None:
        with self._wake:
            self.scheduler.waiting.extend(self._new)
            self._new = []

    def _drop_cancelled(self) -> None:
        self._take_new()
        super()._drop_cancelled()

    def _end(self, answer: Answer) -> None:
        super()._end(answer)
        self._answers.pop(id(answer.request), None)
