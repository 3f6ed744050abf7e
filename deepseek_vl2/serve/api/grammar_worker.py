"""The process that tries grammars out before the server compiles them; run with ``python -m``.

A grammar of a few characters may take minutes and gigabytes, and the library that compiles it cannot be stopped. So
each grammar is first compiled in a child of this process, which may be killed: with bounds of time and memory, and at
once when the server says that nobody waits any more, or when the server is gone.

Messages on the standard streams are a length (4 bytes) and so many bytes. The first is the vocabulary. Then come tasks,
each answered by one message; an empty message ends the task at work, which is answered all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import select
import signal
import time
from typing import Any

import llguidance

from deepseek_vl2.serve.api.grammar_rules import HEADER, build_tokenizer, compile_matcher, rehearse, unusable

INPUT, OUTPUT = 0, 1
WALL_TO_CPU = 5  # seconds that may pass for each one of a CPU, on a busy machine
NICENESS = 5  # answers under way go first


def read_exactly(file: int, size: int) -> bytes:
    """Return so many bytes, or fewer at the end of the file."""
    data = bytearray()
    while len(data) < size and (block := os.read(file, size - len(data))):
        data += block
    return bytes(data)


def read_message(file: int) -> bytes | None:
    """Return the next message; ``None`` at the end."""
    header = read_exactly(file, HEADER.size)
    return read_exactly(file, HEADER.unpack(header)[0]) if len(header) == HEADER.size else None


def write_message(file: int, message: bytes) -> None:
    """Write a message."""
    data = HEADER.pack(len(message)) + message
    while data:
        data = data[os.write(file, data) :]


def memory(field: int) -> int:
    """Return this process's bytes: field 0 is its address space, 1 what is resident; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[field]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def limit_process(seconds: int, size: int) -> None:
    """Let the kernel end this process when it has used so much of a CPU, or asks for more memory."""
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    held = memory(0)
    if held:  # elsewhere (macOS) the limit of time bounds memory too
        resource.setrlimit(resource.RLIMIT_AS, (held + size, held + size))


def try_grammar(tokenizer: llguidance.LLTokenizer, task: dict[str, Any]) -> dict[str, Any]:
    """Compile a grammar; returns what is wrong with it, or the memory it took."""
    before = memory(1)
    try:
        matcher = compile_matcher(tokenizer, task["kind"], task["text"])
        rehearse(matcher, task["kind"])
    except ValueError as error:
        return {"problem": str(error)}
    grown = max(0, memory(1) - before)
    del matcher
    return {"bytes": grown}


def run_child(tokenizer: llguidance.LLTokenizer, task: dict[str, Any], output: int) -> None:
    """Do a task in a forked process, write what came of it, and end."""
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 2)  # Rust's last words when memory is refused
        limit_process(task["seconds"], task["memory"])
        write_message(output, json.dumps(try_grammar(tokenizer, task)).encode())
    finally:
        os._exit(0)


def run_task(tokenizer: llguidance.LLTokenizer, task: dict[str, Any]) -> dict[str, Any]:
    """Return what came of a task, whatever happened to the process that did it."""
    results, output = os.pipe()
    child = os.fork()
    if not child:
        os.close(results)
        run_child(tokenizer, task, output)
    os.close(output)
    end = time.monotonic() + WALL_TO_CPU * task["seconds"]
    ready, _, _ = select.select([results, INPUT], [], [], max(0.0, end - time.monotonic()))
    answer = read_message(results) if results in ready else None
    os.close(results)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if answer:
        return json.loads(answer)
    bounds = f"{task['seconds']} seconds or {task['memory'] >> 20} MiB"
    return {"problem": unusable(task["kind"], f"it takes more than {bounds} to compile. Simplify it.")}


def main() -> None:
    """Do tasks until the server closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    vocabulary = read_message(INPUT)
    if vocabulary is None:
        return
    tokens, special, eos_ids = pickle.loads(vocabulary)
    letters = {token: index for index, token in enumerate(tokens) if len(token) == 1}
    tokenizer = build_tokenizer(
        tokens, special, eos_ids, lambda text: [letters[bytes([byte])] for byte in text if bytes([byte]) in letters]
    )
    while (message := read_message(INPUT)) is not None:
        if message:  # a call to stop may come when the task is done
            write_message(OUTPUT, json.dumps(run_task(tokenizer, json.loads(message))).encode())


if __name__ == "__main__":
    main()
