"""Streamed answers: whole characters, exact stop words, own random numbers, cancellation, errors, an async form."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deepseek_vl2.engine.detokenizer import Detokenizer, StopFilter, TokenBytes
from deepseek_vl2.engine.holder import engine_of
from deepseek_vl2.serve.inference import agenerate, deepseek_generate, generate
from deepseek_vl2.serve.streaming import AsyncTextStream, GenerationOptions, TextStream
from deepseek_vl2.utils.demo import BOS, EOS, byte_tokenizer, write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model

TOKENIZER = byte_tokenizer()
CONVERSATION = [{"role": "user", "content": "Say something."}]
Stream = Callable[..., TextStream]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    return load_pretrained_model(write_demo_checkpoint(tmp_path_factory.mktemp("demo")), "cpu", torch.float32)


@pytest.fixture
def stream(loaded: tuple[Any, Any, Any]) -> Stream:
    tokenizer, processor, model = loaded

    def start(kind: Any = TextStream, conversation: Any = CONVERSATION, **options: Any) -> Any:
        return kind(model, tokenizer, processor(conversations=conversation), GenerationOptions(**options))

    return start


@contextmanager
def counted_steps(model: Any) -> Iterator[list[int]]:
    """Count the model's steps."""
    steps: list[int] = []
    handle = model.language.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        yield steps
    finally:
        handle.remove()


# ---------------------------------------------------------------- text from tokens


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.one_of(st.text(max_size=5), st.binary(max_size=4), st.sampled_from([BOS, EOS, "<|ref|>"])), max_size=9)
)
def test_pieces_add_up_to_the_decoded_text(parts: list[str | bytes]) -> None:
    ids: list[int] = []
    alphabet = sorted(TOKENIZER.backend_tokenizer.pre_tokenizer.alphabet())
    symbols = bytes_to_unicode()
    for part in parts:
        if isinstance(part, bytes):
            ids += [alphabet.index(symbols[byte]) for byte in part]
        else:
            ids += TOKENIZER.encode(part, add_special_tokens=False)
    detokenizer = Detokenizer(TokenBytes(TOKENIZER))
    pieces = [detokenizer.push(id_) for id_ in ids]
    assert "".join(pieces) + detokenizer.finish() == TOKENIZER.decode(ids)


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    detokenizer = Detokenizer(TokenBytes(TOKENIZER))
    pieces = [detokenizer.push(id_) for id_ in TOKENIZER.encode("a猫🦒b", add_special_tokens=False)]
    assert [piece for piece in pieces if piece] == ["a", "猫", "🦒", "b"]


WORDS = st.text("abc", min_size=1, max_size=4)


@given(st.lists(st.text("abc", max_size=3), max_size=12), st.lists(WORDS, max_size=3))
def test_stop_words_cut_the_text_wherever_the_pieces_break(pieces: list[str], words: list[str]) -> None:
    whole = "".join(pieces)
    ends = [whole.index(word) for word in words if word in whole]
    # The stream ends at the first word that is complete, which may begin behind a longer one that is not yet.
    complete = [next(n for n in range(len(whole) + 1) if word in whole[:n]) for word in words if word in whole]
    filter_ = StopFilter(words)
    shown = ""
    for piece in pieces:
        shown += filter_.push(piece)
        if filter_.stopped:
            break
    shown += filter_.flush()
    assert filter_.stopped == bool(ends)
    if not ends:
        assert shown == whole
        return
    assert whole.startswith(shown) and whole[len(shown) :].startswith(str(filter_.found))
    assert not any(word in shown for word in words)
    assert len(shown) <= min(complete)


# ---------------------------------------------------------------- how an answer ends


def test_finish_reasons_and_counts(stream: Stream) -> None:
    whole = stream(max_new_tokens=12)
    assert "".join(whole) == whole.answer.text
    assert (whole.answer.finish_reason, whole.answer.completion_tokens, whole.answer.seed) == ("length", 12, None)
    assert whole.answer.prompt_tokens > 10
    word = whole.answer.text[4:6]
    stopped = stream(max_new_tokens=12, stop=[word]).read()
    assert (stopped.finish_reason, stopped.stop_word) == ("stop", word)
    assert stopped.text == whole.answer.text[: whole.answer.text.index(word)]


