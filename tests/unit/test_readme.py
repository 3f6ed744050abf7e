"""Every fenced Python example of the README runs, and so does its first command's program."""

from __future__ import annotations

import json
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


def run_python(arguments: list[str], cache_home: Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache_home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        timeout=300,
    )


WRONG = {
    "no_such_picture.png": ["--image", "no_such_picture.png"],
    "not an image": ["--image", "README.md"],
    "2 <image> tags but 1 images": ["--prompt", "<image> <image>", "--image", "images/table.png"],
    "no/such/place": ["--model_path", "no/such/place"],
    "--chunk_size must be positive": ["--chunk_size", "0"],
}

# Runs programs as a fresh interpreter would, each with names of its own; what takes seconds, imports, it does once.
RUN_ALL = """
import contextlib, io, json, runpy, sys, traceback

jobs = json.load(sys.stdin)
results = []
for job in jobs:
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if "example" in job:
                exec(compile(job["example"], "README.md", "exec"), {"__name__": "__main__"})
            else:
                sys.argv = ["inference.py", *job["arguments"]]
                runpy.run_path("inference.py", run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            said.write("" if isinstance(end.code, int) else str(end.code))
        except BaseException:
            code = 1
            traceback.print_exc()
    results.append((code, said.getvalue()))
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(cache_home: Path) -> list[tuple[int, str]]:
    """Exit code and output of each example, of each wrong call of inference.py, and of the first command."""
    jobs = [{"example": text} for text in EXAMPLES] + [{"arguments": arguments} for arguments in WRONG.values()]
    jobs.append({"arguments": ["--output", str(cache_home / "vg.png")]})
    done = run_python(["-c", RUN_ALL], cache_home, json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[tuple[int, str]] = json.loads(done.stdout.rpartition("RESULTS")[2])
    return found


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=[e.strip().splitlines()[-1][:40] for e in EXAMPLES])
def test_example_runs(number: int, results: list[tuple[int, str]]) -> None:
    code, said = results[number]
    assert code == 0, said[-2000:]


def test_the_first_command_finds_what_the_readme_shows(cache_home: Path, results: list[tuple[int, str]]) -> None:
    code, said = results[-1]
    assert code == 0, said[-2000:]
    found = parse_grounding(said.split("<|Assistant|>:")[1])
    assert {reference.label for reference in found} == set(SHAPES)
    for reference in found:
        # the boxes that were drawn: see images/README.md
        assert iou(reference.boxes[0], SHAPES[reference.label]) > 0.75, reference
    drawing = Image.open(cache_home / "vg.png")
    assert drawing.size == Image.open(ROOT / "images" / "shapes.png").size
    assert drawing.tobytes() != Image.open(ROOT / "images" / "shapes.png").convert("RGB").tobytes()


@pytest.mark.parametrize("words", WRONG)
def test_inference_says_what_is_wrong(words: str, results: list[tuple[int, str]]) -> None:
    code, said = results[len(EXAMPLES) + list(WRONG).index(words)]
    assert code != 0
    assert words in said
    assert "Traceback" not in said
