"""Measure the package on an NVIDIA GPU in one command, under 8 minutes on an H200.

    python benchmarks/gpu.py --quick                                # small alone, about a minute
    python benchmarks/gpu.py --markdown benchmarks/gpu.md           # all sizes
    python benchmarks/gpu.py --original CHECKOUT --original-packages FOLDER     # and the original, see gpu_original.py

Released shapes, random weights in bfloat16 made on the GPU; one 1024x768 image (7 tiles) and a short question, about
1,450 prompt tokens. Kernels are checked against their plain forms first. Decoding is timed as replays of the step's
graph, by events; the floor is the bytes that the step reads (weights of the experts really hit, and the cache) over the
copy bandwidth measured in the same run. A section that fails is reported, and the others go on.

`--device cpu --sizes demo` tries the program without a GPU (set TRITON_INTERPRET=1, and take time).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_end_to_end import prompt, random_model, released_config
from gpu_kernels import TOLERANCE, KernelChecks

from deepseek_vl2 import ops
from deepseek_vl2.engine import backend
from deepseek_vl2.engine.decode import experts_hit
from deepseek_vl2.engine.decode_buffers import DecodeBuffers
from deepseek_vl2.engine.decoder_weights import DecoderWeights
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.holder import engine_of
from deepseek_vl2.engine.kv_cache import SCRATCH
from deepseek_vl2.engine.rows import Rows
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.engine.triton_runner import CapturedStep, TritonRunner
from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.cache import new_cache
from deepseek_vl2.ops.triton.weights import Weight
from deepseek_vl2.utils.demo import byte_tokenizer, candidate_resolutions

HERE = Path(__file__).resolve().parent
GB = 1e9
CONTEXT = 1450
EXTENT = CONTEXT + 512  # tokens of a row in the cache: all steps of a measurement find room
# What the host calls when it waits for the device, or copies something from there.
WAITS = frozenset(
    ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemcpyAsync",
     "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
)  # fmt: skip


SIZES = ("tiny", "small", "base", "demo")
SIDES = ("floor", "this package", "without its kernels", "the original", "transformers", "vLLM")
FIRST, LATER = "first token, ms", "decoding, batch {}, ms a step"


class Report:
    """Markdown that is written to a file after every section, so that a run cut short leaves what it has."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.lines, self.failures = path, list[str](), list[str]()
        self.notes: dict[tuple[str, str], dict[str, str]] = {}

    def add(self, *lines: str) -> None:
        """Append lines and show them."""
        self.lines += lines
        print(*lines, sep="\n", flush=True)
        if self.path is not None:
            self.path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def table(self, title: str, head: list[str], rows: list[list[Any]]) -> None:
        """Append a table."""
        self.add(f"\n### {title}\n", "| " + " | ".join(head) + " |", "| " + "--- | " * len(head))
        self.add(*("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows))

    def note(self, size: str, measure: str, who: str, value: str) -> None:
        """Keep a figure for the table at the end."""
        self.notes.setdefault((size, measure), {})[who] = value

    def summary(self) -> None:
        """Append all figures that were noted, side by side."""
        rows = [
            [size, measure, *(figures.get(who, "-") for who in SIDES)]
            for (size, measure), figures in sorted(self.notes.items(), key=lambda item: SIZES.index(item[0][0]))
        ]
        self.table("Side by side", ["size", "", *SIDES], rows)
        self.add(
            "\nThe original's first token is without preprocessing, transformers' is of the language model alone. The"
            " original's batch of 8 is of one prompt, so fewer experts are read; here prompts differ."
        )

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Go on after a failure, and note it."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # one failing section must not lose the run
            text = "".join(traceback.format_exception(error)[-4:])
            self.failures.append(name)
            self.add(
                f"\n**{name} failed**: `{type(error).__name__}: {str(error)[:500]}`\n", f"```\n{text[-1800:]}\n```"
            )
            give_memory_back()
        print(f"[{name}: {time.perf_counter() - start:.1f} s]", flush=True)


def give_memory_back() -> None:
    """Let the device have what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def plain_path() -> Iterator[None]:
    """Turn the kernels off."""
    before = os.environ.get(ops.SWITCH)
    os.environ[ops.SWITCH] = "0"
    try:
        yield
    finally:
        os.environ.pop(ops.SWITCH)
        if before is not None:
            os.environ[ops.SWITCH] = before


@dataclass
class RandomStep:
    """A captured step over rows of random numbers, where their extents start, and the ids that they began with."""

    runner: TritonRunner
    captured: CapturedStep
    starts: list[int]
    ids: torch.Tensor

    @property
    def buffers(self) -> DecodeBuffers:
        """What the step reads and writes."""
        return self.captured.buffers[-1]


class Bench:
    """The measurements of one run."""

    def __init__(self, device: torch.device, report: Report, quick: bool) -> None:
        self.device, self.report, self.quick = device, report, quick
        self.on_gpu = device.type == "cuda"
        self.processor = DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions())
        self.bandwidth = 4.2e12  # an H200's; measured below

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, run: Callable[[], Any], repeats: int, warmup: int = 2) -> list[float]:
        """Return the times of single runs, by events on a GPU."""
        for _ in range(warmup):
            run()
        self.synchronize()
        if not self.on_gpu:
            return [self.wall(run) for _ in range(repeats)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        self.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]

    def wall(self, run: Callable[[], Any]) -> float:
        """Return the milliseconds of one run by the clock."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)

    # ---------------------------------------------------------------- the machine

    def ceilings(self) -> None:
        """Measure the copy bandwidth and the rate of a matrix product."""
        count = (1 << 31) if self.on_gpu else (1 << 22)
        source = torch.empty(count, dtype=torch.bfloat16, device=self.device).normal_()
        target = torch.empty_like(source)
        best = min(self.milliseconds(lambda: target.copy_(source), 10))
        self.bandwidth = 4 * count / (best * 1e-3)
        side = 8192 if self.on_gpu else 256
        a, b = (torch.randn(side, side, device=self.device).to(torch.bfloat16) for _ in range(2))
        product = statistics.median(self.milliseconds(lambda: a @ b, 10))
        rate = 2 * side**3 / (product * 1e-3)
        self.report.add(
            f"\nCopy: {self.bandwidth / 1e12:.2f} TB/s (read and written). bf16 product: {rate / 1e12:.0f} TFLOP/s."
        )

    # ---------------------------------------------------------------- kernels

    @torch.no_grad()
    def check_kernels(self, size: str, weights: DecoderWeights) -> None:
        """Compare every kernel with its plain form."""
        rows_of_table = []
        for rows in (1, 8, 64):
            for name, check in KernelChecks(weights, rows).checks():
                try:
                    value = check()
                    verdict = "ok" if value < TOLERANCE else "**WRONG**"
                    rows_of_table.append([size, rows, name, f"{value:.1e}", verdict])
                except Exception as error:  # the table shows it, and the others are still checked
                    rows_of_table.append([size, rows, name, "-", f"**{type(error).__name__}**: {str(error)[:300]}"])
        self.report.table("Kernels against plain", ["size", "rows", "kernels", "relative error", ""], rows_of_table)

    # ---------------------------------------------------------------- decoding

    def runner(self, model: Any, rows: int = 64) -> TritonRunner:
        """Return what runs the model by kernels, with a KV cache for that many rows."""
        engine: Engine = engine_of(model, EngineOptions(kv_cache_tokens=rows * EXTENT))
        if not isinstance(engine.runner, TritonRunner):
            raise RuntimeError(f"no kernels: {engine.placement.reason}")
        return engine.runner

    def random_step(self, model: Any, count: int) -> RandomStep:
        """Return a step over rows whose extents hold random numbers, as after prompts that differ."""
        runner = self.runner(model)
        generator = torch.Generator(self.device).manual_seed(count)
        with torch.inference_mode():
            for pool in runner.kv_cache.pools:
                for part in pool:
                    part.normal_(generator=generator)
            rows = Rows(count, self.device)
            ids = torch.randint(runner.weights.head.shape[0], (count,), generator=generator, device=self.device)
            starts = [SCRATCH + row * EXTENT for row in range(count)]
            rows.set(ids.tolist(), [CONTEXT] * count, starts)
            return RandomStep(runner, runner._step(rows, count), starts, ids)

    def decode(self, size: str, model: Any, batches: tuple[int, ...]) -> None:
        """Time steps of the graph, and the plain path's."""
        table = []
        for rows in batches:
            try:
                table.append(self._decode_row(size, model, rows))
            except Exception as error:  # another batch may still work
                table.append([size, rows, f"**{type(error).__name__}**: {str(error)[:300]}", *["-"] * 6])
        head = [
            "size",
            "batch",
            "kernels, ms a step",
            "again",
            "plain, ms",
            "experts hit",
            "GB read",
            "floor, ms",
            "ratio",
        ]
        self.report.table("Decoding, from 1,450 tokens", head, table)

    def _decode_row(self, size: str, model: Any, rows: int) -> list[Any]:
        step = self.random_step(model, rows)
        times = [statistics.median(self.milliseconds(step.captured, 50)) for _ in range(2)]
        hit = experts_hit(step.runner.weights, step.buffers)
        read = bytes_read(step.runner, rows * (CONTEXT + 50), hit)
        floor = 1e3 * read / self.bandwidth
        plain = self._plain_step(model, step)
        for who, value in (
            ("this package", f"{min(times):.3f}"),
            ("floor", f"{floor:.3f}"),
            ("without its kernels", plain),
        ):
            self.report.note(size, LATER.format(rows), who, value)
        hits = f"{statistics.mean(hit):.1f}" if hit else "-"
        shown = [f"{times[0]:.3f}", f"{times[1]:.3f}", plain, hits, f"{read / GB:.2f}", f"{floor:.3f}"]
        return [size, rows, *shown, f"{min(times) / floor:.2f}"]

    @torch.no_grad()
    def _plain_step(self, model: Any, step: RandomStep) -> str:
        """Return the time of a plain step over a cache of the same contents."""
        language, kv_cache = model.language, step.runner.kv_cache
        cache = new_cache(language.config)
        for layer in range(len(kv_cache.pools)):
            parts = kv_cache.keys_and_values(layer)
            held = (torch.stack([part[s : s + CONTEXT].transpose(0, 1) for s in step.starts]) for part in parts)
            cache.update(*held, layer)
        token = step.ids[:, None]
        try:
            times = self.milliseconds(lambda: language(token, past_key_values=cache, logits_to_keep=1), 5, warmup=1)
            return f"{statistics.median(times):.2f}"
        except torch.OutOfMemoryError:
            return "out of memory"

    # ---------------------------------------------------------------- whole requests

    def requests(self, size: str, model: Any, first_start: float) -> None:
        """Time whole calls of ``generate``: first token, tokens after it, memory."""
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        if self.on_gpu:
            backend.release(model)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        table = []
        for name, switch in (("kernels", nullcontext()), ("plain", plain_path())):
            with switch:
                table.append([size, name, *self._request(model)])
            who = "this package" if name == "kernels" else "without its kernels"
            self.report.note(size, FIRST, who, table[-1][3])
            if self.on_gpu and name == "kernels":
                peak = (torch.cuda.max_memory_allocated() - weights) / GB
                table[-1].append(f"{peak:.2f}")
                self.report.note(size, "peak memory over the weights, GB", who, table[-1][-1])
        table[-1].append("-")
        head = [
            "size",
            "path",
            "host, ms",
            "first token, ms",
            "the quickest",
            "tokens after it, ms each",
            "peak over weights, GB",
        ]
        self.report.table("Whole requests, batch 1", head, table)
        self.report.add(f"\n{size}: first step (compiling or reading kernels, capturing the graph) {first_start:.1f} s")
        self.report.table(f"{size}: the parts of a first token, each waited for", ["part", "ms"], self._parts(model))

    @torch.no_grad()
    def _parts(self, model: Any) -> list[list[str]]:
        inputs = prompt(self.processor).to(self.device)
        embeds = model.prepare_inputs_embeds(**inputs)
        tiles = inputs.images.flatten(0, 1).to(embeds.dtype)
        features, fresh = model.vision(tiles), [prompt(self.processor) for _ in range(4)]

        def language() -> torch.Tensor:
            outputs = model.language(inputs_embeds=embeds, attention_mask=inputs.attention_mask, logits_to_keep=1)
            return outputs.logits[:, -1]

        def plain() -> torch.Tensor:
            with plain_path():
                return language()

        error = float((language() - plain()).norm() / plain().norm())
        parts: dict[str, Callable[[], Any]] = {
            "image and text on the host": lambda: prompt(self.processor),
            "to the device": lambda: fresh.pop().to(self.device),
            "vision tower": lambda: model.vision(tiles),
            "projector": lambda: model.projector(features),
            "vision, projector, merging": lambda: model.prepare_inputs_embeds(**inputs),
            "language model, last logits": language,
            "the same without kernels": plain,
            "generate, one token": lambda: model.generate(
                **inputs, max_new_tokens=1, do_sample=False, eos_token_id=None
            ),
        }
        times = {name: [self.wall(run) for _ in range(4)][1:] for name, run in parts.items()}
        rows = [[name, f"{statistics.median(each):.1f}"] for name, each in times.items()]
        return [*rows, ["(relative error of these logits against those without kernels)", f"{error:.1e}"]]

    def _request(self, model: Any) -> list[str]:
        def ask(new: int) -> None:
            inputs = prompt(self.processor).to(self.device)
            model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None)

        ask(2)
        repeats, new = (7, 65) if not self.quick else (5, 33)
        host = statistics.median(self.wall(lambda: prompt(self.processor)) for _ in range(repeats))
        # The first of them records; a host that others share has slow moments, which the quickest one shows.
        every = [self.wall(lambda: ask(1)) for _ in range(1 + repeats)][1:]
        first = statistics.median(every)
        whole = statistics.median(self.wall(lambda: ask(new)) for _ in range(2))
        return [f"{host:.1f}", f"{first:.1f}", f"{min(every):.1f}", f"{(whole - first) / (new - 1):.3f}"]

    def profile(self, size: str, model: Any, batches: tuple[int, ...]) -> None:
        """Report where a step's and a prompt's time goes, kernel by kernel, and where the host waits."""
        inputs = prompt(self.processor).to(self.device)

        def ask() -> None:
            model.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=None)

        for rows in batches:
            events = self._events(self.random_step(model, rows).captured, 5)
            self._kernel_table(f"{size}: a step, batch {rows}", events, 5, by_neighbour=True)
        events = self._events(ask, 1)
        self._kernel_table(f"{size}: a prompt", events, 1, by_neighbour=False)
        waits = Counter(event.name for event in events if event.name in WAITS)
        shown = ", ".join(f"{name} {count}" for name, count in waits.most_common()) or "none"
        self.report.add(f"\nCalls of the host for that prompt that wait for the device, or may: {shown}.")

    def _events(self, run: Callable[[], Any], repeats: int) -> list[Any]:
        """Return the profiler's events of some runs after two others."""
        run(), run()
        self.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(repeats):
                run()
            self.synchronize()
        return list(profile.events() or [])

    def _kernel_table(self, title: str, events: list[Any], repeats: int, by_neighbour: bool) -> None:
        """Report the device's events by name, and by the one before, with the idle time in front of each."""
        kinds = torch.autograd.DeviceType
        kernels_run = sorted(
            (e for e in events if e.device_type == (kinds.CUDA if self.on_gpu else kinds.CPU)),
            key=lambda event: event.time_range.start,
        )
        if not kernels_run:
            self.report.add(f"\n{title}: the profiler saw no kernels.")
            return
        groups: dict[str, list[tuple[float, float]]] = {}
        end, before = kernels_run[0].time_range.start, ""
        for event in kernels_run:
            name = event.name.replace("|", "/").replace("void ", "")[: 30 if by_neighbour else 90]
            gap = event.time_range.start - end
            label = f"{name} < {before}" if by_neighbour else name
            groups.setdefault(label, []).append((event.time_range.elapsed_us(), gap))
            end, before = max(end, event.time_range.end), name
        rows = []
        for name, times in sorted(groups.items(), key=lambda item: -sum(map(sum, item[1])))[: 24 if self.quick else 36]:
            took, gaps = (statistics.median(part) for part in zip(*times, strict=True))
            whole = sum(time for time, _ in times) / repeats
            rows.append([name, f"{len(times) / repeats:g}", f"{took:.1f}", f"{gaps:.1f}", f"{whole:.0f}"])
        busy = sum(event.time_range.elapsed_us() for event in kernels_run) / repeats
        span = (end - kernels_run[0].time_range.start) / repeats
        head = ["kernel < the one before" if by_neighbour else "kernel", "calls", "us", "idle before, us", "us in all"]
        self.report.table(f"{title}: {busy:.0f} us in kernels, {span:.0f} us from first to last", head, rows)

    # ---------------------------------------------------------------- others

    @torch.no_grad()
    def stock(self) -> None:
        """Time a step of transformers' own DeepSeek-V2 at small's shapes, dynamic cache."""
        from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

        config = DeepseekV2Config(
            vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
            num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2,
            n_routed_experts=64, num_experts_per_tok=6, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, topk_method="greedy", n_group=1, topk_group=1,
        )  # fmt: skip
        with torch.device("meta"):
            model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
        model = model.to_empty(device=self.device).eval()
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        # Buffers of the rotary embedding were made on no device.
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(self.device)
        ids = torch.randint(3, 1000, (1, CONTEXT), device=self.device)
        first = statistics.median(self.wall(lambda: model(ids, logits_to_keep=1)) for _ in range(3))
        cache = model(ids, logits_to_keep=1, use_cache=True).past_key_values
        times = self.milliseconds(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True), 10)
        row = [transformers.__version__, f"{first:.1f}", f"{statistics.median(times):.2f}"]
        self.report.note("small", FIRST, "transformers", row[1])
        self.report.note("small", LATER.format(1), "transformers", row[2])
        head = [
            "transformers' DeepSeek-V2, small's language part",
            "prompt of 1,450 tokens, ms",
            "decoding, ms a token",
        ]
        self.report.table("Others", head, [row])

    # ---------------------------------------------------------------- all

    def size(self, size: str) -> None:
        """Run all sections of one size, and free its memory."""
        self.report.add(f"\n## {size}")
        with self.report.section(f"{size}: model"):
            self._sections(size, random_model(size, self.device))
        give_memory_back()

    def _sections(self, size: str, model: Any) -> None:
        report = self.report
        start = float("nan")
        with report.section(f"{size}: first step"):
            start = self.wall(lambda: self.random_step(model, 1)) / 1e3
            report.add(f"\nWhy not the kernels: {backend.unsupported_reason(model)}; first step {start:.1f} s.")
        with report.section(f"{size}: kernels"):
            self.check_kernels(size, self.runner(model).weights)
        with report.section(f"{size}: decoding"):
            self.decode(size, model, (1, 8, 64))
        with report.section(f"{size}: requests"):
            self.requests(size, model, start)
        with report.section(f"{size}: profile"):
            self.profile(size, model, (1, 8, 64))


