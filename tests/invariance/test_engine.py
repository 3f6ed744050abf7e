"""Continuous batching: every request gets what it would get alone, whoever comes and goes beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_support import Listener, chat_prompt, picture, request, running_engine, wait_until

from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.holder import engine_of, release_model
from deepseek_vl2.engine.request import Prompt, Request
from deepseek_vl2.engine.sampler import SamplingBatch
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.engine.status import EngineStopped, QueueFull
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

Ask = Callable[..., tuple[Request, Listener]]

# Different lengths, so that rows join and leave at different steps; three slots, so that some must wait.
QUESTIONS = ["Hello there", "Tell me about x. " * 9, "What is 2+2?", "<image>\nDescribe it.", "a " * 90, "z"]
SAMPLED = [{"temperature": 0.9, "seed": i, "top_p": 1.0 if i % 2 else 0.9} for i in range(len(QUESTIONS))]


@pytest.fixture
def model(golden_model: Callable[..., DeepseekVLV2ForCausalLM]) -> DeepseekVLV2ForCausalLM:
    """Return the golden model of one kind, where the kind does not matter."""
    return golden_model("small")


@pytest.fixture
def engine(model: DeepseekVLV2ForCausalLM) -> Iterator[Engine]:
    """Run an engine of three rows."""
    with running_engine(model, prefill_chunk=64, prefill_tokens=64, queue_size=40) as running:
        yield running


@pytest.fixture
def ask(model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor) -> Ask:
    """Return what makes a request of a text, and its listener."""

    def make(text: str, tokens: int, **params: Any) -> tuple[Request, Listener]:
        return request(chat_prompt(model, processor, text, [picture()] if "<image>" in text else []), tokens, **params)

    return make


def prompts(model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor) -> list[Prompt]:
    return [chat_prompt(model, processor, q, [picture(300, 200)] if "<image>" in q else []) for q in QUESTIONS]


def by_generate(model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, text: str, tokens: int) -> list[int]:
    turn = {"role": "user", "content": text, "images": [picture(300, 200)] if "<image>" in text else []}
    inputs = processor(conversations=[turn])
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(("kind", "sampled"), [("tiny", False), ("small", False), ("base", False), ("small", True)])
def test_batch_is_single(
    kind: str,
    sampled: bool,
    golden_model: Callable[..., DeepseekVLV2ForCausalLM],
    processor: DeepseekVLV2Processor,
) -> None:
    model = golden_model(kind)
    params = SAMPLED if sampled else [{}] * len(QUESTIONS)
    asked = [(prompt, 6 + 5 * i, params[i]) for i, prompt in enumerate(prompts(model, processor))]
    bounds = {"prefill_chunk": 64, "prefill_tokens": 128, "share_prefixes": True, "image_cache_bytes": 1 << 20}
    with running_engine(model, **bounds) as engine:
        alone = []
        for prompt, tokens, given in asked:
            lone, listener = request(prompt, tokens, **given)
            engine.submit([lone])
            alone.append(listener.wait())
        steps = engine.stats.steps
        together = [request(prompt, tokens, **given) for prompt, tokens, given in asked]
        for one, _ in together:
            engine.submit([one])
        found = [listener.wait() for _, listener in together]
        assert engine.stats.steps - steps < 0.7 * steps, "they were not written together"
        assert engine.images.misses == 1, "the image is encoded once"
        assert engine.scheduler.prefixes.hits >= 3
    assert [one.ids for one in found] == [one.ids for one in alone]
    assert [one.completion_tokens for one in found] == [tokens for _, tokens, _ in asked]
    if not sampled:
        for text, (_, tokens, _), one in zip(QUESTIONS, asked, found, strict=True):
            assert one.ids == by_generate(model, processor, text, tokens)


def test_a_host_that_is_a_step_ahead_writes_the_same(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor
) -> None:
    """As on a GPU: tokens are looked at when the next step has begun, and answers end and join meanwhile."""
    found = []
    for late in (False, True):
        with running_engine(model, prefill_chunk=64, prefill_tokens=128) as engine:
            engine._late = late
            asked = [request(p, 5 + 3 * i, ignore_eos=True) for i, p in enumerate(prompts(model, processor))]
            engine.submit([one for one, _ in asked])
            answers = [listener.wait() for _, listener in asked]
            ends = frozenset(one.ids[2] for one in answers)  # each stops at its third token, or before
            again = [request(p, 9, stop_token_ids=ends) for p in prompts(model, processor)]
            engine.submit([one for one, _ in again])
            found.append([(one.ids, one.reason) for one in (*answers, *(listener.wait() for _, listener in again))])
    assert found[0] == found[1]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_chunks_do_not_matter(
    attn: str,
    golden_model: Callable[..., DeepseekVLV2ForCausalLM],
    processor: DeepseekVLV2Processor,
) -> None:
    model = golden_model("base", attn)
    found = []
    for chunk, tiles in ((7, 1), (600, 8)):
        with running_engine(model, prefill_chunk=chunk, prefill_tokens=chunk, tiles_a_pass=tiles) as engine:
            asked, listener = request(prompts(model, processor)[3], 8)
            engine.submit([asked])
            found.append(listener.wait().ids)
    assert found[0] == found[1]


def test_long_prompt_does_not_stall_others(engine: Engine, ask: Ask) -> None:
    first, listener = ask("Hi", 300)
    engine.submit([first])
    assert listener.begun.wait(60)
    long, late = ask("word " * 500, 1)  # eight chunks
    before = engine.stats.steps
    engine.submit([long])
    late.wait()
    assert engine.stats.steps - before >= 7, "the other answer went on between the chunks"
    engine.cancel(first)


def test_choices_of_one_prompt_share_its_cache(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor
) -> None:
    prompt = chat_prompt(model, processor, QUESTIONS[3], [picture()])
    with running_engine(model, share_prefixes=True) as engine:
        pairs = [request(prompt, 5, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        engine.submit([one for one, _ in pairs])
        same, again, other = (listener.wait().ids for _, listener in pairs)
        assert engine.scheduler.prefixes.hits == 2 and engine.stats.prompt_tokens < 2 * len(prompt)
    assert same == again != other


def test_a_second_question_about_a_picture_hits_the_caches(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor
) -> None:
    """Behind the same beginning the prefix serves; behind another one the image's embeddings do."""
    texts = ["<image>\nWhat is it?", "<image>\nHow large is it?", "Look: <image>\nWhat is it?"]
    asked = [chat_prompt(model, processor, text, [picture(300, 200)]) for text in texts]
    expected = []
    for prompt in asked:
        with running_engine(model) as engine:
            one, listener = request(prompt, 8)
            engine.submit([one])
            expected.append(listener.wait().ids)
    counts = []
    with running_engine(model, share_prefixes=True, image_cache_bytes=1 << 20) as engine:
        for prompt, ids in zip(asked, expected, strict=True):
            one, listener = request(prompt, 8)
            engine.submit([one])
            assert listener.wait().ids == ids
            counts.append((engine.scheduler.prefixes.hits, engine.images.hits, engine.images.misses))
    prefix_hits, image_hits, misses = zip(*counts, strict=True)
    assert prefix_hits == (0, 1, 1) and misses == (1, 1, 1)
    assert image_hits[0] == 0 and image_hits[2] == image_hits[1] + 1


