"""Images scaled by the kernel have the bytes that Pillow gives them, and they wait for the device unharmed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from support import mini_processor

from deepseek_vl2.engine import backend, images
from deepseek_vl2.models import DeepseekVLV2Processor, tiling, views
from deepseek_vl2.models.tiling import TileGrid
from deepseek_vl2.models.views import ByteTiles, Picture, Pictures, scale_image
from deepseek_vl2.ops.triton import image_resize
from deepseek_vl2.utils.demo import byte_tokenizer, candidate_resolutions

Processor = DeepseekVLV2Processor
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BICUBIC = Image.Resampling.BICUBIC
SIDE = 384


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


SIZES = [
    ((40, 30), (20, 15)),
    ((20, 15), (61, 47)),
    ((33, 50), (33, 17)),  # the height alone
    ((50, 33), (17, 33)),  # the width alone
    ((30, 30), (30, 30)),
    ((1, 1), (9, 5)),
    ((90, 60), (1, 1)),
    ((9, 200), (14, 30)),  # the height first, from Pillow 13 on
    ((120, 200), (119, 100)),
    ((200, 9), (30, 14)),
    ((257, 3), (64, 1)),
    ((100, 100), (99, 97)),  # the limit: not more than twice
]


@pytest.mark.parametrize(("size", "scaled"), SIZES)
def test_bytes_are_pillows(size: tuple[int, int], scaled: tuple[int, int]) -> None:
    pixels = noise(*size)
    want = np.asarray(scale_image(Image.fromarray(pixels), scaled))
    assert np.array_equal(image_resize.resize_plain(pixels, scaled, image_resize.is_height_first(size, scaled)), want)
    field = torch.full((scaled[1] + 3, scaled[0] + 5, 3), 77, dtype=torch.uint8, device=DEVICE)
    image_resize.resize_into(torch.from_numpy(pixels).to(DEVICE), field[2:-1, 4:-1])
    assert np.array_equal(field[2:-1, 4:-1].cpu().numpy(), want)
    field[2:-1, 4:-1] = 77
    assert bool((field == 77).all())  # nothing was written beside it


@pytest.mark.parametrize(("size", "scaled"), SIZES)
def test_the_order_of_the_sides_is_the_same_with_every_pillow(size: tuple[int, int], scaled: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    got = scale_image(image, scaled)
    first = tiling.is_height_first(size, scaled)
    assert first == image_resize.is_height_first(size, scaled)
    assert np.array_equal(np.asarray(got), image_resize.resize_plain(np.asarray(image), scaled, first))
    if int(PIL.__version__.partition(".")[0]) >= 13:
        assert np.array_equal(np.asarray(got), np.asarray(image.resize(scaled, BICUBIC)))


def test_bytes_are_pillows_for_any_size() -> None:
    random = np.random.default_rng(5)
    for _ in range(15):
        size, scaled = ((int(a), int(b)) for a, b in random.integers(1, 90, (2, 2)))
        pixels = noise(*size)
        out = torch.empty(scaled[1], scaled[0], 3, dtype=torch.uint8, device=DEVICE)
        image_resize.resize_into(torch.from_numpy(pixels).to(DEVICE), out)
        assert np.array_equal(out.cpu().numpy(), np.asarray(scale_image(Image.fromarray(pixels), scaled)))


def test_extreme_contrast_is_clipped_as_pillow_clips() -> None:
    pixels = np.where(noise(70, 50) > 127, np.uint8(255), np.uint8(0))
    out = torch.empty(131, 97, 3, dtype=torch.uint8, device=DEVICE)
    image_resize.resize_into(torch.from_numpy(pixels).to(DEVICE), out)
    assert np.array_equal(out.cpu().numpy(), np.asarray(Image.fromarray(pixels).resize((97, 131), BICUBIC)))


def test_a_pillow_that_scales_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest(self: Any, size: Any, *rest: Any) -> Any:
        return resize(self, size, Image.Resampling.NEAREST)

    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", nearest)
    image_resize.pillow_is_known.cache_clear()
    assert not image_resize.pillow_is_known()
    assert images.scale(pictures_of([noise(9, 9)]), DEVICE) is None
    monkeypatch.undo()
    image_resize.pillow_is_known.cache_clear()
    assert image_resize.pillow_is_known()


def test_gaps_are_refused() -> None:
    bytes_ = torch.zeros(4, 5, 6, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="gaps"):
        image_resize.resize_axis(bytes_.transpose(0, 1), torch.empty_like(bytes_))


# ---------------------------------------------------------------- tiles


def pictures_of(*samples: list[np.ndarray], side: int = 28, color: tuple[int, ...] = (127, 127, 127)) -> Pictures:
    grids = [TileGrid(2, 3), TileGrid(1, 1), TileGrid(3, 1)]
    rows = [tuple(Picture(pixels, grids[(i + j) % 3]) for j, pixels in enumerate(row)) for i, row in enumerate(samples)]
    values = torch.arange(768.0).view(3, 256)
    return Pictures(tuple(rows), side, color, values, batched=len(samples) > 1)


@pytest.mark.parametrize("color", [(127, 127, 127), (0, 122, 255)])
@pytest.mark.parametrize("samples", [[[(64, 48)]], [[(64, 48), (9, 70)], [(28, 28)], [(300, 2), (56, 84), (5, 5)]]])
def test_tiles_are_those_of_the_host(samples: list[list[tuple[int, int]]], color: tuple[int, ...]) -> None:
    pictures = pictures_of(*([noise(*size) for size in row] for row in samples), color=color)
    want, got = pictures.tiles(), images.scale(pictures, DEVICE)
    assert got is not None and want.counts == pictures.counts
    assert torch.equal(got.cpu() if pictures.batched else got[0].cpu(), want.bytes)


# ---------------------------------------------------------------- in the processor's batches


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Make images wait for a device that scales them; what comes on "meta" was scaled, by count of its samples."""
    scaled: list[int] = []

    def scale(pictures: Pictures, device: torch.device) -> torch.Tensor | None:
        if device.type != "meta":
            return None
        scaled.append(len(pictures.samples))
        out = images.scale(pictures, DEVICE)
        return None if out is None else out.to(device)

    monkeypatch.setattr(backend, "may_scale", lambda: True)
    monkeypatch.setattr(backend, "scale", scale)
    yield scaled