def test_the_end_token_ends_and_is_not_shown(
    stream: Stream, loaded: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, processor, model = loaded
    inputs = processor(conversations=CONVERSATION)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    at = next(index for index, id_ in enumerate(ids) if index > 2 and id_ not in ids[:index])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [ids[at]])
    hidden = stream(max_new_tokens=8).read()
    assert (hidden.finish_reason, hidden.completion_tokens) == ("stop", at + 1)
    assert hidden.text == tokenizer.decode(ids[:at])
    assert stream(max_new_tokens=8, keep_eos=True).read().text == tokenizer.decode(ids[: at + 1])


def test_a_stop_word_ends_the_model_at_once(stream: Stream, loaded: tuple[Any, Any, Any]) -> None:
    text = stream(max_new_tokens=40).read().text
    word = text[6:8]
    with counted_steps(loaded[2]) as steps:
        answer = stream(max_new_tokens=40, stop=[word]).read()
    assert len(steps) == answer.completion_tokens < 40  # no step beyond the token that completes the word


def test_closing_waits_for_the_model_to_stop(stream: Stream, loaded: tuple[Any, Any, Any]) -> None:
    pieces = stream(max_new_tokens=2000)
    with counted_steps(loaded[2]) as steps, pieces:
        next(pieces)
        pieces.close()
        done = len(steps)
        time.sleep(0.1)
        assert len(steps) == done < 1900
    assert pieces.answer.finish_reason == "cancelled"
    assert list(pieces) == []


def test_another_thread_can_cancel(stream: Stream) -> None:
    pieces = stream(max_new_tokens=4000)
    timer = threading.Timer(0.3, pieces.cancel)
    timer.start()
    text = "".join(pieces)
    timer.join()
    assert pieces.answer.finish_reason == "cancelled" and pieces.answer.completion_tokens < 4000
    assert text == pieces.answer.text


def test_a_stream_that_nobody_holds_stops(stream: Stream, loaded: tuple[Any, Any, Any]) -> None:
    pieces = stream(max_new_tokens=4000)
    next(pieces)
    engine, answer = engine_of(loaded[2]), pieces.answer
    assert engine.busy == 1
    del pieces
    gc.collect()
    assert engine.busy == 0 and engine.waiting == 0
    assert answer.finish_reason == "cancelled" and answer.completion_tokens < 4000


def test_nothing_runs_before_the_first_piece_is_asked_for(stream: Stream, loaded: tuple[Any, Any, Any]) -> None:
    with counted_steps(loaded[2]) as steps:
        unread = stream(max_new_tokens=5)
        time.sleep(0.1)
        unread.close()
    assert steps == [] and unread.answer.finish_reason == "cancelled"


