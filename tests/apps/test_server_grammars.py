"""Grammars of strangers: bounded in time and memory, ended with their request, compiled once and kept."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import psutil
import pytest
from server_support import RunningServer, assert_prompt, chat_body, health_times, make_server, post, wait_until

from deepseek_vl2.engine.detokenizer import TokenBytes
from deepseek_vl2.serve.api.errors import ApiError
from deepseek_vl2.serve.api.grammar import FIRST_SECONDS, TOKEN_SECONDS, GrammarCompiler, GrammarError
from deepseek_vl2.serve.api.grammar_process import GrammarCache, GrammarProcess, GrammarService, RefusedGrammars
from deepseek_vl2.serve.api.grammar_worker import HEADER, read_exactly, read_message, write_message
from deepseek_vl2.serve.api.settings import GrammarLimits

LIMITS = GrammarLimits(seconds=1)
MANY_PATTERNS = {f"^{chr(97 + i // 26)}{chr(97 + i % 26)}[a-z]*$": {"type": "integer"} for i in range(600)}
COSTLY = [
    {"type": "integer", "multipleOf": 7777777},
    {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 1500007}, "b": {"multipleOf": 1500009}}},
    {"type": "object", "patternProperties": MANY_PATTERNS},
]


@pytest.fixture(scope="module")
def compiler(demo: Any) -> GrammarCompiler:
    """Return the compiler of the demo model, of one token a byte."""
    model, processor = demo
    table = TokenBytes(processor.tokenizer, [0, 1])
    return GrammarCompiler(table, model.config.language_config.vocab_size, [1])


def with_service(
    compiler: GrammarCompiler, work: Callable[[GrammarService], Awaitable[Any]], limits: GrammarLimits = LIMITS
) -> Any:
    """Do some work with a service, in an event loop of its own."""

    async def run() -> Any:
        service = GrammarService(compiler, limits)
        try:
            return await work(service)
        finally:
            await service.stop()

    return asyncio.run(run())


def schema_body(schema: Any, **fields: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return chat_body(response_format=form, **fields)


@pytest.mark.parametrize("schema", COSTLY, ids=["one multiple", "two", "600 patterns"])
def test_costly_grammars_are_refused_in_time(compiler: GrammarCompiler, schema: Any) -> None:
    async def work(service: GrammarService) -> float:
        begin = time.monotonic()
        with pytest.raises(ValueError, match="takes more than 1 seconds or 256 MiB to compile"):
            await service.constraints("json_schema", json.dumps(schema), 2)
        assert service.compiled == 0, "this process compiled it"
        return time.monotonic() - begin

    # One second of a CPU, of which a busy machine may give a fifth.
    assert with_service(compiler, work) < 8


def test_memory_is_bounded_too(compiler: GrammarCompiler) -> None:
    async def work(service: GrammarService) -> None:
        with pytest.raises(ValueError, match="or 8 MiB to compile"):
            await service.constraints("json_schema", json.dumps({"type": "integer", "multipleOf": 100007}), 1)

    begin = time.monotonic()
    with_service(compiler, work, GrammarLimits(seconds=20, memory=8 << 20))
    assert time.monotonic() - begin < 15


def test_a_grammar_is_compiled_once_for_all_who_ask(compiler: GrammarCompiler) -> None:
    async def work(service: GrammarService) -> None:
        first, second, third = await service.constraints("regex", "ab|cd", 3)
        a, c = (compiler.tokens.index(letter) for letter in (b"a", b"c"))
        first.advance(a)  # each stands in a place of its own
        second.advance(c)
        assert not first.allowed()[compiler.tokens.index(b"d")] and second.allowed()[compiler.tokens.index(b"d")]
        assert third.allowed()[a] and third.allowed()[c]
        with pytest.raises(GrammarError):
            first.advance(a)
        (again,) = await service.constraints("regex", "ab|cd", 1)
        assert again.allowed()[a]
        assert service.compiled == 1
        await service.constraints("json_schema", '{"type": "object"}', 1)
        assert service.compiled == 2 and len(service.cache) == 2

    with_service(compiler, work)


def test_a_grammar_that_was_refused_is_not_tried_again_at_once(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(service: GrammarService) -> None:
        tried: list[str] = []
        real = GrammarProcess.compile

        async def compile_and_note(self: GrammarProcess, kind: Any, text: str) -> int:
            tried.append(text)
            return await real(self, kind, text)

        monkeypatch.setattr(GrammarProcess, "compile", compile_and_note)

        async def ask() -> None:
            with pytest.raises(ValueError, match="cannot be used"):  # at once: how long it took does not matter
                await service.constraints("regex", "(", 1)

        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(ask)
        await ask()
        assert len(tried) <= service.limits.processes
        monkeypatch.setattr("deepseek_vl2.serve.api.grammar_process.REFUSED_SECONDS", -1.0)
        service.refused = RefusedGrammars()
        await ask()
        await ask()
        assert len(tried) >= 3, "after a while it is tried again"

    with_service(compiler, work)


def test_who_asks_at_the_same_time_waits_for_one_compilation(compiler: GrammarCompiler) -> None:
    async def work(service: GrammarService) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(service.constraints, "regex", "x{3}", 1)
        assert service.compiled <= 2  # one for each process

    with_service(compiler, work)


def test_the_cache_has_a_size(compiler: GrammarCompiler) -> None:
    cache = GrammarCache(100)
    matchers = {name: compiler.matcher("regex", name) for name in "abcd"}
    for name in "abc":
        cache.put(name.encode(), matchers[name], 40)
        cache.get(b"a")  # used again and again, it stays
    assert cache.bytes == 80 and len(cache) == 2
    assert cache.get(b"a") is matchers["a"] and cache.get(b"b") is None
    cache.put(b"d", matchers["d"], 101)
    assert cache.get(b"d") is None and cache.bytes == 80


def test_who_leaves_ends_the_work(compiler: GrammarCompiler) -> None:
    async def work(service: GrammarService) -> None:
        await service.constraints("regex", "a", 1)
        (process,) = [p.process for p in service._processes if p.process is not None]
        worker = psutil.Process(process.pid)
        for _ in range(2):
            with anyio.move_on_after(0.3):
                await service.constraints("json_schema", json.dumps(COSTLY[0]), 1)
            assert worker.is_running() and not worker.children(), "the work goes on though nobody waits"
        await service.constraints("regex", "b", 1)
        assert process.returncode is None, "the process was kept"

    with_service(compiler, work, GrammarLimits(seconds=30, processes=1))


def test_a_process_that_died_is_replaced(compiler: GrammarCompiler) -> None:
    async def work(service: GrammarService) -> None:
        await service.constraints("regex", "a", 1)
        (process,) = [p.process for p in service._processes if p.process is not None]
        os.kill(process.pid, signal.SIGSTOP)

        async def kill() -> None:
            await anyio.sleep(0.2)
            os.kill(process.pid, signal.SIGKILL)

        async with anyio.create_task_group() as group:
            group.start_soon(kill)
            with pytest.raises(ApiError) as failure:
                await service.constraints("regex", "b", 1)
        assert failure.value.status == 500
        assert len(await service.constraints("regex", "b", 2)) == 2

    with_service(compiler, work, GrammarLimits(processes=1))


def test_no_process_is_left(compiler: GrammarCompiler) -> None:
    before = set(psutil.Process().children(recursive=True))

    async def work(service: GrammarService) -> None:
        await service.constraints("regex", "a", 1)

    with_service(compiler, work)
    assert set(psutil.Process().children(recursive=True)) <= before


def test_only_so_many_wait(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_vl2.serve.api.grammar_process.MAX_WAITING", 1)

    async def work(service: GrammarService) -> None:
        async with anyio.create_task_group() as group:
            for number in range(2):  # one is at work for seconds, one waits
                schema = json.dumps({"type": "integer", "multipleOf": 7_777_777 - number})
                group.start_soon(service.constraints, "json_schema", schema, 1)
                await anyio.wait_all_tasks_blocked()
            with pytest.raises(ApiError) as refused:
                await service.constraints("regex", "b", 1)
            assert refused.value.status == 429
            group.cancel_scope.cancel()

    with_service(compiler, work, GrammarLimits(processes=1))


def test_none_waits_for_ever(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_vl2.serve.api.grammar_process.MAX_WAITING_SECONDS", 0.1)

    async def work(service: GrammarService) -> None:
        async with anyio.create_task_group() as group:
            schema = json.dumps({"type": "integer", "multipleOf": 7_777_773})  # at work for seconds
            group.start_soon(service.constraints, "json_schema", schema, 1)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(ApiError) as refused:
                await service.constraints("regex", "b", 1)
            assert refused.value.status == 503 and "Retry-After" in refused.value.headers
            group.cancel_scope.cancel()
        monkeypatch.setattr("deepseek_vl2.serve.api.grammar_process.MAX_WAITING_SECONDS", 10.0)
        assert len(await service.constraints("regex", "b", 1)) == 1  # the place is free again

    with_service(compiler, work, GrammarLimits(processes=1))


def test_messages_between_processes() -> None:
    reading, writing = os.pipe()
    write_message(writing, b"hello")
    os.write(writing, HEADER.pack(5) + b"cut")
    os.close(writing)
    assert read_message(reading) == b"hello"
    assert read_message(reading) == b"cut"
    assert read_message(reading) is None and read_exactly(reading, 3) == b""
    os.close(reading)


def test_masks_of_large_grammars_take_no_seconds(compiler: GrammarCompiler) -> None:
    """The library's own bounds hold at each step, where no process can be ended."""
    digits = {letter: compiler.tokens.index(letter.encode()) for letter in "0123456789abcz"}
    patterns = [
        ("json_schema", json.dumps({"type": "integer", "multipleOf": 100007}), "1234567890" * 3),
        ("regex", "(.*a.{50}|.*b.{50}|.*c.{50})z", "abcab" * 12),
        ("regex", "((a{0,50}){0,50}){0,50}", "a" * 60),
        ("json_schema", json.dumps({"type": "string", "pattern": "^.*a.{300}$"}), "abcz" * 10),
    ]
    for kind, text, written in patterns:
        (worst, constraint) = (0.0, compiler.constraint(kind, text))  # type: ignore[arg-type]
        for letter in written:
            begin = time.thread_time()
            try:
                constraint.allowed()
                constraint.advance(digits[letter])
            except GrammarError:
                break
            finally:
                worst = max(worst, time.thread_time() - begin)
        assert worst < 0.5, (text, worst)


