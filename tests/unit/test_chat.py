"""`model.chat`, and boxes read and shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from support import noise_image

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.answers import ChatAnswer

FOUND = "<|ref|>a dog<|/ref|><|det|>[[100, 200, 300, 400]]<|/det|>"


@pytest.fixture(scope="module")
def processor() -> DeepseekVLV2Processor:
    return DeepseekVLV2Processor.from_pretrained("nano")


@pytest.fixture(scope="module")
def model() -> DeepseekVLV2ForCausalLM:
    return DeepseekVLV2ForCausalLM.from_pretrained("nano", dtype=torch.float32).eval()


def test_a_question_is_answered_and_gone_on_from(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path
) -> None:
    picture = noise_image(1)
    picture.save(tmp_path / "a.png")
    answer, history = model.chat(processor, "What is it?", images=tmp_path / "a.png", max_new_tokens=6)
    inputs = processor(prompt="<|User|>: <image>\nWhat is it?\n\n<|Assistant|>:", images=[picture])
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert answer == processor.decode(ids, skip_special_tokens=True).strip() and isinstance(answer, str)
    assert [turn["role"] for turn in history] == ["user", "assistant"] and answer.images[0].size == picture.size
    again, longer = model.chat(processor, "And now?", history=history, max_new_tokens=4)
    assert len(longer) == 4 and len(history) == 2 and len(again.images) == 1
    whole = processor(conversations=longer[:3])
    ids = model.generate(**whole, max_new_tokens=4, do_sample=False)[0, whole.input_ids.shape[1] :]
    assert again == processor.decode(ids, skip_special_tokens=True).strip()


def test_tags_say_where_pictures_stand(model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor) -> None:
    _, history = model.chat(processor, "This: <image>?", images=[noise_image(1)], max_new_tokens=1, system_prompt="Hi.")
    assert history[0] == {"role": "system", "content": "Hi."} and history[1]["content"] == "This: <image>?"
    _, history = model.chat(processor, "Which?", images=[noise_image(1), noise_image(2)], max_new_tokens=1)
    assert history[0]["content"] == "<image>\n<image>\nWhich?"
    with pytest.raises(ValueError, match="2 <image> tags but 1"):
        model.chat(processor, "<image><image>", images=[noise_image(1)])
    with pytest.raises(ValueError, match="first question"):
        model.chat(processor, "hi", history=history, system_prompt="Hi.")
    with pytest.raises(ValueError, match="list of messages"):
        model.chat(processor, "hi", history="earlier")  # type: ignore[arg-type]


def test_boxes_in_pixels(processor: DeepseekVLV2Processor, tmp_path: Path) -> None:
    image = Image.new("RGB", (999, 500))
    image.save(tmp_path / "a.png")
    for shown in (image, [image], (999, 500), [(999, 500)], tmp_path / "a.png", [tmp_path / "a.png"]):
        found = processor.post_process_grounding(FOUND, shown)
        assert [(o.label, o.pixel_boxes) for o in found] == [("a dog", [(100, 100, 300, 200)])]
    assert processor.post_process_grounding(FOUND)[0].pixel_boxes is None
    several = processor.post_process_grounding(FOUND, [(10, 10), (999, 500)], image=0)
    assert several[0].pixel_boxes == [(1, 2, 3, 4)] and several[0].image == 0
    both = processor.post_process_grounding([FOUND, "none"], [(999, 500), None])
    assert both[0][0].pixel_boxes == [(100, 100, 300, 200)] and not both[1]
    with pytest.raises(ValueError, match="2 answers"):
        processor.post_process_grounding([FOUND, FOUND], [(5, 5)])


def test_a_notebook_shows_the_picture_with_its_boxes() -> None:
    answer = ChatAnswer(FOUND, [Image.new("RGB", (50, 40))])
    assert '<img alt="a dog" src="data:image/png;base64,' in answer._repr_html_()
    assert answer.grounding[0].pixel_boxes == [(5, 8, 15, 16)]
    assert ChatAnswer("a < b")._repr_html_() == "<p>a &lt; b</p>"
