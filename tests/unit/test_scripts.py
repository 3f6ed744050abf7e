"""Scripts in the style of the model card and of the original README run, changed in path and device alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.serve.app_modules.utils import parse_ref_bbox
from deepseek_vl2.serve.inference import convert_conversation_to_prompts, deepseek_generate, generate, load_model
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_json, load_pil_images, load_pretrained_model

IMAGES = Path(__file__).resolve().parents[2] / "images"
ONE_IMAGE = {"content": "<image>\n<|ref|>The giraffe at the back.<|/ref|>.", "images": ["visual_grounding_1.jpeg"]}
THREE_IMAGES = {
    "content": "This is image_1: <image>\nThis is image_2: <image>\nThis is image_3: <image>\n"
    " Can you tell me what are in the images?",
    "images": ["multi_image_1.jpeg", "multi_image_2.jpeg", "multi_image_3.jpeg"],
}
IN_CONTEXT = {
    "content": "<image>\n<image>\n<|grounding|>In the first image, an object within the red rectangle is marked. "
    "Locate the object of the same category in the second image.",
    "images": ["incontext_visual_grounding_1.jpeg", "icl_vg_2.jpeg"],
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_checkpoint(tmp_path_factory.mktemp("demo")))


def conversation(question: dict[str, Any]) -> list[dict[str, Any]]:
    images = [str(IMAGES / name) for name in question["images"]]
    return [
        {"role": "<|User|>", "content": question["content"], "images": images},
        {"role": "<|Assistant|>", "content": ""},
    ]


@pytest.mark.parametrize("name", ["language_model", "language"])
@pytest.mark.parametrize("question", [ONE_IMAGE, THREE_IMAGES], ids=["one image", "three images"])
def test_card_script(model_path: str, name: str, question: dict[str, Any]) -> None:
    vl_chat_processor = DeepseekVLV2Processor.from_pretrained(model_path)
    tokenizer = vl_chat_processor.tokenizer
    vl_gpt = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True)
    vl_gpt = vl_gpt.to(torch.bfloat16).eval()
    pil_images = load_pil_images(conversation(question))
    prepare_inputs = vl_chat_processor(
        conversations=conversation(question), images=pil_images, force_batchify=True, system_prompt=""
    ).to(vl_gpt.device)
    inputs_embeds = vl_gpt.prepare_inputs_embeds(**prepare_inputs)
    outputs = getattr(vl_gpt, name).generate(
        inputs_embeds=inputs_embeds,
        attention_mask=prepare_inputs.attention_mask,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=8,
        do_sample=False,
        use_cache=True,
    )
    answer = tokenizer.decode(outputs[0].cpu().tolist(), skip_special_tokens=True)
    assert outputs.shape[1] <= 8
    assert f"{prepare_inputs['sft_format'][0]} {answer}".startswith("<|User|>: ")


@pytest.mark.parametrize("chunk_size", [-1, 512])
def test_incremental_prefilling_script(model_path: str, chunk_size: int) -> None:
    dtype = torch.bfloat16
    vl_chat_processor = DeepseekVLV2Processor.from_pretrained(model_path)
    tokenizer = vl_chat_processor.tokenizer
    vl_gpt = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True, torch_dtype=dtype).eval()
    pil_images = load_pil_images(conversation(IN_CONTEXT))
    prepare_inputs = vl_chat_processor.__call__(
        conversations=conversation(IN_CONTEXT), images=pil_images, force_batchify=True, system_prompt=""
    ).to(vl_gpt.device, dtype=dtype)
    with torch.no_grad():
        if chunk_size == -1:
            inputs_embeds = vl_gpt.prepare_inputs_embeds(**prepare_inputs)
            past_key_values = None
        else:
            inputs_embeds, past_key_values = vl_gpt.incremental_prefilling(
                input_ids=prepare_inputs.input_ids,
                images=prepare_inputs.images,
                images_seq_mask=prepare_inputs.images_seq_mask,
                images_spatial_crop=prepare_inputs.images_spatial_crop,
                attention_mask=prepare_inputs.attention_mask,
                chunk_size=chunk_size,
            )
        outputs = vl_gpt.generate(
            inputs_embeds=inputs_embeds,
            input_ids=prepare_inputs.input_ids,
            images=prepare_inputs.images,
            images_seq_mask=prepare_inputs.images_seq_mask,
            images_spatial_crop=prepare_inputs.images_spatial_crop,
            attention_mask=prepare_inputs.attention_mask,
            past_key_values=past_key_values,
            pad_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            max_new_tokens=8,
            do_sample=True,
            temperature=0.4,
            top_p=0.9,
            repetition_penalty=1.1,
            use_cache=True,
        )
    prompt = prepare_inputs.input_ids
    assert torch.equal(outputs[:, : prompt.shape[1]], prompt)
    answer = tokenizer.decode(outputs[0][len(prompt[0]) :].cpu().tolist(), skip_special_tokens=False)
    drawn = parse_ref_bbox(answer, image=pil_images[-1])
    assert drawn is None or isinstance(drawn, Image.Image)


def test_load_pretrained_model_gives_tokenizer_processor_model(model_path: str) -> None:
    tokenizer, processor, model = load_pretrained_model(model_path, device="cpu")
    assert processor.tokenizer is tokenizer
    assert isinstance(model, DeepseekVLV2ForCausalLM)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_load_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"猫": [1, 2]}', encoding="utf-8")
    assert load_json(tmp_path / "a.json") == {"猫": [1, 2]}


def test_demo_checkpoint_does_not_touch_the_random_state(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    write_demo_checkpoint(tmp_path)
    assert torch.equal(torch.rand(2), expected)


@pytest.fixture(scope="module")
def loaded(model_path: str) -> Iterator[tuple[Any, Any, Any]]:
    yield load_model(model_path, dtype=torch.float32)


def test_streamed_answer_is_the_generated_one(loaded: tuple[Any, Any, Any]) -> None:
    tokenizer, model, processor = loaded
    inputs = processor(conversations=conversation(ONE_IMAGE)).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    streamed = "".join(generate(model, tokenizer, inputs, max_gen_len=12, temperature=0))
    assert streamed == tokenizer.decode(ids)
    chunked = "".join(generate(model, tokenizer, inputs, max_gen_len=12, temperature=0, chunk_size=100))
    assert chunked == streamed


def test_stop_words_end_the_stream_and_are_not_shown(loaded: tuple[Any, Any, Any]) -> None:
    tokenizer, model, processor = loaded
    arguments = (conversation(ONE_IMAGE), model, processor, tokenizer)
    whole = "".join(deepseek_generate(*arguments, stop_words=[], max_length=24, temperature=0))
    stop = whole[3:5]
    stopped = "".join(deepseek_generate(*arguments, stop_words=[stop], max_length=24, temperature=0))
    assert stopped == whole[: whole.index(stop)]


def test_closing_the_stream_stops_the_generation(loaded: tuple[Any, Any, Any]) -> None:
    tokenizer, model, processor = loaded
    steps = []
    handle = model.language.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        inputs = processor(conversations=conversation(ONE_IMAGE)).to(model.device)
        stream = generate(model, tokenizer, inputs, max_gen_len=2000, temperature=0)
        next(stream)
        stream.close()
    finally:
        handle.remove()
    assert len(steps) < 1900


def test_errors_of_the_worker_reach_the_reader(loaded: tuple[Any, Any, Any]) -> None:
    tokenizer, model, processor = loaded
    inputs = processor(conversations=conversation(ONE_IMAGE))
    inputs["images_seq_mask"][:] = False
    with pytest.raises(ValueError, match="images_seq_mask"):
        list(generate(model, tokenizer, inputs, max_gen_len=4))


def test_demo_conversation_becomes_messages() -> None:
    processor_image = Image.new("RGB", (4, 4))
    from deepseek_vl2.models.conversation import get_conv_template

    chat = get_conv_template("deepseek")
    chat.append_message(chat.roles[0], ("<image>\nhi", [processor_image]))
    chat.append_message(chat.roles[1], None)
    messages, last = convert_conversation_to_prompts(chat)
    assert last is processor_image
    assert messages[0] == {"role": "<|User|>", "content": "<image>\nhi", "images": [processor_image]}
    assert messages[1] == {"role": "<|Assistant|>", "content": ""}
