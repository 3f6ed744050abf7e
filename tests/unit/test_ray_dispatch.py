"""Lines to workers that die: each is answered once; here Ray itself is played by the test, and time stands still."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek_vl2.integrations.ray.cluster import check_address, cpus_each, fleet_of, join
from deepseek_vl2.integrations.ray.dispatch import ALONE_AFTER, REFUSED_AFTER, Dispatcher


class RayError(Exception):
    """What Ray raises."""


class RayTaskError(RayError):
    """What Ray raises for an error of an actor's own code."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True)
class Line:
    """A line to be answered."""

    line: int


class Actor:
    """An actor; ``fate(actor, line)`` raises where it dies of a line."""

    def __init__(self, ray: FakeRay, number: int) -> None:
        self.ray, self.number = ray, number
        self.held: list[Line] = []
        self.killed = False
        self.start = SimpleNamespace(remote=lambda: self.ray.call(self, self.on_start))
        self.exchange = SimpleNamespace(remote=lambda lines: self.ray.call(self, lambda: self.on_exchange(lines)))

    def on_start(self) -> str:
        self.ray.on_start(self)
        return f"worker {self.number}"

    def on_exchange(self, lines: list[Line]) -> tuple[list[dict[str, Any]], list[str]]:
        self.held += lines
        self.ray.most_held = max(self.ray.most_held, len(self.held))
        for line in self.held:
            self.ray.fate(self, line.line)
        done, self.held = self.held[:2], self.held[2:]  # some of them, so that others remain with it
        return [{"line": line.line, "answer": f"of {self.number}"} for line in done], []


