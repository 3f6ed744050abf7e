"""The HTTP server in a process of its own, asked by many clients: sections "http" and "steady" of `serving.py`.

The server's tokenizer has a word for every id, so that an answer of random weights streams as many events as another;
the server is told to begin a stream with the first token, not earlier: the first event of a stream is the first token.
Gaps are between events.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from gpu_end_to_end import random_model
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.utils.demo import BOS, EOS, PAD, byte_tokenizer, candidate_resolutions

NAME = "model"
STARTUP_SECONDS = 400
REQUEST_SECONDS = 300
JSON = {"Content-Type": "application/json"}
Lines = Callable[[bytes], contextlib.AbstractAsyncContextManager[AsyncIterable[bytes]]]


@dataclass
class Times:
    """When an answer was asked for, when its events came, and its tokens; seconds."""

    start: float
    events: list[float] = field(default_factory=list)
    end: float = 0.0
    tokens: int = 0


def worded_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return `byte_tokenizer` with words for the ids that it lacks; text is encoded as before."""
    held = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    words = held["model"]["vocab"] | {token["content"]: token["id"] for token in held["added_tokens"]}
    words |= {f"\u0120word{number}": number for number in range(len(words), vocabulary)}
    held["model"]["vocab"] = words
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(held)), bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def picture_url(number: int) -> str:
    """Return a JPEG of 1024x768 pixels that no other request has, as a data URL."""
    small = np.random.default_rng(number).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((1024, 768), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def body_of(number: int, tokens: int) -> bytes:
    """Return a request's body: a picture and a question of its own."""
    content = [
        {"type": "image_url", "image_url": {"url": picture_url(number)}},
        {"type": "text", "text": f"What can be seen in picture number {number}?"},
    ]
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


@contextlib.asynccontextmanager
async def opened(address: str) -> AsyncIterator[Lines]:
    """Yield what posts a body and yields the response's lines, by aiohttp or httpx."""
    if importlib.util.find_spec("aiohttp") is not None:
        import aiohttp

        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            @contextlib.asynccontextmanager
            async def post(body: bytes) -> AsyncIterator[AsyncIterable[bytes]]:
                async with session.post(address, data=body, headers=JSON) as response:
                    if response.status != 200:
                        raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
                    yield response.content

            yield post
        return
    import httpx

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=REQUEST_SECONDS) as client:

        @contextlib.asynccontextmanager
        async def post_httpx(body: bytes) -> AsyncIterator[AsyncIterable[bytes]]:
            async with client.stream("POST", address, content=body, headers=JSON) as response:
                if response.status_code != 200:
                    raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread())[:300]!r}")
                yield (line.encode() async for line in response.aiter_lines())

        yield post_httpx


async def ask(post: Lines, body: bytes) -> Times:
    """Ask, and note when events come."""
    times = Times(time.perf_counter())
    async with post(body) as lines:
        async for line in lines:
            if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                continue
            data = json.loads(line[5:])
            if "error" in data:
                raise RuntimeError(str(data["error"]))
            if data["choices"]:
                times.events.append(time.perf_counter())
            if data.get("usage"):
                times.tokens = data["usage"]["completion_tokens"]
    times.end = time.perf_counter()
    return times


