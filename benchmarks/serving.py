"""Measure serving on a GPU: the engine, `generate` and the HTTP server, and vLLM where it can be imported, in one run.

    python benchmarks/serving.py --sizes small --markdown benchmarks/serving.md
    python benchmarks/serving.py --sizes tiny small base --sections decode generate engine http --requests 1 64 256

Released shapes, random weights in bfloat16; each request one 1024x768 picture of noise and a question of its own, about
1,434 prompt tokens, 65 new ones. Sections: ``decode`` (ms a step of the engine), ``generate`` (one batch of 64),
``engine`` (requests handed to the engine), ``http`` (the server in a process of its own, pictures as JPEG), ``steady``
(Poisson arrivals at 70 % of the best rate), ``second`` (the second question about one picture), ``vllm`` (its server
with this package's plugin, asked the same).
With ``--device cpu --sizes demo`` the program can be tried anywhere.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gpu_end_to_end import random_model
from PIL import Image
from serving_http import HttpBench, our_server, picture_url
from serving_vllm import vllm_environment, vllm_server

from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.holder import engine_of, release_model
from deepseek_vl2.engine.request import Delta, Event, Prompt, PromptImages, Request
from deepseek_vl2.engine.sampling_params import SamplingParams
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.models.image_merge import real_grids
from deepseek_vl2.utils.demo import byte_tokenizer, candidate_resolutions

NEW = 65
INPUTS = ("input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop")
QUESTION = "<image>\nWhat can be seen in picture number {}?"
STEP_PROMPT = 1434


class Report:
    """Lines of Markdown, shown and kept."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.lines = path, list[str]()

    def add(self, *lines: str) -> None:
        """Append lines."""
        self.lines += lines
        print(*lines, sep="\n", flush=True)
        if self.path is not None:
            self.path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def picture(number: int) -> Image.Image:
    """Return noise that differs from request to request."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((1024, 768), Image.Resampling.BICUBIC)


class Bench:
    """The measurements of one size."""

    def __init__(self, size: str, device: torch.device, report: Report) -> None:
        self.size, self.device, self.report = size, device, report
        self.model: DeepseekVLV2ForCausalLM = random_model(size, device)
        image_size = self.model.config.vision_config.image_size
        self.processor = DeepseekVLV2Processor(
            byte_tokenizer(), candidate_resolutions(image_size), image_size=image_size
        )
        self.images = [picture(number) for number in range(8)]

    def wait(self) -> float:
        """Wait for the device and return the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def batch(self, count: int, first: int = 0) -> Any:
        """Return the processor's batch of some requests."""
        conversations = [
            [{"role": "user", "content": QUESTION.format(first + i), "images": [self.images[(first + i) % 8]]}]
            for i in range(count)
        ]
        return self.processor(conversations=conversations)

    def prompts(self, count: int, first: int = 0) -> list[Prompt]:
        """Return prompts for the engine, their tiles on the device."""
        found = []
        for number in range(count):
            one = self.batch(1, first + number).to(self.device)
            tiles, mask = one["images"][0], one["images_seq_mask"][0].cpu()
            grids = real_grids(one["images_spatial_crop"].tolist())[0]
            images = PromptImages(self.model, grids, mask, tiles.to)
            assert images.views <= len(tiles)
            found.append(Prompt(one["input_ids"][0].tolist(), images))
        return found

    # ---------------------------------------------------------------- sections

    def run(self, args: argparse.Namespace) -> int:
        """Run the sections asked for; one that fails is reported, and the others go on."""
        sections: dict[str, Callable[[], None]] = {
            "decode": lambda: self.decode(args.batches),
            "generate": lambda: self.generate([n for n in args.requests if n in (1, 64)] or args.requests[:1]),
            "engine": lambda: self.engine(args.requests),
            "second": self.second,
        }
        failed = 0
        over_http = [section for section in args.sections if section in ("http", "steady", "vllm")]
        for section in args.sections:
            if section in over_http:
                continue
            try:
                sections[section]()
            except Exception:
                failed += 1
                text = traceback.format_exc()[-1500:]
                self.report.add(f"\n{self.size}, {section} failed:\n\n```\n{text}```\n")
            release_model(self.model)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return failed + (self.over_http(over_http, args) if over_http else 0)

    def over_http(self, sections: list[str], args: argparse.Namespace) -> int:
        """Measure servers in processes of their own, which need this one's memory; returns how many failed."""
        del self.model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        counts, failed = args.requests, 0

        def ours() -> Iterator[str]:
            with HttpBench(self.size, NEW, our_server(self.size, str(self.device), 2 * max(counts))) as bench:
                yield from bench.http(counts) if "http" in sections else ()
                if "steady" in sections:
                    yield bench.steady(max(counts))

        def vllm() -> Iterator[str]:
            with tempfile.TemporaryDirectory() as work:
                command = vllm_server(self.size, Path(work), max(counts))
                with HttpBench(self.size, NEW, command, vllm_environment(Path(work))) as bench:
                    yield from bench.http([count for count in counts if count <= 64], "vLLM over http")

        for name, rows, wanted in (("http", ours, sections != ["vllm"]), ("vllm", vllm, "vllm" in sections)):
            try:
                for row in rows() if wanted else ():
                    self.report.add(row)
            except Exception:
                failed += 1
                self.report.add(f"\n{self.size}, {name} failed:\n\n```\n{traceback.format_exc()[-1500:]}```\n")
        return failed

    def decode(self, batches: list[int]) -> None:
        """Time the engine's steps over rows that all have some 1,434 tokens."""
        engine = engine_of(self.model, EngineOptions(kv_cache_tokens=max(batches) * (STEP_PROMPT + 120) + 4096))
        vocabulary = self.model.config.language_config.vocab_size
        for count in batches:
            generator = torch.Generator().manual_seed(count)
            ids = torch.randint(3, vocabulary - 64, (count, STEP_PROMPT), generator=generator).tolist()
            requests = [Request(Prompt(row), greedy(100), lambda event: None) for row in ids]
            engine.submit(requests)
            start = self.wait()
            while len(engine.scheduler.running) < count:
                engine.step()
            prefill = self.wait() - start
            for _ in range(8):
                engine.step()
            times = []
            for _ in range(3):
                start = self.wait()
                for _ in range(20):
                    engine.step()
                times.append((self.wait() - start) / 20)
            for request in requests:
                engine.cancel(request)
            finish(engine, requests)
            self.report.add(
                f"| {self.size} | decode | {count} | {statistics.median(times) * 1e3:.3f} ms a step | "
                f"prefill of text {prefill / count * 1e3:.1f} ms a prompt |"
            )

    def generate(self, counts: list[int]) -> None:
        """Time `generate` of one batch."""
        for count in counts:
            inputs = self.batch(count).to(self.device)
            given = {name: inputs[name] for name in INPUTS}
            times = {}
            for new in (1, NEW):
                kept = []
                for _ in range(3 if count == 1 else 2):
                    torch.cuda.reset_peak_memory_stats() if self.device.type == "cuda" else None
                    start = self.wait()
                    self.model.generate(**given, max_new_tokens=new, do_sample=False, eos_token_id=None)
                    kept.append(self.wait() - start)
                times[new] = min(kept)
            peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0
            self.report.add(
                f"| {self.size} | generate | {count} | {times[NEW]:.3f} s, {count * NEW / times[NEW]:.0f} tokens/s | "
                f"first tokens {times[1]:.3f} s, {(times[NEW] - times[1]) / (NEW - 1) * 1e3:.3f} ms a step, "
                f"peak {peak:.1f} GB |"
            )
            if count == 1:
                self.report.add(self.from_jpeg())

    def from_jpeg(self) -> str:
        """Return the row of a first token by `generate` from what a server is given: a JPEG in base64, and a text."""
        times = []
        for number in range(6):
            url = picture_url(1000 + number)
            start = self.wait()
            image = load_image(url)
            conversation = [{"role": "user", "content": QUESTION.format(number), "images": [image]}]
            inputs = self.processor(conversations=conversation).to(self.device)
            given = {name: inputs[name] for name in INPUTS}
            self.model.generate(**given, max_new_tokens=1, do_sample=False, eos_token_id=None)
            times.append(self.wait() - start)
        return f"| {self.size} | generate from a JPEG | 1 | first token {statistics.median(times[2:]) * 1e3:.1f} ms | |"

    def engine(self, counts: list[int]) -> None:
        """Time requests that are handed to the engine at once."""
        engine = engine_of(self.model, EngineOptions(kv_cache_tokens=max(counts) * (STEP_PROMPT + 200) + 4096))
        for count in counts:
            best: tuple[float, float] | None = None
            for turn in range(2):
                prompts = self.prompts(count, first=turn * count)
                total, first = self.answer(engine, prompts)
                best = min(best or (total, first), (total, first))
            assert best is not None
            self.report.add(
                f"| {self.size} | engine | {count} | {best[0]:.3f} s, {count * NEW / best[0]:.0f} tokens/s | "
                f"last first token {best[1]:.3f} s |"
            )

    def answer(self, engine: Engine, prompts: list[Prompt]) -> tuple[float, float]:
        """Return the seconds until all are answered, and until the last one's first token."""
        firsts: dict[int, float] = {}

        def deliver(index: int) -> Callable[[Event], None]:
            def take(event: Event) -> None:
                assert isinstance(event, Delta), event
                firsts.setdefault(index, time.perf_counter())

            return take

        start = self.wait()
        requests = [Request(prompt, greedy(NEW), deliver(i)) for i, prompt in enumerate(prompts)]
        engine.submit(requests)
        engine.run_until(lambda: not any(engine.holds(request) for request in requests))
        return self.wait() - start, max(firsts.values()) - start

    def second(self) -> None:
        """Time the first token of a second question about one picture."""
        options = EngineOptions(kv_cache_tokens=32768, share_prefixes=True, image_cache_bytes=1 << 28)
        engine, times = engine_of(self.model, options), []
        for turn in range(8):
            (prompt,) = self.prompts(1)
            ids = [*prompt.ids[:-8], *range(10 + turn, 18 + turn)]
            assert prompt.images is not None
            prompt.images.keys = [b"one picture"]
            asked = Prompt(ids, prompt.images, shared=True)
            start, clock = self.wait(), Arrivals()
            requests = [Request(asked, greedy(2), clock)]
            engine.submit(requests)
            finish(engine, requests)
            times.append(clock.times[0] - start)
        self.report.add(
            f"| {self.size} | second question | 1 | first token {statistics.median(times[3:]) * 1e3:.2f} ms | "
            f"the first one's {times[0] * 1e3:.1f} ms; {engine.scheduler.prefixes.hits} hits |"
        )


class Arrivals:
    """Notes when events came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, event: Event) -> None:
        """Note one."""
        self.times.append(time.perf_counter())


def finish(engine: Engine, requests: list[Request]) -> None:
    """Run the engine until these requests are answered."""
    engine.run_until(lambda: not any(engine.holds(request) for request in requests))


def greedy(tokens: int) -> SamplingParams:
    """Return the parameters of a greedy answer of that many tokens."""
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def main() -> int:
    """Measure the sizes asked for; returns how many sections failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"])
    sections = ["decode", "generate", "engine", "second", "http", "steady"]
    parser.add_argument("--sections", nargs="+", default=[*sections, "vllm"])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 128, 256])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    at_hand = importlib.util.find_spec("vllm") is not None
    args.sections = [section for section in args.sections if section != "vllm" or at_hand]
    device, report, failed = torch.device(args.device), Report(args.markdown), 0
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report.add(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}", "")
    report.add("| size | section | requests | time | more |", "| --- | --- | --- | --- | --- |")
    for size in args.sizes:
        failed += Bench(size, device, report).run(args)
    if not at_hand:
        report.add("\nvLLM was not at hand.")
    return failed


if __name__ == "__main__":
    sys.exit(main())
