"""Images may be numpy arrays, PyTorch tensors, open files and paths, alone or several, and read the same."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import MINI_TILE, mini_processor, noise_image

from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.utils.io import load_pil_images

PROCESSOR = mini_processor()
PICTURE = noise_image(1, 2 * MINI_TILE, MINI_TILE)
PIXELS = np.asarray(PICTURE).copy()
GRAY = np.asarray(PICTURE.convert("L")).copy()
ALPHA = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)])

COLOUR: dict[str, Any] = {
    "numpy": PIXELS,
    "numpy, channels first": PIXELS.transpose(2, 0, 1),
    "numpy, 0 to 1": (PIXELS / 255).astype(np.float32),
    "numpy, float64 to 255": PIXELS.astype(np.float64),
    "numpy, 16 bits": PIXELS.astype(np.uint16) * 257,
    "numpy, int64": PIXELS.astype(np.int64),
    "numpy with alpha": ALPHA,
    "torch": torch.from_numpy(PIXELS).permute(2, 0, 1),
    "torch, channels last": torch.from_numpy(PIXELS),
    "torch, 0 to 1": torch.from_numpy(PIXELS).permute(2, 0, 1) / 255,
    "torch with gradients": (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255).requires_grad_(),
}


@pytest.mark.parametrize("name", COLOUR)
def test_an_array_reads_as_its_picture(name: str) -> None:
    source = COLOUR[name]
    want = PROCESSOR(prompt="<image>", images=[PICTURE])
    for got in (
        PROCESSOR(prompt="<image>", images=[source]),
        PROCESSOR(prompt="<image>", images=source),
        PROCESSOR(conversations=[{"role": "user", "content": "<image>", "images": [source]}]),
        PROCESSOR(conversations=[{"role": "user", "content": [{"type": "image", "image": source}]}]),
    ):
        assert torch.equal(got.images, want.images)
    assert load_pil_images([{"images": [source]}])[0].tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize(
    "source", [GRAY, GRAY[..., None], GRAY[None], torch.from_numpy(GRAY), torch.from_numpy(GRAY)[None]]
)
def test_gray_arrays(source: Any) -> None:
    assert load_image(source).tobytes() == PICTURE.convert("L").convert("RGB").tobytes()


def test_arrays_of_two_values() -> None:
    bits = GRAY > 100
    want = Image.fromarray(bits.astype(np.uint8) * 255).convert("RGB").tobytes()
    assert load_image(bits).tobytes() == want == load_image(torch.from_numpy(bits)).tobytes()


@pytest.mark.parametrize("make", [np.stack, lambda pictures: torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)])
def test_a_batch_is_several_images(make: Any) -> None:
    other = np.asarray(noise_image(2, 2 * MINI_TILE, MINI_TILE))
    got = PROCESSOR(prompt="<image><image>", images=make([PIXELS, other]))
    want = PROCESSOR(prompt="<image><image>", images=[PICTURE, noise_image(2, 2 * MINI_TILE, MINI_TILE)])
    assert torch.equal(got.images, want.images)


def test_half_precision_tensors_are_near() -> None:
    got = np.asarray(load_image((torch.from_numpy(PIXELS).permute(2, 0, 1) / 255).bfloat16()))
    assert np.abs(got.astype(int) - PIXELS).max() <= 1


NO_IMAGES: list[Any] = [
    np.zeros((5,), np.uint8),
    np.zeros((2, 3, 4, 5, 3), np.uint8),
    np.zeros((9, 9, 7), np.uint8),
    np.zeros((0, 5, 3), np.uint8),
    np.array([["a"]]),
    np.zeros((4, 4), complex),
    np.full((4, 4), np.nan, np.float32),
    torch.full((3, 4, 4), float("inf")),
]


@pytest.mark.parametrize("source", NO_IMAGES)
def test_an_array_that_is_no_image_is_an_error(source: Any) -> None:
    with pytest.raises(ValueError):
        PROCESSOR(prompt="<image>", images=[source])


def test_the_array_is_left_alone_and_may_change_afterwards() -> None:
    pixels = PIXELS.copy()
    out = PROCESSOR(prompt="<image>", images=[pixels])
    pixels[:] = 0
    assert torch.equal(out.images, PROCESSOR(prompt="<image>", images=[PICTURE]).images)


def test_open_files_and_paths(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PICTURE.save(path)
    want = PROCESSOR(prompt="<image>", images=[PICTURE]).images
    buffer = io.BytesIO(path.read_bytes())
    with open(path, "rb") as file:
        sources: list[Any] = [file, buffer, path, str(path), path.read_bytes(), bytearray(path.read_bytes())]
        for source in sources:
            if hasattr(source, "seek"):
                assert torch.equal(PROCESSOR(prompt="<image>", images=source).images, want)
                source.seek(0)
            got = PROCESSOR(prompt="<image>", images=[source]).images
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match="not an image"):
        PROCESSOR(prompt="<image>", images=[io.BytesIO(b"words")])


def test_an_open_file_is_read_from_its_beginning_each_time(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        for _ in range(2):
            assert np.array_equal(np.asarray(load_image(file)), PIXELS)


def test_a_file_of_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="open it with mode 'rb'"):
        load_image(io.StringIO("x"))


def test_tensors_without_pixels_and_sparse_ones() -> None:
    with pytest.raises(ValueError, match="device meta has no pixels"):
        load_image(torch.zeros(3, 8, 8, device="meta"))
    assert np.array_equal(np.asarray(load_image(torch.from_numpy(PIXELS).to_sparse())), PIXELS)
