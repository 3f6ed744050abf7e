"""The small model through transformers' own doors: Auto classes, pipelines, and the package's names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support import mini_processor, noise_image

import deepseek_vl2
from deepseek_vl2.models import (
    DeepseekVLV2Config,
    DeepseekVLV2ForCausalLM,
    DeepseekVLV2ImageProcessor,
    DeepseekVLV2Processor,
    bundled,
)

MODELS = ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"]


@pytest.mark.parametrize("name", MODELS)
def test_auto_models(name: str) -> None:
    model = getattr(transformers, name).from_pretrained(deepseek_vl2.nano_path())
    assert type(model) is DeepseekVLV2ForCausalLM
    with torch.no_grad():
        assert model(torch.tensor([[5, 6]])).last_hidden_state.shape == (1, 2, 256)


def test_the_other_auto_classes() -> None:
    nano = deepseek_vl2.nano_path()
    assert type(transformers.AutoConfig.from_pretrained(nano)) is DeepseekVLV2Config
    assert type(transformers.AutoProcessor.from_pretrained(nano)) is DeepseekVLV2Processor
    assert type(transformers.AutoImageProcessor.from_pretrained(nano)) is DeepseekVLV2ImageProcessor
    text = "Two words,  two spaces."
    tokenizer = transformers.AutoTokenizer.from_pretrained(nano)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_packages_classes_know_nano_by_name() -> None:
    for kind in (DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2ImageProcessor, DeepseekVLV2Processor):
        assert type(kind.from_pretrained("nano")) is kind


def test_a_pipeline() -> None:
    ask = transformers.pipeline("image-text-to-text", model=deepseek_vl2.nano_path(), dtype=torch.float32)
    parts = [{"type": "image", "image": noise_image(1)}, {"type": "text", "text": "What is it?"}]
    said = ask(text=[{"role": "user", "content": parts}], max_new_tokens=3, return_full_text=False)
    assert isinstance(said[0]["generated_text"], str)


def test_an_installation_without_nano_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "NANO_NAME", "pico")
    with pytest.raises(FileNotFoundError, match="from a release"):
        bundled.nano_path()


def test_every_name_of_the_package_can_be_had_and_costs_nothing_before() -> None:
    for name in deepseek_vl2.__all__:
        assert getattr(deepseek_vl2, name).__name__ == name
    code = "import sys, deepseek_vl2; dir(deepseek_vl2); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------- the image processor


def test_images_alone_become_the_processors_tiles(tmp_path: Path) -> None:
    processor = mini_processor()
    images = [noise_image(1), noise_image(2, 150, 70)]
    want = processor(text="<image><image>", images=images, return_tensors="pt")
    got = processor.image_processor(images=images)
    assert list(got) == ["pixel_values", "image_sizes"]
    assert torch.equal(got.pixel_values, want.pixel_values) and torch.equal(got.image_sizes, want.image_sizes)
    rows = processor.image_processor([[images[0], images[0], images[0]], None, [images[1]]], return_tensors="np")
    assert isinstance(rows["pixel_values"], np.ndarray)
    assert rows["image_sizes"].tolist() == [[70, 70]] * 3 + [[70, 210]]
    assert processor.image_processor(images[1], cropping=False)["image_sizes"].tolist() == [[70, 70]]
    path = tmp_path / "a.png"
    images[0].save(path)
    assert torch.equal(processor.image_processor(path).pixel_values[0], got.pixel_values[0, :2])


def test_what_an_image_processor_cannot_do_is_an_error() -> None:
    images = mini_processor().image_processor
    with pytest.raises(ValueError, match="no images"):
        images([])
    with pytest.raises(TypeError, match="do_resize"):
        images(Image.new("RGB", (5, 5)), do_resize=False)
    with pytest.raises(ValueError, match="'tf'"):
        images(Image.new("RGB", (5, 5)), return_tensors="tf")
