"""The lines of ``deepseek-vl2 batch`` that one engine has in hand: as one is done, another takes its place."""

from __future__ import annotations

from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from deepseek_vl2.cli import batch_lines
from deepseek_vl2.cli.batch_files import Job
from deepseek_vl2.cli.batch_lines import Pending, is_broken_device, submit_safely
from deepseek_vl2.cli.options import Loaded, is_out_of_memory, note


class Window:
    """Lines on their way through one engine, at most ``--batch_size`` of them unanswered.

    Args:
        loaded: the model.
        args: the command's options.
        seed: of random numbers; line n has ``seed + n``.
        tell: is told what the user should know.
    """

    def __init__(self, loaded: Loaded, args: Namespace, seed: int, tell: Callable[[str], None] = note) -> None:
        self.loaded = loaded
        self.args = args
        self.seed = seed
        self.tell = tell
        self.lines: deque[Pending] = deque()

    @property
    def has_room(self) -> bool:
        """Whether another line may be asked."""
        return sum(not line.done for line in self.lines) < self.args.batch_size

    def read(self, job: Job) -> Pending:
        """Read a line, to be asked; several threads may do so."""
        return batch_lines.prepare(self.loaded, job, self.args.system_prompt)

    def add(self, line: Pending) -> None:
        """Ask a line that was read; one with an error is done as it is."""
        self.lines.append(line if line.question is None else self._submit(line.question))

    def take(self, in_order: bool) -> dict[str, Any] | None:
        """Return the record of a line that is done, or ``None``; ``in_order``: of the first line only.

        Raises:
            Exception: the device failed, and would refuse every other line.
        """
        line = next((line for line in self.lines if line.done or in_order), None)
        if line is None or not line.done:
            return None
        if line.failure is not None and self.args.batch_size > 1:
            line = self._ask_alone(line)
        self.lines.remove(line)
        return line.record()

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Drive the engine until one more line is done, though earlier ones go on, or until something is so."""
        done = self._done()
        self._engine().run_until(lambda: self._done() > done or until())

    def cancel(self) -> None:
        """Stop all answers."""
        for line in self.lines:
            line.cancel()

    def _engine(self) -> Any:
        return next(line.engine for line in self.lines if not line.done)

    def _done(self) -> int:
        return sum(line.done for line in self.lines)

    def _submit(self, question: batch_lines.Question) -> Pending:
        return submit_safely(self.loaded, question, self.args, self.seed)

    def _ask_alone(self, failed: Pending) -> Pending:
        """Ask a line that failed among others once more, when these are done."""
        assert failed.failure is not None and failed.question is not None
        if is_broken_device(failed.failure):
            raise failed.failure
        if is_out_of_memory(failed.failure):
            size = self.args.batch_size
            self.tell(f"Out of memory with {size} lines at a time: lower --batch_size. A line is tried alone.")
        while self._done() < len(self.lines):
            self.wait()
        index = self.lines.index(failed)
        alone = self.lines[index] = self._submit(failed.question)
        while not alone.done:
            self.wait()
        return alone


def answer_lines(loaded: Loaded, jobs: Iterable[Job], args: Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a record for each line, in order: an answer, or an error; ``--batch_size`` lines are answered together."""
    window = Window(loaded, args, seed)
    todo = iter(jobs)
    try:
        while True:
            # Before another is asked: what is done is written.
            while (record := window.take(in_order=True)) is not None:
                yield record
            while window.has_room and (job := next(todo, None)) is not None:
                window.add(window.read(job))
            if not window.lines:
                return
            if not window.lines[0].done:
                window.wait()
    finally:
        window.cancel()
