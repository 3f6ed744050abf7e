"""The scheduler without a model: whose tokens the pool holds, and what the next pass reads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from deepseek_vl2.engine import kv_cache
from deepseek_vl2.engine.kv_cache import SCRATCH, KVCache, LayerShape
from deepseek_vl2.engine.request import Answer, Event, Failure, Prompt, Request
from deepseek_vl2.engine.sampling_params import SamplingParams
from deepseek_vl2.engine.scheduler import EngineOptions, Scheduler

SHAPE = LayerShape(torch.device("cpu"), torch.float32, heads=1, size=2)


def scheduler(tokens: int | None = None, max_batch: int = 8, **options: Any) -> Scheduler:
    return Scheduler(
        KVCache([SHAPE], SCRATCH + (tokens or 0)), EngineOptions(kv_cache_tokens=tokens, **options), max_batch
    )


def answer(
    prompt: int, new: int = 4, shared: bool = False, events: list[Event] | None = None, chunk: int | None = None
) -> Answer:
    told = [] if events is None else events
    ids, params = list(range(100, 100 + prompt)), SamplingParams(max_tokens=new)
    return Answer(Request(Prompt(ids, shared=shared), params, told.append, prefill_chunk=chunk), frozenset())


def read_all(plan: Scheduler) -> list[list[int]]:
    """Read all prompts; returns how many tokens of each prompt every pass took."""
    passes = []
    while parts := plan.next_pass():
        passes.append([tokens for _, tokens in parts])
        for each, tokens in parts:
            plan.read(each, tokens)
    return passes


def begin(plan: Scheduler, *answers: Answer) -> None:
    plan.waiting.extend(answers)
    plan.admit()


def test_a_pass_takes_no_more_than_its_tokens() -> None:
    plan = scheduler(prefill_tokens=10, prefill_chunk=3)
    begin(plan, answer(4), answer(4), answer(19))
    assert read_all(plan) == [[4, 4, 2], [3], [3], [3], [3], [3], [2]]  # two are being written meanwhile


def test_a_prompt_that_fits_a_later_pass_whole_is_not_split() -> None:
    plan = scheduler(prefill_tokens=10, prefill_chunk=5)
    begin(plan, answer(4), answer(4), answer(9), answer(1))
    assert plan.next_pass() == [(plan.prefilling[0], 4), (plan.prefilling[1], 4)]  # nothing overtakes the third
    plan = scheduler(prefill_tokens=10, prefill_chunk=5)
    begin(plan, answer(1))
    read_all(plan)
    begin(plan, *(answer(4) for _ in range(5)))
    assert read_all(plan) == [[4, 4], [4, 4], [4]]


def test_the_rest_of_a_prompt_in_chunks_is_not_split_again() -> None:
    plan = scheduler(prefill_tokens=10, prefill_chunk=6)
    begin(plan, answer(1))
    read_all(plan)
    begin(plan, answer(5), answer(16))
    assert read_all(plan) == [[5, 5], [6], [5]]
    begin(plan, answer(6), answer(10))
    assert read_all(plan) == [[6, 4], [6]]


def test_a_prompt_with_a_chunk_of_its_own_goes_by_that() -> None:
    plan = scheduler(prefill_tokens=10)
    begin(plan, answer(8), answer(8, chunk=6), answer(2))
    assert read_all(plan) == [[8], [6], [2, 2]]


def test_a_long_prompt_delays_answers_under_way_by_a_chunk() -> None:
    plan = scheduler(prefill_tokens=10, prefill_chunk=3)
    begin(plan, answer(2))
    assert read_all(plan) == [[2]] and len(plan.running) == 1
    begin(plan, answer(8), answer(4))
    assert read_all(plan) == [[3, 3], [3, 1], [2]]


def test_a_prompt_is_read_when_all_of_it_is() -> None:
    plan = scheduler()
    long = answer(5)
    begin(plan, long)
    assert not plan.read(long, 3) and plan.prefilling == [long]
    assert plan.read(long, 2) and plan.running == [long] and not plan.prefilling


def test_answers_wait_for_room_in_their_order() -> None:
    plan = scheduler(tokens=20)
    first, second, third = answer(8, 8), answer(8, 8), answer(1, 2)
    begin(plan, first, second, third)
    assert plan.prefilling == [first] and list(plan.waiting) == [second, third]
    plan.drop(first)
    plan.admit()
    assert plan.prefilling == [second, third]


def test_an_answer_that_fits_nowhere_fails_and_the_next_goes_on() -> None:
    plan, events = scheduler(tokens=20), list[Event]()
    small = answer(2, 2)
    begin(plan, answer(30, events=events), small)
    assert plan.prefilling == [small] and not plan.waiting
    assert [type(event) for event in events] == [Failure]


def test_a_growing_answer_moves_with_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_vl2.engine.scheduler.FIRST_TOKENS", 2)
    plan = scheduler(tokens=100)
    one = answer(3, 20)
    begin(plan, one)
    read_all(plan)
    assert one.extent is not None
    pool = plan.kv_cache.pools[0][0]
    old = one.extent.start
    pool[old : old + 5] = torch.arange(10.0).view(5, 1, 2)
    one.cached, free = 5, plan.kv_cache.free_tokens
    plan.make_room()
    assert one.extent.capacity == 10 and one.extent.start != old
    torch.testing.assert_close(pool[one.extent.start : one.extent.start + 5], torch.arange(10.0).view(5, 1, 2))
    assert plan.kv_cache.free_tokens == free - 5  # the old extent is free again


def test_the_last_answer_gives_its_room_up_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_vl2.engine.scheduler.FIRST_TOKENS", 2)
    plan = scheduler(tokens=16)
    first, last = answer(4, 6), answer(4, 6)
    begin(plan, first, last)
    read_all(plan)
    first.cached = last.cached = 6
    last.tokens = [1, 2]
    plan.make_room()
    assert plan.running == [first] and list(plan.waiting) == [last] and plan.preempted == 1
    assert last.cached == 0 and last.extent is None and last.length == 6  # prompt and answer so far are read again
    assert first.extent is not None and first.extent.capacity == 10


def test_all_room_is_free_again_at_the_end() -> None:
    plan = scheduler(tokens=60)
    whole = plan.kv_cache.free_tokens
    answers = [answer(4, 4), answer(6, 4), answer(8, 4)]
    begin(plan, *answers)
    read_all(plan)
    for each in (answers[1], answers[0], answers[2]):
        plan.drop(each)
    assert plan.kv_cache.free_tokens == whole
    assert plan.kv_cache.allocate(whole).capacity == whole  # in one piece


def pool_bytes(plan: Scheduler) -> int:
    return sum(part.nbytes for pool in plan.kv_cache.pools for part in pool)


def test_a_pool_that_grows_takes_what_the_first_request_needs() -> None:
    plan = scheduler()
    begin(plan, answer(1450, 128))
    assert plan.grew and plan.kv_cache.tokens == 1792  # 64 + 1,578, rounded up
    assert pool_bytes(plan) == 1792 * SHAPE.numbers * 4
    plan.drop(plan.prefilling[0])
    plan.grew = False
    begin(plan, answer(1450, 128))  # the next one has the same room
    assert not plan.grew and plan.kv_cache.tokens == 1792


def test_a_pool_of_shared_prompts_has_room_for_prefixes() -> None:
    plan = scheduler(share_prefixes=True)
    for prompt in (answer(1450, 128, shared=True), answer(1500, 128)):
        begin(plan, prompt)
        read_all(plan)
        plan.drop(prompt)
    begin(plan, answer(1450, 128, shared=True))
    assert plan.prefixes.hits == 1 and plan.kv_cache.tokens == 4096


def test_growth_is_rare_and_leaves_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, sizes = scheduler(max_batch=64), list[int]()
    grow = plan.kv_cache.grow

    def noted(tokens: int) -> None:
        sizes.append(tokens)
        grow(tokens)

    monkeypatch.setattr(plan.kv_cache, "grow", noted)
    first = answer(300, 100)
    begin(plan, first)
    assert first.extent is not None
    plan.kv_cache.pools[0][0][first.extent.start :][:300] = 7.0
    begin(plan, *(answer(300, 100) for _ in range(40)))
    assert sizes == [512, 16_640]  # once for all that come together: 464 tokens in use, and 40 times 400
    assert bool((plan.kv_cache.pools[0][0][first.extent.start :][:300] == 7.0).all())
    extents = sorted((a.extent.start, a.extent.capacity) for a in plan.prefilling if a.extent is not None)
    assert all(start + size <= following for (start, size), (following, _) in pairwise(extents))
    begin(plan, answer(300, 100))
    assert sizes[-1] == 33_280  # twice as many: those that come one by one let it grow seldom too
    begin(plan, answer(80_000, 8))  # more than twice the pool holds
    assert sizes[-1] >= 80_008 + 42 * 400 and plan.prefilling[-1].extent is not None


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pool have 3,000 tokens at most."""
    grow = KVCache.grow

    def bounded(cache: KVCache, tokens: int) -> None:
        if tokens > 3000:
            raise torch.OutOfMemoryError("a test")
        grow(cache, tokens)

    monkeypatch.setattr(KVCache, "grow", bounded)