def bytes_read(runner: TritonRunner, tokens: int, hit: list[int]) -> int:
    """Return the bytes that a step must read: weights, of experts only those hit, and the cache of so many tokens."""

    def size(*parts: Weight | None) -> int:
        return sum(part.nbytes for part in parts if part is not None)

    weights, hits = runner.weights, iter(hit)
    total = size(weights.head) + tokens * runner.kv_cache.bytes_per_token
    for layer in weights.layers:
        a, e = layer.attention, layer.experts
        total += size(*a.projections, a.out, a.kv_b, layer.gate, e.shared_gate, e.shared_up, e.shared_down)
        if layer.routing is not None:
            total += next(hits) * size(e.gate_up, e.down) // e.num_experts
    return total


def times_of(command: list[str], packages: str | None = None) -> tuple[list[dict[str, float]], str | None]:
    """Run a program that prints a JSON object a line; returns them, and why it failed where it did."""
    path = {} if packages is None else {"PYTHONPATH": packages}
    done = subprocess.run([sys.executable, *command], env={**os.environ, **path}, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rows"')]  # others print too
    return lines, None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1][:200]


def beside(report: Report, who: str, title: str, head: list[str], sizes: list[str], run: Callable[[str], Any]) -> None:
    """Report what a program gives for each size."""
    table = []
    for size in sizes:
        lines, error = run(size)
        table += [[size, line["rows"], f"{line['first']:.1f}", f"{line['later']:.2f}"] for line in lines]
        for line in lines:
            report.note(size, LATER.format(line["rows"]), who, f"{line['later']:.2f}")
            if line["rows"] == 1:
                report.note(size, FIRST, who, f"{line['first']:.1f}")
        if error is not None:
            table.append([size, "-", f"**failed**: {error}", "-"])
    report.table(title, ["size", *head], table)


