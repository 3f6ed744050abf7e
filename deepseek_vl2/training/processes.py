"""Training in several processes, a GPU each: how weights are sharded, and what is refused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepseek_vl2.models.quantized_layers import packed_layers


def refuse_deepspeed(deepspeed: Any = None) -> None:
    """Raise ``ValueError`` where DeepSpeed is asked for: by an argument, or by accelerate's launcher."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes", "on", "y", "t")
    if deepspeed is not None or launched:
        raise ValueError(
            "DeepSpeed is not supported: FSDP 2 shards weights, gradients and moments as ZeRO-3 does "
            "(accelerate launch --use_fsdp --fsdp_version 2; docs/training.md has the whole command)."
        )


def idle_gpus(processes: int, device: torch.device) -> str | None:
    """Return what to do where a machine has more GPUs than there are processes; ``None``: all are in use."""
    there = torch.cuda.device_count() if device.type == "cuda" else 0
    if processes > 1 or there < 2:
        return None
    return (
        f"One process trains on one GPU of {there}; "
        f"accelerate launch --num_processes {there} -m deepseek_vl2.training.finetune ... uses them all."
    )


def keep_sums_exact(plugin: Any) -> None:
    """Let FSDP 2 add gradients up in float32, and leave the loss in float32, where accelerate would round both.

    Args:
        plugin: accelerate's; without mixed precision it stays as it is.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def shard_as_it_is(plugin: Any, model: nn.Module) -> None:
    """Let FSDP 2 hand out a model's weights in their own dtypes, packed ones too: under adapters most are frozen in
    bfloat16 already, and it would round packed numbers, gates and norms.

    Args:
        plugin: accelerate's.
        model: with adapters; whoever runs it has autocast choose the dtype of products.
    """
    plugin.mixed_precision_policy = None
    for _, layer in packed_layers(model):
        layer.hold_as_floats()


@contextmanager
def hidden_buffers(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Take a model's buffers out of its state dict for a while, with the first process's values in all processes.

    accelerate's FSDP 2 empties a model before it shards it and brings back sharded parameters and hidden buffers; on a
    saved buffer, which is not sharded, it fails. ``device``: where processes talk to each other.
    """
    saved = [
        (module, name)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    for module, name in saved:
        shared = module._buffers[name].to(device)  # type: ignore[union-attr]
        dist.broadcast(shared, src=0)
        module._buffers[name] = shared
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in saved:
            module._non_persistent_buffers_set.discard(name)