class FakeRay:
    """Ray as far as a dispatcher knows it."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.calls: dict[object, Callable[[], Any]] = {}
        self.fate: Callable[[Actor, int], None] = lambda actor, line: None
        self.on_start: Callable[[Actor], None] = lambda actor: None
        self.most_held = 0

    def hire(self) -> Actor:
        self.actors.append(Actor(self, len(self.actors)))
        return self.actors[-1]

    def call(self, actor: Actor, run: Callable[[], Any]) -> object:
        assert not actor.killed, "nobody asks an actor that was killed"
        token = object()
        self.calls[token] = run
        return token

    def wait(self, calls: list[object], num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        assert calls, "there is always a call to wait for"
        oldest = next(call for call in self.calls if call in calls)
        return [oldest], [call for call in calls if call is not oldest]

    def get(self, call: object) -> Any:
        return self.calls.pop(call)()

    def kill(self, actor: Actor) -> None:
        actor.killed = True


def dispatch(ray: FakeRay, lines: int, workers: int = 2, capacity: int = 4) -> tuple[list[dict[str, Any]], list[str]]:
    """Have lines answered; returns the records by line, and what the user was told."""
    told: list[str] = []
    dispatcher = Dispatcher(
        ray,
        ray.hire,
        workers,
        capacity,
        lambda job, reason: {"line": job.line, "error": reason},
        lambda greeting: None,
        told.append,
    )
    records = list(dispatcher.run(map(Line, range(1, lines + 1))))
    assert all(actor.killed for actor in ray.actors), "workers are ended with the run"
    assert len(records) == len({record["line"] for record in records}) == lines
    return sorted(records, key=lambda record: record["line"]), told


def test_every_line_is_answered_once_and_workers_hold_no_more_than_they_may() -> None:
    ray = FakeRay()
    records, told = dispatch(ray, 50)
    assert all("answer" in record for record in records) and not told
    assert ray.most_held == 4 and len(ray.actors) == 2


def test_the_lines_of_a_worker_that_dies_are_asked_again() -> None:
    ray = FakeRay()

    def die_once(actor: Actor, line: int) -> None:
        if actor.number < 2 and line > 5 * (actor.number + 1):
            raise RayError("The actor died unexpectedly.\nand much more")

    ray.fate = die_once
    records, told = dispatch(ray, 30)
    assert all("answer" in record for record in records)
    assert len(told) == 2 and all("is replaced" in text and "much more" not in text for text in told)
    assert [actor.number for actor in ray.actors] == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [RayError("gone"), RayTaskError(RuntimeError("CUDA error"))])
def test_a_line_that_kills_its_workers_takes_no_other_with_it(error: RayError) -> None:
    ray = FakeRay()
    met: list[int] = []

    def die(actor: Actor, line: int) -> None:
        if line == 7:
            met.append(len(actor.held))
            raise error

    ray.fate = die
    records, _ = dispatch(ray, 30)
    assert [record["line"] for record in records if "error" in record] == [7]
    assert "whenever it had this line" in records[6]["error"] and str(error) in records[6]["error"]
    assert len(met) == REFUSED_AFTER and met[ALONE_AFTER:] == [1] * (REFUSED_AFTER - ALONE_AFTER)


def test_a_model_that_cannot_be_loaded_is_the_users_to_know() -> None:
    ray = FakeRay()

    def fail(actor: Actor) -> None:
        raise RayTaskError(FileNotFoundError("There is no directory x."))

    ray.on_start = fail
    with pytest.raises(FileNotFoundError, match="no directory x"):
        dispatch(ray, 3)
    assert all(actor.killed for actor in ray.actors)


def test_workers_that_die_again_and_again_end_the_run() -> None:
    ray = FakeRay()

    def die(actor: Actor) -> None:
        raise RayError("out of memory")

    ray.on_start = die
    with pytest.raises(ChildProcessError, match=r"again and again.*out of memory"):
        dispatch(ray, 3)
    assert len(ray.actors) < 12


@pytest.mark.parametrize(("comes_after", "ends"), [(3, False), (99, True)])
def test_a_cluster_without_room_is_waited_for_and_not_for_ever(comes_after: int, ends: bool) -> None:
    ray, told, looks = FakeRay(), [], 0
    waits = FakeRay.wait

    def has_room() -> bool:
        nonlocal looks
        looks += 1
        return looks > comes_after

    def wait(calls: list[object], num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        return waits(ray, calls, num_returns, timeout) if looks > comes_after else ([], calls)

    ray.wait = wait  # type: ignore[method-assign]
    refused = lambda job, reason: {"line": job.line}  # noqa: E731
    run = Dispatcher(ray, ray.hire, 1, 4, refused, lambda greeting: None, told.append, has_room).run([Line(1)])
    if ends:
        with pytest.raises(ConnectionError, match=r"For 10 minutes the cluster has had no node"):
            list(run)
        assert looks == 20
    else:
        assert [record["line"] for record in run] == [1]
    assert all(actor.killed for actor in ray.actors)


def test_what_is_read_is_what_workers_can_hold() -> None:
    ray, read = FakeRay(), 0

    def lines() -> Any:
        nonlocal read
        for number in range(1, 1001):
            read = number
            yield Line(number)

    run = Dispatcher(ray, ray.hire, 3, 8, lambda job, reason: {}, lambda greeting: None, print).run(lines())
    for taken, _ in enumerate(run, 1):
        assert read <= taken + 3 * 8 + 2  # two records come in one answer
        if taken == 100:
            break
    run.close()
    assert all(actor.killed for actor in ray.actors), "also when nobody wants the rest"


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"), [([8, 8], 2, 8), ([8, 4], 2, 4), ([8], 3, 2), ([2, 2], 8, 1), ([], 1, 1)]
)
def test_cpus_of_a_worker(nodes: list[int], workers: int, cpus: int) -> None:
    assert cpus_each(nodes, workers) == cpus


def test_workers_of_a_cluster() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}]
    dead = {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}}
    ray = SimpleNamespace(nodes=lambda: [*nodes, dead])
    assert fleet_of(ray, None, on_cpu=False) == (4, 1, 1, 4)
    assert fleet_of(ray, 2, on_cpu=False) == (2, 1, 1, 4)
    assert fleet_of(ray, None, on_cpu=True) == (2, 0, 4, 3)
    assert fleet_of(ray, 20, on_cpu=True) == (20, 0, 1, 12)
    for bare in ({}, {"CPU": 0.0}, {"GPU": 2.0}, {"GPU": 2.0, "CPU": 0.0}):  # none of them could hold a worker
        ray = SimpleNamespace(nodes=lambda bare=bare: [{"Alive": True, "Resources": bare}])
        assert fleet_of(ray, None, on_cpu=False).fitting == 0


@pytest.mark.parametrize("address", ["nowhere", "10.0.0.1", "host:", ":6379", "host:port", "host:70000"])
def test_what_is_no_address_is_told(address: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT, or auto, not"):
        check_address(address)


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"There is no Ray cluster at {address}"):
            check_address(address)
        taken.listen()
        check_address(address)
    for other in (None, "auto", "local", "ray://head:10001"):
        check_address(other)


def test_no_cluster_on_this_machine_is_told_in_the_commands_words() -> None:
    def init(**options: Any) -> None:
        raise ConnectionError("Please specify the one to connect to by setting `--address` flag")

    with pytest.raises(ConnectionError, match=r"No Ray cluster runs on this machine: `ray start --head`"):
        join(SimpleNamespace(init=init), "auto", {})
