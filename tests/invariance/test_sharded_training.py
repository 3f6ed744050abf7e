"""Training in two processes, sharded or copied, is training in one: losses, weights and the gates' bias."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded_training
import torch
from safetensors.torch import load_file
from support import TESTS, mini_conversation, mini_model, mini_processor

from deepseek_vl2.training.finetune import main as finetune

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def in_two_processes(how: str, kind: str, directory: Path) -> dict[str, Any]:
    """Run the script in two processes that talk through gloo, and return what it wrote."""
    out = directory / "result.pt"
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    subprocess.run(
        [sys.executable, "-m", *launch, str(TESTS / "sharded_training.py"), how, kind, str(out)],
        check=True,
        timeout=300,
        env=environment(),
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


# ---------------------------------------------------------------- the command, through accelerate's launcher

# As docs/training.md has it, but for the number of processes.
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP += ["--fsdp_state_dict_type", "FULL_STATE_DICT"]
MACHINE = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def write_files(root: Path, kind: str) -> Path:
    """Write a mini checkpoint and eight conversations, three without images: one step has none but those."""
    model, processor = mini_model(kind), mini_processor()
    language, tokenizer = model.config.language_config, processor.tokenizer
    language.bos_token_id, language.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    lines = []
    for number in range(8):
        sample = mini_conversation(number, images=int(number not in (1, 3, 6)))
        for image in sample["images"]:
            image.save(root / f"{number}.png")
            sample["conversation"][0]["images"] = [f"{number}.png"]
        lines.append(json.dumps(sample["conversation"]))
    (root / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files of the base model."""
    return write_files(tmp_path_factory.mktemp("launched"), "base")


def options(files: Path, method: str, output: Path, rows: int) -> list[str]:
    """Return the command's options; ``method``: "full", "lora", or the kind of weights under adapters."""
    paths = ["--model", str(files / "model"), "--data", str(files / "train.jsonl"), "--output", str(output)]
    fixed = "--cpu --workers 0 --accumulation 1 --no_bar --max_steps 4 --save_every 2 --save_dtype float32 --warmup 0"
    schedule = ["--schedule", "constant", "--learning_rate", "1e-3", "--batch_size", str(rows), "--log_every", "1"]
    packed = [] if method in ("full", "lora") else ["--quantize", method]
    return [*paths, *fixed.split(), *schedule, "--method", "full" if method == "full" else "lora", *packed]


def launch(spread: str, arguments: list[str]) -> None:
    """Run the command in two processes: sharded by accelerate's launcher, or copied by torchrun."""
    if spread == "sharded":
        start = ["accelerate.commands.launch", *MACHINE, *FSDP, "--main_process_port", str(free_port())]
        start += [str(TESTS / "fsdp_finetune.py")]
    else:  # on CPUs accelerate's launcher starts one process
        start = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        start += ["-m", "deepseek_vl2.training.finetune"]
    command = [sys.executable, "-m", *start, *arguments]
    done = subprocess.run(command, timeout=300, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def needs_peft(method: str) -> None:
    if method != "full":
        pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("spread", "method"),
    [("sharded", "full"), ("sharded", "lora"), ("sharded", "int4"), ("copied", "full"), ("copied", "int8")],
)
def test_the_launched_command_trains_as_alone(spread: str, method: str, files: Path, tmp_path: Path) -> None:
    """The base model has a buffer that is saved, the gate's bias, which accelerate alone fails to shard around."""
    needs_peft(method)
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    launch(spread, options(files, method, shared, rows=1))
    sharded = (shared / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()  # only FSDP writes it
    assert sharded == (spread == "sharded")
    assert finetune(options(files, method, alone, rows=2)) == 0
    want, start = load_file(alone / "model.safetensors"), load_file(files / "model" / "model.safetensors")

    def compare() -> None:
        got = load_file(shared / "model.safetensors")
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            change = (tensor - start[name]).norm()
            # AdamW's first steps are signs, which magnify what float32 sums in another order leave of small gradients.
            assert (got[name] - tensor).norm() <= 2e-2 * change + 1e-6, name

    compare()
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-4)
    if method != "lora":
        shutil.rmtree(shared / "checkpoint-4")
        (shared / "model.safetensors").unlink()
        launch(spread, [*options(files, method, shared, rows=1), "--resume"])
        compare()


def losses(output: Path) -> list[float]:
    """Return the losses of a run's log."""
    lines = (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [log["loss"] for log in map(json.loads, lines) if "loss" in log]


@pytest.mark.parametrize("method", ["full", "lora", "int4", "fp8"])
def test_the_launched_command_recomputes_layers_in_bfloat16(method: str, tmp_path: Path) -> None:
    """Before torch 2.14 FSDP 2 casts a layer's inputs when it runs first, and not when it is run again."""
    needs_peft(method)
    files = write_files(tmp_path, "tiny")
    more = ["--precision", "bf16", "--gradient_checkpointing", "--max_steps", "3"]
    sharded, alone = tmp_path / "sharded", tmp_path / "alone"
    launch("sharded", [*options(files, method, sharded, rows=1), *more])
    assert finetune([*options(files, method, alone, rows=2), *more]) == 0
    got, want = losses(sharded), losses(alone)
    assert len(got) == len(want) == 3
    # Gates and norms are rounded to bfloat16, which one process keeps in float32.
    assert got == pytest.approx(want, abs=0.02)
