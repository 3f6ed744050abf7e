"""One process of a run of `finetune_two_gpus.py`: the fine-tuning command over random weights made on its device.

    python benchmarks/finetune_worker.py MODEL FIGURES --model PROCESSOR --data train.jsonl --output OUT ...

MODEL is a release's name, ``cut:`` in front for two of its layers. The options behind FIGURES are the command's. Its
own pieces train, data, trainer, launcher and checkpoints; only the base model is not read but drawn where it is
trained, packed where --quantize says so: no weight is ever on the host. FIGURES gets parameters, peak memory and the
seconds of each part.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_end_to_end import ROOT, released_config
from random_weights import fill_packed_randomly, fill_randomly, pack_shapes

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.quantizer import WeightOnlyConfig
from deepseek_vl2.training import finetune, finetune_run
from deepseek_vl2.training.trainer import last_complete_checkpoint
from deepseek_vl2.utils.demo import byte_tokenizer

CUT = "cut:"


def config_of(model: str) -> DeepseekVLV2Config:
    """Return a release's config for what `byte_tokenizer` writes; ``cut:``: with two layers of each part."""
    config = released_config(model.removeprefix(CUT))
    if model.startswith(CUT):
        config.language_config.num_hidden_layers = 2
        config.vision_config.layers = 2
    tokenizer, language = byte_tokenizer(), config.language_config
    language.bos_token_id, language.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    language.eos_token_id = tokenizer.eos_token_id
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return config


def draw_base(model: str, args: argparse.Namespace) -> DeepseekVLV2ForCausalLM:
    """Return what the command would load, made on this process's device: every process draws the same."""
    on_cpu = args.cpu or not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    dtype = torch.bfloat16 if args.method == "lora" and args.precision == "bf16" else torch.float32
    with torch.device("meta"):
        made = DeepseekVLV2ForCausalLM(config_of(model)).to(dtype)
    if args.quantize:
        pack_shapes(made, WeightOnlyConfig(args.quantize), dtype)
    made = made.to_empty(device=device)
    if args.quantize:
        fill_packed_randomly(made, device)
        for parameter in made.parameters():
            parameter.requires_grad_(False)
    else:
        fill_randomly(made, device)
    made.freeze_unused()
    return made


def shard_on_cpus() -> None:
    """Open accelerate's FSDP 2 to CPUs, as the tests do."""
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("fsdp_finetune").open_to_gloo()


def train(model: str, figures: Path, argv: list[str]) -> None:
    """Run the command's training; a checkpoint is gone on from with ``--resume``, the finished model is not saved."""
    start = time.perf_counter()
    args = finetune.build_parser().parse_args(argv)
    finetune.check_options(args)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    if args.cpu and sharded:
        shard_on_cpus()
    finetune_run.load_base = lambda args: draw_base(model, args)  # type: ignore[assignment]
    trainer = finetune_run.build_trainer(args)
    if args.save_every > args.max_steps:
        trainer.args.save_strategy = "no"
    built = time.perf_counter()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    checkpoint = last_complete_checkpoint(args.output) if args.resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    found: dict[str, Any] = {
        "trained": trained,
        "build_seconds": built - start,
        "train_seconds": time.perf_counter() - built,
        "sharded": any(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        "peak": torch.cuda.max_memory_allocated() if trainer.args.device.type == "cuda" else 0,
    }
    if trainer.is_world_process_zero():
        figures.write_text(json.dumps(found), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
