"""Batches under transformers' names: what they hold, that models take them, and that they say the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from support import mini_model, mini_processor, noise_image

from deepseek_vl2.models.batch import BatchCollateOutput
from deepseek_vl2.models.messages import CHAT_TEMPLATE, is_own_template
from deepseek_vl2.models.processing_deepseek_vl_v2 import StandardBatch

PROCESSOR = mini_processor()
MODEL = mini_model("base")
MODEL.config.image_token_id = PROCESSOR.image_token_id
ORIGINAL = ("input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop", "labels")
COUNTS = [1, 0, 2]  # pictures of three conversations


def user(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ],
    }


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def conversations() -> list[list[dict[str, Any]]]:
    pictures = [noise_image(1), noise_image(2, 150, 70), noise_image(3)]
    return [[user(pictures[0], "What?")], [user("Nothing to see")], [user(*pictures[1:], "Which is larger?")]]


def standard(**options: Any) -> StandardBatch:
    return PROCESSOR.apply_chat_template(
        conversations(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def original() -> BatchCollateOutput:
    return PROCESSOR(conversations=conversations())


def test_it_holds_tensors_under_transformers_names() -> None:
    batch = standard()
    assert list(batch) == ["input_ids", "attention_mask", "pixel_values", "image_sizes"]
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    assert batch["attention_mask"].dtype == torch.int64
    assert batch["pixel_values"].shape[0] == len(batch["image_sizes"]) == sum(COUNTS)
    assert batch["image_sizes"].tolist() == [[70, 70], [70, 210], [70, 70]]  # height, width
    assert list(PROCESSOR(text="hi", return_tensors="pt")) == ["input_ids", "attention_mask"]


def test_the_originals_fields_are_read_by_name() -> None:
    batch, want = standard(), original()
    for name in ORIGINAL:
        assert torch.equal(batch[name], want[name]), name
        assert torch.equal(getattr(batch, name), want[name]), name
    assert batch.sft_format == want.sft_format and batch.seq_lens == want.seq_lens
    assert "images" not in batch and "sft_format" not in dict(batch)
    with pytest.raises(AttributeError):
        batch.pictures  # noqa: B018
    blank = PROCESSOR(text=["hi", "you"])
    assert blank.images.shape == (2, 1, 3, 70, 70) and not blank.images_spatial_crop.any()


def test_it_is_moved_pickled_and_copied_whole() -> None:
    want = original()
    for batch in (pickle.loads(pickle.dumps(standard())), copy.copy(standard()), standard().to("cpu")):
        assert torch.equal(batch.images, want.images) and torch.equal(batch.labels, want.labels)
    assert standard().to(torch.float64).pixel_values.dtype == torch.float64
    assert standard().to("meta").labels.device.type == "meta"


@pytest.mark.parametrize("gone", ["input_ids", "attention_mask", "pixel_values", "image_sizes"])
def test_a_field_that_was_taken_out_is_gone(gone: str) -> None:
    batch = PROCESSOR(text="<image>\nhi", images=[noise_image(1)])
    batch.pop(gone)
    assert gone not in batch and not hasattr(batch, gone)
    for name in ("images", "images_seq_mask", "images_spatial_crop", "seq_lens"):
        getattr(batch, name, None)  # an AttributeError at most


def test_the_model_takes_either_names() -> None:
    batch, want = standard(), original()
    with torch.no_grad():
        assert torch.equal(MODEL(**batch).logits, MODEL(**want).logits)
        assert torch.equal(MODEL.prepare_inputs_embeds(**batch), MODEL.prepare_inputs_embeds(**want))
        embeds, cache = MODEL.incremental_prefilling(**batch, chunk_size=16)
    assert cache.get_seq_length() == embeds.shape[1] - 1
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(MODEL.generate(**batch, **options), MODEL.generate(**want, **options))
    assert torch.equal(MODEL.generate(**batch, **options, num_beams=2), MODEL.generate(**want, **options, num_beams=2))


def test_the_body_gives_hidden_states_without_logits() -> None:
    batch = standard()
    with torch.no_grad():
        whole, body = MODEL(**batch), MODEL.base_model(**batch)
    assert body.logits is None and torch.equal(body.last_hidden_state, whole.last_hidden_state)
    assert not list(MODEL.base_model.parameters())
    assert not MODEL.supports_pp_plan and MODEL.get_encoder("image") is MODEL


def broken(**changes: Any) -> dict[str, Any]:
    return {**standard(), **changes}


WRONG = {
    "pixel_values without sizes": (lambda: broken(image_sizes=None), "image_sizes is missing"),
    "sizes without pixel_values": (lambda: broken(pixel_values=None), "pixel_values is missing"),
    "too few images": (
        lambda: broken(pixel_values=standard().pixel_values[:2], image_sizes=standard().image_sizes[:2]),
        "do not match: row 2",
    ),
    "too many images": (lambda: {**PROCESSOR(text="hi"), **only_images()}, "the prompts show 0 images"),
    "a size that is not of whole tiles": (lambda: broken(image_sizes=torch.tensor([[70, 71]] * 3)), r"\[70, 71\]"),
    "sizes of other images": (lambda: broken(image_sizes=torch.tensor([[140, 210]] * 3)), "asks for 7 tiles"),
    "tiles of another size": (lambda: broken(pixel_values=torch.zeros(3, 2, 3, 9, 9)), r"\[3, 2, 3, 9, 9\]"),
    "one size too few": (lambda: broken(image_sizes=torch.tensor([[70, 70]])), r"\[3, 2\]"),
    "both names": (lambda: broken(images=original().images), "or as pixel_values: not both"),
}


def only_images() -> dict[str, Any]:
    return {name: standard()[name] for name in ("pixel_values", "image_sizes")}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_belong_together_is_named(case: str) -> None:
    make, message = WRONG[case]
    for call in (MODEL, MODEL.generate, MODEL.prepare_inputs_embeds):
        with pytest.raises((TypeError, ValueError), match=message):
            call(**make())


def test_rows_without_padding_are_lists() -> None:
    strict = mini_processor()
    strict.transformers_defaults = True
    want = original()
    rows = [ids[mask].tolist() for ids, mask in zip(want.input_ids, want.attention_mask, strict=True)]
    texts = PROCESSOR.apply_chat_template(conversations(), add_generation_prompt=True)
    for batch in (
        PROCESSOR.apply_chat_template(
            conversations(), add_generation_prompt=True, tokenize=True, return_dict=True, padding=False
        ),
        strict.apply_chat_template(conversations(), add_generation_prompt=True, tokenize=True, return_dict=True),
        strict(text=texts, images=[want_images for want_images in pictures_of_rows()]),
    ):
        assert batch["input_ids"] == rows and batch["attention_mask"] == [[1] * len(row) for row in rows]
        assert torch.equal(batch["pixel_values"], standard()["pixel_values"])
    padded = strict.apply_chat_template(
        conversations(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    assert isinstance(padded.input_ids, np.ndarray) and padded.input_ids.shape == want.input_ids.shape
    assert "transformers_defaults" in strict.to_dict() and "transformers_defaults" not in PROCESSOR.to_dict()


def pictures_of_rows() -> list[list[Any]]:
    return [[p["image"] for p in row[0]["content"] if p["type"] == "image"] for row in conversations()]


def test_special_tokens_are_added_or_not() -> None:
    end = PROCESSOR.tokenizer.eos_token
    completion = PROCESSOR(text=f"It is red{end}", add_special_tokens=False, return_tensors="pt")
    assert completion.input_ids[0].tolist() == [*PROCESSOR.encode("It is red", bos=False), PROCESSOR.eos_id]
    bos = PROCESSOR.tokenizer.bos_token
    printed = f"<|User|>: hi\n\n<|Assistant|>: you{end}"
    whole = PROCESSOR(text=bos + printed, add_special_tokens=False).input_ids[0].tolist()
    assert whole[0] == PROCESSOR.bos_id and whole[-1] == PROCESSOR.eos_id
    assert PROCESSOR(text=printed).input_ids[0].tolist() == whole[:-1]
    with pytest.raises(ValueError, match="belongs to text"):
        PROCESSOR(prompt="hi", add_special_tokens=False)


# ---------------------------------------------------------------- which tokens are answers


DIALOGUE = [user(noise_image(1), "What?"), assistant("A cat"), user("And?"), assistant("No <image_placeholder> dog")]
OTHER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|User|>: "
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}\n\n"
    "<|Assistant|>:{% else %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


def masked(messages: Any, **options: Any) -> list[int]:
    batch = PROCESSOR.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt", **options
    )
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    return batch["input_ids"][batch["assistant_masks"] == 1].tolist()


def test_the_tokens_of_answers_are_marked() -> None:
    dialogue = [*DIALOGUE[:3], assistant("No dog")]
    said = [id_ for text in ("A cat", "No dog") for id_ in [*PROCESSOR.encode(text, bos=False), PROCESSOR.eos_id]]
    assert masked(dialogue) == said
    assert masked(dialogue, chat_template=OTHER_TEMPLATE) == said
    assert masked(dialogue, continue_final_message=True) == said[:-1]
    assert masked([dialogue, [user("hi")]]) == said
    assert masked(dialogue[:3]) == said[: said.index(PROCESSOR.eos_id) + 1]
    keeps = mini_processor()
    keeps.mask_prompt = False
    batch = keeps.apply_chat_template(dialogue, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert int((batch.labels[0] != -100).sum()) == int((~batch.images_seq_mask[0]).sum())


def test_the_space_in_front_of_a_printed_answer_has_no_token_and_no_mark() -> None:
    printed = OTHER_TEMPLATE.replace("{% generation %}", "{% generation %}{{ ' ' }}")
    dialogue = [user("hi"), assistant("A cat"), user("And?"), assistant("No")]
    assert masked(dialogue, chat_template=printed) == masked(dialogue)


def test_marks_are_cut_with_the_tokens() -> None:
    dialogue = [user("hi"), assistant("A long answer")]
    whole = masked(dialogue)
    length = PROCESSOR.apply_chat_template(dialogue, tokenize=True).shape[1] - 4
    assert masked(dialogue, processor_kwargs={"truncation": True, "max_length": length}) == whole[:-4]


def test_the_same_marks_come_from_the_tokenizer() -> None:
    dialogue = [user("hi"), assistant("A cat"), user("And?"), assistant("No")]
    theirs = PROCESSOR.tokenizer.apply_chat_template(dialogue, return_dict=True, return_assistant_tokens_mask=True)
    assert masked(dialogue) == [
        id_ for id_, mark in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if mark
    ]


def test_tags_that_are_text_have_marks_too() -> None:
    template = OTHER_TEMPLATE.replace("part['text']", "part['text'] | replace('<image>', '<\u2060image>')")
    said = [user("see <image>"), assistant("<\u2060image>, yes")]
    assert masked(said, chat_template=template) == [
        *PROCESSOR.encode("<\u2060image>, yes", bos=False),
        PROCESSOR.eos_id,
    ]


def test_a_template_without_marks_is_refused() -> None:
    plain = OTHER_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match="marks answers"):
        masked([user("hi"), assistant("you")], chat_template=plain)


def test_a_template_saved_before_it_had_marks_is_todays() -> None:
    old = CHAT_TEMPLATE.replace("{%- generation -%}\n      ", "").replace("    {%- endgeneration -%}\n", "")
    assert "generation -%" not in old and is_own_template(old) and not is_own_template(OTHER_TEMPLATE)
    arguments = ([PROCESSOR.tokenizer], {**PROCESSOR.to_dict(), "chat_template": old})
    assert type(PROCESSOR).from_args_and_dict(*arguments).chat_template == CHAT_TEMPLATE


def test_keywords_that_nothing_knows_are_named() -> None:
    with pytest.warns(UserWarning, match="enable_thinking"):
        PROCESSOR.apply_chat_template([user("hi")], enable_thinking=True)
    with pytest.warns(UserWarning, match="do_pan_and_scan"):
        PROCESSOR.apply_chat_template([user("hi")], tokenize=True, processor_kwargs={"do_pan_and_scan": True})


def test_hints_of_packing_belong_to_positions() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    hints = {"cu_seq_lens_q": torch.tensor([0, 2, 4]), "max_length_q": 2, "seq_idx": torch.tensor([[0, 0, 1, 1]])}
    positions = torch.tensor([[0, 1, 0, 1]])
    with torch.no_grad():
        got = MODEL(ids, position_ids=positions, **hints).logits
        assert torch.equal(got, MODEL(ids, position_ids=positions).logits)
    with pytest.raises(TypeError, match="seq_idx"):
        MODEL(ids, **hints)
