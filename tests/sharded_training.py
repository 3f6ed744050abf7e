"""One process of a sharded training on CPUs; `invariance/test_sharded_training.py` starts two of it.

    python -m torch.distributed.run --nproc_per_node 2 tests/sharded_training.py HOW KIND OUT

HOW is "torch" (``fully_shard``), "accelerate" (its FSDP 2, which its launcher keeps for GPUs) or "copied" (DDP). Each
process trains on its own rows; process 0 writes losses, weights and biases after some steps to OUT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from support import mini_inputs, mini_model
from torch import nn

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.training.routing import RoutingBiasUpdater

STEPS = 3
ROWS = 4
RATE = 0.01
Batch = dict[str, torch.Tensor]


def rows_of_step(step: int) -> list[Batch]:
    """Return the rows of a step; those of the second half have no images."""
    kinds: list[Any] = [[(1, 1), 20], [5, (1, 1), 9], [26], [31]]
    rows = [mini_inputs(items, seed=10 * step + index) for index, items in enumerate(kinds)]
    for row in rows:
        row["labels"] = row["input_ids"].masked_fill(row["images_seq_mask"], -100)
    return rows


def build(kind: str, checkpointing: bool = False) -> DeepseekVLV2ForCausalLM:
    """Build the model that is trained; the balance loss is large enough to be seen."""
    model = mini_model(kind, aux_loss_alpha=0.1).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def train(model: nn.Module, optimizer: Any, rank: int, processes: int) -> Any:
    """Train on this process's rows, one a micro-batch; return the whole batch's losses and the updater."""
    updater = RoutingBiasUpdater(model, rate=RATE)
    losses = []
    for step in range(STEPS):
        rows = rows_of_step(step)
        labels = sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)
        share = ROWS // processes
        total = torch.zeros(())
        for row in rows[rank * share : (rank + 1) * share]:
            # As transformers' Trainer does: labels of all processes are counted, gradients of processes averaged.
            loss = model(**row, num_items_in_batch=torch.tensor(labels)).loss
            (loss * processes).backward()
            total += loss.detach()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    return losses, updater


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    # Not Adam: its first steps are signs, which magnify what is left of a zero gradient.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def shard_with_torch(model: DeepseekVLV2ForCausalLM) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.language.model.layers, model.vision, model.projector):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def shard_with_accelerate(model: DeepseekVLV2ForCausalLM) -> nn.Module:
    """Shard as `Accelerator.prepare` does on GPUs: layers, embedding, and the last norm with the head."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, mixed_precision="no", is_main_process=dist.get_rank() == 0)
    return fsdp2_prepare_model(accelerator, model)


WRAPPERS: dict[str, Callable[[DeepseekVLV2ForCausalLM], nn.Module]] = {
    "torch": shard_with_torch,
    "accelerate": shard_with_accelerate,
    "copied": nn.parallel.DistributedDataParallel,
}


def full_state(model: nn.Module) -> Batch:
    """Return the whole weights, gathered from all processes."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        state[name.removeprefix("module.")] = whole.detach().clone()
    return state


def run(how: str, kind: str) -> dict[str, Any]:
    """Train in the way asked for; return losses, weights and figures."""
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    wrapped = WRAPPERS[how](build(kind, checkpointing=how == "torch"))
    losses, updater = train(wrapped, optimizer_for(wrapped), rank, processes)
    state, sharded = full_state(wrapped), any(hasattr(p, "full_tensor") for p in wrapped.parameters())
    return {"losses": losses, "state": state, "figures": updater.statistics(), "sharded": sharded, "rank": rank}


if __name__ == "__main__":
    torch.set_num_threads(1)
    how, kind, out = sys.argv[1:]
    result = run(how, kind)
    if int(os.environ["RANK"]) == 0:
        torch.save(result, Path(out))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