@pytest.fixture(scope="module")
def server(demo: Any) -> Any:
    """Run a server that gives grammars one second."""
    with make_server(*demo, grammars=LIMITS, request_seconds=60.0) as running:
        yield running


def test_others_are_served_while_grammars_are_refused(server: RunningServer) -> None:
    post(server, schema_body({"type": "object"}))
    with ThreadPoolExecutor(4) as pool:
        costly = [pool.submit(post, server, schema_body(COSTLY[i], n=2)) for i in range(3)]
        begin, answers = time.monotonic(), []
        times = health_times(server, lambda: all(future.done() for future in costly))
        answers.append(post(server, chat_body())[0])
        assert time.monotonic() - begin < 40
    assert answers == [200]
    for future in costly:
        status, answer = future.result()
        assert status == 400 and "to compile" in answer["error"]["message"]
    assert_prompt(times)


def test_a_deadline_ends_a_grammar(another: Any) -> None:
    with make_server(*another, grammars=GrammarLimits(seconds=30), request_seconds=2.0) as server:
        begin = time.monotonic()
        status, answer = post(server, schema_body(COSTLY[0]))
        assert (status, answer["error"]["type"]) == (504, "timeout_error")
        assert time.monotonic() - begin < 15
        wait_until(lambda: not [c for c in psutil.Process().children(recursive=True) if c.cpu_percent(0.1) > 50], 10)
        assert server.server.service.in_hand == 0