def test_streams_are_written_together(stream: Stream, loaded: tuple[Any, Any, Any]) -> None:
    """Whoever asks for a piece drives all of them: sixteen answers take hardly more steps than one."""
    texts = [stream(max_new_tokens=12, temperature=1.0, seed=seed).read().text for seed in range(16)]
    streams = [stream(max_new_tokens=12, temperature=1.0, seed=seed) for seed in range(16)]
    before = engine_of(loaded[2]).stats.steps
    threads = [threading.Thread(target=one.read) for one in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [one.answer.text for one in streams] == texts
    assert engine_of(loaded[2]).stats.steps - before < 16 * 11 / 2


# ---------------------------------------------------------------- random numbers


def test_a_seed_is_reproducible_and_leaves_the_global_generator_alone(stream: Stream) -> None:
    state = torch.get_rng_state()
    first = stream(max_new_tokens=24, temperature=1.0, seed=5).read()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert stream(max_new_tokens=24, temperature=1.0, seed=5).read() == first
    other = stream(max_new_tokens=24, temperature=1.0, seed=6).read()
    assert other.text != first.text and (first.seed, other.seed) == (5, 6)


def test_without_a_seed_torchs_own_decides_and_is_told(stream: Stream) -> None:
    answers = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        answers.append(stream(max_new_tokens=16, temperature=1.0).read())
    assert answers[0] == answers[1] and answers[0].text != answers[2].text
    assert stream(max_new_tokens=16, temperature=1.0, seed=answers[2].seed).read() == answers[2]


def test_answers_in_other_threads_change_nothing(stream: Stream) -> None:
    alone = [stream(max_new_tokens=16, temperature=1.0, seed=seed).read().text for seed in range(4)]
    together = [stream(max_new_tokens=16, temperature=1.0, seed=seed) for seed in range(4)]
    for one in together:  # all run at once
        next(one)
    assert [one.read().text for one in together] == alone


def test_top_k_and_a_tiny_temperature_are_greedy(stream: Stream) -> None:
    greedy = stream(max_new_tokens=8).read().text
    assert stream(max_new_tokens=8, temperature=1.0, top_k=1, seed=0).read().text == greedy
    assert stream(max_new_tokens=8, temperature=1e-30).read().text == greedy


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**64}, "64 bits"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size"),
        ({"stop": "word"}, "list of texts"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerationOptions(**options)


def test_a_batch_is_refused_before_any_work(stream: Stream) -> None:
    with pytest.raises(ValueError, match="a batch of 2"):
        stream(conversation=[CONVERSATION, CONVERSATION])


def test_errors_are_raised_once_and_keep_no_memory(stream: Stream, loaded: tuple[Any, Any, Any]) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("the model broke")

    handle = loaded[2].language.lm_head.register_forward_hook(fail)
    try:
        pieces = stream()
        with pytest.raises(RuntimeError, match="the model broke"):
            next(pieces)
        assert list(pieces) == [] and pieces._run.request is None and pieces._run.inputs is None
    finally:
        handle.remove()


# ---------------------------------------------------------------- in an event loop


def test_async_answers_are_the_same_and_run_beside_the_loop(stream: Stream) -> None:
    async def main() -> tuple[Any, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(tick())
        answer = await stream(AsyncTextStream, max_new_tokens=16).read()  # type: ignore[misc]
        task.cancel()
        return answer, ticks

    answer, ticks = asyncio.run(main())
    assert answer == stream(max_new_tokens=16).read() and ticks > 16


def test_cancelling_a_task_stops_the_model(stream: Stream) -> None:
    async def main() -> AsyncTextStream:
        pieces: Any = stream(AsyncTextStream, max_new_tokens=4000)
        task = asyncio.create_task(pieces.read())
        while not pieces.answer.text:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await pieces.aclose()
        return pieces

    pieces = asyncio.run(main())
    assert pieces.answer.completion_tokens < 4000 and pieces.answer.finish_reason == "cancelled"


def test_leaving_an_async_stream_early_stops_the_model(stream: Stream) -> None:
    async def main() -> Any:
        async with stream(AsyncTextStream, max_new_tokens=4000) as pieces:  # type: ignore[attr-defined]
            async for _ in pieces:
                break
        assert [piece async for piece in pieces] == []
        return pieces.answer

    assert asyncio.run(main()).completion_tokens < 4000


def test_errors_reach_the_async_reader(stream: Stream, loaded: tuple[Any, Any, Any]) -> None:
    tokenizer, processor, model = loaded
    inputs = processor(conversations=CONVERSATION)
    inputs["images_seq_mask"][:] = True

    async def main() -> None:
        with pytest.raises(ValueError, match="images_seq_mask"):
            async for _ in agenerate(model, tokenizer, inputs, max_gen_len=4):
                pass

    asyncio.run(main())


# ---------------------------------------------------------------- the original's names


def test_the_originals_functions_take_a_seed(loaded: tuple[Any, Any, Any]) -> None:
    tokenizer, processor, model = loaded
    settings = {"temperature": 1.0, "seed": 3}
    answer = deepseek_generate(CONVERSATION, model, processor, tokenizer, [], max_length=12, **settings)
    inputs = processor(conversations=CONVERSATION)
    assert "".join(answer) == "".join(generate(model, tokenizer, inputs, max_gen_len=12, top_p=1.0, **settings))
