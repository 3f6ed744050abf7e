"""On two GPUs: how long does a token take where a model's layers are spread over both, beside the same model on one?

    python benchmarks/spread_model.py tiny base

Released shapes, random weights in bfloat16; the first half of the layers on the first GPU, the rest and the head on the
second. Prints milliseconds a token at batch 1, and how many greedy tokens of four prompts are the same.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from accelerate import dispatch_model
from gpu_end_to_end import random_model

from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.holder import engine_of, release_model
from deepseek_vl2.engine.request import Delta, Event, Prompt, Request
from deepseek_vl2.engine.sampling_params import SamplingParams
from deepseek_vl2.engine.scheduler import EngineOptions

PROMPTS, LENGTH, NEW = 4, 700, 24
ROUNDS, STEPS = 3, 50


def greedy_tokens(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Return the greedy answers to the prompts, written together."""
    events: list[list[Event]] = [[] for _ in prompts]
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    requests = [Request(Prompt(ids), params, got.append) for ids, got in zip(prompts, events, strict=True)]
    engine.submit(requests)
    engine.run_until(lambda: not any(engine.holds(request) for request in requests))
    return [[t.token_id for event in got if isinstance(event, Delta) for t in event.tokens] for got in events]


def wait_for_devices() -> None:
    """Wait until all GPUs are done."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


def milliseconds(engine: Engine, prompt: list[int]) -> float:
    """Return the time of a decoding step of one row."""
    params = SamplingParams(max_tokens=20 + ROUNDS * STEPS + 10, temperature=0, ignore_eos=True)
    request = Request(Prompt(prompt), params, lambda event: None)
    engine.submit([request])
    for _ in range(20):
        engine.step()
    times = []
    for _ in range(ROUNDS):
        wait_for_devices()
        start = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        wait_for_devices()
        times.append(1e3 * (time.perf_counter() - start) / STEPS)
    engine.cancel(request)
    return statistics.median(times)


def measure(model: Any) -> tuple[float, list[list[int]], str]:
    """Return the time of a token, the answers and what runs the model."""
    engine = engine_of(model, EngineOptions(kv_cache_tokens=20_000))
    numbers = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 1000, (PROMPTS, LENGTH), generator=numbers).tolist()
    tokens = greedy_tokens(engine, prompts)
    took = milliseconds(engine, prompts[0])
    runner = f"{type(engine.runner).__name__} on {len(engine.placement.devices)}"
    release_model(model)
    return took, tokens, runner if engine.placement.reason is None else f"{runner}: {engine.placement.reason}"


def spread(model: Any) -> None:
    """Put the first half of a model's layers on the first GPU, the rest on the second."""
    layers = len(model.language.model.layers)
    devices = dict.fromkeys(("vision", "projector", "image_newline", "view_seperator"), 0)
    devices |= {"language.model.embed_tokens": 0, "language.model.rotary_emb": 0}
    devices |= {f"language.model.layers.{i}": int(i >= layers // 2) for i in range(layers)}
    devices |= {"language.model.norm": 1, "language.lm_head": 1}
    dispatch_model(model, devices)
    torch.cuda.empty_cache()


def main() -> None:
    """Measure each size that the arguments name on one GPU and on two, and print a table."""
    if torch.cuda.device_count() < 2:
        sys.exit("This needs two GPUs.")
    rows = []
    for size in sys.argv[1:] or ["tiny", "small", "base"]:
        model = random_model(size, torch.device("cuda:0"))
        one, tokens, _ = measure(model)
        spread(model)
        two, same, runner = measure(model)
        agree = sum(a == b for x, y in zip(tokens, same, strict=True) for a, b in zip(x, y, strict=True))
        rows.append(f"| {size} | {one:.3f} | {two:.3f} | {two / one:.3f} | {agree} of {PROMPTS * NEW} | {runner} |")
        del model
        torch.cuda.empty_cache()
    print("| size | ms a token, one GPU | two GPUs | ratio | same tokens | run by |\n|---|---|---|---|---|---|")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
