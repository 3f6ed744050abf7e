"""Measure everything that needs a GPU, one part after the other, each in a process of its own with a bound on its time.

    python benchmarks/measure_all.py                      # all parts that this machine can run
    python benchmarks/measure_all.py kernels serving      # some of them
    python benchmarks/measure_all.py --list

The output of each part is kept in a folder (``--output``, by default ``measured``), with the command, its exit status
and its seconds; a table of the parts comes last. A part that fails or runs out of time does not keep the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """What is measured: a name, the command behind ``python``, most seconds, GPUs, and a package that it needs."""

    name: str
    command: tuple[str, ...]
    seconds: int
    gpus: int = 1
    package: str | None = None


def script(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a program of this folder."""
    return (str(HERE / name), *arguments)


TESTS = str(HERE.parent / "tests" / "invariance" / "test_engine_kernels.py")
PARTS = (
    Part("kernels", ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", TESTS), 500),
    Part("decode", script("gpu.py"), 600),
    Part("serving", script("serving.py", "--sections", "decode", "generate", "engine", "second", "http", "vllm"), 900),
    Part("steady", script("serving.py", "--sections", "steady", "--requests", "64"), 600),
    Part("quantized", script("gpu_quantized.py"), 600),
    Part("finetune", script("finetune_gpu.py"), 300),
    Part("spread", script("spread_model.py", "tiny", "base"), 300, gpus=2),
    Part("finetune-two", script("finetune_two_gpus.py"), 1100, gpus=2),
    Part("vllm-plugin", script("vllm_plugin.py", "--serve"), 600, package="vllm"),
    Part("vllm-plugin-two", script("vllm_plugin.py", "--tp", "2"), 600, gpus=2, package="vllm"),
)


def why_not(part: Part) -> str | None:
    """Return what this machine lacks for a part."""
    found = torch.cuda.device_count()
    if found < part.gpus:
        return f"needs {part.gpus} GPU{'s' * (part.gpus > 1)}, {found} found"
    if part.package is not None and importlib.util.find_spec(part.package) is None:
        return f"needs the package {part.package}"
    return None


def run(part: Part, folder: Path) -> str:
    """Run a part and return its row of the table; its output goes to a file and to the terminal."""
    command = [sys.executable, *part.command]
    start = time.monotonic()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=part.seconds)
        said, status = done.stdout, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        said, status = error.stdout or b"", f"ended after {part.seconds} s"
    took = time.monotonic() - start
    text = said.decode(errors="replace")
    (folder / f"{part.name}.txt").write_text(f"{' '.join(part.command)}\n{status}, {took:.0f} s\n\n{text}", "utf-8")
    print(f"\n===== {part.name}: {status}, {took:.0f} s\n{text}", flush=True)
    return f"| {part.name} | {status} | {took:.0f} |"


def main() -> None:
    """Run what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--output", type=Path, default=Path("measured"))
    parser.add_argument("--list", action="store_true", help="say what can be run here, and run nothing")
    args = parser.parse_args()
    unknown = sorted(set(args.parts) - {part.name for part in PARTS})
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(part.name for part in PARTS)}")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{', '.join(names) or 'no GPU'}; {versions}")
    rows = []
    for part in PARTS:
        if args.parts and part.name not in args.parts:
            continue
        reason = why_not(part)
        if args.list or reason is not None:
            rows.append(f"| {part.name} | {reason or 'can be run'} | |")
            continue
        args.output.mkdir(parents=True, exist_ok=True)
        rows.append(run(part, args.output))
    print("\n| part | outcome | s |\n|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
