"""Images that are held as bytes until somebody reads them: the numbers, the fields, and where they are made."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import pad_as_pillow_13

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.tiling import select_best_resolution
from deepseek_vl2.models.views import ByteTiles
from deepseek_vl2.training.collator import ConversationCollator

Processor = DeepseekVLV2Processor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "rgb": ("RGB", [(500, 430)]),
    "gray": ("L", [(300, 800)]),
    "rgba": ("RGBA", [(640, 480)]),
    "palette": ("P", [(90, 70)]),
    "one pixel": ("RGB", [(1, 1)]),
    "one tile": ("RGB", [(384, 384)]),
    "wide": ("RGB", [(3000, 3)]),
    "tall": ("RGB", [(2, 1800)]),
    "two": ("RGB", [(700, 500), (384, 768)]),
    "three": ("RGB", [(700, 500), (60, 61), (384, 384)]),
    "none": ("RGB", []),
}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    data = np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(data, "RGBA") if mode == "RGBA" else Image.fromarray(data[..., :3]).convert(mode)


def pictures(case: str) -> list[Image.Image]:
    mode, sizes = CASES[case]
    return [noise(*size, mode) for size in sizes]


def wanted(processor: Processor, images: list[Image.Image]) -> torch.Tensor:
    """Return the tiles by PIL's padding and float32 arithmetic, one step after the other, [V, 3, S, S]."""
    side, tiles = processor.image_size, []
    for image in images:
        rgba = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        rgb = rgba.convert("RGB") if image.mode == "RGBA" else image.convert("RGB")
        size = select_best_resolution(rgb.size, processor.candidate_resolutions) if len(images) <= 2 else (side, side)
        views = []
        for box in ((side, side), size):
            fits = min(box[0] / rgb.width, box[1] / rgb.height)
            scaled = (max(1, round(rgb.width * fits)), max(1, round(rgb.height * fits)))
            if min(rgb.size) <= 3:  # so thin that Pillow's own padding may find no pixel
                field = Image.new("RGB", box, (127, 127, 127))
                shown = rgb.resize(scaled, Image.Resampling.BICUBIC)
                field.paste(shown, (round((box[0] - shown.width) * 0.5), round((box[1] - shown.height) * 0.5)))
            else:
                field = pad_as_pillow_13(rgb, box, (127, 127, 127))
            views.append(field)
        tiles.append(views[0])
        corners = [(x, y) for y in range(0, size[1], side) for x in range(0, size[0], side)]
        tiles += [views[1].crop((x, y, x + side, y + side)) for x, y in corners]
    if not tiles:
        return torch.zeros(1, 3, side, side)
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2)
    return pixels.float().div_(255).sub_(0.5).div_(0.5).contiguous()


def process(processor: Processor, case: str, **settings: Any) -> Any:
    images = pictures(case)
    return processor(prompt="<image>" * len(images) + "hi", images=images, **settings)


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_arithmetic_in_each_dtype(processor: Processor, case: str) -> None:
    want = wanted(processor, pictures(case))
    sample = process(processor, case, force_batchify=False)
    assert isinstance(sample.held()["images"], ByteTiles)
    assert torch.equal(sample.images, want) and sample.images.is_contiguous() and sample["images"] is sample.images
    for dtype in DTYPES:
        for moved in (process(processor, case).to("cpu", dtype), process(processor, case).to(dtype).to("cpu")):
            assert moved.images.dtype == dtype and torch.equal(moved.images, want[None].to(dtype))
    twice = process(processor, case).to(torch.float16).to(torch.float32)
    assert torch.equal(twice.images, want[None].to(torch.float16).float())


def test_rows_with_fewer_tiles_end_in_zeros_of_numbers(processor: Processor) -> None:
    cases = ["three", "none", "gray", "one pixel"]
    images = [pictures(case) for case in cases]
    batch = processor(prompt=["<image>" * len(row) + "hi" for row in images], images=images)
    assert isinstance(batch.held()["images"], ByteTiles)
    want = [wanted(processor, row) for row in images]
    for row, tiles in zip(batch.images, want, strict=True):
        assert torch.equal(row[: len(tiles)], tiles) and not row[len(tiles) :].any()


