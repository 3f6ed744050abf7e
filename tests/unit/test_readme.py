"""Every fenced Python example of the README runs, and so does its first command's program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deepseek_vl2.synthetic.suite import iou
from deepseek_vl2.utils.grounding import parse_grounding

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)

# What images/shapes.png shows, in thousandths of its sides.
SHAPES = {
    "a large green ring": (84, 81, 391, 371),
    "a small blue arrow": (86, 605, 214, 761),
    "a large blue cross": (248, 440, 542, 718),
    "a large green arrow": (580, 142, 892, 373),
    "a large red circle": (598, 465, 958, 806),
}


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run_python(arguments: list[str], cache_home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache_home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.strip().splitlines()[-1][:40])
def test_example_runs(example: str, cache_home: Path) -> None:
    done = run_python(["-c", example], cache_home)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_first_command_finds_what_the_readme_shows(cache_home: Path) -> None:
    done = run_python(["inference.py", "--output", str(cache_home / "vg.png")], cache_home)
    assert done.returncode == 0, done.stderr[-2000:]
    found = parse_grounding(done.stdout.split("<|Assistant|>:")[1])
    assert {reference.label for reference in found} == set(SHAPES)
    for reference in found:
        # the boxes that were drawn: see images/README.md
        assert iou(reference.boxes[0], SHAPES[reference.label]) > 0.75, reference
    drawing = Image.open(cache_home / "vg.png")
    assert drawing.size == Image.open(ROOT / "images" / "shapes.png").size
    assert drawing.tobytes() != Image.open(ROOT / "images" / "shapes.png").convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "no_such_picture.png"], "no_such_picture.png"),
        (["--image", "README.md"], "not an image"),
        (["--prompt", "<image> <image>", "--image", "images/table.png"], "2 <image> tags but 1 images"),
        (["--model_path", "no/such/place"], "no/such/place"),
        (["--chunk_size", "0"], "--chunk_size must be positive"),
    ],
)
def test_inference_says_what_is_wrong(arguments: list[str], words: str, cache_home: Path) -> None:
    done = run_python(["inference.py", *arguments], cache_home)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