def original(report: Report, bench: Bench, sizes: list[str], checkout: str, packages: str) -> None:
    """Time the original in a process of its own: both packages have one name, and need other packages."""
    fields = ("input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop")
    head = ["batch, rows alike", "first token without preprocessing, ms", "tokens after it, ms each"]
    given = prompt(bench.processor)
    with tempfile.TemporaryDirectory() as folder:
        inputs, config = Path(folder) / "inputs.pt", Path(folder) / "config.json"
        torch.save({name: given[name] for name in fields}, inputs)

        def run(size: str) -> Any:
            config.write_text(json.dumps(released_config(size).to_dict()), encoding="utf-8")
            program = [str(HERE / "gpu_original.py"), checkout, str(config), str(inputs)]
            return times_of([*program, "--device", str(bench.device)], packages)

        beside(report, "the original", "The original", head, sizes, run)


def vllm(report: Report, bench: Bench, sizes: list[str]) -> None:
    """Time vLLM in a process of its own, which gives its memory back."""
    head = ["batch", "first token, ms", "tokens after it, ms each"]
    with tempfile.TemporaryDirectory() as folder:
        bench.processor.save_pretrained(folder)

        def run(size: str) -> Any:
            released_config(size).save_pretrained(folder)
            return times_of([str(HERE / "gpu_vllm.py"), folder])

        beside(report, "vLLM", f"vLLM {importlib.metadata.version('vllm')}", head, sizes, run)


