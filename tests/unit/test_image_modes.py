"""Gray of many bits is scaled by its range, and transparency lies over white, wherever an image is read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import GOLDEN, MINI_TILE, mini_processor

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.utils.drawing import draw_boxes
from deepseek_vl2.utils.io import load_pil_images

SIDE = MINI_TILE
RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
WANT = np.rint(RAMP * 255).astype(np.uint8)


def saved(image: Image.Image, file_format: str = "PNG", **settings: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, file_format, **settings)
    return data.getvalue()


def reads(image: Any, **settings: Any) -> list[np.ndarray]:
    """Return the pixels of an image by every way that reads one."""
    conversation = [{"role": "user", "content": "<image>", "images": [image]}]
    tile = mini_processor()(conversations=conversation, **settings).images[0, 0]
    tile_bytes = ((tile * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    return [
        np.asarray(load_image(image, **settings)),
        np.asarray(load_pil_images([{"images": [image]}], **settings)[0]),
        tile_bytes,
    ]


def assert_gray(image: Any, want: np.ndarray, most: int = 1) -> None:
    for pixels in reads(image):
        assert pixels.shape == (SIDE, SIDE, 3) and np.ptp(pixels, axis=-1).max() == 0
        assert np.abs(pixels[..., 0].astype(int) - want.astype(int)).max() <= most


# ---------------------------------------------------------------- gray of more than 8 bits


GRAY: dict[str, Callable[[], Any]] = {
    "I;16": lambda: Image.fromarray((RAMP * 65535).astype(np.uint16)),
    "I;16 file": lambda: saved(Image.fromarray((RAMP * 65535).astype(np.uint16))),
    "I;16 tiff": lambda: saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF"),
    "I;16B": lambda: Image.frombytes("I;16B", (SIDE, SIDE), (RAMP * 65535).astype(">u2").tobytes()),
    "I;16L": lambda: Image.frombytes("I;16L", (SIDE, SIDE), (RAMP * 65535).astype("<u2").tobytes()),
    "I of 16 bits": lambda: Image.fromarray((RAMP * 65535).astype(np.int32)),
    "I of 8 bits": lambda: Image.fromarray((RAMP * 255).round().astype(np.int32)),
    "I of 24 bits": lambda: Image.fromarray((RAMP * (2**24 - 1)).astype(np.int32)),
    "I of 32 bits": lambda: Image.fromarray((RAMP * (2**31 - 1)).astype(np.int32)),
    "I tiff": lambda: saved(Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"),
    "F to 1": lambda: Image.fromarray(RAMP.astype(np.float32)),
    "F to 255": lambda: Image.fromarray((RAMP * 255).astype(np.float32)),
    "F to 65535": lambda: Image.fromarray((RAMP * 65535).astype(np.float32)),
    "F to a million": lambda: Image.fromarray((RAMP * 1e6).astype(np.float32)),
    "F from -1 to 1": lambda: Image.fromarray((RAMP * 2 - 1).astype(np.float32)),
    "F tiff": lambda: saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAY)
def test_gray_is_scaled_by_its_range(name: str) -> None:
    assert_gray(GRAY[name](), WANT)


def test_dark_gray_of_16_bits_stays_dark() -> None:
    dark = (RAMP * 255).astype(np.uint16)
    for source in (Image.fromarray(dark), saved(Image.fromarray(dark))):
        assert_gray(source, np.rint(dark / 65535 * 255).astype(np.uint8))


def test_dim_floats_stay_dim() -> None:
    assert_gray(Image.fromarray((RAMP / 2).astype(np.float32)), np.rint(RAMP / 2 * 255).astype(np.uint8))
    assert_gray(Image.fromarray((RAMP * 100).astype(np.float32)), np.rint(RAMP * 100).astype(np.uint8))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_single_value_is_no_division_by_zero(value: float) -> None:
    for kind, most in ((np.float32, 1), (np.int32, 255), (np.uint16, 65535)):
        image = Image.fromarray(np.full((SIDE, SIDE), value * most, dtype=kind))
        assert_gray(image, np.full((SIDE, SIDE), round(value * 255)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_an_error(wrong: float) -> None:
    pixels = RAMP.astype(np.float32).copy()
    pixels[3, :4] = wrong
    for call in (load_image, reads):
        with pytest.raises(ValueError, match="4 pixels are not finite"):
            call(Image.fromarray(pixels))


def test_boxes_are_drawn_on_what_the_model_sees() -> None:
    image = Image.fromarray((RAMP * 65535).astype(np.uint16))
    assert np.array_equal(np.asarray(draw_boxes(image, [])), np.asarray(load_image(image)))
    clear = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    assert draw_boxes(clear, []).getpixel((5, 5)) == (255, 255, 255)


# ---------------------------------------------------------------- transparency


def half_clear(mode: str) -> Image.Image:
    """Return black of which the right half is transparent."""
    image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (SIDE // 2, 0, SIDE, SIDE))
    if mode in ("RGBA", "LA", "PA"):
        return image.convert(mode)
    if mode in ("RGBa", "La"):
        return image.convert("RGBa") if mode == "RGBa" else image.convert("LA").convert("La")
    return image


def keyed(mode: str) -> bytes:
    """Return a PNG in which one colour or value is transparent."""
    if mode == "I;16":
        pixels = np.zeros((SIDE, SIDE), dtype=np.uint16)
        pixels[:, SIDE // 2 :] = 7
        return saved(Image.fromarray(pixels), transparency=7)
    image = Image.new(mode, (SIDE, SIDE), 0)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 10, 10])
    color: Any = (10, 10, 10) if mode == "RGB" else 1
    image.paste(color, (SIDE // 2, 0, SIDE, SIDE))
    return saved(image, transparency=color)


CLEAR: dict[str, Callable[[], Any]] = {
    **{mode: (lambda mode=mode: half_clear(mode)) for mode in ("RGBA", "LA", "PA", "RGBa", "La")},
    "RGBA file": lambda: saved(half_clear("RGBA")),
    "LA file": lambda: saved(half_clear("LA")),
    "webp": lambda: saved(half_clear("RGBA"), "WEBP", lossless=True),
    "gif": lambda: saved(half_clear("RGBA"), "GIF"),
    "palette with alphas": lambda: saved(half_clear("RGBA").quantize(4)),
    **{f"{mode} with a transparent value": (lambda mode=mode: keyed(mode)) for mode in ("P", "L", "RGB", "1", "I;16")},
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_transparent_is_white(name: str) -> None:
    for pixels in reads(CLEAR[name]()):
        assert (pixels[:, : SIDE // 2] == 0).all() and (pixels[:, SIDE // 2 :] == 255).all()


@pytest.mark.parametrize("name", CLEAR)
def test_without_a_background_alpha_is_dropped_as_in_the_original(name: str) -> None:
    source = CLEAR[name]()
    for pixels in reads(source, background=None):
        assert pixels.max() <= (255 if name.startswith("1") else 10)
    opened = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
    if opened.mode not in ("RGBa", "La", "I;16"):  # Pillow converts these to RGB by way of another mode, or clips them
        assert np.array_equal(np.asarray(load_image(source, background=None)), np.asarray(opened.convert("RGB")))


def test_what_is_half_transparent_is_mixed_with_white() -> None:
    for pixels in reads(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 128))):
        assert np.abs(pixels.astype(int) - 127).max() <= 1


def test_a_background_may_be_any_colour() -> None:
    for background, want in (("red", (255, 0, 0)), ((1, 2, 3), (1, 2, 3)), ("#00ff00", (0, 255, 0))):
        for pixels in reads(half_clear("RGBA"), background=background):
            assert (pixels[:, SIDE // 2 :] == want).all()


@pytest.mark.parametrize("background", ["no colour", (1, 2), (1, 2, 300), 7])
def test_a_background_that_is_no_colour_is_an_error(background: Any) -> None:
    for call in (
        lambda: mini_processor()(prompt="<image>", images=[half_clear("RGBA")], background=background),
        lambda: load_pil_images([{"images": [half_clear("RGBA")]}], background=background),
        lambda: DeepseekVLV2Processor(mini_processor().tokenizer, background=background),
    ):
        with pytest.raises(ValueError, match=r"background|color"):
            call()


def test_a_processor_keeps_its_background(tmp_path: Path) -> None:
    processor = DeepseekVLV2Processor(mini_processor().tokenizer, [(SIDE, SIDE)], background=None)
    image = half_clear("RGBA")
    assert processor(prompt="<image>", images=[image]).images.max() == -1
    assert processor(prompt="<image>", images=[image], background="white").images.max() == 1
    processor.save_pretrained(tmp_path)
    again = DeepseekVLV2Processor.from_pretrained(tmp_path)
    assert again.background is None and again(prompt="<image>", images=[image]).images.max() == -1
    assert DeepseekVLV2Processor.from_pretrained(tmp_path, background="white").background == "white"


def test_the_golden_picture_with_alpha_is_as_recorded_without_a_background() -> None:
    path = GOLDEN / "images" / "rgba.png"
    want = Image.open(path).convert("RGB")
    assert load_image(path, background=None).tobytes() == want.tobytes() != load_image(path).tobytes()


def test_opaque_images_are_what_pillow_converts_them_to() -> None:
    source = Image.open(GOLDEN / "images" / "tiny.png").convert("RGB")
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        image = source.convert("L").convert(mode) if mode == "PA" else source.convert(mode)
        assert load_image(image).tobytes() == image.convert("RGB").tobytes(), mode


def test_an_image_whose_file_was_closed_is_an_error(tmp_path: Path) -> None:
    half_clear("RGBA").save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(ValueError, match="closed"):
        mini_processor()(prompt="<image>", images=[image])


def test_reading_changes_nothing_of_the_callers() -> None:
    image = half_clear("RGBA")
    before = image.tobytes()
    reads(image)
    assert image.mode == "RGBA" and image.tobytes() == before
    assert torch.is_tensor(mini_processor()(prompt="<image><image>", images=[image, image]).images)
