"""Processes that train together may get batches with and without images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import TESTS

PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from support import mini_conversation, mini_model, mini_processor
from deepseek_vl2.training.collator import ConversationCollator

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{meeting}", rank=rank, world_size=2)
collator = ConversationCollator(mini_processor())
batch = collator([mini_conversation(1, images=rank)])
model = mini_model("base", aux_loss_alpha=0.0).train()
model.freeze_unused()
loss = DistributedDataParallel(model)(**batch).loss
loss.backward()
shared = {{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}}
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    model.zero_grad()
    losses = [model(**collator([mini_conversation(1, images=n)])).loss for n in (0, 1)]
    (sum(losses) / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # float32, added up in another order
            torch.testing.assert_close(shared[name], parameter.grad, rtol=1e-4, atol=2e-6)
    assert float(shared["vision.patch_embed.proj.weight"].norm()) > 0
"""


@pytest.mark.slow
def test_a_batch_without_images_beside_one_with_them(tmp_path: Path) -> None:
    code = PROCESS.format(tests=str(TESTS), meeting=tmp_path / "meeting")
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
