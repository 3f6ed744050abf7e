"""What recording a prompt's pass gives on an NVIDIA GPU: time to the first token with and without, and memory.

    python benchmarks/gpu_prompt.py                       # small, under a minute
    python benchmarks/gpu_prompt.py --sizes tiny small base

Released shapes, random bfloat16 weights, one 1024x768 image (7 tiles) and a short question. Every time is the median
of several runs that are waited for, in milliseconds; "device" is the time between events around a replay. Replays must
give the bits that the same function gives when it runs as it is.

`--device cpu --sizes demo` tries the program without a GPU (set TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_end_to_end import prompt, random_model

from deepseek_vl2.engine import backend, cuda_graphs, runtime
from deepseek_vl2.models import DeepseekVLV2Processor, generation, modeling_deepseek_vl_v2
from deepseek_vl2.utils.demo import byte_tokenizer, candidate_resolutions

REPEATS = 7


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall(device: torch.device, run: Callable[[], Any]) -> float:
    """Return the median time of a function in milliseconds, waited for."""
    times = []
    for _ in range(REPEATS if device.type == "cuda" else 2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def on_device(device: torch.device, run: Callable[[], Any]) -> float:
    """Return the median time between events around a function, in milliseconds; on a CPU by the clock."""
    if device.type != "cuda":
        return wall(device, run)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


@contextmanager
def unrecorded(engine: runtime.Engine) -> Iterator[None]:
    """Let prompts go through the model's own forward pass."""
    reason, engine.unsupported_prompts = engine.unsupported_prompts, "this measurement wants none"
    try:
        yield
    finally:
        engine.unsupported_prompts = reason


def reserved(device: torch.device) -> float:
    """Return the memory in MB that PyTorch holds of the device, what it could give back not counted."""
    if device.type != "cuda":
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) / 1e6


def kernel_table(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """Return what a function runs on the device: names, calls and microseconds, most first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    calls, times = Counter[str](), Counter[str]()
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            calls[event.name[:90]] += 1
            times[event.name[:90]] += int(event.time_range.elapsed_us() * 10)
    return [(name, calls[name], tenths / 10) for name, tenths in times.most_common(30)]


@torch.no_grad()
def measure(size: str, device: torch.device) -> list[tuple[str, str]]:
    """Return the lines of one size's table."""
    model = random_model(size, device)
    processor = DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions())
    inputs = prompt(processor).to(device)
    settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None}

    def ask() -> None:
        model.generate(**prompt(processor).to(device), **settings)

    def answer() -> None:
        model.generate(**inputs, **settings)

    rows: list[tuple[str, str]] = []
    answer()  # compiles, and is each pass's first use
    engine = runtime.ENGINES[model.language]
    before = reserved(device)
    start = time.perf_counter()
    answer()
    synchronize(device)
    rows.append(
        ("the call that records (includes the pass itself three times)", f"{1e3 * (time.perf_counter() - start):.0f}")
    )
    rows.append(("memory that recordings hold, MB", f"{reserved(device) - before:.0f}"))
    (session,) = engine.sessions.values()
    (one,) = session.prefill_graphs.held.values()
    rows.append(("why prompts are not recorded", str(engine.unsupported_prompts)))
    replay = one.replay or one.run

    logits = session.buffers.logits
    results = []
    for run in (one.run, replay):
        logits.fill_(float("nan"))
        run()
        results.append(logits.clone())
    embeds = model.prepare_inputs_embeds(**inputs)

    def plain() -> torch.Tensor:
        return model.language(inputs_embeds=embeds, logits_to_keep=1, use_cache=True).logits[:, -1]

    expected = plain()
    rows.append(("replay equals the same function run as it is", "yes" if torch.equal(*results) else "**NO**"))
    rows.append(
        (
            "relative error of logits against the forward pass",
            f"{float((results[1] - expected).norm() / expected.norm()):.1e}",
        )
    )
    rows.append(("tokens, and with padding", f"{embeds.shape[1]}, {one.buffers.embeds.shape[1]}"))

    pixels = inputs.images.flatten(0, 1).to(embeds.dtype)
    every = modeling_deepseek_vl_v2.FAST_ENCODERS
    fast, every[:] = list(every), []
    rows.append(("tower and projector, by their modules", f"{wall(device, lambda: model.encode_tiles(pixels)):.1f}"))
    modules = model.encode_tiles(pixels)
    every[:] = fast
    tiles = [model.encode_tiles(pixels) for _ in range(3)]
    same = "yes" if all(torch.equal(tiles[0], other) for other in tiles[1:]) else "**NO**"
    rows.append(("recorded tiles equal each other", same))
    rows.append(
        ("relative error of recorded tiles against the modules'",
         f"{float((tiles[-1] - modules).norm() / modules.norm()):.1e}")
    )  # fmt: skip
    rows += [
        ("image and text on the host", f"{wall(device, lambda: prompt(processor)):.1f}"),
        ("language model, forward pass", f"{wall(device, plain):.1f}"),
        ("language model, the pass run as it is", f"{wall(device, one.run):.1f}"),
        ("language model, replay", f"{wall(device, replay):.1f}"),
        ("language model, replay, device", f"{on_device(device, replay):.1f}"),
        ("tower and projector, recorded", f"{wall(device, lambda: model.encode_tiles(pixels)):.1f}"),
        (
            "tower and projector, recorded, between events",
            f"{on_device(device, lambda: model.encode_tiles(pixels)):.1f}",
        ),
    ]
    for name, run in (("generate, one token", answer), ("first token with the host's part", ask)):
        with unrecorded(engine):
            slow = wall(device, run)
        rows.append((f"{name}: before / recorded", f"{slow:.1f} / {wall(device, run):.1f}"))
    if device.type == "cuda":
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        torch.cuda.reset_peak_memory_stats()
        answer()
        rows.append(("peak over the weights, GB", f"{(torch.cuda.max_memory_allocated() - weights) / 1e9:.2f}"))
        print(f"\n### {size}: kernels of a replayed prompt\n\n| kernel | calls | us |\n| --- | --- | --- |")
        for kernel, count, spent in kernel_table(replay):
            print(f"| {kernel} | {count} | {spent:.0f} |")
    backend.release(model)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small"])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type != "cuda":  # the loop of the kernels, and passes that are not recorded
        runtime.unsupported_device = lambda weight: None
        generation.FAST_SAMPLERS[:] = [runtime.sample]
        cuda_graphs.capture_for = lambda device: lambda run: run
    for size in args.sizes:
        start = time.perf_counter()
        rows = measure(size, device)
        print(f"\n### {size}: a prompt\n\n| part | ms |\n| --- | --- |")
        print(*(f"| {name} | {value} |" for name, value in rows), sep="\n", flush=True)
        print(f"\n[{size}: {time.perf_counter() - start:.0f} s]", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