SAMPLES = [[(500, 300)], [], [(90, 70), (200, 900)], [(60, 61), (384, 384), (5, 9)]]


def process(processor: Processor, samples: list[list[tuple[int, int]]], **settings: Any) -> Any:
    images = [[Image.fromarray(noise(*size)) for size in row] for row in samples]
    return processor(prompt=["<image>" * len(row) + "hi" for row in samples], images=images, **settings)


def test_a_batch_that_waited_is_the_batch(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    for samples in (SAMPLES, SAMPLES[:1], SAMPLES[2:]):
        want = process(processor, samples)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "may_scale", lambda: True)
            patch.setattr(backend, "scale", lambda *given: None)
            got = process(processor, samples)
            again = pickle.loads(pickle.dumps(got))
            copied = copy.deepcopy(got).to("cpu", torch.bfloat16)
        assert isinstance(got.held()["images"], ByteTiles if [] in samples else Pictures)
        assert isinstance(again.held()["images"], ByteTiles)  # what is sent to another process is small
        assert torch.equal(got.images, want.images) and torch.equal(again.images, want.images)
        assert torch.equal(copied.images, want.images.bfloat16())
        assert list(got) == list(want) and all(torch.equal(got[n], want[n]) for n in want if torch.is_tensor(want[n]))


def test_images_are_scaled_where_they_go(waiting: list[int]) -> None:
    processor, samples = mini_processor(), [[(5, 9)], [(40, 40), (7, 2)]]  # of small tiles
    batch = process(processor, samples)
    assert isinstance(batch.held()["images"], Pictures) and not waiting
    moved = batch.to("meta", torch.bfloat16)
    assert waiting == [2] and isinstance(moved.held()["images"], ByteTiles)
    assert moved.images.shape == process(processor, samples).images.shape and moved.images.dtype == torch.bfloat16


def test_the_callers_image_may_change_while_tiles_wait(processor: Processor, waiting: list[int]) -> None:
    image = Image.fromarray(noise(50, 60))
    batch = processor(prompt="<image>", images=[image])
    image.paste((0, 0, 0), (0, 0, 50, 60))
    want = processor(prompt="<image>", images=[Image.fromarray(noise(50, 60))]).images
    assert torch.equal(batch.images, want)


def test_large_images_and_those_of_loaders_do_not_wait(
    processor: Processor, waiting: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(views, "MAX_PIXELS_KEPT", 2999)
        assert isinstance(process(processor, [[(50, 60)]]).held()["images"], ByteTiles)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.data, "get_worker_info", object)
        assert isinstance(process(processor, [[(50, 60)]]).held()["images"], ByteTiles)
    assert isinstance(process(processor, [[(50, 60)]]).held()["images"], Pictures)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor(byte_tokenizer(), candidate_resolutions())
    torch.zeros(1, device=DEVICE)
    assert isinstance(process(processor, SAMPLES[2:]).held()["images"], Pictures)
    for samples in (SAMPLES, SAMPLES[:1], SAMPLES[2:], [[(1024, 768)]], [[(3000, 2000)]], [[(700, 2900)]]):
        got = process(processor, samples).to(DEVICE).images.cpu()
        with monkeypatch.context() as patch:
            patch.setattr(backend, "may_scale", lambda: False)
            assert torch.equal(got, process(processor, samples).images)
