"""A model that two processes share, by heads and widths or by experts, is the model of one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import parallel_model
import pytest
import torch
from support import KINDS, TESTS, mini_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """Return what two processes made of every kind in every way, from one start."""
    root = tmp_path_factory.mktemp("parallel")
    for kind in KINDS:
        mini_model(kind).save_pretrained(root / kind)
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(TESTS / "parallel_model.py"), str(root), str(root / "out.pt")]
    done = subprocess.run([*launch, *script], timeout=300, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[Any, dict[str, Any]] = torch.load(root / "out.pt")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_shared_models_compute_alike(kind: str, shared: dict[Any, dict[str, Any]]) -> None:
    want = parallel_model.results(mini_model(kind))
    for way in parallel_model.WAYS:
        got = shared[kind, way]
        assert got.pop("split"), f"{way}: nothing was split"
        assert got.keys() == want.keys()
        assert torch.equal(got["tokens"], want["tokens"])
        torch.testing.assert_close(got["logits"], want["logits"], rtol=1e-5, atol=2e-5)
        for name in want.keys() - {"tokens", "logits"}:
            # float32, added up in another order
            assert (got[name] - want[name]).norm() <= 1e-5 * want[name].norm() + 1e-7, (way, name)
