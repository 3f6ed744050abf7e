"""A checkpoint that is damaged, incomplete or another model's is refused in one sentence that names the file."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import mini_model
from tokenizers import Tokenizer, models, pre_tokenizers

from deepseek_vl2.cli import info, main
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.checkpoint import OPTIONAL_TENSORS
from deepseek_vl2.models.checkpoint_check import check_finite
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model, resolve_model_path

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "vocab_size": 320}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("good"))


def spoil_weights(part: str, value: float) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        weights = load_file(directory / WEIGHTS)
        name = next(name for name in weights if part in name)
        weights[name].view(-1)[3] = value
        save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})

    return spoil


def write(name: str, content: bytes | str | dict[str, Any]) -> Callable[[Path], None]:
    data = json.dumps(content) if isinstance(content, dict) else content
    return lambda directory: (directory / name).write_bytes(data.encode() if isinstance(data, str) else data)


def change(name: str, **fields: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**content, **fields}))

    return spoil


def remove(*names: str) -> Callable[[Path], None]:
    return lambda directory: [file.unlink() for file in directory.iterdir() if not names or file.name in names]  # type: ignore[return-value]


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * keep)])

    return spoil


def llama(directory: Path) -> None:
    remove()(directory)
    write(CONFIG, LLAMA)(directory)
    save_file({"model.embed_tokens.weight": torch.zeros(320, 64)}, directory / WEIGHTS)


def strange_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["[UNK]", "a", "b"])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / TOKENIZER))


def moved_ids(directory: Path) -> None:
    content = json.loads((directory / TOKENIZER).read_text())
    by_content = {token["content"]: token for token in content["added_tokens"]}
    image, reference = by_content["<image>"], by_content["<|ref|>"]
    image["id"], reference["id"] = reference["id"], image["id"]
    (directory / TOKENIZER).write_text(json.dumps(content))


def sharded(index: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        write("model.safetensors.index.json", index)(directory)

    return spoil


# What is done to a good checkpoint, the file that the sentence names, and what it says of it.
WRONG: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "NaN in the language model": (spoil_weights("self_attn", float("nan")), WEIGHTS, "NaN"),
    "NaN in an expert": (spoil_weights("experts.5.up_proj", float("nan")), WEIGHTS, "NaN"),
    "infinity in the tower": (spoil_weights("vision.blocks", float("inf")), WEIGHTS, "infinite"),
    "another model_type": (change(CONFIG, model_type="qwen2_vl"), CONFIG, "qwen2_vl"),
    "no model_type": (write(CONFIG, {"hidden_size": 8}), CONFIG, "model_type"),
    "an empty directory": (remove(), "", "is empty"),
    "a llama": (llama, CONFIG, "llama"),
    "no config.json": (remove(CONFIG), CONFIG, "has no"),
    "an empty config.json": (write(CONFIG, b""), CONFIG, "empty"),
    "a cut config.json": (cut(CONFIG, 0.5), CONFIG, "valid JSON"),
    "a list as config.json": (write(CONFIG, "[1]"), CONFIG, "no JSON object"),
    "a config.json of bytes": (write(CONFIG, b"\xff\xfe\x00\x01"), CONFIG, "UTF-8"),
    "no weights": (remove(WEIGHTS), WEIGHTS, "no safetensors files"),
    "empty weights": (write(WEIGHTS, b""), WEIGHTS, "is empty"),
    "weights cut in the middle": (cut(WEIGHTS, 0.5), WEIGHTS, "truncated"),
    "weights cut in the header": (cut(WEIGHTS, 0.001), WEIGHTS, "truncated"),
    "garbage as weights": (write(WEIGHTS, b"this is not it" * 99), WEIGHTS, "no safetensors file"),
    "a page of a server as weights": (write(WEIGHTS, b"<!DOCTYPE html><html>"), WEIGHTS, "no safetensors file"),
    "a git-lfs pointer as weights": (write(WEIGHTS, b"version https://git-lfs\noid"), WEIGHTS, "no safetensors file"),
    "a garbled index": (sharded(b"{"), "model.safetensors.index.json", "valid JSON"),
    "an index without its map": (sharded({}), "model.safetensors.index.json", "weight_map"),
    "no tokenizer.json": (remove(TOKENIZER), TOKENIZER, "has no"),
    "an empty tokenizer.json": (write(TOKENIZER, b""), TOKENIZER, "empty"),
    "a cut tokenizer.json": (cut(TOKENIZER, 0.5), TOKENIZER, "valid JSON"),
    "a tokenizer.json without a vocabulary": (write(TOKENIZER, {}), TOKENIZER, "vocabulary"),
    "another model's tokenizer": (strange_tokenizer, TOKENIZER, "another model's"),
    "a tokenizer with another image id": (moved_ids, TOKENIZER, "another model's"),
}  # fmt: skip


@pytest.fixture(params=WRONG)
def wrong(request: pytest.FixtureRequest, good: Path, tmp_path: Path) -> tuple[Path, str, str]:
    spoil, file, says = WRONG[request.param]
    shutil.copytree(good, tmp_path / "checkpoint")
    spoil(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", file, says


def check(error: BaseException | str, wrong: tuple[Path, str, str]) -> None:
    directory, file, says = wrong
    text = str(error)
    assert str(directory) in text and file in text and says in text, text
    assert "\n" not in text.strip() and len(text) < 400, text


def test_loading_says_so(wrong: tuple[Path, str, str]) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_pretrained_model(wrong[0], device="cpu")
    check(error.value, wrong)


def test_from_pretrained_says_so(wrong: tuple[Path, str, str]) -> None:
    about_tokenizer = wrong[1] == TOKENIZER
    load = DeepseekVLV2Processor.from_pretrained if about_tokenizer else DeepseekVLV2ForCausalLM.from_pretrained
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(wrong[0])
    check(error.value, wrong)


def test_info_says_so(wrong: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main.main(["info", str(wrong[0])])
    shown = capsys.readouterr()
    line = next(line for line in shown.err.splitlines() if str(wrong[0]) in line)
    check(line, wrong)
    assert "Traceback" not in shown.err
    assert (code == 0) == ("experts a token" in shown.out)
    if wrong[1] in ("", CONFIG):
        assert code == 1


COMMANDS = {
    "ask": ["hi", "--image", "PICTURE"],
    "chat": [],
    "ground": ["PICTURE", "a cat"],
    "batch": ["LINES", "OUT"],
    "finetune": ["--data", "LINES", "--output", "OUT"],
    "evaluate": [],
    "serve": ["--port", "0"],
}


@pytest.mark.parametrize("case", ["a llama", "garbage as weights", "another model's tokenizer", "NaN in an expert"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_so(
    good: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    case: str,
) -> None:
    spoil, file, says = WRONG[case]
    directory = tmp_path / "checkpoint"
    shutil.copytree(good, directory)
    spoil(directory)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "hi"} if command == "batch" else turns) + "\n")
    names = {"PICTURE": str(tmp_path / "a.png"), "LINES": str(tmp_path / "q.jsonl"), "OUT": str(tmp_path / "out")}
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.chdir(tmp_path)
    arguments = [names.get(argument, argument) for argument in COMMANDS[command]]
    try:
        code = main.main([command, *arguments, "--model", str(directory)])
    except SystemExit as error:
        code = int(error.code or 0)
    shown = capfd.readouterr().err
    assert code != 0 and "Traceback" not in shown
    line = next(line for line in shown.splitlines() if str(directory) in line and says in line)
    assert file in line


def test_a_tokenizer_with_more_ids_than_the_model(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "checkpoint")
    change(CONFIG, language_config={"vocab_size": 64})(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="another model's"):
        DeepseekVLV2Processor.from_pretrained(tmp_path / "checkpoint")


def test_a_good_checkpoint_passes(good: Path) -> None:
    assert resolve_model_path(good) == good
    assert info.model_facts(str(good), 10).get("problem") is None


def test_numbers_that_no_file_gave_are_not_looked_at() -> None:
    """The unused pooling head may be missing: its memory then holds anything."""
    model = mini_model("tiny")
    model.vision.attn_pool.latent.data.fill_(float("nan"))
    check_finite(model, {}, "somewhere", OPTIONAL_TENSORS)
    with pytest.raises(ValueError, match="attn_pool"):
        check_finite(model, {"vision.attn_pool.latent": Path("a.safetensors")}, "somewhere", OPTIONAL_TENSORS)


def test_weights_on_no_device_are_not_looked_at(good: Path) -> None:
    with torch.device("meta"):
        from deepseek_vl2.models.checkpoint_check import find_not_finite

        assert find_not_finite([("a", torch.empty(3)), ("b", torch.empty(3, dtype=torch.long))]) == []
    assert find_not_finite([("a", torch.tensor([1.0])), ("b", torch.tensor([float("nan")]).bfloat16())]) == ["b"]
    assert find_not_finite([]) == []