@pytest.mark.usefixtures("little_memory")
def test_memory_that_does_not_double_grows_by_what_it_must() -> None:
    plan = scheduler()
    begin(plan, answer(1450, 128), answer(500, 100))
    assert plan.kv_cache.tokens == 2304 and len(plan.prefilling) == 2
    with pytest.raises(torch.OutOfMemoryError):
        begin(plan, answer(1450, 128))


@pytest.mark.usefixtures("little_memory")
def test_memory_that_has_no_room_for_all_has_room_for_the_first() -> None:
    plan = scheduler()
    with pytest.raises(torch.OutOfMemoryError):
        begin(plan, answer(1450, 128), answer(1450, 128))
    assert plan.kv_cache.tokens == 1792 and len(plan.prefilling) == 1


def test_a_pool_is_replaced_layer_by_layer() -> None:
    """Where memory ends in between, what is cached is still there, and the next attempt goes through."""
    cache = KVCache([SHAPE] * 3, 100)
    extent = cache.allocate(10)
    for pool in cache.pools:
        for part in pool:
            part[extent.start : extent.start + 10] = 3.0
    first, layers = cache.pools[0][0], list[int]()
    whole = kv_cache.new_pool

    def failing(shape: LayerShape, tokens: int) -> tuple[torch.Tensor, ...]:
        layers.append(tokens)
        if len(layers) == 3:
            raise torch.OutOfMemoryError("a test")
        return whole(shape, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "new_pool", failing)
        with pytest.raises(torch.OutOfMemoryError):
            cache.grow(200)
    assert cache.pools[0][0] is not first and cache.tokens == 100 and cache.free_tokens == 26
    cache.grow(150)
    for pool in cache.pools:
        for part in pool:
            assert len(part) == 150 and bool((part[extent.start : extent.start + 10] == 3.0).all())
    assert cache.free_tokens == 76


def test_what_begins_alike_is_copied_but_for_its_last_token() -> None:
    plan = scheduler(share_prefixes=True)
    first, second = answer(64, shared=True), answer(64, shared=True)
    begin(plan, first)
    read_all(plan)
    begin(plan, second)
    assert second.cached == second.prefix_tokens == 63
    assert plan.prefixes.hits == 1 and plan.prefixes.tokens_saved == 63
