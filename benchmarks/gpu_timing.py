"""Times of a function on the device, and the kernels that it runs there."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

REPEATS = 7


def wall(device: torch.device, run: Callable[[], Any]) -> float:
    """Return the median time of a function in milliseconds, waited for."""
    times = []
    for _ in range(REPEATS if device.type == "cuda" else 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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


def kernel_table(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """Return what a function runs on the device: names, calls and microseconds, most first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    calls, times = Counter[str](), Counter[str]()
    for event in trace.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            calls[event.name[:90]] += 1
            times[event.name[:90]] += int(event.time_range.elapsed_us() * 10)
    return [(name, calls[name], tenths / 10) for name, tenths in times.most_common(30)]
