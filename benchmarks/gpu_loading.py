"""How fast does a checkpoint come from the disk onto a GPU, and in how much host memory?

    python benchmarks/gpu_loading.py [--size tiny] [--folder FOLDER]

A release's shapes with random bfloat16 weights are saved into a temporary folder (of --folder), then loaded in
processes of their own: once with the files dropped from the page cache as far as the system lets one, and once from the
page cache. Beside it, in the same run, the files are read without being used, by one thread and by four, which is what
the disk and the page cache give. Peak host memory is that of the loading process over what it had once CUDA was up.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from gpu_end_to_end import random_model

from deepseek_vl2.models import DeepseekVLV2ForCausalLM

GB = 1e9
CHUNK = 1 << 24


def host_memory_gb(field: str) -> float:
    """Return a field of this process's status: VmRSS is now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / GB
    raise RuntimeError(f"/proc/self/status has no {field}")


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages."""
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_file(path: Path) -> None:
    """Read a file, and throw away what it holds."""
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_seconds(folder: Path, threads: int) -> float:
    """Return how long reading all files takes, so many at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_file, sorted(folder.glob("*.safetensors"))))
    return time.perf_counter() - start


def load(folder: str, device: str) -> None:
    """Load, and print seconds and gigabytes as JSON."""
    torch.zeros(1, device=device)
    before = host_memory_gb("VmRSS")
    start = time.perf_counter()
    model = DeepseekVLV2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device})
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GB
    print(json.dumps({"seconds": seconds, "host": host_memory_gb("VmHWM") - before, "weights": weights}))


def measure(size: str, parent: str | None, device: str) -> list[str]:
    """Return the lines of the table."""
    lines = []
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        random_model(size, torch.device(device)).save_pretrained(folder, max_shard_size="2GB")
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / GB
        largest = max(path.stat().st_size for path in folder.glob("*.safetensors")) / GB
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        for state in ("dropped from the page cache", "in the page cache"):
            cold = state.startswith("dropped")
            raw = []
            for threads in (1, 4):
                if cold:
                    drop_from_cache(folder)
                raw.append(total / read_seconds(folder, threads))
            if cold:
                drop_from_cache(folder)
            command = [sys.executable, __file__, "--load", str(folder), "--device", device]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            got = json.loads(result.stdout.splitlines()[-1])
            lines.append(
                f"| {size} | {state} | {total:.2f} | {largest:.2f} | {raw[0]:.2f} / {raw[1]:.2f} | "
                f"{got['seconds']:.2f} | {total / got['seconds']:.2f} | {got['host']:.2f} |"
            )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        load(args.load, args.device)
        return
    print("| size | files | GB | largest, GB | read by 1 / 4 threads, GB/s | loaded in, s | GB/s | host memory, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(*measure(args.size, args.folder, args.device), sep="\n", flush=True)


if __name__ == "__main__":
    main()
