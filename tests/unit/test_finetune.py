"""The fine-tuning command: what it writes, how it goes on, and what it says to mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TESTS, mini_conversation, mini_model, mini_processor, released_names

from deepseek_vl2.cli.main import run_command
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.training.finetune import build_parser, main

ROOT = TESTS.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a mini checkpoint, data/train.jsonl with its images, and return the directory."""
    root = tmp_path_factory.mktemp("finetune")
    model, processor = mini_model("base"), mini_processor()
    language, tokenizer = model.config.language_config, processor.tokenizer
    language.bos_token_id, language.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "data").mkdir()
    lines = []
    for number in range(6):
        sample = mini_conversation(number)
        sample["images"][0].save(root / "data" / f"{number}.png")
        sample["conversation"][0]["images"] = [f"{number}.png"]
        lines.append(json.dumps(sample["conversation"]))
    (root / "data" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture
def run(files: Path, tmp_path: Path) -> Callable[..., int]:
    """Return a function that runs the command on the mini checkpoint, on the CPU."""

    def run(*options: str, output: str = "out", data: str = "train.jsonl") -> int:
        paths = [
            "--model",
            str(files / "model"),
            "--data",
            str(files / "data" / data),
            "--output",
            str(tmp_path / output),
        ]
        fixed = ["--cpu", "--workers", "0", "--batch_size", "2", "--accumulation", "1", "--no_bar", "--log_every", "1"]
        return main([*paths, *fixed, *options])

    return run


def stopped_early(output: Path, last: int) -> Path:
    """Return a copy of what a run wrote, as if it had stopped while it wrote its last checkpoint: without the model."""
    stopped = output.with_name("stopped")
    shutil.copytree(output, stopped)
    for path in (*stopped.glob("*.safetensors"), *stopped.glob("adapter/*"), *stopped.glob(f"checkpoint-{last}/*")):
        path.unlink()
    return stopped


@pytest.mark.parametrize("weights", ["int4", "nf4"])
def test_adapters_over_packed_weights_end_in_a_plain_checkpoint(
    weights: str, run: Callable[..., int], files: Path, tmp_path: Path, capsys: Any
) -> None:
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    assert run("--quantize", weights, "--max_steps", "2", "--lora_rank", "2", "--cpu") == 0
    whole = DeepseekVLV2ForCausalLM.from_pretrained(files / "model").num_parameters()
    trained, everything = (
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of ([\d,]+) para", capsys.readouterr().out)[0]
    )
    assert whole == everything - trained
    assert released_names(tmp_path / "out") == released_names(files / "model")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))


def test_full_training_is_saved_resumed_and_loads(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    options = [
        "--method",
        "full",
        "--epochs",
        "2",
        "--save_every",
        "2",
        "--learning_rate",
        "1e-3",
        "--save_dtype",
        "float32",
    ]
    assert run(*options) == 0
    told = capsys.readouterr().out
    assert "parameters are trained (full, fp32)" in told and "step 6/6  loss" in told
    assert run(*options) == 1
    assert "out holds checkpoint-6: add --resume" in capsys.readouterr().err

    stopped = stopped_early(tmp_path / "out", 6)
    assert run(*options, "--resume", output="stopped") == 0
    assert "Going on from checkpoint-4." in capsys.readouterr().out
    whole, resumed = (DeepseekVLV2ForCausalLM.from_pretrained(d) for d in (tmp_path / "out", stopped))
    DeepseekVLV2Processor.from_pretrained(stopped)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_the_first_stage_trains_vision_and_projector(run: Callable[..., int], files: Path, tmp_path: Path) -> None:
    assert run("--method", "full", "--stage", "1", "--max_steps", "2", "--warmup", "0", "--save_dtype", "float32") == 0
    before = DeepseekVLV2ForCausalLM.from_pretrained(files / "model").state_dict()
    after = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision", "projector", "image_newline", "view_seperator"}


def test_evaluation_packing_and_tensorboard(run: Callable[..., int], files: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("tensorboard")
    held_out = ["--eval_data", str(files / "data" / "train.jsonl"), "--eval_every", "2"]
    packing = ["--packing", "--max_length", "200", "--gradient_checkpointing"]
    assert run("--method", "full", "--max_steps", "2", *held_out, *packing, "--tensorboard") == 0
    assert "step 2/2  evaluation loss" in capsys.readouterr().out
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))


def test_samples_that_are_too_long_are_told_of(run: Callable[..., int], capsys: Any) -> None:
    assert run("--method", "full", "--max_steps", "1", "--max_length", "20") == 0
    told = capsys.readouterr().out  # the number of samples includes those fetched ahead
    assert re.search(r"Of (\d+) samples \1 were dropped and 0 cut \(longer than 20 tokens\)\.", told)


