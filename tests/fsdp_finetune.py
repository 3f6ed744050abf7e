"""The fine-tuning command in a process of accelerate's launcher, its FSDP 2 opened for CPUs.

    accelerate launch --use_fsdp --fsdp_version 2 ... tests/fsdp_finetune.py --cpu ...

accelerate shards on accelerators only: with CPUs the same command trains copies of the model. Here it is told that gloo
serves such devices; everything else is as users run it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from deepseek_vl2.training.finetune import main


def gloo_for_all(*args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def open_to_gloo() -> None:
    """Let this process of a launcher shard on its CPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    dist.init_process_group("gloo")
    PartialState._prepare_backend = gloo_for_all


if __name__ == "__main__":
    open_to_gloo()
    code = main(sys.argv[1:])
    dist.destroy_process_group()
    sys.exit(code)
