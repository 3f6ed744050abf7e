"""The processor: conversations, prompts, batches, tiling overrides, errors, saving and loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import CASES, GOLDEN, case_images, case_inputs, mini_processor
from transformers import AutoProcessor, PreTrainedTokenizerFast

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.image_processor import DeepseekVLV2ImageProcessor
from deepseek_vl2.models.processing_deepseek_vl_v2 import BatchCollateOutput, VLChatProcessorOutput

Processor = DeepseekVLV2Processor
Messages = list[dict[str, Any]]


def picture(width: int = 50, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 30, 60))


def user(text: str, role: str = "<|User|>") -> dict[str, Any]:
    return {"role": role, "content": text}


def answer(text: str = "", role: str = "<|Assistant|>") -> dict[str, Any]:
    return {"role": role, "content": text}


def ids_of(processor: Processor, conversation: Messages, *images: Image.Image, **settings: Any) -> list[int]:
    return processor(conversations=conversation, images=list(images), **settings).input_ids[0].tolist()


# ---------------------------------------------------------------- conversations


def test_turns_are_tagged_separated_and_ended(processor: Processor) -> None:
    got = ids_of(processor, [user(" hi "), answer(" hello "), user("more"), answer()])
    pieces = ["<|User|>: hi\n\n<|Assistant|>:", "hello", "<|User|>: more\n\n<|Assistant|>:"]
    first, reply, second = (processor.tokenizer.encode(piece, add_special_tokens=False) for piece in pieces)
    assert got == [0, *first, *reply, 1, *second]


@pytest.mark.parametrize(
    ("asks", "says"), [("user", "assistant"), ("User", "Assistant"), ("<|User|>", "<|Assistant|>")]
)
def test_roles_may_be_written_in_several_ways(processor: Processor, asks: str, says: str) -> None:
    want = ids_of(processor, [user("hi"), answer("hello"), user("more"), answer()])
    assert ids_of(processor, [user("hi", asks), answer("hello", says), user("more", asks), answer("", says)]) == want


def test_a_conversation_that_ends_with_the_user_asks_for_the_answer(processor: Processor) -> None:
    with_empty, without = [user("hi"), answer()], [user("hi")]
    assert ids_of(processor, without) == ids_of(processor, with_empty)
    shown = [processor(conversations=c).sft_format for c in (with_empty, without)]
    assert shown[0] == shown[1] == ["<|User|>: hi\n\n<|Assistant|>:"]


@pytest.mark.parametrize("role", ["system", "deepseekapi-sys"])
def test_a_system_message_stands_right_after_bos(processor: Processor, role: str) -> None:
    system = processor.tokenizer.encode("Be brief.", add_special_tokens=False)
    got = ids_of(processor, [{"role": role, "content": " Be brief. "}, user("hi"), answer()])
    assert got == [0, *system, *ids_of(processor, [user("hi"), answer()])[1:]]


def test_a_system_prompt_is_tokenized_as_a_leading_system_message(processor: Processor) -> None:
    conversation = [user("hi"), answer()]
    want = ids_of(processor, [{"role": "system", "content": "Be brief."}, *conversation])
    batch = processor(conversations=conversation, system_prompt="Be brief.")
    assert batch.input_ids[0].tolist() == want
    assert batch.sft_format == ["Be brief.<|User|>: hi\n\n<|Assistant|>:"]


def test_an_empty_system_prompt_is_none(processor: Processor) -> None:
    conversation = [user("hi"), answer()]
    assert ids_of(processor, conversation, system_prompt="") == ids_of(processor, conversation)


def test_the_cards_older_image_tag_is_understood(processor: Processor) -> None:
    old, new = ([user(f"{tag}\nWhat?"), answer()] for tag in ("<image_placeholder>", "<image>"))
    assert ids_of(processor, old, picture()) == ids_of(processor, new, picture())


def test_images_are_consumed_in_order_over_the_whole_conversation(processor: Processor) -> None:
    wide, tall = picture(900, 300), picture(300, 900)
    conversation = [user("<image>"), answer("a"), user("and <image>"), answer()]
    grids = [processor(conversations=conversation, images=i).images_spatial_crop for i in ([wide, tall], [tall, wide])]
    assert grids[0][0].tolist() == grids[1][0].flip(0).tolist() != grids[1][0].tolist()


def test_images_named_in_messages_are_loaded(processor: Processor) -> None:
    case = CASES["two_images"]
    messages = [
        {**m, "images": [str(GOLDEN / "images" / name) for name in m.get("images") or []]} for m in case["conversation"]
    ]
    got, want = processor(conversations=messages), processor(**case_inputs(case))
    assert torch.equal(got.images, want.images) and torch.equal(got.input_ids, want.input_ids)


def test_no_images_give_one_zero_image_and_a_zero_crop(processor: Processor) -> None:
    batch = processor(conversations=[user("hi"), answer()])
    assert batch.images.shape == (1, 1, 3, 384, 384) and not batch.images.any()
    assert batch.images_spatial_crop.tolist() == [[[0, 0]]]
    assert not batch.images_seq_mask.any()


# ---------------------------------------------------------------- labels


def test_position_zero_keeps_its_label_and_images_have_none(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mask_prompt in (True, False):
        monkeypatch.setattr(processor, "mask_prompt", mask_prompt)
        conversation = [user("<image>\nhi"), answer("hello")]
        sample = processor.process_one(conversations=conversation, images=[picture()], inference_mode=False)
        assert sample.target_ids[0] == 0
        assert set(sample.target_ids[sample.images_seq_mask].tolist()) == {-100}
        kept = sample.target_ids[sample.target_ids != -100].tolist()
        hello = processor.encode("hello", bos=False)
        assert kept[-len(hello) - 1 :] == [*hello, 1]
        assert (kept == [0, *hello, 1]) == mask_prompt


def test_a_system_message_is_masked_with_the_prompt(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "mask_prompt", True)
    conversation = [{"role": "system", "content": "Be brief."}, user("hi"), answer("hello")]
    sample = processor.process_one(conversations=conversation, inference_mode=False)
    assert sample.target_ids[sample.target_ids != -100].tolist() == [0, *processor.encode("hello", bos=False), 1]


# ---------------------------------------------------------------- prompts


def test_a_prompt_is_tokenized_as_it_is(processor: Processor) -> None:
    assert processor(prompt="  hi\n").input_ids[0].tolist() == processor.encode("  hi\n")
    assert processor(prompt="  hi\n").sft_format == ["  hi\n"]


def test_a_prompt_may_be_wrapped_as_one_user_turn(processor: Processor) -> None:
    got = processor(prompt=" <image>\nhi ", images=[picture()], apply_sft_format=True)
    want = processor(conversations=[user(" <image>\nhi "), answer()], images=[picture()])
    assert torch.equal(got.input_ids, want.input_ids) and got.sft_format == want.sft_format


def test_text_and_prompt_take_bos_once(processor: Processor) -> None:
    rendered = "<｜begin▁of▁sentence｜><|User|>: hi\n\n<|Assistant|>:"
    want = processor(conversations=[user("hi"), answer()]).input_ids
    assert torch.equal(processor(text=rendered).input_ids, want)
    assert torch.equal(processor(text=rendered.removeprefix("<｜begin▁of▁sentence｜>")).input_ids, want)


def test_encode_and_decode_are_inverse(processor: Processor) -> None:
    text = "Two words,  two spaces — naïve café 🦒\n\tend "
    assert processor.decode(processor.encode(text, bos=False)) == text
    assert processor.encode("hi", bos=True, eos=True) == [0, *processor.encode("hi", bos=False), 1]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(("tags", "images"), [(0, 1), (1, 0), (2, 1), (1, 3)])
def test_tags_and_images_that_differ_in_number_are_both_named(processor: Processor, tags: int, images: int) -> None:
    text, pictures = "<image>" * tags + "hi", [picture()] * images
    with pytest.raises(ValueError, match=rf"{tags} .*{images} "):
        processor(conversations=[user(text), answer()], images=pictures)
    with pytest.raises(ValueError, match=rf"{tags} .*{images} "):
        processor(prompt=text, images=pictures)
    with pytest.raises(ValueError, match=rf"{tags} .*{images} "):
        processor(text=text, images=pictures)
    with pytest.raises(ValueError, match=rf"{tags} .*{images} "):
        parts = [{"type": "text", "text": text}, *({"type": "image", "image": p} for p in pictures[:-1])]
        processor.apply_chat_template([{"role": "user", "content": text, "images": pictures}], tokenize=True) and parts


BAD_CONVERSATIONS: dict[str, tuple[Messages, str]] = {
    "image tag in an answer": ([user("hi"), answer("<image>")], "<image>"),
    "older image tag in an answer": ([user("hi"), answer("<image_placeholder>")], "image"),
    "image tag in a system message": ([{"role": "system", "content": "<image>"}, user("hi")], "<image>"),
    "unknown role": ([user("hi", "robot"), answer()], "robot"),
    "system message not first": ([user("hi"), {"role": "system", "content": "x"}, answer()], "[Ss]ystem"),
    "second system message": ([{"role": "system", "content": "x"}] * 2 + [user("hi")], "[Ss]ystem"),
    "nothing": ([], "no messages"),
}


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_a_bad_conversation_is_an_error(processor: Processor, name: str) -> None:
    conversation, says = BAD_CONVERSATIONS[name]
    with pytest.raises(ValueError, match=says):
        processor(conversations=conversation, images=[picture()] if "tag" in name else None)
    with pytest.raises(ValueError, match=says):
        processor.process_one(conversations=conversation, images=[picture()] if "tag" in name else None)


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_a_bad_conversation_is_an_error_in_the_chat_template_too(processor: Processor, name: str) -> None:
    with pytest.raises(ValueError, match=BAD_CONVERSATIONS[name][1]):
        processor.apply_chat_template(BAD_CONVERSATIONS[name][0], tokenize=True, return_dict=True)


@pytest.mark.parametrize("name", ["image tag in an answer", "unknown role", "system message not first"])
def test_rendering_a_bad_conversation_is_a_value_error(processor: Processor, name: str) -> None:
    with pytest.raises(ValueError):
        processor.apply_chat_template(BAD_CONVERSATIONS[name][0], tokenize=False)


def test_prompt_and_conversations_are_one_or_the_other(processor: Processor) -> None:
    conversation = [user("hi"), answer()]
    for call in (processor, processor.process_one):
        with pytest.raises(ValueError, match=r"prompt"):
            call(prompt="hi", conversations=conversation)
        with pytest.raises(ValueError, match=r"prompt"):
            call()


def test_a_system_prompt_and_a_system_message_are_one_too_many(processor: Processor) -> None:
    with pytest.raises(ValueError, match="system"):
        processor(conversations=[{"role": "system", "content": "x"}, user("hi")], system_prompt="y")


def test_an_unknown_template_is_an_error_when_built(processor: Processor) -> None:
    with pytest.raises(ValueError, match="chatty"):
        Processor(processor.tokenizer, sft_format="chatty")


@pytest.mark.parametrize("part", [{"type": "video", "video": "a.mp4"}, {"type": "image"}, {"text": "no type"}])
def test_a_content_part_that_cannot_be_used_is_an_error(processor: Processor, part: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)


def test_a_message_without_role_or_content_is_a_value_error(processor: Processor) -> None:
    for message in ({"content": "hi"}, {"role": "user"}):
        with pytest.raises(ValueError):
            processor(conversations=[message])


def test_lists_of_images_must_match_the_inputs(processor: Processor) -> None:
    conversation = [user("<image>"), answer()]
    with pytest.raises(ValueError, match=r"3 .*2"):
        processor(conversations=[conversation] * 2, images=[[picture()]] * 3)
    with pytest.raises(ValueError, match=r"2 .*3"):
        processor(conversations=[conversation] * 2, images=[picture()] * 3)


def test_other_tensors_than_pytorchs_are_refused(processor: Processor) -> None:
    with pytest.raises(ValueError, match="tf"):
        processor(prompt="hi", return_tensors="tf")


def test_an_empty_batch_is_an_error(processor: Processor) -> None:
    with pytest.raises(ValueError):
        processor.batchify([])


def test_a_tokenizer_that_loses_spaces_is_refused(tokenizer_dir: Path) -> None:
    from transformers import LlamaTokenizerFast

    broken = LlamaTokenizerFast.from_pretrained(tokenizer_dir)
    if broken.decode(broken.encode("two words", add_special_tokens=False)) == "two words":
        pytest.skip("this transformers loads the tokenizer whole")
    with pytest.raises(ValueError, match="spaces"):
        Processor(broken)


# ---------------------------------------------------------------- tiling


@pytest.mark.parametrize(("count", "tiles"), [(1, 7), (2, 14), (3, 6), (4, 8)])
def test_tiling_stops_at_three_images(processor: Processor, count: int, tiles: int) -> None:
    batch = processor(conversations=[user("<image>" * count), answer()], images=[picture(1100, 700)] * count)
    assert batch.images.shape[1] == tiles


def test_tiling_can_be_forced_and_forbidden(processor: Processor) -> None:
    image, one, many = picture(1100, 700), [user("<image>"), answer()], [user("<image>" * 3), answer()]
    assert processor(conversations=one, images=[image], cropping=False).images_spatial_crop.tolist() == [[[1, 1]]]
    forced = processor(conversations=many, images=[image] * 3, cropping=True)
    assert forced.images_spatial_crop.tolist() == [[[3, 2]] * 3]


def test_a_call_may_bring_its_own_resolutions(processor: Processor) -> None:
    """The paper evaluates with up to 18 tiles; the released list stops at 9."""
    resolutions = [(384 * w, 384 * h) for w in range(1, 19) for h in range(1, 19) if w * h <= 18]
    image = Image.effect_noise((2300, 1150), 60).convert("RGB")
    batch = processor(conversations=[user("<image>"), answer()], images=[image], candidate_resolutions=resolutions)
    assert batch.images_spatial_crop.tolist() == [[[6, 3]]]
    assert batch.images.shape[1] == 19
    assert int(batch.images_seq_mask.sum()) == 14 * 15 + 1 + 42 * (6 * 14 + 1)
    assert len(processor.candidate_resolutions) == 23


def test_resolutions_that_are_not_whole_tiles_are_an_error(processor: Processor) -> None:
    with pytest.raises(ValueError, match="400x384"):
        processor(prompt="<image>", images=[picture()], candidate_resolutions=[(400, 384)])
    with pytest.raises(ValueError, match="400x384"):
        Processor(processor.tokenizer, candidate_resolutions=[(384, 384), (400, 384)])


def test_resolutions_of_more_tiles_than_there_is_memory_for_are_an_error(processor: Processor) -> None:
    far = (384 * 500, 384 * 500)
    with pytest.raises(ValueError, match="192000x192000 is 250,000 tiles of 384x384"):
        processor(prompt="<image>", images=[picture()], candidate_resolutions=[(384, 384), far])
    for make in (lambda sizes: Processor(processor.tokenizer, candidate_resolutions=sizes), DeepseekVLV2ImageProcessor):
        with pytest.raises(ValueError, match="250,000 tiles"):
            make([(384, 384), far])
    for sizes in ([], [(384,)], [(384, 384), (400, 384)]):
        with pytest.raises(ValueError, match=r"candidate_resolutions|400x384"):
            DeepseekVLV2ImageProcessor(sizes)


def test_the_chat_template_takes_the_overrides_too(processor: Processor) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": picture(1100, 700)}]}]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, cropping=False)
    assert batch.images_spatial_crop.tolist() == [[[1, 1]]]


# ---------------------------------------------------------------- batches


def three_samples() -> tuple[list[Messages], list[list[Image.Image]]]:
    texts = ["hi", "<image>\nwhat?", "<image> and <image> and <image>"]
    images = [[picture(30 + i, 30) for i in range(text.count("<image>"))] for text in texts]
    return [[user(text), answer()] for text in texts], images


@pytest.mark.parametrize("side", ["left", "right"])
def test_samples_of_unequal_length_are_padded(processor: Processor, side: str) -> None:
    conversations, images = three_samples()
    batch = processor(conversations=conversations, images=images, padding=side)
    alone = [processor.process_one(conversations=c, images=i) for c, i in zip(conversations, images, strict=True)]
    length, tiles = max(map(len, alone)), 6
    assert batch.seq_lens == [len(sample) for sample in alone]
    assert batch.images.shape == (3, tiles, 3, 384, 384)
    assert batch.images_spatial_crop.tolist() == [[[0, 0]] * 3, [[1, 1], [0, 0], [0, 0]], [[1, 1]] * 3]
    for row, sample in enumerate(alone):
        size = len(sample)
        real = slice(length - size, None) if side == "left" else slice(0, size)
        assert batch.input_ids[row, real].tolist() == sample.input_ids.tolist()
        assert batch.labels[row, real].tolist() == sample.target_ids.tolist()
        assert batch.images_seq_mask[row, real].tolist() == sample.images_seq_mask.tolist()
        mask = batch.attention_mask[row]
        assert bool(mask[real].all()) and int(mask.sum()) == size
        assert set(batch.input_ids[row][~mask].tolist()) <= {processor.pad_id}
        assert set(batch.labels[row][~mask].tolist()) <= {-100}
        assert torch.equal(batch.images[row, : len(sample.images)], sample.images)
        assert not batch.images[row, len(sample.images) :].any()
    assert batch.attention_mask.dtype == batch.images_seq_mask.dtype == torch.bool


def test_padding_is_left_unless_asked_otherwise(processor: Processor) -> None:
    conversations, images = three_samples()
    batch = processor(conversations=conversations, images=images)
    assert bool(batch.attention_mask[:, -1].all()) and not batch.attention_mask[0, 0]
    samples = [processor.process_one(conversations=c, images=i) for c, i in zip(conversations, images, strict=True)]
    assert torch.equal(processor.batchify(samples).input_ids, batch.input_ids)


def test_a_batch_of_prompts_and_of_texts(processor: Processor) -> None:
    texts = ["short", "<image> is longer"]
    for name in ("prompt", "text"):
        batch = processor(**{name: texts}, images=[[], [picture()]])
        assert batch.seq_lens == [len(processor.encode("short")), 421 + len(processor.encode(" is longer"))]


def test_a_single_sample_without_batchify(processor: Processor) -> None:
    sample = processor(prompt="hi", force_batchify=False)
    assert type(sample) is VLChatProcessorOutput
    assert sample.input_ids.tolist() == processor.encode("hi") and len(sample) == len(processor.encode("hi"))


def test_fields_are_attributes_and_items(processor: Processor) -> None:
    batch, sample = processor(prompt="hi"), processor(prompt="hi", force_batchify=False)
    for name in ("sft_format", "input_ids", "labels", "attention_mask", "images", "images_seq_mask", "seq_lens"):
        assert batch[name] is getattr(batch, name)
    for name in ("sft_format", "input_ids", "target_ids", "images", "images_seq_mask", "num_image_tokens"):
        assert sample[name] is getattr(sample, name)
    assert {**batch}.keys() == set(batch.keys()) and "images_spatial_crop" in batch
    with pytest.raises(AttributeError):
        _ = batch.nothing
    with pytest.raises(KeyError):
        _ = batch["nothing"]


@pytest.mark.parametrize("how", ["keyword", "two", "dtype alone"])
def test_to_moves_everything_and_casts_the_images_only(processor: Processor, how: str) -> None:
    batch = processor(prompt="hi")
    moved = {
        "keyword": lambda: batch.to("cpu", dtype=torch.bfloat16),
        "two": lambda: batch.to(torch.device("cpu"), torch.bfloat16),
        "dtype alone": lambda: batch.to(torch.bfloat16),
    }[how]()
    assert moved is batch and type(moved) is BatchCollateOutput
    assert moved.images.dtype == torch.bfloat16
    assert moved.input_ids.dtype == torch.long and moved.attention_mask.dtype == torch.bool
    assert moved.sft_format == ["hi"]


def test_to_a_device_keeps_the_images_dtype(processor: Processor) -> None:
    batch = processor(prompt="hi").to("meta")
    assert {batch[n].device.type for n in ("input_ids", "labels", "attention_mask", "images")} == {"meta"}
    assert batch.images.dtype == torch.float32


# ---------------------------------------------------------------- chat template


IMAGE_PARTS = ["image", "path", "url", "image_url", "image_url dict", "base64", "file url"]


@pytest.mark.parametrize("style", IMAGE_PARTS)
def test_image_parts_name_their_source_in_several_ways(processor: Processor, style: str) -> None:
    import base64

    path = GOLDEN / "images" / "square.png"
    data = base64.b64encode(path.read_bytes()).decode()
    url = f"data:image/png;base64,{data}"
    part = {
        "image": {"type": "image", "image": Image.open(path)},
        "path": {"type": "image", "path": str(path)},
        "url": {"type": "image", "url": str(path)},
        "image_url": {"type": "image_url", "image_url": url},
        "image_url dict": {"type": "image_url", "image_url": {"url": url}},
        "base64": {"type": "image", "base64": data},
        "file url": {"type": "image", "url": f"file://{path}"},
    }[style]
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}]
    got = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    want = processor(conversations=[user("<image>\nhi"), answer()], images=[Image.open(path)])
    assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.images, want.images)


def test_a_batch_of_conversations_is_templated(processor: Processor) -> None:
    conversations, images = three_samples()
    messages = [[{**c[0], "images": i}] for c, i in zip(conversations, images, strict=True)]
    got = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert torch.equal(got.input_ids, processor(conversations=conversations, images=images).input_ids)
    texts = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert len(texts) == 3 and all(text.endswith("<|Assistant|>:") for text in texts)


def test_without_a_generation_prompt_the_users_turn_is_the_end(processor: Processor) -> None:
    messages = [user("hi")]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == "<｜begin▁of▁sentence｜><|User|>: hi\n\n"
    ids = processor.apply_chat_template(messages, tokenize=True)
    assert torch.equal(ids, processor(text=text).input_ids)


def test_the_last_answer_may_be_continued(processor: Processor) -> None:
    messages = [user("hi"), answer("The answer is")]
    ids = processor.apply_chat_template(messages, tokenize=True, continue_final_message=True)[0].tolist()
    assert ids[-1] == processor.encode("The answer is", bos=False)[-1]
    text = processor.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text.endswith("<|Assistant|>:The answer is")


@pytest.mark.parametrize("last", [user("go on: "), answer("The answer is"), user("")])
def test_the_last_message_is_left_open_as_transformers_does(processor: Processor, last: dict[str, Any]) -> None:
    messages = [user("hi"), answer("Hello."), last] if last["role"].endswith("User|>") else [user("hi"), last]
    ours = processor.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours == processor.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ids = processor.apply_chat_template(messages, tokenize=True, continue_final_message=True)
    assert torch.equal(ids, processor(text=ours).input_ids)
    one = processor.process_one(conversations=messages, add_generation_prompt=False, continue_final_message=True)
    assert one.input_ids.tolist() == ids[0].tolist()


# ---------------------------------------------------------------- saving and loading


def same_answers(one: Processor, other: Processor) -> None:
    for name in ("two_images", "unicode", "text_only"):
        inputs = case_inputs(CASES[name])
        first, second = one(**inputs), other(**inputs)
        assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)
    messages = CASES["multi_turn"]["conversation"]
    assert one.apply_chat_template(messages) == other.apply_chat_template(messages)


@pytest.mark.parametrize(
    "load", [Processor.from_pretrained, lambda p: AutoProcessor.from_pretrained(p, trust_remote_code=True)]
)
def test_a_saved_processor_loads_the_same(processor: Processor, tmp_path: Path, load: Any) -> None:
    processor.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is Processor
    same_answers(processor, again)
    assert "<|User|>" in (tmp_path / "chat_template.jinja").read_text()


def test_changed_settings_survive(tmp_path: Path) -> None:
    changed = Processor(
        mini_processor().tokenizer,
        candidate_resolutions=[(384, 384), (768, 384)],
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        sft_format="plain",
        mask_prompt=True,
        ignore_id=-1,
    )
    changed.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    names = ("image_mean", "image_std", "sft_format", "mask_prompt", "ignore_id", "patch_size", "candidate_resolutions")
    assert [getattr(again, n) for n in names] == [getattr(changed, n) for n in names]
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["sft_format"] == "plain" and saved["mask_prompt"] is True


def test_a_released_directory_keeps_its_spaces(processor: Processor) -> None:
    text = "a  b   c. 12 34\n\n x"
    assert processor.tokenizer.decode(processor.tokenizer.encode(text, add_special_tokens=False)) == text
    assert type(processor.tokenizer).__name__ not in ("LlamaTokenizer", "LlamaTokenizerFast")


def test_a_stray_chat_template_is_left_out(tokenizer_dir: Path, tmp_path: Path, processor: Processor) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    stray = "{% for m in messages %}### Instruction:\n{{ m['content'] }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(stray)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": stray}))
    again = Processor.from_pretrained(tmp_path)
    same_answers(processor, again)
    assert again.tokenizer.chat_template == again.chat_template == processor.chat_template


def test_a_template_of_ones_own_for_this_model_is_kept(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    own = "{{ bos_token }}{% for m in messages %}<|User|>: {{ m['content'] }}!{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(own)
    again = Processor.from_pretrained(tmp_path)
    assert again.apply_chat_template([user("hi")]) == "<｜begin▁of▁sentence｜><|User|>: hi!"
    got = again.apply_chat_template([user("hi")], tokenize=True)
    assert got[0].tolist() == again.encode("<|User|>: hi!")


def test_missing_special_tokens_are_added(tmp_path: Path, tokenizer_dir: Path) -> None:
    fields = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["id"] < 128815]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    bare = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
    )
    processor = Processor(bare)
    assert processor.image_token_id == bare.convert_tokens_to_ids("<image>") >= 128815
    assert processor.pad_id == bare.convert_tokens_to_ids("<｜▁pad▁｜>")
    for token in ("<|User|>", "<|Assistant|>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>"):
        assert len(processor.encode(token, bos=False)) == 1


def test_special_ids_come_from_the_tokenizer(processor: Processor) -> None:
    assert (processor.bos_id, processor.eos_id, processor.pad_id, processor.image_token_id) == (0, 1, 2, 128815)
    assert processor.tokenizer.padding_side == "left"
    assert processor.model_input_names == [
        "input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop",
    ]  # fmt: skip


# ---------------------------------------------------------------- the original's other methods


def test_the_originals_helpers_work(processor: Processor) -> None:
    case = CASES["two_images"]
    images = case_images(case)
    want = processor.process_one(**case_inputs(case))
    ids, labels, tiles, mask, crop, counts = processor.format_messages_v2(case["conversation"], images)
    assert ids[:-1] == want.input_ids.tolist() and len(labels) == len(ids) == len(mask)
    assert torch.equal(torch.stack(tiles), want.images) and crop == want.images_spatial_crop.tolist()
    assert counts == want.num_image_tokens
    ids, tiles, mask, crop, counts = processor.tokenize_with_images("a <image> b", images[:1], bos=True, eos=False)
    assert ids == processor(prompt="a <image> b", images=images[:1]).input_ids[0].tolist()
    assert sum(mask) == counts[0]
    assert processor.format_messages(CASES["text_only"]["conversation"]) == (
        GOLDEN / "expected" / "processor" / "text_only.txt"
    ).read_text(encoding="utf-8")
    assert processor.format_prompts("hi") == "<|User|>: hi\n\n<|Assistant|>:"
    assert processor.new_chat_template().name == "deepseek"