# Each step of these takes longer than the one before: there are ever more ways to have read the answer.
AMBIGUOUS = {
    "two or three": 'start: a\na: "x" | a a | a a a',
    "nothing too": 'start: a\na: | "x" | a a | a a a | a a a a',
    "all orders": "start: a0\n" + "\n".join(f'a{i}: a{i + 1} a{i + 1} | "x"' for i in range(40)) + '\na40: "x"?',
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_grammar_ends_before_its_steps_take_long(compiler: GrammarCompiler, name: str) -> None:
    constraint = compiler.constraint("lark", AMBIGUOUS[name])
    letter = compiler.tokens.index(b"x")
    longest = 0.0
    with pytest.raises(GrammarError, match=r"The grammar could not be followed: .*(read in too many ways|items)"):
        for _ in range(5000):
            begin = time.thread_time()
            constraint.allowed()
            constraint.advance(letter)
            longest = max(longest, time.thread_time() - begin)
    assert longest < 0.1 and constraint.seconds < FIRST_SECONDS + (constraint.tokens + 20) * TOKEN_SECONDS


LONG: list[tuple[Any, str]] = [
    ("regex", "a{1000000}"),
    ("lark", "start: /a{500000}/ /b/"),
    ("lark", 'start: "a"{1000000}'),
]


@pytest.mark.parametrize(("kind", "text"), LONG, ids=[text for _, text in LONG])
def test_what_is_costly_behind_its_first_token_is_refused(compiler: GrammarCompiler, kind: Any, text: str) -> None:
    async def work(service: GrammarService) -> None:
        with pytest.raises(ValueError, match="cannot be used"):
            await service.constraints(kind, text, 1)
        assert service.compiled == 0, "this process compiled it"

    with_service(compiler, work, GrammarLimits(seconds=5))


WIDE: dict[str, tuple[Any, str]] = {
    "choices": ("lark", "start: " + " | ".join(json.dumps(f"choice number {i}") for i in range(1024))),
    "properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{i}": {"type": ["string", "null"]} for i in range(400)}}),
    ),
    "a tree": (
        "json_schema",
        json.dumps(
            {
                "$defs": {"n": {"type": "object", "properties": {"l": {"$ref": "#/$defs/n"}, "r": {"type": "null"}}}},
                "$ref": "#/$defs/n",
            }
        ),
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_grammars_are_followed(compiler: GrammarCompiler, name: str) -> None:
    constraint = compiler.constraint(*WIDE[name])
    for step in range(300):
        if constraint.finished:
            break
        allowed = constraint.allowed().nonzero().flatten().tolist()
        constraint.advance(allowed[step % len(allowed)])
    assert constraint.seconds < FIRST_SECONDS / 2


def test_an_ambiguous_grammar_ends_its_own_answer_alone(another: Any) -> None:
    model, processor = another
    engine = {"max_batch": 4, "max_length": 3000}
    with make_server(model, processor, engine=engine) as server, ThreadPoolExecutor(8) as pool:
        hard = chat_body(guided_grammar=AMBIGUOUS["two or three"], max_tokens=2500, min_tokens=2400, temperature=0)
        plain = chat_body(max_tokens=200, temperature=0, ignore_eos=True)
        alone = post(server, plain)[1]["choices"]
        refused = [pool.submit(post, server, hard) for _ in range(2)]
        answered = [pool.submit(post, server, plain) for _ in range(2)]
        times = health_times(server, lambda: all(job.done() for job in (*refused, *answered)))
        for job in refused:
            status, answer = job.result()
            assert status == 400 and "could not be followed" in answer["error"]["message"]
        for job in answered:
            assert job.result()[0] == 200 and job.result()[1]["choices"] == alone
    assert_prompt(times)
