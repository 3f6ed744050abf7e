"""One process uses one GPU; what shards, rounds or batches in ways that are not ours is refused with a sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import mini_model, shared_mini_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.training_args import ParallelMode

from deepseek_vl2.training.finetune import main as finetune
from deepseek_vl2.training.processes import idle_gpus, keep_sums_exact
from deepseek_vl2.training.trainer import VLTrainingArguments


def test_a_process_that_sees_several_gpus_uses_one(tmp_path: Any) -> None:
    """By the Trainer's rules it would use all of them, through DataParallel, and a step would take more samples."""
    args = VLTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=3, report_to=[])
    assert args.device.type in ("cpu", "cuda")
    args._n_gpu = 2  # as its set-up counts them
    assert args.n_gpu == 1
    assert args.train_batch_size == args.eval_batch_size - 5 == 3
    assert args.parallel_mode == ParallelMode.NOT_PARALLEL


def test_a_process_that_leaves_gpus_idle_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    gpu = torch.device("cuda", 0)
    hint = idle_gpus(1, gpu)
    assert hint is not None and "one GPU of 4" in hint and "--num_processes 4" in hint
    assert idle_gpus(4, gpu) is None
    assert idle_gpus(1, torch.device("cpu")) is None


def test_deepspeed_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"DeepSpeed is not supported: FSDP 2"):
        VLTrainingArguments(output_dir=str(tmp_path), deepspeed={"zero_optimization": {"stage": 3}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # accelerate launch --use_deepspeed
    assert finetune(["--data", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "out")]) == 1
    assert "DeepSpeed is not supported" in capsys.readouterr().err
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setattr("deepseek_vl2.models.parallel.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"ZeRO-3 is not supported: FSDP 2"):
        mini_model("tiny")


def test_sharded_training_in_bfloat16_adds_up_in_float32() -> None:
    """Accelerate's policy rounds the sums of gradients, and the loss itself."""
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=rounded)
    keep_sums_exact(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32, None)
    plugin.mixed_precision_policy = None  # float32
    keep_sums_exact(plugin)
    assert plugin.mixed_precision_policy is None


@pytest.mark.parametrize("part", ["whole", "language"])
def test_continuous_batching_is_refused(part: str) -> None:
    """It used to return nothing, or requests without any token."""
    whole = shared_mini_model("base")
    model: Any = whole if part == "whole" else whole.language
    with pytest.raises(NotImplementedError, match=r"generate_batch.*deepseek-vl2 serve"):
        model.generate_batch(inputs=[[3, 4, 5]])


def test_the_whole_model_has_no_other_way_into_data_parallel() -> None:
    model = mini_model("tiny")
    with pytest.raises(RuntimeError, match="one process uses one GPU"):
        for module in model.modules():  # as torch.nn.parallel.replicate does
            module._replicate_for_data_parallel()