def test_a_sample_that_was_read_or_changed_is_batched_as_it_is(processor: Processor) -> None:
    read, other = (process(processor, "gray", force_batchify=False) for _ in range(2))
    read.images.mul_(2)
    single, both = processor.batchify([read]), processor.batchify([read, other])
    assert single.images.data_ptr() == read.images.data_ptr()
    assert torch.equal(both.images[0], read.images) and torch.equal(both.images[1] * 2, read.images)
    cast = process(processor, "gray", force_batchify=False).to(torch.bfloat16)
    assert torch.equal(processor.batchify([other, cast]).images[1], cast.images.float())


def test_bytes_travel_and_numbers_are_made_where_they_arrive(processor: Processor) -> None:
    moved = process(processor, "rgb").to("meta", torch.bfloat16)
    held = moved.held()["images"]
    assert held.bytes.dtype == torch.uint8 and held.bytes.device.type == "meta"
    assert moved.images.device.type == "meta" and moved.images.dtype == torch.bfloat16
    assert moved.images.shape == process(processor, "rgb").images.shape


@pytest.mark.parametrize("batched", [True, False])
def test_fields_behave_as_in_a_dict(processor: Processor, batched: bool) -> None:
    def fresh() -> Any:
        return process(processor, "palette", force_batchify=batched)

    want = fresh().images
    for read in (
        lambda out: out["images"],
        lambda out: out.images,
        lambda out: out.get("images"),
        lambda out: {**out}["images"],
        lambda out: dict(out)["images"],
        lambda out: dict(out.items())["images"],
        lambda out: list(out.values())[list(out).index("images")],
        lambda out: out.data["images"],
        lambda out: (out | {})["images"],
        lambda out: out.pop("images"),
        lambda out: copy.copy(out).images,
        lambda out: out.copy().images,
        lambda out: copy.deepcopy(out).images,
        lambda out: pickle.loads(pickle.dumps(out)).images,
    ):
        assert torch.equal(read(fresh()), want)
    out = fresh()
    assert "images" in out and "nothing" not in out and out == out and copy.copy(out) == out
    assert copy.copy(out).images is out.images
    out = fresh()
    out["images"] = None
    assert out.images is None and "tensor" in repr(fresh())
    del out["images"]
    assert "images" not in out


def test_pickles_hold_bytes(processor: Processor) -> None:
    batch = process(processor, "rgb")
    again = pickle.loads(pickle.dumps(batch))
    assert type(again) is type(batch) and isinstance(again.held()["images"], ByteTiles)
    assert again.keys() == batch.keys() and torch.equal(again.images, batch.images)


def test_images_first_read_in_inference_mode_can_be_trained_on(processor: Processor) -> None:
    batch = process(processor, "palette")
    with torch.inference_mode():
        assert not batch.images.is_inference()


def test_the_number_of_threads_changes_nothing(processor: Processor, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        noise(400 + index, 300).save(path)
    threads, got = torch.get_num_threads(), []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            got.append(processor(prompt="<image>" * 3, images=paths).images)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*got)
    with pytest.raises(FileNotFoundError, match="missing"):
        processor(prompt="<image>" * 3, images=[paths[0], tmp_path / "missing.png", paths[1]])


def test_the_callers_image_is_left_alone(processor: Processor, tmp_path: Path) -> None:
    image = noise(50, 40)
    before = image.tobytes()
    processor(prompt="<image><image>", images=[image, image])
    assert image.tobytes() == before and image.size == (50, 40)


@pytest.mark.parametrize("packing", [False, True])
def test_the_collator_casts_once(processor: Processor, packing: bool) -> None:
    conversations = [
        {
            "conversation": [
                {"role": "user", "content": "<image>" * count + "hi"},
                {"role": "assistant", "content": "a"},
            ],
            "images": [noise(80, 60)] * count,
        }
        for count in (1, 0, 2)
    ]
    batches = [
        ConversationCollator(processor, max_length=4096, packing=packing, image_dtype=dtype)(conversations)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert type(batches[1]["images"]) is torch.Tensor
    assert torch.equal(batches[0]["images"].bfloat16(), batches[1]["images"])
