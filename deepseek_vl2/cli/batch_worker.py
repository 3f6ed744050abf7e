"""One of several workers of ``deepseek-vl2 batch --ray``: a model and an engine, and the lines that it holds."""

from __future__ import annotations

import os
import platform
import threading
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from deepseek_vl2 import __version__
from deepseek_vl2.cli.batch_files import Job
from deepseek_vl2.cli.batch_lines import Pending

READERS = 2  # threads that decode images and tokenize while the engine works


class Lines(Protocol):
    """The lines that an engine has in hand; see `batch_window.Window`."""

    @property
    def has_room(self) -> bool:
        """Whether another line may be asked."""

    @property
    def lines(self) -> Iterable[Any]:
        """Those that were asked, and whose records nobody took."""

    def read(self, job: Job) -> Pending:
        """Read a line; called from several threads."""

    def add(self, line: Pending) -> None:
        """Ask a line that was read."""

    def take(self, in_order: bool) -> dict[str, Any] | None:
        """Return the record of a line that is done, or ``None``."""

    def wait(self, until: Callable[[], bool]) -> None:
        """Drive the engine until one more line is done, or until something is so."""


class Greeting(NamedTuple):
    """What a worker says when its model is loaded.

    Fields:
        version: of this package.
        host: its machine's name.
        notes: what the user should know.
    """

    version: str
    host: str
    notes: list[str]


def open_lines(args: Namespace, seed: int, tell: Callable[[str], None]) -> Lines:
    """Load the model into the engine that ``--backend`` names."""
    if args.backend == "vllm":
        from deepseek_vl2.cli.batch_vllm import VllmLines

        return VllmLines(args, seed)
    from deepseek_vl2.cli.batch_window import Window
    from deepseek_vl2.cli.options import load

    return Window(load(args, tell), args, seed, tell)


class LineWorker:
    """Answers lines as they come, in the order in which they are done.

    Args:
        args: the command's options.
        seed: of random numbers.
        directory: the command's working directory, which paths of images are relative to.
    """

    def __init__(self, args: Namespace, seed: int, directory: str) -> None:
        self.args = args
        self.seed = seed
        self.directory = directory
        self.changed = threading.Condition()
        self.ready: deque[Pending] = deque()
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.failure: BaseException | None = None
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self.window: Lines | None = None

    def start(self) -> Greeting:
        """Load the model.

        Raises:
            ValueError, OSError: see `options.load`.
        """
        if os.path.isdir(self.directory):
            os.chdir(self.directory)
        else:
            self.notes.append(
                f"There is no directory {self.directory} on {platform.node()}: images that lines name by relative "
                "paths are not found there."
            )
        self.window = open_lines(self.args, self.seed, self.notes.append)
        threading.Thread(target=self._work, name="lines", daemon=True).start()
        return Greeting(__version__, platform.node(), self._take_notes())

    def exchange(self, jobs: list[Job]) -> tuple[list[dict[str, Any]], list[str]]:
        """Take more lines; return the records that are done, at least one, and notes for the user.

        Raises:
            RuntimeError: the engine failed, and answers nothing more.
        """
        for job in jobs:
            self.readers.submit(self._read, job)
        with self.changed:
            self.changed.wait_for(lambda: self.records or self.failure is not None)
            if self.failure is not None:
                raise RuntimeError(f"{type(self.failure).__name__}: {self.failure}")
            records, self.records = self.records, []
        return records, self._take_notes()

    def _take_notes(self) -> list[str]:
        notes, self.notes[:] = list(self.notes), []
        return notes

    def _read(self, job: Job) -> None:
        assert self.window is not None
        try:
            line = self.window.read(job)
        except BaseException as error:  # what is wrong with the line is in what is read: this is not
            self._fail(error)
            return
        with self.changed:
            self.ready.append(line)
            self.changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def _work(self) -> None:
        window = self.window
        assert window is not None
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.ready or window.lines)
                while self.ready and window.has_room:
                    window.add(self.ready.popleft())
                while (record := window.take(in_order=False)) is not None:
                    self._deliver(record)
                if window.lines:
                    window.wait(lambda: bool(self.ready) and window.has_room)
        except BaseException as error:
            self._fail(error)

    def _deliver(self, record: dict[str, Any]) -> None:
        with self.changed:
            self.records.append(record)
            self.changed.notify_all()
