"""The command that writes quantized checkpoints, and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_vl2.cli.main import main
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model
from deepseek_vl2.utils.quantization_report import compare_logits


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_checkpoint(tmp_path_factory.mktemp("demo")))


def test_a_checkpoint_is_written_with_its_report(
    model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "int4"
    arguments = ["quantize", model_path, str(output), "--to", "int4", "--group-size", "32", "--head", "int8"]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((output / "quantization_report.json").read_text(encoding="utf-8"))
    assert report["bytes_after"] < report["bytes_before"]
    _, _, model = load_pretrained_model(output, device="cpu")
    assert {entry["name"] for entry in report["errors"]} == set(model.config.quantization_config.formats)
    for entry in report["errors"]:
        assert 0 < entry["relative_error"] < (0.02 if entry["format"].startswith("int8") else 0.12), entry
    assert 0 <= report["next_tokens"]["same"] <= 1 and report["next_tokens"]["positions"] > 20
    assert main(["ask", "Hi", "--model", str(output), "--max_new_tokens", "3"]) == 0


def test_the_report_is_readable_and_models_need_not_be_run(
    model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "fp8")
    assert main(["quantize", model_path, output, "--to", "fp8", "--no_agreement", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "GB become" in text and "layer 1" in text and "next tokens" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["/dev/null/x"], "/dev/null is a file"),
        (["out", "--max_shard_size", "abc"], "--max_shard_size must be like 5GB"),
        (["out", "--max_shard_size", "0GB"], "--max_shard_size must be like 5GB"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_packed(
    model_path: str, options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from deepseek_vl2.cli import quantize

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize, "measure_exact", lambda *_: pytest.fail("it was begun"))
    assert main(["quantize", model_path, *options, "--device", "cpu"]) != 0
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_directory_that_holds_something_is_left_alone(
    model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["quantize", model_path, str(tmp_path)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "int8", "--group_size", "64"], "int4 alone"),
        (["--block"], "fp8 alone"),
        (["--group_size", "5"], "32, 64"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], words: str, model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", model_path, str(tmp_path / "out"), *options]) == 1
    assert words in capsys.readouterr().err


def test_agreement_counts_positions_and_measures_divergence() -> None:
    exact = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert compare_logits([exact], [exact]).same == 1.0
    assert compare_logits([exact], [exact]).divergence == pytest.approx(0.0, abs=1e-7)
    half = compare_logits([exact[:1], exact[1:]], [exact[:1], -exact[1:]])
    assert (half.same, half.positions) == (0.5, 2)
    assert half.divergence == pytest.approx(0.5 * 2 * torch.tanh(torch.tensor(1.0)).item(), rel=1e-5)