async def ask_all(address: str, bodies: list[bytes], delays: list[float] | None = None) -> list[Times]:
    """Ask everything at once, or each after its delay."""

    async def later(post: Lines, body: bytes, delay: float) -> Times:
        await asyncio.sleep(delay)
        return await ask(post, body)

    async with opened(address) as post:
        return await asyncio.gather(
            *(later(post, *one) for one in zip(bodies, delays or [0.0] * len(bodies), strict=True))
        )


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile of seconds, in milliseconds."""
    return 1e3 * float(np.percentile(values, percent))


def our_server(size: str, device: str, most: int) -> Callable[[int], list[str]]:
    """Return the command that serves random weights of a size on a port, to ``most`` requests at once."""
    options = ["--size", size, "--device", device, "--queue", str(most + 64)]
    return lambda port: [sys.executable, __file__, *options, "--port", str(port)]


class HttpBench:
    """A server of one size, and its measurements as table rows.

    Args:
        size: of the model.
        tokens: of each answer.
        command: returns what starts the server on a port.
        environment: of the server; ``None``: as this process's.
    """

    def __init__(
        self, size: str, tokens: int, command: Callable[[int], list[str]], environment: dict[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.size, self.tokens, self.asked = size, tokens, 0
        self.address = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        self.process = subprocess.Popen(command(self.port), env=environment)

    def __enter__(self) -> HttpBench:
        end = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError(f"The server ended with code {self.process.returncode}.") from None
                time.sleep(0.5)
        self.process.kill()
        raise RuntimeError("The server did not start in time.")

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def bodies(self, count: int) -> list[bytes]:
        """Return requests, none of which was made before."""
        self.asked += count
        return [body_of(number, self.tokens) for number in range(self.asked - count, self.asked)]

    def at_once(self, count: int) -> tuple[float, list[Times]]:
        """Return the seconds of all requests at once, and their times."""
        bodies = self.bodies(count)
        start = time.perf_counter()
        times = asyncio.run(ask_all(self.address, bodies))
        total = time.perf_counter() - start
        if any(one.tokens != self.tokens for one in times):
            raise RuntimeError(f"{[one.tokens for one in times]} tokens instead of {self.tokens} each")
        return total, times

    def http(self, counts: list[int], name: str = "http") -> Iterator[str]:
        """Yield a table row for each number of requests; a first round warms up."""
        for count in counts:
            self.at_once(count)
            total, times = min((self.at_once(count) for _ in range(4)), key=lambda found: found[0])
            firsts = [one.events[0] - one.start for one in times]
            more = f"first token p50 {percentile(firsts, 50):.1f} ms, p95 {percentile(firsts, 95):.1f} ms"
            if count == 1:
                step = (times[0].end - times[0].events[0]) / (self.tokens - 1)
                more += f", {1e3 * step:.3f} ms a token"
            rate = count * self.tokens / total
            yield f"| {self.size} | {name} | {count} | {total:.3f} s, {rate:.0f} tokens/s | {more} |"

    def steady(self, most: int) -> str:
        """Return the row of Poisson arrivals at 70 % of the rate of ``most`` requests at once."""
        self.at_once(most)
        rate = 0.7 * most / min(self.at_once(most)[0] for _ in range(2))
        count, clock, delays = 2 * most, random.Random(0), [0.0]
        while len(delays) < count:
            delays.append(delays[-1] + clock.expovariate(rate))
        times = asyncio.run(ask_all(self.address, self.bodies(count), delays))
        firsts = [one.events[0] - one.start for one in times]
        gaps = [b - a for one in times for a, b in zip(one.events, one.events[1:], strict=False)] or [0.0]
        first, gap = (
            ", ".join(f"p{percent} {percentile(values, percent):.1f}" for percent in (50, 95, 99))
            for values in (firsts, gaps)
        )
        events = statistics.mean(len(one.events) for one in times)
        return (
            f"| {self.size} | steady | {count} | {rate:.2f} requests/s | first token {first} ms; gaps {gap} ms, "
            f"{events:.0f} events an answer |"
        )


def serve(args: argparse.Namespace) -> None:
    """Serve random weights of a size until a signal comes."""
    from deepseek_vl2.serve.api import command
    from deepseek_vl2.serve.api.app import Server
    from deepseek_vl2.serve.api.serving import http_server

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = parser.parse_args(["--queue", str(args.queue), "--served_model_name", NAME, "--device", args.device])
    model = random_model(args.size, torch.device(args.device))
    side = model.config.vision_config.image_size
    tokenizer = worded_tokenizer(model.config.language_config.vocab_size)
    processor = DeepseekVLV2Processor(tokenizer, candidate_resolutions(side), image_size=side)
    model.config.language_config.eos_token_id = processor.tokenizer.eos_token_id
    options = command.engine_options(given, model)
    settings = command.server_settings(given, (), NAME, options.max_batch, "")
    settings = replace(settings, first_byte_seconds=float(REQUEST_SECONDS), request_seconds=float(REQUEST_SECONDS))
    server = Server(model, processor, settings, options)
    http_server(server, 10.0, host="127.0.0.1", port=args.port, log_level="warning").run()


def main() -> None:
    """Serve: the process that `HttpBench` starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--queue", type=int, default=64)
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
