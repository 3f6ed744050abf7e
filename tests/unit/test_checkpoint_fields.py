"""Impossible values in a checkpoint's files are one sentence with the file and the field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deepseek_vl2.cli import main
from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.checkpoint_check import check_config
from deepseek_vl2.models.config_fields import Field
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model

CONFIG, PROCESSOR, TOKENIZER = "config.json", "processor_config.json", "tokenizer.json"
SETTINGS, GENERATION, INDEX = "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"
WEIGHTS, TEMPLATE, ADAPTER = "model.safetensors", "chat_template.jinja", "adapter_config.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("good"))


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


def change(directory: Path, file: str, part: str | None, **fields: Any) -> None:
    content = json.loads((directory / file).read_text())
    (content if part is None else content[part]).update(fields)
    (directory / file).write_text(json.dumps(content))


def check(error: pytest.ExceptionInfo[Any], directory: Path, file: str, says: str) -> None:
    text = str(error.value)
    assert str(directory) in text and file in text and says in text, text
    assert "\n" not in text and len(text) < 400, text


LANGUAGE: list[tuple[str, Any]] = [
    ("num_attention_heads", 0), ("num_hidden_layers", -1), ("num_hidden_layers", 0), ("num_hidden_layers", 10**9),
    ("n_routed_experts", 10**12),
    ("hidden_size", "64"), ("hidden_size", 0), ("hidden_size", None), ("hidden_size", True), ("vocab_size", -5),
    ("intermediate_size", 1.5), ("moe_intermediate_size", 0), ("num_key_value_heads", 0), ("n_routed_experts", -1),
    ("n_shared_experts", -1), ("num_experts_per_tok", "3"), ("first_k_dense_replace", -3), ("rms_norm_eps", -1),
    ("rms_norm_eps", "x"), ("max_position_embeddings", 0), ("max_position_embeddings", "4096"),
    ("routed_scaling_factor", "a"), ("attention_dropout", 7), ("rope_scaling", "yarn"), ("q_lora_rank", 0),
]  # fmt: skip
VISION: list[tuple[str, Any]] = [
    ("layers", 0), ("layers", -1), ("heads", 0), ("image_size", "384"), ("patch_size", 0), ("mlp_ratio", -1),
    ("width", "64"), ("image_size", 10**12), ("patch_size", 10**12),
]  # fmt: skip
PROJECTOR: list[tuple[str, Any]] = [
    ("downsample_ratio", 0), ("input_dim", "x"), ("mlp_ratio", 0), ("depth", "2"),
    ("depth", 10**12), ("depth", 2.5), ("downsample_ratio", 10**12),
]  # fmt: skip
WHOLE: list[tuple[str, Any]] = [
    ("language_config", "x"), ("vision_config", 5), ("projector_config", []), ("global_view_pos", 3),
    ("candidate_resolutions", "x"), ("candidate_resolutions", [[384]]), ("candidate_resolutions", [[0, 0]]),
    ("candidate_resolutions", [[384, 384], [384 * 500, 384 * 500]]), ("candidate_resolutions", [[10**30, 10**30]]),
    ("image_token_id", "x"), ("quantization_config", 5), ("torch_dtype", "foo"),
    ("torch_dtype", "int8"), ("dtype", 5), ("_attn_implementation", "foo"), ("attn_implementation", 5),
]  # fmt: skip
FIELDS = [
    *(("language_config", *pair) for pair in LANGUAGE),
    *(("vision_config", *pair) for pair in VISION),
    *(("projector_config", *pair) for pair in PROJECTOR),
    *((None, *pair) for pair in WHOLE),
]


@pytest.mark.parametrize(("part", "name", "value"), FIELDS)
def test_impossible_fields_of_the_config(copied: Path, part: str | None, name: str, value: Any) -> None:
    change(copied, CONFIG, part, **{name: value})
    with pytest.raises(ValueError) as error:
        check_config(copied, DeepseekVLV2Config.model_type)
    check(error, copied, CONFIG, "dict" if name == "quantization_config" else name)


@pytest.mark.parametrize("value", [0, "64"])
def test_every_way_to_the_config_says_so(copied: Path, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    change(copied, CONFIG, "language_config", num_attention_heads=value)
    for load in (load_pretrained_model, DeepseekVLV2ForCausalLM.from_pretrained, DeepseekVLV2Processor.from_pretrained):
        with pytest.raises(ValueError) as error:
            load(copied)
        check(error, copied, CONFIG, "num_attention_heads")
    assert main.main(["info", str(copied)]) == 1
    shown = capsys.readouterr().err
    assert CONFIG in shown and "num_attention_heads" in shown and "Traceback" not in shown


PROCESSOR_FIELDS: list[tuple[str, Any]] = [
    ("patch_size", 0), ("patch_size", "a"), ("patch_size", 15), ("downsample_ratio", 0), ("downsample_ratio", 3),
    ("candidate_resolutions", []), ("candidate_resolutions", [[1, 1]]), ("candidate_resolutions", [["a", "b"]]),
    ("candidate_resolutions", [[384, 384], [192000, 192000]]), ("candidate_resolutions", [[384, 384], [400, 384]]),
    ("candidate_resolutions", [[384, 384, 384]]), ("image_mean", [0.5]), ("image_mean", "x"), ("image_std", [0, 0, 0]),
    ("image_std", None), ("ignore_id", "x"), ("image_token", 5), ("image_token", ""), ("pad_token", 7),
    ("sft_format", "zzz"), ("sft_format", ["deepseek"]), ("normalize", "no"), ("mask_prompt", "yes"),
    ("add_special_token", 0), ("transformers_defaults", "x"), ("background", "no colour"), ("background", [300, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), PROCESSOR_FIELDS)
def test_impossible_fields_of_the_processor(copied: Path, name: str, value: Any) -> None:
    change(copied, PROCESSOR, None, **{name: value})
    with pytest.raises(ValueError) as error:
        DeepseekVLV2Processor.from_pretrained(copied)
    check(error, copied, PROCESSOR, name if name != "sft_format" or value != "zzz" else "template 'zzz'")


def write(file: str, content: bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / file).write_bytes(content)


def tokenizer(**fields: Any) -> Callable[[Path], Any]:
    return lambda directory: change(directory, TOKENIZER, None, **fields)


def settings(**fields: Any) -> Callable[[Path], Any]:
    return lambda directory: change(directory, SETTINGS, None, **fields)


def without_image_token(directory: Path) -> None:
    content = json.loads((directory / TOKENIZER).read_text())
    added = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    change(directory, TOKENIZER, None, added_tokens=added)


def shard_of_a_number(directory: Path) -> None:
    names = load_file(directory / WEIGHTS)
    (directory / INDEX).write_text(json.dumps({"weight_map": {**dict.fromkeys(names, WEIGHTS), "image_newline": 3}}))


def in_shards(change_index: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        weights = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        shards = {f"model-{i}-of-2.safetensors": dict(list(weights.items())[i - 1 :: 2]) for i in (1, 2)}
        for name, part in shards.items():
            save_file(part, directory / name, metadata={"format": "pt"})
        index = {"weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
        change_index(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return spoil


def without_index(directory: Path) -> None:
    in_shards(dict)(directory)
    (directory / INDEX).unlink()


def link(file: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).symlink_to("../blobs/gone")

    return spoil


def adapter_alone(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    (directory / ADAPTER).write_text(json.dumps({"base_model_name_or_path": "org/base"}))


def pickled(content: bytes) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        (directory / "pytorch_model.bin").write_bytes(content)

    return spoil


def quantized(**config: Any) -> Callable[[Path], None]:
    return lambda directory: change(directory, CONFIG, None, quantization_config=config)


def stored_as(dtype: torch.dtype) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        weights = load_file(directory / WEIGHTS)
        weights["image_newline"] = weights["image_newline"].to(dtype)
        save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})

    return spoil


FILES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a list as processor": (write(PROCESSOR, b"[]"), PROCESSOR, "no JSON object"),
    "a processor of bytes": (write(PROCESSOR, b"\xff\xfe"), PROCESSOR, "UTF-8"),
    "a template of bytes": (write(TEMPLATE, b"\xff\xfe"), TEMPLATE, "UTF-8"),
    "a garbled generation config": (write(GENERATION, b"{"), GENERATION, "valid JSON"),
    "a list as generation config": (write(GENERATION, b"[]"), GENERATION, "no JSON object"),
    "an end that is no token": (write(GENERATION, b'{"eos_token_id": "x"}'), GENERATION, "eos_token_id"),
    "no beams": (write(GENERATION, b'{"num_beams": 0}'), GENERATION, "num_beams"),
    "added tokens of a number": (tokenizer(added_tokens=5), TOKENIZER, "added_tokens"),
    "added tokens without ids": (tokenizer(added_tokens=[{"content": "a"}]), TOKENIZER, "added_tokens"),
    "an unknown kind of tokenizer": (tokenizer(pre_tokenizer={"type": "Nope"}), TOKENIZER, "cannot be read"),
    "no image token": (without_image_token, TOKENIZER, "another model's"),
    "a length that is no number": (write(SETTINGS, b'{"model_max_length": "x"}'), SETTINGS, "model_max_length"),
    "a shard of a number": (shard_of_a_number, INDEX, "shard"),
    "weights as whole numbers": (stored_as(torch.int64), WEIGHTS, "image_newline as whole numbers (I64)"),
    "weights of two values": (stored_as(torch.bool), WEIGHTS, "BOOL"),
    "weights of complex numbers": (stored_as(torch.complex64), WEIGHTS, "complex numbers (C64)"),
    "shards without an index": (without_index, INDEX, "which says what is in model-1-of-2.safetensors"),
    "weights that are a dangling link": (link(WEIGHTS), WEIGHTS, "a link to ../blobs/gone, where no file is"),
    "a config that is a dangling link": (link(CONFIG), CONFIG, "a link to ../blobs/gone"),
    "an adapter alone": (adapter_alone, ADAPTER, "trained over, org/base"),
    "an empty pickle": (pickled(b""), "pytorch_model.bin", "holds no weights"),
    "a pickle of garbage": (pickled(b"junk" * 9), "pytorch_model.bin", "holds no weights"),
    "another quantizer": (quantized(quant_method="gptq", bits=4), CONFIG, "quantized by gptq"),
    "a quantizer without a name": (quantized(), CONFIG, "quantized by None"),
    "plain weights said to be quantized": (quantized(quant_method="fp8"), CONFIG, "is not packed"),
    "an end outside of the vocabulary": (write(GENERATION, b'{"eos_token_id": [1, 99999]}'), GENERATION, "another"),
    "a negative temperature": (write(GENERATION, b'{"temperature": -1, "do_sample": true}'), GENERATION, "temperature"),
    "a share above one": (write(GENERATION, b'{"top_p": 7, "do_sample": true}'), GENERATION, "top_p"),
    "a number of candidates as text": (write(GENERATION, b'{"top_k": "5"}'), GENERATION, "top_k"),
    "an unknown cache": (write(GENERATION, b'{"cache_implementation": "x"}'), GENERATION, "cache_implementation"),
    "an end that is a list": (settings(eos_token=["a"]), SETTINGS, "eos_token"),
    "an end that is null": (settings(eos_token=None), SETTINGS, "eos_token"),
    "a length of nothing": (settings(model_max_length=0), SETTINGS, "model_max_length"),
    "padding in the middle": (settings(padding_side="middle"), SETTINGS, "current value: middle"),
}


def test_shards_are_read_as_one_file_is(copied: Path, good: Path) -> None:
    """What the index says of tensors is not needed, as long as it names the files."""
    in_shards(lambda names: names.update({name: max(names.values()) for name in list(names)[::4]}))(copied)
    want = DeepseekVLV2ForCausalLM.from_pretrained(good).state_dict()
    found = DeepseekVLV2ForCausalLM.from_pretrained(copied).state_dict()
    assert all(found[name].equal(tensor) for name, tensor in want.items())


def test_an_adapter_beside_a_model_is_not_silently_left_out(copied: Path) -> None:
    (copied / ADAPTER).write_text("{}")
    with pytest.warns(UserWarning, match="also holds an adapter"):
        DeepseekVLV2ForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("{}/gone", "There is no checkpoint directory"),
        ("./gone", "There is no checkpoint directory"),
        ("some/deep/path", "There is no checkpoint directory"),
        ("~/no such model", "There is no checkpoint directory"),
        ("~no_such_user/model", "There is no checkpoint directory"),
        ("{}/model.safetensors", "is a file"),
        ("", "name is empty"),
    ],
)
def test_names_of_no_model(good: Path, name: str, says: str) -> None:
    for load in (DeepseekVLV2Processor.from_pretrained, DeepseekVLV2ForCausalLM.from_pretrained):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            load(name.format(good))


def test_a_subfolder_that_is_not_there(good: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope.*no config\.json|There are no safetensors files in .*nope"):
        DeepseekVLV2ForCausalLM.from_pretrained(good, subfolder="nope")


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        DeepseekVLV2Processor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_of_no_use(copied: Path, name: str) -> None:
    spoil, file, says = FILES[name]
    spoil(copied)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_pretrained_model(copied, device="cpu")
    check(error, copied, file, says)


def test_a_tokenizer_that_names_no_end(copied: Path) -> None:
    (copied / SETTINGS).unlink()
    with pytest.raises(ValueError, match=r"names no bos_token: its tokenizer_config\.json is missing"):
        DeepseekVLV2Processor.from_pretrained(copied)


def test_without_a_processor_config_images_are_cut_as_the_model_was_trained(copied: Path) -> None:
    settings = json.loads((copied / PROCESSOR).read_text())
    assert len(settings["candidate_resolutions"]) > 1 or settings["patch_size"] != 16
    wide = Image.new("RGB", (900, 300), "red")
    turns = [{"role": "user", "content": "<image>", "images": [wide]}]
    before = DeepseekVLV2Processor.from_pretrained(copied)(conversations=turns)
    (copied / PROCESSOR).unlink()
    after = DeepseekVLV2Processor.from_pretrained(copied)(conversations=turns)
    assert before["images_spatial_crop"].equal(after["images_spatial_crop"])
    assert before["input_ids"].equal(after["input_ids"])


def test_numbers_as_other_programs_write_them(copied: Path) -> None:
    change(copied, CONFIG, "language_config", rms_norm_eps="1e-06", n_group=0, routed_scaling_factor=2)
    config = check_config(copied, DeepseekVLV2Config.model_type)
    assert DeepseekVLV2Config.from_dict(config).language_config.rms_norm_eps == 1e-6
    assert Field(0, whole=False).allows(torch.tensor(0.5).numpy()[()]) and not Field().allows(float("nan"))
