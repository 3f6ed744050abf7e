"""One process of a model that several share; `invariance/test_parallel_model.py` starts two of it.

    python -m torch.distributed.run --nproc_per_node 2 tests/parallel_model.py CHECKPOINTS OUT

CHECKPOINTS holds a directory for each kind. Process 0 writes to OUT what each kind gives, split in each way.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import KINDS, mini_inputs
from transformers.distributed import DistributedConfig

from deepseek_vl2.models import DeepseekVLV2ForCausalLM

NEW = 6
# transformers' names differ between the supported versions; the newer ones split all but the experts as "tensor" does.
FIELDS = DistributedConfig.__dataclass_fields__
EXPERTS: dict[str, Any] = {"ep_size": 2} if "ep_size" in FIELDS else {"enable_expert_parallel": True}
WAYS: dict[str, Any] = {"tensor": {"tp_plan": "auto"}, "experts": {"tp_size": 2, **EXPERTS}}


def whole(tensor: Any) -> torch.Tensor:
    """Return a tensor of which each process has a part; PyTorch's own way fails on packed parts before 2.12."""
    if not hasattr(tensor, "to_local"):
        return tensor
    (placement,), local = tensor.placements, tensor.to_local().contiguous()
    if placement.is_replicate():
        return local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    packed = getattr(placement, "split_factor", 1)  # gate and up projection stand one behind the other in a part
    pieces = [part.chunk(packed, placement.dim) for part in parts]
    return torch.cat([piece[number] for number in range(packed) for piece in pieces], placement.dim)


def results(model: DeepseekVLV2ForCausalLM) -> dict[str, torch.Tensor]:
    """Return logits, greedy tokens, a training loss and some gradients for a left-padded batch with an image."""
    inputs = mini_inputs([(1, 1), 20], [26], seed=3)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    labels = inputs["input_ids"].masked_fill(inputs["images_seq_mask"] | ~inputs["attention_mask"], -100)
    loss = model.train()(**inputs, labels=labels).loss
    loss.backward()
    found = {"logits": logits, "tokens": tokens, "loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = whole(parameter.grad)
    return found


def is_split(model: DeepseekVLV2ForCausalLM, way: str) -> bool:
    """Whether this process holds half of what the way splits."""
    layer = model.language.model.layers[-1]
    local: Any = layer.mlp.experts.down_proj if way == "experts" else layer.self_attn.o_proj.weight
    return hasattr(local, "to_local") and 2 * local.to_local().numel() == local.numel()


def main(checkpoints: Path, out: Path) -> None:
    """Load each kind in each way, run it, and write what it gave."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        for way, options in WAYS.items():
            model = DeepseekVLV2ForCausalLM.from_pretrained(
                checkpoints / kind, distributed_config=DistributedConfig(**options)
            )
            found[kind, way] = {"split": is_split(model, way), **results(model)}
    if int(os.environ["RANK"]) == 0:
        torch.save(found, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.barrier()
    dist.destroy_process_group()