def test_adapters_are_merged_into_a_model_that_loads(run: Callable[..., int], files: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = ["--max_steps", "4", "--learning_rate", "1e-2", "--save_every", "2", "--save_dtype", "float32"]
    assert run(*options) == 0
    before = DeepseekVLV2ForCausalLM.from_pretrained(files / "model").state_dict()
    after = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("experts" in name for name in moved) and any("self_attn" in name for name in moved)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    DeepseekVLV2Processor.from_pretrained(tmp_path / "out")

    stopped = stopped_early(tmp_path / "out", 4)
    assert run(*options, "--resume", output="stopped") == 0
    resumed = DeepseekVLV2ForCausalLM.from_pretrained(stopped).state_dict()
    for name, tensor in after.items():
        assert torch.equal(resumed[name], tensor), name


MISTAKES = {
    "--method lora --freeze vision": (2, "--stage and --freeze choose weights to train: they need --method full."),
    "--method full --quantize int4": (2, "--quantize packs frozen weights: it needs --method lora."),
    "--method full --quantize nf4": (2, "--quantize packs frozen weights: it needs --method lora."),
    "--method full --freeze vision projector language": (2, "--freeze names every part"),
    "--eval_every 5": (2, "--eval_every needs --eval_data."),
    "--max_length 0": (2, "--max_length must be positive, not 0."),
    "--epochs 0": (2, "--epochs must be positive, not 0."),
    **{
        f"--{name} {value}": (2, f"--{name} must be")
        for name, values in {
            "max_length": "1 99999999999999999999",
            "workers": "-1 100000",
            "lora_alpha": "nan -1 inf",
            "lora_dropout": "nan -0.1 1 1.5",
            "learning_rate": "nan -1 inf",
            "vision_lr_factor": "nan -1 inf",
            "epochs": "nan -1 inf",
            "max_steps": "0 -2",
            "batch_size": "0 99999999999",
            "warmup": "nan -1 inf",
            "weight_decay": "nan -1",
            "clip": "nan -1 inf",
            "seed": "-1 99999999999999999999",
            "keep": "0",
            "routing_bias_rate": "nan -1",
            "lora_rank": "100000000",
        }.items()
        for value in values.split()
    },
    "--lora_alpha 0": (2, "--lora_alpha must not be 0"),
    "--eval_data x.jsonl --eval_every 0": (2, "--eval_every must be at least 1"),
    "--image_root /nowhere": (2, "--image_root: there is no directory '/nowhere'."),
    "--output /dev/null/x": (2, "--output: /dev/null is a file"),
    "--output /dev/null": (2, "--output: /dev/null is a file"),
    "--model /nowhere/at/all": (1, "/nowhere/at/all"),
    "--data none.jsonl": (1, "There is no data file at none.jsonl."),
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_ends_in_one_line(run: Callable[..., int], options: str, capsys: Any) -> None:
    code, words = MISTAKES[options]
    assert run(*options.split()) == code
    message = capsys.readouterr().err.strip()
    assert words in message and len(message.splitlines()) <= 2
    assert "Traceback" not in message


@pytest.mark.parametrize("options", ["", "--skip_check --workers 2"])
def test_a_bad_line_ends_in_one_line_from_a_worker_too(
    run: Callable[..., int], files: Path, options: str, capsys: Any
) -> None:
    lines = (files / "data" / "train.jsonl").read_text().splitlines()
    (files / "data" / "bad.jsonl").write_text("\n".join([*lines, '[{"role": "robot", "content": "?"}]']))
    assert run("--method", "full", *options.split(), data="bad.jsonl") == 1
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1 and message[0].endswith(
        "bad.jsonl, line 7: unknown role 'robot' in message 1: expected user, assistant or system "
        "(or '<|User|>', '<|Assistant|>')."
    )


def test_texts_alone_do_not_stop_a_run_that_trains_the_projector(
    run: Callable[..., int], files: Path, capsys: Any
) -> None:
    line = json.dumps([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}])
    (files / "data" / "texts.jsonl").write_text(line)
    assert run("--lora_parts", "projector", "--lora_rank", "2", "--max_steps", "1", data="texts.jsonl") == 0


def test_unknown_options_end_with_usage(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "x", "--data", "y", "--output", "z", "--method", "magic"], prog="deepseek-vl2 finetune")
    assert caught.value.code == 2
    assert "deepseek-vl2 finetune: error: argument --method: invalid choice: 'magic'" in capsys.readouterr().err


def test_the_program_runs_it_with_either_spelling_of_options(capsys: Any) -> None:
    assert run_command("finetune", ["--data", "x", "--output", "y", "--max-length", "0"]) == 2
    assert "deepseek-vl2 finetune: error: --max_length must be positive" in capsys.readouterr().err


def test_every_option_is_explained() -> None:
    for action in build_parser()._actions:
        assert action.help, action.option_strings


def test_the_script_in_the_root_is_the_command() -> None:
    shown = subprocess.run([sys.executable, str(ROOT / "finetune.py"), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "Fine-tune DeepSeek-VL2 on conversations" in shown.stdout