def others(report: Report, bench: Bench, sizes: list[str], args: argparse.Namespace) -> None:
    """Measure what else is on this machine, or say that it is not."""
    with report.section("transformers"):
        bench.stock()
    give_memory_back()  # which the processes below need
    if args.original is None:
        report.add(
            "\nThe original was not asked for (--original): its figures of another run are in benchmarks/README.md."
        )
    else:
        with report.section("the original"):
            original(report, bench, sizes, args.original, args.original_packages)
    if importlib.util.find_spec("vllm") is None:
        report.add("\nvLLM is not importable here: its figures of another run are in benchmarks/README.md.")
    else:
        with report.section("vLLM"):
            vllm(report, bench, sizes)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one size, no comparison with others")
    parser.add_argument("--markdown", type=Path, help="write the report there too")
    parser.add_argument("--original", help="a checkout of the original, to be measured too")
    parser.add_argument("--original-packages", default="", help="a folder with transformers 4.38, see gpu_original.py")
    args = parser.parse_args()
    device, report = torch.device(args.device), Report(args.markdown)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    triton_version = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    report.add(
        "# Speed on a GPU\n",
        f"{name}; torch {torch.__version__}, Triton {triton_version}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}; bfloat16, random weights at the released shapes.",
    )
    start = time.perf_counter()
    bench = Bench(device, report, args.quick)
    with report.section("ceilings"):
        bench.ceilings()
    sizes = args.sizes or (["small"] if args.quick else ["tiny", "small", "base"])
    for size in sizes:
        bench.size(size)
    if not args.quick:
        others(report, bench, sizes, args)
    report.summary()
    failed = ", ".join(report.failures) or "none"
    report.add(f"\nSections that failed: {failed}. The whole run took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
