"""One frame for every image: upright, as its EXIF orientation says, whichever way it comes and wherever boxes go."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import MINI_TILE, mini_processor

from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.serve.app_modules.utils import parse_ref_bbox
from deepseek_vl2.training.collator import ConversationCollator
from deepseek_vl2.training.data import ConversationDataset
from deepseek_vl2.utils.drawing import draw_boxes, mark_object
from deepseek_vl2.utils.grounding import GroundedObject, parse_grounding, to_coco, to_pixels
from deepseek_vl2.utils.io import load_pil_images
from deepseek_vl2.utils.prompts import in_context

SIZE = (2 * MINI_TILE, MINI_TILE)  # upright
UNDO = {
    1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}  # fmt: skip
FORMATS = ["PNG", "JPEG", "WEBP", "TIFF"]


def picture() -> Image.Image:
    """Return the picture as it is to be seen: smooth, and with nothing that looks alike turned."""
    x, y = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
    return Image.fromarray(np.stack([x, y, np.where(x > y, 200, 20)], axis=-1).astype(np.uint8))


def turned(orientation: int, file_format: str = "PNG") -> bytes:
    """Return a file whose pixels are stored turned, and whose EXIF data say so."""
    stored = picture()
    for step in UNDO[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(file_format, {})
    stored.save(data, file_format, exif=exif, **lossless)
    return data.getvalue()


def opened(orientation: int, file_format: str = "PNG") -> Image.Image:
    return Image.open(io.BytesIO(turned(orientation, file_format)))


def decoded(orientation: int) -> Image.Image:
    image = opened(orientation)
    image.load()
    return image


def difference(got: Image.Image, want: Image.Image) -> float:
    assert got.mode == "RGB" and got.size == want.size
    return float(np.abs(np.asarray(got).astype(int) - np.asarray(want).astype(int)).mean())


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", UNDO)
def test_an_image_is_read_upright_whether_opened_or_not(orientation: int, file_format: str) -> None:
    data = turned(orientation, file_format)
    loaded = opened(orientation, file_format)
    loaded.load()
    for source in (data, opened(orientation, file_format), loaded, loaded.copy(), loaded.convert("RGB")):
        got = load_image(source)
        assert difference(got, picture()) < 3
        assert load_image(got).tobytes() == got.tobytes()  # what was turned is not turned again
        assert got.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", UNDO)
def test_files_that_pillow_maps_into_memory_are_read_upright(tmp_path: Path, orientation: int, mode: str) -> None:
    gray = Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)
    shown = gray if mode == "I;16" else picture().quantize() if mode == "P" else picture().convert(mode)
    stored = shown
    for step in UNDO[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.tif"
    stored.save(path, exif=exif)
    want = load_image(shown)
    for source in (path, str(path), Image.open(path)):
        assert difference(load_image(source), want) == 0
    assert to_pixels((0, 0, 499, 999), Image.open(path)) == LEFT_HALF
    assert draw_boxes(Image.open(path), []).tobytes() == want.tobytes()


SOURCES: dict[str, Callable[[int, Path], Any]] = {
    "path": lambda orientation, path: path,
    "string": lambda orientation, path: str(path),
    "bytes": lambda orientation, path: path.read_bytes(),
    "data URL": lambda orientation, path: "data:;base64," + base64.b64encode(path.read_bytes()).decode(),
    "opened": lambda orientation, path: Image.open(path),
    "decoded": lambda orientation, path: decoded(orientation),
    "converted": lambda orientation, path: decoded(orientation).convert("RGBA"),
}


@pytest.mark.parametrize("way", SOURCES)
@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_the_processor_sees_every_image_upright(tmp_path: Path, orientation: int, way: str) -> None:
    processor, path = mini_processor(), tmp_path / "turned.png"
    path.write_bytes(turned(orientation))
    want = processor(prompt="<image>", images=[picture()])
    source = SOURCES[way](orientation, path)
    conversation = [{"role": "user", "content": "<image>", "images": [source]}]
    parts = [{"role": "user", "content": [{"type": "image", "image": SOURCES[way](orientation, path)}]}]
    for got in (
        processor(prompt="<image>", images=[SOURCES[way](orientation, path)]),
        processor(conversations=conversation),
        processor(prompt="<image>", images=load_pil_images([{"images": [SOURCES[way](orientation, path)]}])),
        processor.apply_chat_template(parts, tokenize=True, return_dict=True),
    ):
        assert torch.equal(got.images_spatial_crop, want.images_spatial_crop)
        assert torch.equal(got.images, want.images)


def test_the_originals_own_ways_to_tokenize_see_it_upright_too() -> None:
    processor = mini_processor()
    want = processor(prompt="<image>", images=[picture()])
    grids = processor.tokenize_with_images("<image>", [opened(6)])[3]
    messages = [{"role": "user", "content": "<image>"}]
    assert grids == processor.format_messages_v2(messages, [opened(6)])[4] == want.images_spatial_crop[0].tolist()
    tiles = torch.stack(processor.tokenize_with_images("<image>", [opened(6)])[1])
    assert torch.equal(tiles, want.images[0])


def test_the_training_collator_and_data_see_it_upright(tmp_path: Path) -> None:
    (tmp_path / "turned.png").write_bytes(turned(6))
    line = '[{"role": "user", "content": "<image>", "images": ["turned.png"]}, {"role": "assistant", "content": "a"}]'
    (tmp_path / "data.jsonl").write_text(line)
    sample = ConversationDataset(tmp_path / "data.jsonl")[0]
    assert difference(sample["images"][0], picture()) == 0
    collator = ConversationCollator(mini_processor())
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]
    batches = [collator([{"conversation": turns, "images": [image]}]) for image in (picture(), opened(6))]
    assert torch.equal(batches[0]["images"], batches[1]["images"])


# ---------------------------------------------------------------- boxes


ANSWER = "<|ref|>it<|/ref|><|det|>[[0, 0, 499, 999]]<|/det|>"
LEFT_HALF = (0, 0, 69, 70)


@pytest.mark.parametrize("orientation", UNDO)
@pytest.mark.parametrize("make", [opened, decoded])
def test_boxes_are_in_pixels_of_the_upright_image(make: Callable[[int], Image.Image], orientation: int) -> None:
    assert to_pixels((0, 0, 499, 999), make(orientation)) == LEFT_HALF == to_pixels((0, 0, 499, 999), SIZE)
    found = parse_grounding(ANSWER, [make(orientation)])
    assert found[0].pixel_boxes == [LEFT_HALF]
    coco = to_coco([(parse_grounding(ANSWER), "a.png", make(orientation))])
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == SIZE
    assert coco == to_coco([(parse_grounding(ANSWER), "a.png", SIZE)])


@pytest.mark.parametrize("orientation", UNDO)
def test_boxes_are_drawn_on_the_upright_image(orientation: int) -> None:
    want = draw_boxes(picture(), [GroundedObject("it", [(0, 0, 499, 999)])])
    for got in (
        draw_boxes(opened(orientation), [GroundedObject("it", [(0, 0, 499, 999)])]),
        parse_ref_bbox(ANSWER, opened(orientation)),
    ):
        assert got is not None and got.size == SIZE and got.tobytes() == want.tobytes()
        again = io.BytesIO()
        got.save(again, "JPEG")
        assert Image.open(again).getexif().get(0x0112, 1) == 1


def test_an_example_is_marked_upright() -> None:
    want = mark_object(picture(), (0, 0, 499, 999))
    assert mark_object(opened(6), (0, 0, 499, 999)).tobytes() == want.tobytes()
    conversation = in_context(opened(6), picture(), (0, 0, 499, 999))
    assert conversation[0]["images"][0].tobytes() == want.tobytes()


# ---------------------------------------------------------------- what does not stop a picture


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0" + b"\xff" * 20]
)
def test_exif_data_that_cannot_be_read_turn_nothing(exif: bytes) -> None:
    data = io.BytesIO()
    picture().save(data, "JPEG", quality=100, subsampling=0, exif=exif)
    assert difference(load_image(data.getvalue()), picture()) < 3
    assert to_pixels((0, 0, 499, 999), Image.open(data)) == LEFT_HALF


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(orientation: int) -> None:
    image = picture()
    image.getexif()[0x0112] = orientation
    assert load_image(image).tobytes() == picture().tobytes()
    assert mini_processor()(prompt="<image>", images=[image]).images_spatial_crop.tolist() == [[[2, 1]]]


def test_an_orientation_that_is_a_text_turns_nothing() -> None:
    image = picture()
    image.getexif()[0x0112] = "6"
    assert to_pixels((0, 0, 499, 999), image) == LEFT_HALF
    assert load_image(image).size == SIZE


def test_the_callers_image_is_not_turned() -> None:
    image = opened(6)
    mini_processor()(prompt="<image>", images=[image])
    draw_boxes(image, [])
    assert image.size == SIZE[::-1] and image.getexif()[0x0112] == 6
