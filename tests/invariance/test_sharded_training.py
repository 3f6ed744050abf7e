"""Training in two processes, sharded or copied, is training in one: losses, weights and the gates' bias."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded_training
import torch
from support import TESTS

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_two_processes(how: str, kind: str, directory: Path) -> dict[str, Any]:
    """Run the script in two processes that talk through gloo, and return what it wrote."""
    out = directory / "result.pt"
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", *launch, str(TESTS / "sharded_training.py"), how, kind, str(out)],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    result: dict[str, Any] = torch.load(out)
    return result


@pytest.mark.parametrize(
    ("how", "kind"), [("torch", "base"), ("torch", "tiny"), ("accelerate", "small"), ("copied", "base")]
)
def test_two_processes_train_as_one(how: str, kind: str, tmp_path: Path) -> None:
    """Half of the rows have no images: both processes must still run the vision tower's share of the work."""
    model = sharded_training.build(kind)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses, updater = sharded_training.train(model, sharded_training.optimizer_for(model), 0, 1)
    got = in_two_processes(how, kind, tmp_path)
    assert got["sharded"] == (how != "copied")
    torch.testing.assert_close(torch.tensor(got["losses"]), torch.tensor(losses), rtol=1e-5, atol=0)
    want = model.state_dict()
    assert got["state"].keys() == want.keys()
    for name, tensor in want.items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(got["state"][name], tensor)
            continue
        change = (tensor - start[name]).norm()
        # Float32 sums in another order, over three steps: parts of what the weights changed by.
        assert (got["state"][name] - tensor).norm() <= 1e-3 * change + 1e-6, name
    figures = updater.statistics()
    assert got["figures"].keys() == figures.keys()
    for name in ("routed_tokens", "load_max", "load_min", "dead_experts", "balance_loss"):
        assert got["figures"][name] == pytest.approx(figures[name], rel=1e-6)
