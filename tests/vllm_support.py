"""What tests of vLLM share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def vllm_checkpoint() -> ModuleType:
    """Import benchmarks/vllm_checkpoint.py, which makes checkpoints of the released head sizes."""
    path = Path(__file__).parents[1] / "benchmarks" / "vllm_checkpoint.py"
    spec = importlib.util.spec_from_file_location("vllm_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
