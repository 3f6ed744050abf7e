"""Reading images: every mode becomes RGB, and everything wrong with a file has an error that a person understands."""

from __future__ import annotations

import base64
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import GOLDEN

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.image_loading import MAX_IMAGE_PIXELS, load_image
from deepseek_vl2.models.processing_deepseek_vl_v2 import ImageTransform

IMAGES = GOLDEN / "images"


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that says it is that large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def ask(processor: DeepseekVLV2Processor, image: object, **settings: object) -> object:
    conversation = [{"role": "user", "content": "<image>"}]
    return processor(conversations=conversation, images=[image], **settings)


# ---------------------------------------------------------------- what is wrong


@pytest.fixture
def bad_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    content = {
        "empty": b"",
        "words": b"this is not an image, it is a text",
        "cut": (IMAGES / "photo.jpg").read_bytes()[:9000],
        "cut png": (IMAGES / "landscape.png").read_bytes()[:5000],
        "header only": (IMAGES / "landscape.png").read_bytes()[:60],
        "no width": png_header(0, 5),
        "bomb": png_header(60000, 60000),
        "large": png_header(12000, 9000),
        "wide bomb": png_header(2**31 - 1, 1),
    }[request.param]
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    return path


ALL_BAD = ["empty", "words", "cut", "cut png", "header only", "no width", "bomb", "large", "wide bomb"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bad_file", ALL_BAD, indirect=True)
def test_a_bad_file_is_an_error_that_names_it(bad_file: Path) -> None:
    for source in (bad_file, str(bad_file)):
        with pytest.raises(ValueError, match=r"bad\.png"):
            load_image(source)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bad_file", ALL_BAD, indirect=True)
def test_the_processor_refuses_a_bad_image_however_it_comes(processor: DeepseekVLV2Processor, bad_file: Path) -> None:
    data = bad_file.read_bytes()
    for source in (bad_file, str(bad_file), data, f"data:image/png;base64,{base64.b64encode(data).decode()}"):
        with pytest.raises(ValueError):
            ask(processor, source)


@pytest.mark.parametrize(
    ("bad_file", "says"), [("cut", "truncated"), ("bomb", "pixel"), ("large", "pixel")], indirect=["bad_file"]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_error_says_what_is_wrong(bad_file: Path, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_image(bad_file)


def test_a_missing_file_is_named(processor: DeepseekVLV2Processor, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.jpeg"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpeg"):
        load_image(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpeg"):
        ask(processor, str(path))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpeg"):
        processor(conversations=[{"role": "user", "content": "<image>", "images": [str(path)]}])


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    pipe, source = tmp_path / "pipe", IMAGES / "rgba.png"
    os.mkfifo(pipe)

    def fill(content: bytes) -> threading.Thread:
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        return writer

    writer = fill(source.read_bytes())
    assert load_image(pipe).tobytes() == load_image(source).tobytes()
    writer.join()
    for content, says in ((b"", "a pipe that holds nothing"), (b"text", "pipe is not an image")):
        writer = fill(content)
        with pytest.raises(ValueError, match=says):
            load_image(pipe)
        writer.join()


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_not_an_image(device: str) -> None:
    with pytest.raises(ValueError, match=f"{device} is a device"):
        load_image(device)


def test_a_directory_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="directory"):
        load_image(tmp_path)


@pytest.mark.parametrize("source", [None, 5, ["a.png"], {"path": "a.png"}])
def test_what_is_no_image_source_is_an_error(source: object) -> None:
    with pytest.raises(ValueError):
        load_image(source)


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:image/png;base64,@@@", "https://example.com/a.png"])
def test_a_bad_address_is_an_error(url: str) -> None:
    with pytest.raises(ValueError):
        load_image(url)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_pil_image_without_area_is_an_error(processor: DeepseekVLV2Processor, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        ask(processor, Image.new("RGB", size))


def test_the_pixel_limit_holds_for_files_and_images_and_can_be_changed(processor: DeepseekVLV2Processor) -> None:
    image = Image.open(IMAGES / "square.png")
    pixels = image.width * image.height
    for source in (image, IMAGES / "square.png"):
        with pytest.raises(ValueError, match="pixel"):
            ask(processor, source, max_pixels=pixels - 1)
        ask(processor, source, max_pixels=pixels)
    assert MAX_IMAGE_PIXELS >= 80_000_000


def test_a_pil_image_that_cannot_be_decoded_is_an_error(processor: DeepseekVLV2Processor, tmp_path: Path) -> None:
    """Pillow opens lazily: a truncated file is noticed only when the pixels are needed."""
    path = tmp_path / "cut.jpg"
    path.write_bytes((IMAGES / "photo.jpg").read_bytes()[:9000])
    with pytest.raises(ValueError, match="truncated"):
        ask(processor, Image.open(path))


# ---------------------------------------------------------------- what is read


def over_white(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGBA", image.size, "white")
    return (
        Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
        if "A" in image.mode
        else image.convert("RGB")
    )


@pytest.mark.parametrize("name", sorted(path.name for path in IMAGES.iterdir()))
def test_every_way_to_give_an_image_reads_the_same(name: str) -> None:
    path = IMAGES / name
    want = Image.open(path).convert("RGB")
    url = f"data:image/any;base64,{base64.b64encode(path.read_bytes()).decode()}"
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), url, Image.open(path)):
        got = load_image(source, background=None)
        assert got.mode == "RGB" and got.size == want.size and got.tobytes() == want.tobytes()
        assert load_image(source).tobytes() == over_white(Image.open(path)).tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_files(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (40, 20), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 10, 10))  # the top left corner is red
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }.get(orientation, [])  # fmt: skip
    stored = upright
    for step in undo:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    for source in (path, path.read_bytes()):
        got = load_image(source)
        assert got.size == (40, 20)
        assert got.getpixel((2, 2)) == (255, 0, 0) and got.getpixel((38, 18)) == (0, 0, 255)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_becomes_what_pillow_converts_it_to(processor: DeepseekVLV2Processor, mode: str) -> None:
    source = Image.open(IMAGES / "tiny.png").convert("RGB")
    image = source.convert("L").convert(mode) if mode in ("I", "F", "PA") else source.convert(mode)
    got = ask(processor, image)
    want = ask(processor, image.convert("RGB"))
    assert got.images.equal(want.images)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "L", "1"])
