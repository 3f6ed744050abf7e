"""What is no prompt, or no setting, gets one sentence from ``generate`` instead of an answer or a raw error."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor, generate_inputs
from deepseek_vl2.models.generate_inputs import check_finite_embeds
from deepseek_vl2.utils.demo import demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model


class Loaded:
    """The demo model with a text prompt and one with a picture."""

    model: DeepseekVLV2ForCausalLM
    processor: DeepseekVLV2Processor

    def __init__(self) -> None:
        _, self.processor, self.model = load_pretrained_model(demo_checkpoint(), device="cpu")
        image = Image.new("RGB", (64, 48), "red")
        self.text = self._inputs("hello")
        self.seen = self._inputs("<image>\nhello", images=[image])
        self.ids = self.text["input_ids"]

    def _inputs(self, content: str, **more: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": content, **more}, {"role": "assistant", "content": ""}]
        return dict(self.processor(conversations=turns, force_batchify=True))

    def generate(self, inputs: Any = None, **kwargs: Any) -> torch.Tensor:
        return self.model.generate(inputs, **{"max_new_tokens": 4, **kwargs})


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded()


def changed(inputs: dict[str, Any], name: str, change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return {**inputs, name: change(inputs[name])}


PROMPTS: dict[str, tuple[Callable[[Loaded], Any], str]] = {
    "a row": (lambda m: m.generate(m.ids[0]), r"\[rows, tokens\], got int64 of shape \[\d+\]"),
    "three dimensions": (lambda m: m.generate(m.ids[None]), r"\[rows, tokens\]"),
    "no rows": (lambda m: m.generate(m.ids[:0]), r"\[rows, tokens\]"),
    "a list": (lambda m: m.generate(m.ids.tolist()), "got list"),
    "an array": (lambda m: m.generate(m.ids.numpy()), "got ndarray"),
    "floats": (lambda m: m.generate(m.ids.float()), "whole numbers, got float32"),
    "a mask as ids": (lambda m: m.generate(m.ids.bool()), "whole numbers, got bool"),
    "no token": (lambda m: m.generate(torch.tensor([[10**6]])), "hold 1000000, which is no token"),
    "a negative id": (lambda m: m.generate(torch.tensor([[1, -100]])), "hold -100, which is no token"),
    "a text": (lambda m: m.generate("hello"), "not a text"),
    "the whole batch": (lambda m: m.generate(m.processor(text="hello")), r"generate\(\*\*inputs\)"),
    "flat embeddings": (lambda m: m.generate(inputs_embeds=torch.zeros(3, 64)), r"got float32 of shape \[3, 64\]"),
    "narrow embeddings": (lambda m: m.generate(inputs_embeds=torch.zeros(1, 3, 7)), r"\[rows, tokens, 64\]"),
    "embeddings of whole numbers": (
        lambda m: m.generate(inputs_embeds=torch.zeros(1, 3, 64, dtype=torch.long)),
        "floating point",
    ),
    "a short mask": (lambda m: m.generate(m.ids, attention_mask=torch.ones(1, 2)), "does not fit a prompt"),
    "a mask of one row": (lambda m: m.generate(m.ids.repeat(2, 1), attention_mask=m.ids > -1), "does not fit a prompt"),
    "a mask of text": (lambda m: m.generate(m.ids, attention_mask="x"), "attention_mask must be a tensor"),
    "images alone": (lambda m: m.generate(images=m.seen["images"]), "without input_ids"),
    "pixels alone": (lambda m: m.generate(pixel_values=m.seen["images"]), "without input_ids"),
    "images of bytes": (lambda m: m.generate(**changed(m.seen, "images", lambda x: x.byte())), "floating point"),
    "tilings as floats": (
        lambda m: m.generate(**changed(m.seen, "images_spatial_crop", lambda x: x.float())),
        "images_spatial_crop must be whole numbers",
    ),
    "images as an array": (lambda m: m.generate(**changed(m.seen, "images", lambda x: x.numpy())), "got ndarray"),
    "images as pictures": (lambda m: m.generate(**changed(m.seen, "images", lambda x: ["a.png"])), "got list"),
    "gray tiles": (lambda m: m.generate(**changed(m.seen, "images", lambda x: x[:, :, :1])), r"\[batch, tiles, 3, 384"),
    "a mask of images as a list": (
        lambda m: m.generate(**changed(m.seen, "images_seq_mask", lambda x: x.tolist())),
        "images_seq_mask must be a tensor",
    ),
    "tilings as a list": (
        lambda m: m.generate(**changed(m.seen, "images_spatial_crop", lambda x: x.tolist())),
        "images_spatial_crop must be a tensor",
    ),
    "tilings of one row": (
        lambda m: m.generate(**changed(m.seen, "images_spatial_crop", lambda x: x[0])),
        r"images_spatial_crop must be \[rows, images, 2\]",
    ),
    "tilings for a forward pass": (
        lambda m: m.model(**changed(m.seen, "images_spatial_crop", lambda x: x[..., :1])),
        r"images_spatial_crop must be \[rows, images, 2\]",
    ),
    "pixels as an array": (
        lambda m: m.generate(m.ids, pixel_values=m.seen["images"].numpy(), image_sizes=torch.tensor([[384, 384]])),
        "pixel_values must be a tensor",
    ),
    "gray pixels": (
        lambda m: m.generate(m.ids, pixel_values=m.seen["images"][:, :, :1], image_sizes=torch.tensor([[384, 384]])),
        r"pixel_values must be \[images, tiles, 3, 384, 384\]",
    ),
    "a mask of nothing": (lambda m: m.generate(**changed(m.seen, "attention_mask", torch.zeros_like)), "is empty"),
    "a text as cache": (lambda m: m.generate(m.ids, past_key_values="x"), "past_key_values must be a Cache"),
    "numbers as cache": (lambda m: m.generate(m.ids, past_key_values=((1, 2),)), "past_key_values must be a Cache"),
    "image tokens for the language model": (
        lambda m: m.model.language.generate(m.seen["input_ids"], max_new_tokens=2),
        "421 image tokens, which the language model alone does not see",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_no_prompt(loaded: Loaded, name: str, caplog: pytest.LogCaptureFixture) -> None:
    call, says = PROMPTS[name]
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=says) as error:
        call(loaded)
    assert "\n" not in str(error.value)
    assert not caplog.records, "the engine met it first"


PASSES: dict[str, tuple[Callable[[Loaded], Any], str]] = {
    "a row": (lambda m: m.model(m.ids[0]), r"\[rows, tokens\], got int64 of shape"),
    "a list": (lambda m: m.model(m.ids.tolist()), "got list"),
    "floats": (lambda m: m.model(m.ids.float()), "whole numbers, got float32"),
    "no tokens": (lambda m: m.model(m.ids[:, :0]), "There are no tokens"),
    "a text": (lambda m: m.model("hello"), r"not a text: model\(\*\*processor"),
    "the whole batch": (lambda m: m.model(m.processor(text="hello")), r"model\(\*\*inputs\)"),
    "embeddings as a list": (lambda m: m.model(inputs_embeds=[[0.0]]), "inputs_embeds must be"),
    "a short mask": (lambda m: m.model(m.ids, attention_mask=torch.ones(1, 2)), "does not fit a prompt"),
    "a mask of one row": (lambda m: m.model(m.ids.repeat(2, 1), attention_mask=m.ids > -1), "does not fit a prompt"),
    "labels of another length": (lambda m: m.model(m.ids, labels=m.ids[:, 1:]), "labels .* do not fit a prompt"),
    "labels of a row": (lambda m: m.model(m.ids, labels=m.ids[0]), "labels .* do not fit a prompt"),
    "labels of floats": (lambda m: m.model(m.ids, labels=m.ids.float()), "labels must be token ids, or -100"),
}


@pytest.mark.parametrize("part", ["whole", "language"])
@pytest.mark.parametrize("name", PASSES)
def test_what_is_no_input_of_a_forward_pass(loaded: Loaded, name: str, part: str) -> None:
    call, says = PASSES[name]
    one = copy.copy(loaded)
    one.model = loaded.model if part == "whole" else loaded.model.language  # type: ignore[assignment]
    with pytest.raises(ValueError, match=says) as error:
        call(one)
    assert "\n" not in str(error.value)


def test_a_mask_may_cover_what_a_cache_holds(loaded: Loaded) -> None:
    first = loaded.model(loaded.ids, use_cache=True)
    longer = torch.ones(1, loaded.ids.shape[1] + 1, dtype=torch.long)
    loaded.model(loaded.ids[:, -1:], attention_mask=longer, past_key_values=first.past_key_values)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": "4"}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": -2}, "num_beams"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"pad_token_id": "x"}, "pad_token_id"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": ""}, "stop_strings"),
        ({"generation_config": {"max_new_tokens": 3}}, "GenerationConfig"),
        ({"top_p": 1.5, "do_sample": True}, "top_p must be a number of at least 0 and at most 1"),
        ({"top_p": "x", "do_sample": True}, "top_p"),
        ({"typical_p": 2.0, "do_sample": True}, "typical_p"),
        ({"streamer": "x"}, "streamer must have put and end"),
    ],
)
def test_what_is_no_setting(loaded: Loaded, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        loaded.generate(**{**loaded.text, **settings})


def test_settings_of_other_kinds_that_mean_the_same(loaded: Loaded) -> None:
    plain = loaded.generate(**loaded.text)
    config = GenerationConfig(max_new_tokens=4, eos_token_id=[257], pad_token_id=257)
    assert loaded.model.generate(**loaded.text, generation_config=config).equal(plain)
    assert loaded.generate(**loaded.text, eos_token_id=torch.tensor([257]), max_new_tokens=np.int64(4)).equal(plain)
    assert loaded.generate(loaded.ids.int()).equal(plain)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_stop_strings_end_an_answer(loaded: Loaded, settings: dict[str, Any]) -> None:
    tokenizer = loaded.processor.tokenizer
    start = loaded.ids.shape[1]
    long = loaded.generate(**loaded.text, max_new_tokens=12, **settings)[0, start:].tolist()
    texts = [tokenizer.decode([token]) for token in long]
    stop = next(text for text in texts[1:] if text.isprintable() and text.isascii())
    found = loaded.generate(**loaded.text, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer, **settings)[
        0, start:
    ].tolist()
    assert stop in tokenizer.decode(found)
    if not settings.get("num_beams"):
        assert found == long[: texts.index(stop) + 1]


def test_a_mask_that_hides_a_part_of_an_image_is_one_for_all_ways_to_decode(loaded: Loaded) -> None:
    hidden = changed(loaded.seen, "attention_mask", lambda mask: mask.clone().index_fill(1, torch.arange(3, 40), False))
    on_the_engine = loaded.generate(**hidden)
    assert on_the_engine.equal(loaded.generate(**hidden, use_cache=False))


# ---------------------------------------------------------------- what is no number


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["whole", "language", "chunks"])
def test_embeddings_that_are_no_numbers(loaded: Loaded, part: str, value: float) -> None:
    """Any answer to them would be noise: all logits are NaN, of which the first token is the likeliest."""
    embeds = loaded.model.prepare_inputs_embeds(**{k: v for k, v in loaded.seen.items() if k != "attention_mask"})
    embeds[0, 5, 3] = value
    mask = loaded.seen["attention_mask"]
    with pytest.raises(ValueError, match="inputs_embeds hold NaN or infinity, first at token 5 of row 0"):
        if part == "chunks":
            loaded.model.incremental_prefilling(inputs_embeds=embeds, attention_mask=mask, chunk_size=8)
        else:
            model = loaded.model if part == "whole" else loaded.model.language
            model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tiles_that_are_no_numbers(loaded: Loaded, value: float) -> None:
    def spoil(images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        images[0, 1, 2, 7, 7] = value
        return images

    broken = changed(loaded.seen, "images", spoil)
    for call in (loaded.generate, loaded.model.prepare_inputs_embeds):
        with pytest.raises(ValueError, match="images hold NaN or infinity, first in tile 1 of row 0"):
            call(**broken)


def test_what_nobody_reads_may_be_anything(loaded: Loaded) -> None:
    """Tiles behind a row's own, and embeddings of padding."""
    whole = loaded.generate(**loaded.seen)
    filled = changed(loaded.seen, "images", lambda i: torch.cat((i, torch.full_like(i[:, :1], float("nan"))), dim=1))
    assert torch.equal(loaded.generate(**filled), whole)
    check_finite_embeds(torch.tensor([[[float("nan")], [1.0]]]), torch.tensor([[0, 1]]))


def test_a_training_step_does_not_look(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a value that is no number shows in the loss, and a look at one would wait for the device at every step."""
    monkeypatch.setattr(generate_inputs, "_finite_rows", lambda values: pytest.fail("looked"))
    loaded.model(**{name: value for name, value in loaded.seen.items() if name != "sft_format"})
