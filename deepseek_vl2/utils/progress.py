"""What a command says on the error stream while it works at something slow."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

SLOW = 10.0  # seconds after which a log, which nobody watches, is told too
TICK = 0.5
ERASE = "\r\x1b[K"


class Progress:
    """One line about slow work: ``with Progress("Loading nano") as line``.

    In a terminal the line is there at once, counts seconds or per cent, and is gone at the end. Elsewhere it is written
    once, when the work has taken `SLOW` seconds; with ``terminal_only`` never. Of several launched processes the first
    speaks.

    Args:
        text: what is being done.
        terminal_only: say nothing where no terminal is.
    """

    def __init__(self, text: str, terminal_only: bool = False) -> None:
        self.text = text
        self.stream = sys.stderr
        first = os.environ.get("RANK", "0") == "0"
        self.terminal = first and self.stream.isatty()
        self.silent = not first or (terminal_only and not self.terminal)
        self.fraction: float | None = None
        self.begun = 0.0
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="progress-line", daemon=True)

    def report(self, fraction: float) -> None:
        """Say how much is done, 0 to 1."""
        self.fraction = fraction

    def __enter__(self) -> Progress:
        self.begun = time.monotonic()
        if self.terminal:
            self._write(f"{self.text} ...")
        if not self.silent:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        self.ended.set()
        if not self.silent:
            self.thread.join()
        if self.terminal:
            self._write(ERASE)

    def _run(self) -> None:
        if not self.terminal:
            if not self.ended.wait(SLOW):
                self._write(f"{self.text} ...\n")
            return
        while not self.ended.wait(TICK):
            seconds = time.monotonic() - self.begun
            known = f"{100 * self.fraction:.0f} %" if self.fraction is not None else f"{seconds:.0f} s"
            if seconds >= 1:
                self._write(f"{ERASE}{self.text} ... {known}")

    def _write(self, text: str) -> None:
        with self.lock, contextlib.suppress(OSError, ValueError):  # a stream that was closed stops no work
            self.stream.write(text)
            self.stream.flush()


@contextlib.contextmanager
def weights_reported(report: Callable[[float], None]) -> Iterator[None]:
    """Report transformers' progress with reading weights, and keep its own bars from the terminal."""
    from transformers.utils import logging

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        items: Any = args[0] if args else options.get("iterable")
        total = options.get("total") or (len(items) if hasattr(items, "__len__") else None)
        return _Counter(items, total, report)

    logging.disable_progress_bar()
    previous = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


class _Counter:
    """Stands in for a progress bar, and tells how far it is."""

    def __init__(self, items: Any, total: float | None, report: Callable[[float], None]) -> None:
        self.items, self.total, self.report = items, total, report
        self.done = 0.0

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update(1)

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is drawn, and nothing has to go."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None  # such as set_description, refresh and close

    def update(self, count: float = 1) -> None:
        """Count what is done."""
        self.done += count
        if self.total:
            self.report(min(1.0, self.done / self.total))