def test_a_file_of_any_mode_reads(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.open(IMAGES / "tiny.png").convert("RGB").convert(mode).save(path)
    assert load_image(path).mode == "RGB"


# ---------------------------------------------------------------- into numbers


def test_the_transform_scales_and_normalises() -> None:
    image = Image.open(IMAGES / "tiny.png").convert("RGB")
    want = (np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255 - 0.5) / 0.5
    got = ImageTransform()(image)
    assert got.shape == (3, image.height, image.width)
    assert np.abs(got.numpy() - want).max() < 1e-6  # the same float32 steps


@pytest.mark.parametrize("normalize", [True, False])
def test_the_transform_gives_the_bits_of_the_arithmetic(normalize: bool) -> None:
    mean, std = (0.48145466, 0.4578275, 0.5), (0.26862954, 0.26130258, 0.5)
    bytes_ = torch.randint(256, (2, 37, 41, 3), dtype=torch.uint8)
    want = bytes_.permute(0, 3, 1, 2).float().div_(255)
    if normalize:
        want.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))
    got = ImageTransform(mean, std, normalize).batch([Image.fromarray(part.numpy()) for part in bytes_])
    assert torch.equal(got, want)


def test_each_channel_has_its_own_mean_and_std() -> None:
    image = Image.new("RGB", (2, 2), (255, 51, 0))
    got = ImageTransform(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))(image)[:, 0, 0]
    assert np.allclose(got, [1.8, 0.0, -1.0], atol=1e-6)


def test_without_normalisation_values_run_from_zero_to_one() -> None:
    got = ImageTransform(normalize=False)(Image.new("RGB", (2, 2), (255, 0, 51)))[:, 0, 0]
    assert np.allclose(got, [1.0, 0.0, 0.2], atol=1e-6)


def test_the_padding_colour_is_the_mean() -> None:
    assert ImageTransform().background == (127, 127, 127)
    assert ImageTransform(mean=(0.0, 0.48, 1.0)).background == (0, 122, 255)
