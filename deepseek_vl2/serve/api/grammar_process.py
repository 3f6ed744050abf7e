"""Grammars of strangers: tried out in a process that can be ended, compiled once, and kept for the next request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import anyio
import anyio.to_thread
import llguidance

from .errors import ApiError
from .grammar import Constraint, GrammarCompiler
from .grammar_rules import HEADER, Kind, check_length
from .settings import GrammarLimits

WORKER = "deepseek_vl2.serve.api.grammar_worker"
LAST_WORDS_SECONDS = 1.0
REFUSED_SECONDS, MOST_REFUSED = 60.0, 256
MAX_WAITING = 32  # requests whose grammar waits to be tried out
MAX_WAITING_SECONDS = 20.0  # then a request is given up: others' costly grammars may keep the processes for longer


class GrammarProcess:
    """A process that tries out one grammar at a time; it is started when it is needed first, and again when it died.

    Args:
        compiler: whose vocabulary it works with.
        limits: what a grammar may cost.
    """

    def __init__(self, compiler: GrammarCompiler, limits: GrammarLimits) -> None:
        self.compiler = compiler
        self.limits = limits
        self.process: asyncio.subprocess.Process | None = None

    async def _start(self) -> asyncio.subprocess.Process:
        compiler = self.compiler
        content = compiler.tokens, compiler.special, compiler.eos_ids
        vocabulary = await anyio.to_thread.run_sync(pickle.dumps, content)
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", WORKER,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            await self._send(self.process, vocabulary)
        except BaseException:
            await self.stop()
            raise
        return self.process

    @staticmethod
    async def _send(process: asyncio.subprocess.Process, message: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(HEADER.pack(len(message)) + message)
        await process.stdin.drain()

    @staticmethod
    async def _receive(process: asyncio.subprocess.Process) -> dict[str, Any]:
        assert process.stdout is not None
        (size,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
        return json.loads(await process.stdout.readexactly(size))

    async def compile(self, kind: Kind, text: str) -> int:
        """Try a grammar out; returns the bytes it takes.

        Raises:
            ValueError: it cannot be used, or costs too much.
        """
        task = {"kind": kind, "text": text, "seconds": self.limits.seconds, "memory": self.limits.memory}
        try:
            process = self.process
            if process is None or process.returncode is not None:
                process = await self._start()
            answer = await self._ask(process, json.dumps(task).encode())
        except (OSError, asyncio.IncompleteReadError) as error:
            await self.stop()
            raise ApiError(500, "The server failed to compile this grammar.") from error
        if "problem" in answer:
            raise ValueError(answer["problem"])
        return int(answer["bytes"])

    async def _ask(self, process: asyncio.subprocess.Process, task: bytes) -> dict[str, Any]:
        try:
            await self._send(process, task)
            return await self._receive(process)
        except asyncio.CancelledError:
            # Nobody waits any more: the task is ended, and the process stays for the next one.
            with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_WORDS_SECONDS) as scope:
                await self._send(process, b"")
                await self._receive(process)
            if scope.cancelled_caught:
                await self.stop()
            raise

    async def stop(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        assert process.stdin is not None
        process.stdin.close()
        with anyio.CancelScope(shield=True):
            await process.wait()


class GrammarCache:
    """The grammars used last, up to a size.

    Args:
        most_bytes: of all of them.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._found: OrderedDict[bytes, tuple[llguidance.LLMatcher, int]] = OrderedDict()

    def get(self, key: bytes) -> llguidance.LLMatcher | None:
        """Return a grammar."""
        if key not in self._found:
            return None
        self._found.move_to_end(key)
        return self._found[key][0]

    def put(self, key: bytes, matcher: llguidance.LLMatcher, size: int) -> None:
        """Keep a grammar, and let go of those used longest ago."""
        if key in self._found or size > self.most_bytes:
            return
        self._found[key] = matcher, size
        self.bytes += size
        while self.bytes > self.most_bytes:
            _, (_, gone) = self._found.popitem(last=False)
            self.bytes -= gone

    def __len__(self) -> int:
        return len(self._found)


class RefusedGrammars:
    """The grammars that were refused last, and why; for a while, since a busy machine may be why."""

    def __init__(self) -> None:
        self._found: OrderedDict[bytes, tuple[float, str]] = OrderedDict()

    def check(self, key: bytes) -> None:
        """Raise ``ValueError`` for a grammar that was refused lately."""
        until, problem = self._found.get(key, (0.0, ""))
        if until > time.monotonic():
            raise ValueError(problem)

    def put(self, key: bytes, problem: str) -> None:
        """Remember a grammar."""
        self._found[key] = time.monotonic() + REFUSED_SECONDS, problem
        self._found.move_to_end(key)
        if len(self._found) > MOST_REFUSED:
            self._found.popitem(last=False)


class GrammarService:
    """Makes the constraints of requests, without harm to others.

    Args:
        compiler: compiles what was tried out.
        limits: what grammars may cost.
    """

    def __init__(self, compiler: GrammarCompiler, limits: GrammarLimits | None = None) -> None:
        self.compiler = compiler
        self.limits = limits or GrammarLimits()
        self.cache = GrammarCache(self.limits.cached_bytes)
        self.refused = RefusedGrammars()
        self.compiled = 0
        self._waiting = 0
        self._idle = [GrammarProcess(compiler, self.limits) for _ in range(self.limits.processes)]
        self._processes = list(self._idle)
        self._slots = anyio.CapacityLimiter(self.limits.processes)

    async def constraints(self, kind: Kind, text: str, count: int) -> list[Constraint]:
        """Return constraints to one grammar, each for an answer of its own.

        Raises:
            ValueError: the grammar cannot be used, or costs too much.
            ApiError: too many wait for theirs, or this one waited too long.
        """
        if not hasattr(os, "fork"):
            raise ValueError("The work of a grammar cannot be bounded on this system: serve on Linux or macOS.")
        check_length(kind, text)
        key = sha256(f"{kind}\n{text}".encode()).digest()
        self.refused.check(key)
        matcher = self.cache.get(key)
        if matcher is None:
            async with self._process() as process:
                self.refused.check(key)
                matcher = self.cache.get(key) or await self._compile(process, key, kind, text)
        return [Constraint(matcher.deep_copy(), self.compiler.vocabulary) for _ in range(count)]

    async def _compile(self, process: GrammarProcess, key: bytes, kind: Kind, text: str) -> llguidance.LLMatcher:
        try:
            size = await process.compile(kind, text)
        except ValueError as error:
            self.refused.put(key, str(error))
            raise
        # Known to end, and soon; still in one of the few places, so that not too many do it together.
        matcher = await anyio.to_thread.run_sync(self.compiler.matcher, kind, text)
        self.compiled += 1
        self.cache.put(key, matcher, size + 2 * len(text) + 10_000)
        return matcher

    @contextlib.asynccontextmanager
    async def _process(self) -> AsyncIterator[GrammarProcess]:
        if self._waiting >= MAX_WAITING:
            raise ApiError(429, "Too many grammars wait to be compiled. Try again later.", code="queue_full")
        self._waiting += 1
        try:
            with anyio.move_on_after(MAX_WAITING_SECONDS) as scope:
                await self._slots.acquire()
        finally:
            self._waiting -= 1
        if scope.cancelled_caught:
            raise ApiError(503, "Other grammars are being compiled. Try again later.", code="queue_full")
        process = self._idle.pop()
        try:
            yield process
        finally:
            self._idle.append(process)
            self._slots.release()

    async def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            await process.stop()
