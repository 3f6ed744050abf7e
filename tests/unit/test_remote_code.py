"""A directory saved with its code loads where this package is not importable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import save_with_code

PICTURE = Path(__file__).resolve().parents[2] / "images" / "table.png"
CONVERSATION = [{"role": "user", "content": "<image>\nWhat is this?", "images": [str(PICTURE)]}]
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image", "path": str(PICTURE)}, {"type": "text", "text": "What is this?"}],
    }
]

# Runs in another process, in which importing the package fails.
STRANGER = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepseek_vl2":
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline
directory, conversation, messages = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
inputs = processor(conversations=conversation)
answers = []
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    model = auto_class.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    answers.append(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist())
ask = pipeline("image-text-to-text", model=directory, trust_remote_code=True, dtype=torch.float32)
said = ask(text=messages, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
print("RESULT" + json.dumps({"answers": answers, "said": said}))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeepseekVLV2ForCausalLM, DeepseekVLV2Processor]:
    path = write_demo_checkpoint(tmp_path_factory.mktemp("demo"))
    model = DeepseekVLV2ForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), DeepseekVLV2Processor.from_pretrained(path)


def ask_a_stranger(directory: Path, home: Path) -> dict[str, Any]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    arguments = [str(directory), json.dumps(CONVERSATION), json.dumps(MESSAGES)]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT", 1)[1])


def check(result: dict[str, Any], demo: tuple[Any, Any]) -> None:
    model, processor = demo
    inputs = processor(conversations=CONVERSATION)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    assert result["answers"] == [ids.tolist()] * 2
    new = processor.tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert result["said"].strip() == new.strip()


def test_save_with_code(demo: tuple[Any, Any], tmp_path: Path) -> None:
    save_with_code(*demo, tmp_path / "saved")
    check(ask_a_stranger(tmp_path / "saved", tmp_path / "home"), demo)


@pytest.mark.slow
def test_register_for_auto_class(demo: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = demo
    for kind in (type(model), type(processor)):
        monkeypatch.setattr(kind, "_auto_class", None)
    type(model).register_for_auto_class("AutoModelForCausalLM")
    type(processor).register_for_auto_class("AutoProcessor")
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    check(ask_a_stranger(tmp_path / "saved", tmp_path / "home"), demo)
