"""Continuous batching: every request gets what it would get alone, whoever comes and goes beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from server_support import GREEDY, job, picture, running_engine, text_prompt, wait_until

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.serve.api import engine as engine_module
from deepseek_vl2.serve.api.engine import Engine, EngineOptions, EngineStopped, QueueFull
from deepseek_vl2.serve.api.sampling import SamplingOptions
from deepseek_vl2.serve.api.slots import SlotCache, cache_bytes
from deepseek_vl2.serve.api.token_bytes import TokenBytes

# Different lengths, so that rows join and leave at different steps; three slots, so that some must wait.
QUESTIONS = ["Hello there", "Tell me about x. " * 9, "What is 2+2?", "<image>\nDescribe it.", "a " * 90, "z"]
SAMPLED = [SamplingOptions(temperature=0.9, seed=i, top_p=1.0 if i % 2 else 0.9) for i in range(len(QUESTIONS))]


@pytest.fixture(scope="module")
def token_bytes(processor: DeepseekVLV2Processor) -> TokenBytes:
    """Return the table of the golden tokenizer."""
    return TokenBytes(processor.tokenizer)


@pytest.fixture
def model(golden_model: Callable[..., DeepseekVLV2ForCausalLM]) -> DeepseekVLV2ForCausalLM:
    """Return the golden model of one kind, where the kind does not matter."""
    return golden_model("small")


@pytest.fixture
def engine(model: DeepseekVLV2ForCausalLM, token_bytes: TokenBytes) -> Iterator[Engine]:
    """Run an engine of three slots."""
    with running_engine(model, token_bytes, prefill_chunk=64) as running:
        yield running


def prompts(processor: DeepseekVLV2Processor) -> list[Callable]:
    return [
        lambda text=text: text_prompt(processor, text, [picture(300, 200)] if "<image>" in text else [])
        for text in QUESTIONS
    ]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_batch_is_single(
    kind: str,
    sampled: bool,
    golden_model: Callable[..., DeepseekVLV2ForCausalLM],
    token_bytes: TokenBytes,
    processor: DeepseekVLV2Processor,
) -> None:
    model = golden_model(kind)
    options = SAMPLED if sampled else [GREEDY] * len(QUESTIONS)
    asked = [(make, 6 + 5 * i, options[i]) for i, make in enumerate(prompts(processor))]
    with running_engine(model, token_bytes, prefill_chunk=64) as engine:
        alone = []
        for make, tokens, sampling in asked:
            lone, listener = job(make(), tokens, sampling)
            engine.submit([lone])
            alone.append(listener.wait())
        steps = engine.stats.steps
        together = [job(make(), tokens, sampling) for make, tokens, sampling in asked]
        for one, _ in together:
            engine.submit([one])
        found = [listener.wait() for _, listener in together]
        assert engine.stats.steps - steps < 0.7 * steps, "they were not written together"
    assert [one.ids for one in found] == [one.ids for one in alone]
    assert [one.completion_tokens for one in found] == [tokens for _, tokens, _ in asked]
    if not sampled:
        for (make, tokens, _), one in zip(asked, found, strict=True):
            inputs = processor.batchify([make().inputs])
            expected = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            assert one.ids == expected[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_chunks_do_not_matter(
    attn: str,
    golden_model: Callable[..., DeepseekVLV2ForCausalLM],
    token_bytes: TokenBytes,
    processor: DeepseekVLV2Processor,
) -> None:
    model = golden_model("base", attn)
    found = []
    for chunk, tiles in ((7, 1), (600, 8)):
        with running_engine(model, token_bytes, prefill_chunk=chunk, tiles_a_step=tiles) as engine:
            asked, listener = job(text_prompt(processor, QUESTIONS[3], [picture(300, 200)]), 8)
            engine.submit([asked])
            found.append(listener.wait().ids)
    assert found[0] == found[1]


def test_long_prompt_does_not_stall_others(
    engine: Engine, processor: DeepseekVLV2Processor, token_bytes: TokenBytes
) -> None:
    first, listener = job(text_prompt(processor, "Hi"), 300)
    engine.submit([first])
    assert listener.begun.wait(60)
    long, late = job(text_prompt(processor, "word " * 500), 1)  # eight chunks
    before = engine.stats.steps
    engine.submit([long])
    late.wait()
    assert engine.stats.steps - before >= 7, "the other answer went on between the chunks"
    engine.cancel(first)


def test_choices_of_one_prompt_share_its_embeddings(engine: Engine, processor: DeepseekVLV2Processor) -> None:
    prompt = text_prompt(processor, QUESTIONS[3], [picture()])
    pairs = [job(prompt, 5, SamplingOptions(seed=seed)) for seed in (1, 1, 2)]
    engine.submit([one for one, _ in pairs])
    same, again, other = (listener.wait().ids for _, listener in pairs)
    assert same == again != other
    assert prompt.inputs is None and prompt.embeds is not None


def test_cancelling_frees_the_slot(engine: Engine, processor: DeepseekVLV2Processor) -> None:
    pairs = [job(text_prompt(processor, "Hello"), 400) for _ in range(4)]
    engine.submit([one for one, _ in pairs])
    for _, listener in pairs[:3]:
        assert listener.begun.wait(60)
    assert engine.busy_slots == 3 and engine.waiting == 1
    engine.cancel(pairs[3][0])
    assert engine.waiting == 0
    for one, _ in pairs[:3]:
        engine.cancel(one)
    wait_until(lambda: engine.busy_slots == 0)
    after, listener = job(text_prompt(processor, "Hello"), 3)
    engine.submit([after])
    assert len(listener.wait().ids) == 3
    assert not any(listener.done.is_set() for _, listener in pairs)
    assert engine.stats.cancelled == 4


@pytest.mark.parametrize("text", ["Hello", "a " * 90], ids=["short", "in chunks"])
def test_who_leaves_while_the_prompt_runs_gets_no_step(
    text: str, engine: Engine, processor: DeepseekVLV2Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a first token there is nothing to embed; on a GPU an id of -1 would end the whole process's use of it."""
    leaving, _ = job(text_prompt(processor, text), 20)
    sample = engine_module.sample

    def leave_then_sample(logits_BV: torch.Tensor, rows: list) -> tuple:
        engine.cancel(leaving)
        return sample(logits_BV, rows)

    monkeypatch.setattr(engine_module, "sample", leave_then_sample)
    engine.submit([leaving])
    wait_until(lambda: engine.stats.cancelled == 1)
    assert (engine.stats.failed, engine.stats.steps, engine.busy_slots) == (0, 0, 0)


