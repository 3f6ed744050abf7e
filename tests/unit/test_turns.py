"""One walk over the turns: what is printed, encoded, rendered by the chat template and checked for training agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import CASES, MINI_TILE, case_inputs, mini_processor, noise_image

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.messages import CHAT_TEMPLATE, escape_tags
from deepseek_vl2.training.data import ConversationDataset

Processor = DeepseekVLV2Processor
Messages = list[dict[str, Any]]
PROCESSOR = mini_processor()
PICTURE = noise_image(1)
NAMES = {"user": ("user", "User", "<|User|>"), "assistant": ("assistant", "Assistant", "<|Assistant|>")}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


# ---------------------------------------------------------------- what is printed is what is tokenized


@pytest.mark.parametrize("case", [name for name in CASES if "conversation" in CASES[name]])
def test_a_printed_golden_case_gives_the_same_ids(processor: Processor, case: str) -> None:
    if any(message["role"] == "system" for message in CASES[case]["conversation"]):
        pytest.skip("a system message is printed as the original prints it")
    inputs = case_inputs(CASES[case])
    want = processor(**inputs)
    got = processor(text=want.sft_format[0], images=inputs["images"])
    assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.images_seq_mask, want.images_seq_mask)


@pytest.mark.parametrize("asks", NAMES["user"])
@pytest.mark.parametrize("says", NAMES["assistant"])
def test_the_spelling_of_roles_changes_neither_ids_nor_print(asks: str, says: str) -> None:
    def process(user: str, assistant: str) -> Any:
        turns = [turn(user, "<image>\nhi "), turn(assistant, " well\n"), turn(user, "more"), turn(assistant, "")]
        return PROCESSOR(conversations=turns, images=[PICTURE])

    want, got = process("<|User|>", "<|Assistant|>"), process(asks, says)
    assert torch.equal(got.input_ids, want.input_ids) and got.sft_format == want.sft_format
    eos = PROCESSOR.tokenizer.eos_token
    assert got.sft_format == [f"<|User|>: <image>\nhi\n\n<|Assistant|>: well{eos}<|User|>: more\n\n<|Assistant|>:"]


def test_a_system_message_keeps_its_printed_form_beside_any_spelling() -> None:
    eos = PROCESSOR.tokenizer.eos_token
    for user, assistant in (("user", "assistant"), ("<|User|>", "<|Assistant|>")):
        turns = [turn("system", "Be brief."), turn(user, "hi"), turn(assistant, "")]
        printed = PROCESSOR(conversations=turns).sft_format[0]
        assert printed == f"system: Be brief.\n\n<|User|>: hi{eos}<|Assistant|>:"


ODD: dict[str, Messages] = {
    "two questions": [turn("user", "a"), turn("user", "b")],
    "two answers": [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"), turn("user", "d")],
    "an answer first": [turn("assistant", "a"), turn("user", "b")],
    "an empty question": [turn("user", ""), turn("assistant", "")],
    "an empty answer between": [turn("user", "a"), turn("assistant", ""), turn("user", "b")],
    "ends with an answer": [turn("user", "a"), turn("assistant", "b")],
    "an answer with the tag's colon": [turn("user", "a: b"), turn("assistant", ": c"), turn("user", "d")],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_conversations_are_printed_as_they_are_tokenized(name: str) -> None:
    want = PROCESSOR(conversations=ODD[name])
    assert torch.equal(PROCESSOR(text=want.sft_format[0]).input_ids, want.input_ids)


@pytest.mark.parametrize("system_prompt", ["", "Be brief."])
def test_a_system_prompt_is_printed_as_tokenized(system_prompt: str) -> None:
    want = PROCESSOR(conversations=[turn("user", "hi")], system_prompt=system_prompt)
    assert torch.equal(PROCESSOR(text=want.sft_format[0]).input_ids, want.input_ids)


def test_without_a_generation_prompt_none_is_printed() -> None:
    out = PROCESSOR.apply_chat_template([turn("user", "hi")], tokenize=True, return_dict=True)
    assert out.sft_format == ["<|User|>: hi\n\n"]
    assert torch.equal(PROCESSOR(text=out.sft_format[0]).input_ids, out.input_ids)


def test_a_rendered_answer_keeps_its_end_for_training() -> None:
    text = PROCESSOR.apply_chat_template([turn("user", "hi"), turn("assistant", "a")], tokenize=False)
    assert PROCESSOR(text=text).input_ids[0, -1] == PROCESSOR.eos_id


# ---------------------------------------------------------------- the template


TEXT = st.text(alphabet=st.sampled_from(list("aB 1\n:,<>|é🦒")), max_size=6) | st.sampled_from(
    ["<image>", "see <image> there", "<image_placeholder>", "<|ref|>a<|/ref|>", "", " "]
)
PART = st.one_of(TEXT.map(lambda text: {"type": "text", "text": text}), st.just({"type": "image", "image": PICTURE}))


def messages_of(roles: list[str], contents: list[list[dict[str, Any]]]) -> Messages:
    return [
        turn(role, [part for part in content if part["type"] == "text" or role in NAMES["user"]])
        for role, content in zip(roles, contents, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    roles=st.lists(st.sampled_from(sorted(sum(NAMES.values(), ()))), min_size=1, max_size=4),
    contents=st.lists(st.lists(PART, max_size=3), min_size=4, max_size=4),
    system=st.booleans(),
    prompt=st.booleans(),
)
def test_the_jinja_template_writes_what_the_walk_writes(
    roles: list[str], contents: list[list[dict[str, Any]]], system: bool, prompt: bool
) -> None:
    messages = messages_of(roles, contents[: len(roles)])
    if system:
        messages.insert(0, turn("system", "Be brief."))
    ours = PROCESSOR.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    theirs = PROCESSOR.tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=prompt, tokenize=False
    )
    assert ours == theirs
    tensors = PROCESSOR.apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=True, cropping=False
    )
    images = [part["image"] for message in messages if not isinstance(message["content"], str)
              for part in message["content"] if part["type"] == "image"]  # fmt: skip
    again = PROCESSOR(text=ours, images=images, cropping=False, inference_mode=False)
    assert torch.equal(again.input_ids, tensors.input_ids)
    shown = int((tensors.input_ids == PROCESSOR.image_token_id).sum())
    assert shown == int(tensors.images_seq_mask.sum()) == 25 * len(images)


# ---------------------------------------------------------------- tags that are text


@pytest.mark.parametrize("tag", ["<image>", "<image_placeholder>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_tag_in_a_text_part_is_text(processor: Processor, role: str, tag: str) -> None:
    said = f"What does {tag} mean, {tag}{tag}?"
    messages = [turn("user", [{"type": "image", "image": PICTURE}, {"type": "text", "text": said}])]
    if role != "user":
        messages = [turn(role, [{"type": "text", "text": said}]), turn("user", [{"type": "image", "image": PICTURE}])]
    if role == "assistant":
        messages.insert(0, turn("user", "hi"))
    for got in (
        processor(conversations=messages),
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True),
        processor(text=processor.apply_chat_template(messages, add_generation_prompt=True), images=[PICTURE]),
    ):
        ids = got.input_ids[0]
        marked = ids == processor.image_token_id
        assert int(marked.sum()) == 421 and torch.equal(marked, got.images_seq_mask[0])
        assert said in processor.decode(ids[~marked])
    if role != "system":
        printed = processor(conversations=messages).sft_format[0]
        assert torch.equal(processor(text=printed, images=[PICTURE]).input_ids, got.input_ids)


def test_a_tag_that_is_text_is_tokenized_by_its_letters(processor: Processor) -> None:
    ids = processor.encode(escape_tags("a <image> b"), bos=False)
    assert processor.image_token_id not in ids and processor.decode(ids) == "a <image> b"


def test_images_are_shared_out_by_tags_that_show_some() -> None:
    first = [turn("user", [{"type": "text", "text": "What is <image>?"}])]
    second = [turn("user", "<image>\nWhat?")]
    batch = PROCESSOR(conversations=[first, second], images=[PICTURE])
    assert batch.images_spatial_crop.tolist() == [[[0, 0]], [[1, 1]]]


def test_plain_contents_keep_their_rules() -> None:
    for role in ("assistant", "system"):
        with pytest.raises(ValueError, match="<image>"):
            PROCESSOR(conversations=[turn(role, "<image>"), turn("user", "hi")], images=[PICTURE])
    with pytest.raises(ValueError, match="1 <image>"):
        PROCESSOR(conversations=[turn("user", "<image>")], images=[])


# ---------------------------------------------------------------- training


def test_training_data_follow_the_same_rules(tmp_path: Path) -> None:
    Image.new("RGB", (MINI_TILE, MINI_TILE)).save(tmp_path / "a.png")
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What does <image> mean?"}]
    lines = [
        [turn("user", parts), turn("assistant", [{"type": "text", "text": "<image> is a tag."}])],
        [turn("<|User|>", "hi"), turn("Assistant", "<image>")],
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = ConversationDataset(tmp_path / "data.jsonl")
    sample = data[0]
    out = PROCESSOR(conversations=sample["conversation"], images=sample["images"], inference_mode=False)
    assert int((out.input_ids == PROCESSOR.image_token_id).sum()) == 25
    with pytest.raises(ValueError, match=r"line 2: message 2 is the assistant's \('Assistant'\) and holds <image>"):
        data[1]
