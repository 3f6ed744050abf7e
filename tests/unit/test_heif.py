"""HEIC images are read wherever images are, where their package is installed; without it, a sentence says so."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import mini_processor

from deepseek_vl2.models import heif
from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.serve.api.decode_process import Decoders
from deepseek_vl2.serve.api.images import decode_images
from deepseek_vl2.serve.api.settings import ImageLimits
from deepseek_vl2.training.data import ConversationDataset

HEADER = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


def heic(size: tuple[int, int], orientation: int = 1) -> tuple[bytes, Image.Image]:
    """Return a file whose picture is to be turned, and the picture as it is to be seen."""
    package = pytest.importorskip("pillow_heif")
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = Image.fromarray(np.stack([x, y, np.where(x > y, 200, 20)], axis=-1).astype(np.uint8))
    stored = picture.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else picture
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    package.from_pillow(stored).save(file, quality=95, exif=exif.tobytes())
    return file.getvalue(), picture


def assert_alike(got: Image.Image, want: Image.Image) -> None:
    assert got.mode == "RGB" and got.size == want.size
    assert np.abs(np.asarray(got).astype(int) - np.asarray(want).astype(int)).mean() < 6


@pytest.mark.parametrize("orientation", [1, 6])
def test_every_way_reads_heic_upright(tmp_path: Path, orientation: int) -> None:
    data, picture = heic((64, 32), orientation)
    path = tmp_path / "photo.heic"
    path.write_bytes(data)
    url = "data:image/heic;base64," + base64.b64encode(data).decode()
    for source in (data, path, str(path), url, io.BytesIO(data)):
        assert_alike(load_image(source), picture)
    line = '[{"role": "user", "content": "<image>", "images": ["photo.heic"]}, {"role": "assistant", "content": "a"}]'
    (tmp_path / "data.jsonl").write_text(line)
    assert_alike(ConversationDataset(tmp_path / "data.jsonl")[0]["images"][0], picture)
    assert len(mini_processor()(prompt="<image>", images=[path]).input_ids) == 1


def test_large_ones_are_decoded_in_a_process_of_their_own() -> None:
    decoders = Decoders(processes=1)
    try:
        data, picture = heic((1301, 803), 6)
        assert_alike(decode_images([("messages.0", data)], ImageLimits(), decoders)[0], picture)
        assert decoders.running == 1
    finally:
        decoders.stop()


def test_without_the_package_a_sentence_names_file_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "find_spec", lambda name: None)
    path = tmp_path / "photo.heic"
    path.write_bytes(HEADER)
    for source in (HEADER, path):
        with pytest.raises(ValueError, match=r"HEIC image.*deepseek_vl2\[heif\]") as told:
            load_image(source)
        assert isinstance(source, bytes) or str(path) in str(told.value)


def test_damaged_ones_are_told(tmp_path: Path) -> None:
    data, _ = heic((64, 32))
    for wrong in (HEADER, data[: len(data) // 2]):
        path = tmp_path / "photo.heic"
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"photo\.heic"):
            load_image(path)