def test_a_full_cache_makes_answers_wait_and_begin_anew(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More is asked for than the pool holds at once; everyone gets what they get alone."""
    monkeypatch.setattr("deepseek_vl2.engine.scheduler.FIRST_TOKENS", 16)
    text = "word " * 30
    with running_engine(model) as engine:
        lone, expected = request(chat_prompt(model, processor, text), 80)
        engine.submit([lone])
        expected.wait()
    with running_engine(model, kv_cache_tokens=600, max_batch=16, share_prefixes=True) as engine:
        pairs = [request(chat_prompt(model, processor, text), 80) for _ in range(8)]
        engine.submit([one for one, _ in pairs])
        assert all(listener.wait().ids == expected.ids for _, listener in pairs)
        assert engine.scheduler.preempted > 0 and engine.kv_cache.tokens < 700


def test_threads_that_generate_are_written_together(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor
) -> None:
    release_model(model)
    texts, found = ["Hello there", "What is 2+2?"], {}
    expected = {text: by_generate(model, processor, text, 60) for text in texts}
    before = engine_of(model).stats.steps
    barrier = threading.Barrier(len(texts))

    def generate(text: str) -> None:
        barrier.wait(60)
        found[text] = by_generate(model, processor, text, 60)

    threads = [threading.Thread(target=generate, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == expected
    assert engine_of(model).stats.steps - before < 1.8 * 60


@pytest.mark.parametrize("least", [{"min_new_tokens": 6}, {"min_length": 0}, {"min_new_tokens": 2, "min_length": 1}])
def test_least_lengths_stay_on_the_engine(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, least: dict[str, int]
) -> None:
    """transformers makes two processors of `min_new_tokens`, one of which counts the prompt."""
    inputs = processor(conversations=[{"role": "user", "content": "Hello there"}])
    length = inputs["input_ids"].shape[1]
    first = int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, length])
    if "min_length" in least:
        least = {**least, "min_length": least["min_length"] * (length + 5)}
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": first, "pad_token_id": 0, **least}
    before = engine_of(model).stats.generated_tokens
    found = model.generate(**inputs, **options)
    assert engine_of(model).stats.generated_tokens > before
    by_transformers = model.generate(**inputs, **options, return_dict_in_generate=True).sequences
    assert torch.equal(found, by_transformers)
    assert found.shape[1] - length >= {0: 1, 6: 6, 2: 5}[least.get("min_new_tokens", 0)]


def test_cancelling_frees_the_slot(engine: Engine, ask: Ask) -> None:
    pairs = [ask("Hello", 400) for _ in range(4)]
    engine.submit([one for one, _ in pairs])
    for _, listener in pairs[:3]:
        assert listener.begun.wait(60)
    assert engine.busy == 3 and engine.waiting == 1
    engine.cancel(pairs[3][0])
    wait_until(lambda: engine.waiting == 0)
    for one, _ in pairs[:3]:
        engine.cancel(one)
    wait_until(lambda: engine.busy == 0)
    after, listener = ask("Hello", 3)
    engine.submit([after])
    assert len(listener.wait().ids) == 3
    assert not any(listener.done.is_set() for _, listener in pairs)
    assert engine.stats.cancelled == 4


def test_nothing_is_delivered_behind_a_cancellation(engine: Engine, ask: Ask) -> None:
    """Not even a token of the same step, which the device has chosen already."""
    (first, listener), (second, other) = ask("Hello", 8), ask("Hello", 8)
    told: list[int] = []

    def cancel_the_other(event: Any) -> None:
        listener(event)
        if len(listener.ids) == 3:
            engine.cancel(second)
            told.append(len(other.ids))

    first.deliver = cancel_the_other
    engine.submit([first, second])
    listener.wait()
    wait_until(lambda: engine.busy == 0)
    assert told == [2] and len(other.ids) == 2 and not other.done.is_set()


@pytest.mark.parametrize("text", ["Hello", "a " * 90], ids=["short", "in chunks"])
def test_who_leaves_while_the_prompt_runs_gets_no_step(
    text: str, engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a first token there is nothing to embed; on a GPU an id of -1 would end the whole process's use of it."""
    leaving, _ = ask(text, 20)
    sample = SamplingBatch.sample

    def leave_then_sample(*arguments: Any) -> Any:
        engine.cancel(leaving)
        return sample(*arguments)

    monkeypatch.setattr(SamplingBatch, "sample", leave_then_sample)
    engine.submit([leaving])
    wait_until(lambda: engine.stats.cancelled == 1)
    assert (engine.stats.failed, engine.stats.steps, engine.busy) == (0, 0, 0)


def test_bounds(engine: Engine, ask: Ask) -> None:
    with pytest.raises(ValueError, match="max_tokens=600 exceed 600"):
        engine.submit([ask("Hello", 600)[0]])
    jobs = [ask("Hello", 400)[0] for _ in range(44)]
    with pytest.raises(QueueFull):
        engine.submit(jobs)
    assert engine.waiting == 0, "all of them or none"
    engine.submit(jobs[:43])
    for one in jobs:
        engine.cancel(one)


def test_stopping_fails_what_runs(engine: Engine, ask: Ask) -> None:
    pairs = [ask("Hello", 400) for _ in range(5)]
    engine.submit([one for one, _ in pairs])
    assert pairs[0][1].begun.wait(60)
    engine.stop()
    assert all(isinstance(listener.wait().error, EngineStopped) for _, listener in pairs)
    with pytest.raises(EngineStopped):
        engine.submit([ask("Hello", 4)[0]])


def test_an_error_stays_with_its_request(engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three answers, one meets an error in every step of the model, and one in its own rules."""
    decode = engine.runner.decode
    bad_step = ask("bad step", 12)

    def failing(rows: Any, count: int) -> Any:
        if any(answer.request is bad_step[0] for answer in rows.answers[:count]):
            raise RuntimeError("out of memory, say")
        return decode(rows, count)

    class Broken:
        finished = False

        def allowed(self) -> torch.Tensor:
            raise RuntimeError("no token is allowed")

        def advance(self, token: int) -> None: ...

    good, bad_rules = ask("good", 12), ask("bad rules", 12, grammar=Broken)
    alone, listener = ask("good", 12)
    engine.submit([alone])
    expected = listener.wait().ids
    monkeypatch.setattr(engine.runner, "decode", failing)
    engine.submit([good[0], bad_step[0], bad_rules[0]])
    assert good[1].wait().ids == expected
    assert "out of memory" in str(bad_step[1].wait().error)
    assert "no token is allowed" in str(bad_rules[1].wait().error)
    assert engine.stats.failed == 2 and engine.healthy
    wait_until(lambda: engine.busy == 0)


def test_a_prompt_that_fails_leaves_no_trace(
    engine: Engine, ask: Ask, model: DeepseekVLV2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of a pass's prompts it is."""
    monkeypatch.setattr(model, "encode_tiles", lambda tiles: 1 / 0)
    for order in (1, -1):
        bad, listener = ask(QUESTIONS[3], 4)
        good, other = ask("Hello", 4)
        engine.submit([bad, good][::order])
        assert isinstance(listener.wait().error, ZeroDivisionError)
        assert len(other.wait().ids) == 4
        wait_until(lambda: engine.busy == 0)


def test_many_threads_submit_and_cancel(engine: Engine, ask: Ask) -> None:
    expected, listener = ask("Hello", 10)
    engine.submit([expected])
    listener.wait()
    kept: list = []

    def client(number: int) -> None:
        for turn in range(4):
            one, own = ask("Hello", 10)
            engine.submit([one])
            if (number + turn) % 2:
                own.begun.wait(60)
                engine.cancel(one)
            else:
                kept.append(own.wait())

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    wait_until(lambda: engine.busy == 0)
    assert len(kept) == 12 and all(own.ids == listener.ids for own in kept)


@pytest.mark.parametrize(
    "name", ["max_batch", "max_length", "prefill_chunk", "prefill_tokens", "kv_cache_tokens", "tiles_a_pass"]
)
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        EngineOptions(**{name: 0})