def test_bounds(engine: Engine, processor: DeepseekVLV2Processor) -> None:
    engine.options.queue_size = 1
    with pytest.raises(ValueError, match="max_tokens=600 exceed 600"):
        engine.submit([job(text_prompt(processor, "Hello"), 600)[0]])
    jobs = [job(text_prompt(processor, "Hello"), 400)[0] for _ in range(5)]
    with pytest.raises(QueueFull):
        engine.submit(jobs)
    assert engine.waiting == 0, "all of them or none"
    engine.submit(jobs[:4])
    for one in jobs:
        engine.cancel(one)


def test_stopping_fails_what_runs(engine: Engine, processor: DeepseekVLV2Processor) -> None:
    pairs = [job(text_prompt(processor, "Hello"), 400) for _ in range(5)]
    engine.submit([one for one, _ in pairs])
    assert pairs[0][1].begun.wait(60)
    engine.stop()
    assert all(isinstance(listener.wait().error, EngineStopped) for _, listener in pairs)
    with pytest.raises(EngineStopped):
        engine.submit([job(text_prompt(processor, "Hello"), 4)[0]])


def test_an_error_stays_with_its_request(
    engine: Engine, processor: DeepseekVLV2Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three answers, one meets an error in every step of the model, and one in its own rules."""
    good, bad_step, bad_rules = (job(text_prompt(processor, text), 12) for text in ("good", "bad step", "bad rules"))
    forward = engine._forward

    def failing(rows: list) -> torch.Tensor:
        if any(row.job is bad_step[0] for row in rows):
            raise RuntimeError("out of memory, say")
        return forward(rows)

    class Broken:
        finished = False

        def allowed(self) -> torch.Tensor:
            raise RuntimeError("no token is allowed")

        def advance(self, token: int) -> None: ...

    alone, listener = job(text_prompt(processor, "good"), 12)
    engine.submit([alone])
    expected = listener.wait().ids
    monkeypatch.setattr(engine, "_forward", failing)
    bad_rules[0].constraint = Broken()  # type: ignore[assignment]
    engine.submit([good[0], bad_step[0], bad_rules[0]])
    assert good[1].wait().ids == expected
    assert "out of memory" in str(bad_step[1].wait().error)
    assert "no token is allowed" in str(bad_rules[1].wait().error)
    assert engine.stats.failed == 2 and engine.healthy
    wait_until(lambda: engine.busy_slots == 0)


def test_a_prompt_that_fails_leaves_no_trace(
    engine: Engine, processor: DeepseekVLV2Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = text_prompt(processor, QUESTIONS[3], [picture()])
    monkeypatch.setattr(engine.model, "encode_tiles", lambda tiles: 1 / 0)
    bad, listener = job(broken, 4)
    good, other = job(text_prompt(processor, "Hello"), 4)
    engine.submit([bad, good])
    assert isinstance(listener.wait().error, ZeroDivisionError)
    assert len(other.wait().ids) == 4
    wait_until(lambda: engine.busy_slots == 0)


def test_many_threads_submit_and_cancel(engine: Engine, processor: DeepseekVLV2Processor) -> None:
    engine.options.queue_size = 100
    expected, listener = job(text_prompt(processor, "Hello"), 10)
    engine.submit([expected])
    listener.wait()
    kept: list = []

    def client(number: int) -> None:
        for turn in range(4):
            one, own = job(text_prompt(processor, "Hello"), 10)
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
    wait_until(lambda: engine.busy_slots == 0)
    assert len(kept) == 12 and all(own.ids == listener.ids for own in kept)


def test_cache_bytes_are_what_the_cache_takes(kind: str, golden_model: Callable[..., DeepseekVLV2ForCausalLM]) -> None:
    language = golden_model(kind).language
    cache = SlotCache(language, slots=3, max_length=40)
    taken = sum(layer.key_room.nbytes + layer.value_room.nbytes for layer in cache.layers)
    assert taken == cache_bytes(language.config, 3, 40, torch.float32)


@pytest.mark.parametrize("name", ["slots", "max_length", "prefill_chunk", "tiles_a_step"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        EngineOptions(**{name: 0})
