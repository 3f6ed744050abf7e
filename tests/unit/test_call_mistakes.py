"""What is no text, no picture or no option of a call of the processor is one sentence, never a raw error."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from support import mini_processor

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.image_loading import load_image

RED = Image.new("RGB", (64, 48), "red")


@pytest.fixture(scope="module")
def processor() -> DeepseekVLV2Processor:
    return mini_processor()


def turns(content: Any, answer: Any = "") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def shown(**fields: Any) -> dict[str, Any]:
    return {"type": "image", "image": Image.new("RGB", (900, 300), "red"), **fields}


def png_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def closed_file() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


HALF = r"U\+D83D, half of a character"
CALLS: dict[str, tuple[Callable[[DeepseekVLV2Processor], Any], str]] = {
    "half a character": (lambda p: p(conversations=turns("a\ud83d")), HALF),
    "half a character in a part": (lambda p: p(conversations=turns([{"type": "text", "text": "\ud83d"}])), HALF),
    "half a character in an answer": (lambda p: p(conversations=turns("a", "\ud83d")), HALF),
    "half a character in a system prompt": (lambda p: p(conversations=turns("a"), system_prompt="\ud83d"), HALF),
    "half a character in a text": (lambda p: p(text="\ud83d"), HALF),
    "half a character beside an escaped tag": (
        lambda p: p(conversations=turns([{"type": "text", "text": "<image> \ud83d"}])),
        HALF,
    ),
    "half a character in a template": (lambda p: p.apply_chat_template(turns("\ud83d"), tokenize=True), HALF),
    "bytes as text": (lambda p: p(text=b"x"), "text must be a text, or a list of some, got b'x'"),
    "no texts": (lambda p: p(text=[]), "text must be a text"),
    "numbers as texts": (lambda p: p(text=["a", 1]), "got int"),
    "ids as a text": (lambda p: p(text=[[1, 2]]), "got list"),
    "a number as prompt": (lambda p: p(prompt=5), "prompt must be a text"),
    "a number as images": (lambda p: p(text="<image>", images=0), "images is a list of images, got int"),
    "a dict as images": (lambda p: p(text="<image>", images={"a": RED}), "images is a list of images, got dict"),
    "two lists of images for one text": (
        lambda p: p(text="<image>", images=[[RED], [RED]]),
        "2 lists of images.*1 inp",
    ),
    "a file that was closed": (lambda p: p(text="<image>", images=[closed_file()]), "open file .* was closed"),
    "a number as system prompt": (lambda p: p(conversations=turns("a"), system_prompt=5), "system_prompt"),
    "no conversation": (lambda p: p.apply_chat_template(None), "A conversation is a list of messages"),
    "a length of text": (lambda p: p(text="a", max_length="5", truncation=True), "max_length"),
    "a negative multiple": (lambda p: p(text="a", pad_to_multiple_of=-3), "pad_to_multiple_of"),
    "cropping of text": (lambda p: p(text="<image>", images=[RED], cropping="no"), "cropping"),
    "a limit of text": (lambda p: p(text="<image>", images=[RED], max_pixels="x"), "max_pixels"),
    "one number as resolutions": (
        lambda p: p(text="<image>", images=[RED], candidate_resolutions=384),
        "candidate_resolutions",
    ),
    "resolutions of one side": (
        lambda p: p(text="<image>", images=[RED], candidate_resolutions=[(384,)]),
        "candidate_resolutions",
    ),
    "labels decoded": (lambda p: p.decode([-100, 5]), "decode takes token ids"),
    "a text decoded": (lambda p: p.decode("x"), "decode takes token ids"),
    "rows of labels decoded": (lambda p: p.batch_decode([[-100]]), "batch_decode takes token ids"),
    "an answer of labels": (lambda p: p.post_process_image_text_to_text(torch.tensor([[-100]])), "takes token ids"),
    "keywords of a number": (
        lambda p: p.apply_chat_template(turns("a"), processor_kwargs=5),
        "processor_kwargs is a dict",
    ),
    "a group of zero": (lambda p: p(text="a", text_kwargs=0), "text_kwargs is a dict"),
    "no messages": (lambda p: p.apply_chat_template([]), "The conversation has no messages"),
    "no messages among others": (lambda p: p.apply_chat_template([turns("a"), []]), "The conversation has no messages"),
    "calls of tools": (
        lambda p: p.apply_chat_template([*turns("a", "b"), {"role": "assistant", "content": "", "tool_calls": [{}]}]),
        "Message 3 calls tools",
    ),
    "an unknown detail": (lambda p: p.apply_chat_template(turns([shown(detail="huge")])), "detail of an image must be"),
    "details that differ": (
        lambda p: p(conversations=turns([shown(detail="low"), shown()])),
        "'low' for all images of a conversation or for none",
    ),
    "an address of a bucket": (lambda p: p(text="<image>", images=["s3://bucket/a.png"]), "an address of 's3'"),
    "a batch of whole numbers": (
        lambda p: p(text="<image>", images=[RED]).to(torch.int64),
        "cannot become torch.int64",
    ),
    "boxes of a number": (lambda p: p.post_process_grounding(5), "decode it first"),
    "boxes of ids": (lambda p: p.post_process_grounding([[1, 2]]), "decode it first"),
    "a template that counts too far": (
        lambda p: p.apply_chat_template(turns("a"), chat_template="{% for i in range(10**9) %}x{% endfor %}"),
        "chat template refuses",
    ),
    "a template that divides by zero": (
        lambda p: p.apply_chat_template(turns("a"), chat_template="{{ 1 // 0 }}"),
        "chat template refuses",
    ),
    "a template that calls itself": (
        lambda p: p.apply_chat_template(turns("a"), chat_template="{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
        "chat template refuses",
    ),
    "a template that marks answers and fails": (
        lambda p: p.apply_chat_template(
            turns("a"),
            chat_template="{% generation %}{{ messages[9].content }}{% endgeneration %}",
            tokenize=True,
            return_assistant_tokens_mask=True,
        ),
        "chat template refuses",
    ),
}


def test_a_setting_that_is_none_is_named(processor: DeepseekVLV2Processor) -> None:
    with pytest.warns(UserWarning, match="no settings of these names: candidate_resolution"):
        DeepseekVLV2Processor(processor.tokenizer, candidate_resolution=[[384, 384]])


def test_the_detail_of_an_image_is_not_ignored() -> None:
    nano = DeepseekVLV2Processor.from_pretrained("nano")
    url = {"type": "image_url", "image_url": {"url": png_url(shown()["image"]), "detail": "low"}}
    plain = nano(conversations=turns([shown()]))
    want = nano(conversations=turns([shown()]), cropping=False)
    assert plain["images_spatial_crop"].tolist() != want["images_spatial_crop"].tolist()
    for part in (shown(detail="low"), url):
        assert nano(conversations=turns([part]))["input_ids"].equal(want["input_ids"])
        found = nano.apply_chat_template(turns([part])[:1], tokenize=True, return_dict=True, add_generation_prompt=True)
        assert found["input_ids"].equal(want["input_ids"])
        assert nano(conversations=turns([part]), cropping=True)["input_ids"].equal(plain["input_ids"])
    assert nano(conversations=turns([shown(detail="auto")]))["input_ids"].equal(plain["input_ids"])


def test_a_file_by_its_address(processor: DeepseekVLV2Processor, tmp_path: Any) -> None:
    RED.save(tmp_path / "red.png")
    for address in (f"file://{tmp_path}/red.png", f"file://localhost{tmp_path}/red.png", f"FILE://{tmp_path}/red.png"):
        parts = [{"type": "image", "url": address}]
        assert processor.apply_chat_template(turns(parts), tokenize=True, return_dict=True)["pixel_values"].any()


@pytest.mark.parametrize("name", CALLS)
def test_mistakes_are_told_in_a_sentence(processor: DeepseekVLV2Processor, name: str) -> None:
    call, says = CALLS[name]
    with pytest.raises(ValueError, match=says) as error:
        call(processor)
    assert "\n" not in str(error.value)


PIXELS = torch.arange(48, dtype=torch.float32).reshape(3, 4, 4) / 48


@pytest.mark.parametrize(
    "make",
    [
        lambda: PIXELS.to(torch.float8_e4m3fn),
        lambda: PIXELS.to(torch.float8_e5m2),
        lambda: torch.quantize_per_tensor(PIXELS, 1 / 255, 0, torch.quint8),
        lambda: (-PIXELS)._neg_view(),
    ],
    ids=["float8_e4m3fn", "float8_e5m2", "quantized", "negative view"],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_of_every_kind_of_number(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    plain = tensor.dequantize() if tensor.is_quantized else tensor.float().clone()
    assert load_image(tensor).tobytes() == load_image(plain).tobytes()
    with pytest.raises(ValueError, match="holds numbers, not complex64"):
        load_image(torch.ones(4, 4, dtype=torch.complex64).conj())


def test_data_urls_as_they_are_found(tmp_path: Any) -> None:
    RED.save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    assert load_image(memoryview(data)).tobytes() == RED.tobytes()
    plain = base64.b64encode(data).decode()
    forms = {
        "data:image/png;base64," + base64.encodebytes(data).decode(),
        "data:image/png;base64," + base64.urlsafe_b64encode(data).decode().rstrip("="),
        "DATA:image/png;charset=utf-8;BASE64," + plain,
        "data:;base64, " + plain + "\n",
    }
    for url in forms:
        assert load_image(url).tobytes() == RED.tobytes()
    with pytest.raises(ValueError, match="is an address"):
        load_image("HTTPS://example.org/a.png")
