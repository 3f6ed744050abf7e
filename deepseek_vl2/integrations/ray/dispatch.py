"""Lines to workers and records back: each line is answered once, whichever workers and nodes die meanwhile.

Ray Data is not used for this: it runs a lost block anew and hands it on anew, so what a consumer has written may come
again; a block's answers are there only when its last one is; and a pool whose actors died for good may wait forever.
Here the process that writes the answers is the only one that knows which lines are open. A worker holds a few lines; it
is asked for what is done and given others in the same call, so there is one call at a time for each worker, and no more
lines are read than workers can hold.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

# After two deaths of workers that held it a line is asked alone, when nothing else is left; after two more it is given
# up. A line that kills its worker takes no other with it, and one that was nearby is answered.
ALONE_AFTER, REFUSED_AFTER = 2, 4
PATIENCE_SECONDS = 30.0  # without a word from any worker before the user is told
NO_ROOM_SECONDS = 600.0  # a cluster that grows on demand has a node by then


class Item(Protocol):
    """A line to be answered."""

    @property
    def line(self) -> int:
        """Its number, which its record bears too."""


@dataclass(eq=False)
class Worker:
    """An actor.

    Fields:
        actor: its handle.
        call: what it was asked last, while it is at it.
        started: its model is loaded.
        held: the lines it has and has not answered.
    """

    actor: Any
    call: Any
    started: bool = False
    held: dict[int, Any] = field(default_factory=dict)


class Dispatcher:
    """Keeps workers busy, and replaces those that die.

    An actor has two methods: ``start()`` loads its model and returns what there is to tell of it, and
    ``exchange(lines)`` takes more lines and returns (records that are done, notes), as soon as there is one.

    Args:
        ray: the package, connected.
        hire: makes an actor.
        workers: how many there shall be.
        capacity: lines that a worker holds at most.
        refuse: makes the record of a line that is given up, from the line and the reason.
        started: is told what each worker says when its model is loaded.
        tell: is told what the user should know.
        has_room: whether any node could hold a worker, were it free.
    """

    def __init__(
        self,
        ray: Any,
        hire: Callable[[], Any],
        workers: int,
        capacity: int,
        refuse: Callable[[Any, str], dict[str, Any]],
        started: Callable[[Any], None],
        tell: Callable[[str], None],
        has_room: Callable[[], bool] = lambda: True,
    ) -> None:
        self.ray = ray
        self.hire = hire
        self.count = workers
        self.capacity = capacity
        self.refuse = refuse
        self.on_started = started
        self.tell = tell
        self.has_room = has_room
        self.waited = 0.0
        self.workers: list[Worker] = []
        self.again: deque[Any] = deque()
        self.suspects: deque[Any] = deque()
        self.deaths: Counter[int] = Counter()
        self.deaths_in_a_row = 0
        self.exhausted = False

    def run(self, jobs: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """Yield a record for each line, in the order in which they are done.

        Raises:
            ValueError, OSError, RuntimeError: a worker cannot load its model, they die again and again, or there is
            nowhere for one to run.
        """
        source = iter(jobs)
        try:
            self.workers = [self._new_worker() for _ in range(self.count)]
            while True:
                self._hand_out(source)
                if not self._open:
                    return
                calls = {worker.call: worker for worker in self.workers if worker.call is not None}
                done, _ = self.ray.wait(list(calls), num_returns=1, timeout=PATIENCE_SECONDS)
                if not done and not any(worker.started for worker in self.workers):
                    self._wait_for_room()
                for call in done:
                    yield from self._receive(calls[call])
        finally:
            for worker in self.workers:
                self._kill(worker)

    def _wait_for_room(self) -> None:
        """Tell the user that no worker has started, and end a run for which there is nowhere one could."""
        self.tell("No worker has started yet: they wait for free GPUs or CPUs, or load the model.")
        self.waited = 0.0 if self.has_room() else self.waited + PATIENCE_SECONDS
        if self.waited >= NO_ROOM_SECONDS:
            raise ConnectionError(
                f"For {NO_ROOM_SECONDS / 60:.0f} minutes the cluster has had no node with the CPU, and the GPU if any, "
                "that a worker takes: `ray status` lists what its nodes have; `ray start --address=FIRST:6379` on "
                "another machine adds one."
            )

    @property
    def _open(self) -> bool:
        held = any(worker.held for worker in self.workers)
        return held or bool(self.again or self.suspects) or not self.exhausted

    def _new_worker(self) -> Worker:
        actor = self.hire()
        return Worker(actor, actor.start.remote())

    def _kill(self, worker: Worker) -> None:
        with contextlib.suppress(Exception):  # it may be gone with its node
            self.ray.kill(worker.actor)

    # ---------------------------------------------------------------- lines out

    def _hand_out(self, source: Iterator[Item]) -> None:
        for worker in self.workers:
            if worker.call is not None:
                continue
            lines = list(self._next_lines(source, self.capacity - len(worker.held)))
            if not lines and not worker.held and self.suspects:
                lines = [self.suspects.popleft()]
            worker.held.update((job.line, job) for job in lines)
            if worker.held:
                worker.call = worker.actor.exchange.remote(lines)

    def _next_lines(self, source: Iterator[Item], most: int) -> Iterator[Item]:
        while most > 0:
            job = self.again.popleft() if self.again else next(source, None)
            if job is None:
                self.exhausted = True
                return
            most -= 1
            yield job

    # ---------------------------------------------------------------- records back

    def _receive(self, worker: Worker) -> Iterator[dict[str, Any]]:
        call, worker.call = worker.call, None
        try:
            told = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:  # the worker's own code failed
            if not worker.started:
                raise (error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))) from None
            yield from self._replace(worker, str(error.cause))
        except self.ray.exceptions.RayError as error:  # it died, or cannot be reached, or its words were lost
            if getattr(error, "actor_init_failed", False):
                raise ChildProcessError(f"A worker cannot be started: {error}") from None
            yield from self._replace(worker, str(error).partition("\n")[0])
        else:
            if worker.started:
                yield from self._accept(worker, *told)
            else:
                worker.started = True
                self.on_started(told)

    def _accept(self, worker: Worker, records: list[dict[str, Any]], notes: list[str]) -> Iterator[dict[str, Any]]:
        for note in notes:
            self.tell(note)
        for record in records:
            del worker.held[record["line"]]
            self.deaths.pop(record["line"], None)
            self.deaths_in_a_row = 0
            yield record

    def _replace(self, worker: Worker, reason: str) -> Iterator[dict[str, Any]]:
        """Put another worker in the place of one that died, and its lines back.

        One that merely cannot be reached is killed: whatever it would still answer, nobody asks for any more.
        """
        self._kill(worker)
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row > 3 + 2 * self.count:
            raise ChildProcessError(f"Workers die again and again, the last one of: {reason}")
        self.tell(f"A worker died and is replaced; its {len(worker.held)} lines are asked again. {reason}")
        self.workers[self.workers.index(worker)] = self._new_worker()
        for job in worker.held.values():
            self.deaths[job.line] += 1
            if self.deaths[job.line] >= REFUSED_AFTER:
                self.deaths_in_a_row = 0
                yield self.refuse(job, f"The worker died whenever it had this line: {reason}")
            elif self.deaths[job.line] >= ALONE_AFTER:
                self.suspects.append(job)
            else:
                self.again.append(job)
