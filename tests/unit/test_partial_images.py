"""A prompt with image tokens needs all of its images: no way into the model answers without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from support import GREEDY, MINI_IMAGE_ID, mini_inputs, mini_model
from transformers import AutoModelForCausalLM

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.modeling_deepseek_vl_v2 import IMAGE_INPUTS
from deepseek_vl2.utils.demo import write_demo_checkpoint

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def model() -> DeepseekVLV2ForCausalLM:
    model = mini_model("base")
    model.config.image_token_id = MINI_IMAGE_ID
    return model


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return mini_inputs([3, (2, 1), 2])


def ways_in(model: DeepseekVLV2ForCausalLM) -> dict[str, Call]:
    return {
        "forward": lambda **kw: model(**kw),
        "forward in training": lambda **kw: model.train()(**kw, labels=kw["input_ids"]),
        "forward with an empty cache": lambda **kw: model(**kw, use_cache=True),
        "generate": lambda **kw: model.generate(**kw, **GREEDY),
        "generate, ids by position": lambda input_ids, **kw: model.generate(input_ids, **kw, **GREEDY),
        "beams": lambda **kw: model.generate(**kw, **GREEDY, num_beams=2),
        "generate in chunks": lambda **kw: model.generate(**kw, **GREEDY, prefill_chunk_size=8),
        "generate without a cache": lambda **kw: model.generate(**kw, **GREEDY, use_cache=False),
        "incremental_prefilling": lambda **kw: model.incremental_prefilling(**kw),
        "prepare_inputs_embeds": lambda **kw: model.prepare_inputs_embeds(**kw),
    }


WAYS = list(ways_in(None))  # type: ignore[arg-type]
PARTS = [names for n in range(3) for names in combinations(IMAGE_INPUTS, n)]


@pytest.mark.parametrize("given", PARTS, ids=lambda names: "+".join(names) or "ids alone")
@pytest.mark.parametrize("way", WAYS)
def test_a_part_of_the_images_inputs_is_an_error(
    model: DeepseekVLV2ForCausalLM, inputs: dict[str, torch.Tensor], way: str, given: tuple[str, ...]
) -> None:
    part = {name: inputs[name] for name in ("input_ids", *given)}
    missing = [name for name in IMAGE_INPUTS if name not in given]
    try:
        with pytest.raises(ValueError) as error:
            ways_in(model)[way](**part)
    finally:
        model.eval()
    assert "image tokens" in str(error.value)
    assert all(name in str(error.value) for name in missing)


def test_a_row_of_the_batch_with_image_tokens_is_enough(
    model: DeepseekVLV2ForCausalLM, inputs: dict[str, torch.Tensor]
) -> None:
    text = torch.full_like(inputs["input_ids"], 5)
    with pytest.raises(ValueError, match="34 image tokens"):
        model(torch.cat((text, inputs["input_ids"])))


def test_images_without_their_crops_are_an_error_in_a_text_prompt_too(model: DeepseekVLV2ForCausalLM) -> None:
    text, tile = torch.tensor([[5, 6, 7]]), torch.zeros(1, 1, 3, 70, 70)
    with pytest.raises(ValueError, match="images_spatial_crop"):
        model(text, images=tile)
    with pytest.raises(ValueError, match="images_spatial_crop"):
        model.generate(text, images=tile, **GREEDY)
    with pytest.raises(ValueError, match="images and images_seq_mask are missing"):
        model(text, images_spatial_crop=torch.tensor([[[1, 1]]]))


def test_text_needs_no_images(model: DeepseekVLV2ForCausalLM) -> None:
    text = torch.tensor([[5, 6, 7]])
    empty = {
        "images": torch.zeros(1, 1, 3, 70, 70),
        "images_seq_mask": torch.zeros(1, 3, dtype=torch.bool),
        "images_spatial_crop": torch.zeros(1, 1, 2, dtype=torch.long),
    }
    assert torch.equal(model(text).logits, model(text, **empty).logits)
    assert torch.equal(model.generate(text, **GREEDY), model.generate(text, **empty, **GREEDY))


def test_a_further_turn_may_have_its_images_in_the_cache(
    model: DeepseekVLV2ForCausalLM, inputs: dict[str, torch.Tensor]
) -> None:
    settings = {**GREEDY, "return_dict_in_generate": True}
    first = model.generate(**inputs, **settings)
    again = torch.cat((first.sequences, torch.tensor([[7, 8]])), dim=1)
    out = model.generate(again, past_key_values=first.past_key_values, **GREEDY)
    assert out.shape[1] == again.shape[1] + GREEDY["max_new_tokens"]
    more = torch.cat((out, torch.full((1, 34), MINI_IMAGE_ID)), dim=1)
    with pytest.raises(ValueError, match="34 image tokens"):
        model.generate(more, past_key_values=first.past_key_values, **GREEDY)


def test_a_chunk_with_image_tokens_behind_a_cache_is_an_error(
    model: DeepseekVLV2ForCausalLM, inputs: dict[str, torch.Tensor]
) -> None:
    cache = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="34 image tokens"):
        model(inputs["input_ids"], past_key_values=cache)


def test_an_image_id_that_the_model_says_itself_is_no_error(
    model: DeepseekVLV2ForCausalLM, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "image_token_id", int(model.generate(torch.tensor([[5, 6]]), **GREEDY)[0, 2]))
    for settings in ({}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        assert model.generate(torch.tensor([[5, 6]]), **GREEDY, **settings).shape == (1, 10)


@pytest.mark.parametrize("name", ["pixel_values", "image", "image_seq_mask", "cropping", "token_type_ids"])
def test_an_unknown_keyword_of_forward_is_a_type_error(
    model: DeepseekVLV2ForCausalLM, inputs: dict[str, torch.Tensor], name: str
) -> None:
    with pytest.raises(TypeError, match=name):
        model(**inputs, **{name: inputs["images"]})


def test_pixel_values_are_pointed_to_their_name_here(model: DeepseekVLV2ForCausalLM) -> None:
    with pytest.raises(TypeError, match="images, images_seq_mask and images_spatial_crop"):
        model(torch.tensor([[5, MINI_IMAGE_ID]]), pixel_values=torch.zeros(1, 3, 70, 70))


def test_generate_refuses_unknown_keywords_too(model: DeepseekVLV2ForCausalLM) -> None:
    with pytest.raises((TypeError, ValueError), match="pixel_values"):
        model.generate(torch.tensor([[5, 6]]), pixel_values=torch.zeros(1, 3, 70, 70), **GREEDY)


def test_a_processors_batch_goes_in_whole(model: DeepseekVLV2ForCausalLM, inputs: dict[str, torch.Tensor]) -> None:
    extra = {"sft_format": ["a"], "seq_lens": [39], "num_image_tokens": [34], "target_ids": inputs["input_ids"]}
    assert torch.equal(model(**inputs, **extra).logits, model(**inputs).logits)


# ---------------------------------------------------------------- where the id comes from


@pytest.mark.parametrize(("vocabulary", "image_id"), [(129280, 128815), (102400, 100003), (4000, None)])
def test_a_release_without_the_id_is_known_by_its_embedding_size(vocabulary: int, image_id: int | None) -> None:
    config = DeepseekVLV2Config(
        vision_config={"width": 8, "layers": 1, "heads": 1, "patch_size": 14, "image_size": 70},
        language_config={
            "vocab_size": vocabulary, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "use_mla": False, "q_lora_rank": None,
        },
    )  # fmt: skip
    assert config.image_token_id is None
    with torch.device("meta"):
        assert DeepseekVLV2ForCausalLM(config).config.image_token_id == image_id


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("demo"))


def drop_id(checkpoint: Path, target: Path) -> Path:
    shutil.copytree(checkpoint, target)
    config = json.loads((target / "config.json").read_text())
    config.pop("image_token_id", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("load", [DeepseekVLV2ForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_the_id_is_read_from_the_tokenizers_files(checkpoint: Path, tmp_path: Path, load: Call, file: str) -> None:
    directory = drop_id(checkpoint, tmp_path / "checkpoint")
    if file == "tokenizer_config.json":
        added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
        settings = json.loads((directory / file).read_text())
        settings["added_tokens_decoder"] = {str(token["id"]): token for token in added}
        (directory / file).write_text(json.dumps(settings))
        (directory / "tokenizer.json").unlink()
    assert load(directory).config.image_token_id == 259


def test_the_id_is_saved(checkpoint: Path, tmp_path: Path) -> None:
    assert json.loads((checkpoint / "config.json").read_text())["image_token_id"] == 259
    model = DeepseekVLV2ForCausalLM.from_pretrained(drop_id(checkpoint, tmp_path / "checkpoint"))
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["image_token_id"] == 259


def test_an_id_in_the_config_is_believed(checkpoint: Path, tmp_path: Path) -> None:
    directory = drop_id(checkpoint, tmp_path / "checkpoint")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "image_token_id": 7}))
    assert DeepseekVLV2ForCausalLM.from_pretrained(directory).config.image_token_id == 7
