"""The kernels compile for an H200 without one, and keep their numbers in registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
MOST_SHARED = 227  # kB a program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "rows"), [("tiny", 8), ("small", 1), ("base", 64), ("tiny", 1536), ("base", 1536), ("tower", 1)]
)
def test_kernels_compile_without_spilling(size: str, rows: int) -> None:
    script = ROOT / "benchmarks" / "kernel_resources.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(script), "--sizes", size, "--rows", str(rows)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith(f"| {size} |")]
    kernels = {line[2].strip() for line in lines}
    assert len(kernels) >= (1 if size == "tower" else 7), done.stdout
    for line in lines:
        spilled, shared = int(line[5]), float(line[6])
        assert spilled == 0 and shared <= MOST_SHARED, "|".join(line)
