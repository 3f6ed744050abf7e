"""Threads leave the interpreter to the engine while it launches, and not for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from support import shared_mini_model

from deepseek_vl2.engine import launching
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.kv_cache import Extent
from deepseek_vl2.engine.launching import Launching
from deepseek_vl2.engine.scheduler import EngineOptions


def seconds_of(work: Callable[[], None]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def test_nobody_waits_where_nothing_is_launched() -> None:
    gate = Launching()
    with gate:
        pass
    assert seconds_of(gate.wait) < launching.LONGEST_SECONDS / 2


def test_a_long_launch_is_not_waited_for() -> None:
    gate = Launching()
    with gate:
        assert launching.LONGEST_SECONDS * 0.9 < seconds_of(gate.wait) < 2


def test_others_work_while_the_engine_waits_for_the_device() -> None:
    gate, passed = Launching(), threading.Event()

    def work() -> None:
        gate._over.wait(5)
        passed.set()

    with gate:
        thread = threading.Thread(target=work)
        thread.start()
        assert not passed.wait(0.05)
        with gate.paused():
            assert passed.wait(5)
        assert not gate._over.is_set(), "it launches again"
    thread.join()
    with gate.paused():
        pass
    assert gate._over.is_set(), "nothing was launched before"


def test_what_is_prepared_is_prepared_in_the_engines_thread() -> None:
    """Libraries keep plans for each thread."""
    threads: list[str] = []

    def prepare() -> None:
        threads.append(threading.current_thread().name)
        engine.warm_up()

    engine = Engine(shared_mini_model("small").language, EngineOptions(max_batch=1, kv_cache_tokens=256))
    engine.start(prepare)
    try:
        assert threads == ["engine"]
    finally:
        engine.stop()


def test_a_preparation_that_fails_is_told_and_leaves_the_engine_to_be_started() -> None:
    def prepare() -> None:
        raise MemoryError("none left")

    engine = Engine(shared_mini_model("small").language, EngineOptions(max_batch=1, kv_cache_tokens=256))
    with pytest.raises(MemoryError, match="none left"):
        engine.start(prepare)
    engine.start()
    engine.stop()


def test_a_warm_up_that_fails_gives_its_part_of_the_pool_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture_all(rows: object, scratch: Extent | None) -> None:
        assert scratch is not None and scratch.capacity == 64
        raise MemoryError("none left")

    options = EngineOptions(max_batch=1, kv_cache_tokens=256, prefill_tokens=64)
    engine = Engine(shared_mini_model("small").language, options)
    monkeypatch.setattr(engine.runner, "capture_all", capture_all)
    with pytest.raises(MemoryError):
        engine.warm_up()
    assert engine.kv_cache.allocate(256).capacity == 256
