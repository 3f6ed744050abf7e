"""What people give wrongly is said in a short sentence, never by an error of what lies beneath."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from support import mini_processor, noise_image, shared_mini_model

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.utils.io import load_pil_images

PROCESSOR = mini_processor()


def picture_base64(side: int = 160) -> str:
    data = io.BytesIO()
    noise_image(1, side, side).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def says(call: Callable[[], Any], *words: str, kind: Any = ValueError) -> None:
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert all(word in text for word in words), text
    assert len(text) < 400, f"{len(text)} characters"


def user(content: Any, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **fields}]


def ways(conversation: Any) -> list[Callable[[], Any]]:
    return [
        lambda: PROCESSOR(conversations=conversation),
        lambda: PROCESSOR.process_one(conversations=conversation),
        lambda: PROCESSOR.apply_chat_template(conversation, tokenize=True),
        lambda: PROCESSOR.apply_chat_template(conversation, tokenize=False),
        lambda: PROCESSOR.format_messages(conversation),
    ]


@pytest.mark.parametrize(
    "conversation", ["hi", b"hi", {"role": "user", "content": "hi"}, 5, ["hi"], [5], [None], [["hi"]]]
)
def test_what_is_no_conversation(conversation: Any) -> None:
    for call in ways(conversation):
        says(call, "role")


@pytest.mark.parametrize("part", ["hi", 5, None, ["hi"]])
def test_a_part_that_is_no_dict(part: Any) -> None:
    for call in ways(user([part])):
        says(call, "content part is a dict")


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 5}])
def test_a_text_part_without_its_text(part: dict[str, Any]) -> None:
    for call in ways(user([part])):
        says(call, "text part needs its text")


@pytest.mark.parametrize("content", [None, 5, {"type": "text", "text": "hi"}])
def test_a_content_that_is_neither_text_nor_parts(content: Any) -> None:
    for call in ways(user(content)):
        says(call, "needs a content")


@pytest.mark.parametrize("images", ["a.png", b"bytes", {"a": 1}, 5])
def test_images_of_a_message_that_are_no_list(images: Any) -> None:
    for call in (*ways(user("<image>", images=images)), lambda: load_pil_images([{"images": images}])):
        says(call, "images of a message is a list")


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path(path: str) -> None:
    for call in (
        lambda: PROCESSOR(conversations=user("<image>", images=[path])),
        lambda: PROCESSOR(prompt="<image>", images=[path]),
        lambda: PROCESSOR.apply_chat_template(user([{"type": "image", "path": path}]), tokenize=True),
        lambda: load_image(path),
    ):
        says(call, "path of an image is empty")


@pytest.mark.parametrize("cut", [300, None])
def test_bare_base64(cut: int | None) -> None:
    text = picture_base64()[:cut]
    assert cut is not None or len(text) > 50_000
    for call in (
        lambda: load_image(text),
        lambda: PROCESSOR(prompt="<image>", images=[text]),
        lambda: PROCESSOR(conversations=user("<image>", images=[text])),
        lambda: PROCESSOR(conversations=user([{"type": "image", "image": text}])),
    ):
        says(call, "base64", "data:")
    assert load_image("data:;base64," + picture_base64()).size == (160, 160)


@pytest.mark.parametrize("path", ["a" * 5000, "no/such/" + "b" * 3000 + ".png", "zero\0byte.png"])
def test_a_path_that_no_file_can_have(path: str) -> None:
    for call in (lambda: load_image(path), lambda: PROCESSOR(prompt="<image>", images=[path])):
        says(call, kind=(ValueError, FileNotFoundError))


def test_labels_need_all_logits() -> None:
    model, ids = shared_mini_model("tiny"), torch.tensor([[5, 6, 7]])
    for keep in (1, torch.tensor([2])):
        says(lambda keep=keep: model(ids, labels=ids, logits_to_keep=keep), "logits_to_keep", "labels")


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit"])
def test_quantization_is_asked_for_by_its_config(name: str) -> None:
    says(lambda: DeepseekVLV2ForCausalLM.from_pretrained("anywhere", **{name: True}), name, "WeightOnlyConfig")


# ---------------------------------------------------------------- addresses


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path != "/missing.png"
        body = b"" if not found else b"<html>" if self.path == "/page.png" else base64.b64decode(picture_base64(8))
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body) + (9 if self.path == "/cut.png" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(url: str) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return PROCESSOR.apply_chat_template(user(parts), tokenize=True, return_dict=True)


def test_an_address_is_downloaded(address: str) -> None:
    assert ask(f"{address}/a.png").images_spatial_crop.tolist() == [[[1, 1]]]


@pytest.mark.parametrize("path", ["/missing.png", "/page.png"])
def test_an_address_that_fails(address: str, path: str) -> None:
    says(lambda: ask(address + path), *(["missing.png", "404"] if path == "/missing.png" else ["not an image"]))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/a.png", "http://[bad/a.png", "http://", "http://127.0.0.1:9/" + "a" * 9000]
)
def test_an_address_that_cannot_be_reached(url: str) -> None:
    says(lambda: ask(url))


@pytest.mark.parametrize("name", ["image", "image_url", "img", "picture", "video", "audio"])
def test_a_picture_under_another_name_is_not_overlooked(name: str) -> None:
    for way in ways(user("What?", **{name: "a.png"})):
        says(way, f"A message has '{name}'", "under 'images'")
    PROCESSOR(conversations=user("What?", **{name: None}))
