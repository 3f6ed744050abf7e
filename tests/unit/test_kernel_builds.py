"""The kernels compile for GPUs that are not there, and keep their numbers in registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
MOST_SHARED = 227  # kB a program


# Bytes of shared memory that a program may have, in kB, by compute capability.
SHARED = {90: MOST_SHARED, 89: 99, 80: 163}
PACKED = [("base", 1, "int4", 80), ("small", 64, "int4", 89), ("base", 1536, "int4", 90), ("tiny", 1, "fp8 blocks", 80)]
PACKED += [("base", 64, "int8", 80), ("small", 1536, "fp8", 89), ("small", 16, "int4", 89)]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rows", "weights", "architecture"), PACKED)
def test_kernels_over_packed_weights_compile_without_spilling(
    size: str, rows: int, weights: str, architecture: int
) -> None:
    lines = compiled(size, rows, "--weights", weights, "--architectures", str(architecture))
    assert len(lines) >= 3
    for line in lines:
        spilled, shared = int(line[5]), float(line[6])
        assert spilled == 0 and shared <= SHARED[architecture], "|".join(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "rows"), [("tiny", 8), ("small", 1), ("base", 64), ("tiny", 1536), ("base", 1536), ("tower", 1)]
)
def test_kernels_compile_without_spilling(size: str, rows: int) -> None:
    lines = compiled(size, rows)
    kernels = {line[2].strip() for line in lines}
    assert len(kernels) >= (1 if size == "tower" else 7)
    for line in lines:
        spilled, shared = int(line[5]), float(line[6])
        assert spilled == 0 and shared <= MOST_SHARED, "|".join(line)


def compiled(size: str, rows: int, *options: str) -> list[list[str]]:
    """Return the lines of the program's table."""
    script = ROOT / "benchmarks" / "kernel_resources.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(script), "--sizes", size, "--rows", str(rows), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith(f"| {size} |")]
