"""The notebooks of the documentation run as they are, on nano, and are kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "notebooks"
# What the last lines of output must hold, by notebook: nano's answers.
EXPECTED = {
    "quick_start": ("5", "Red.", "The second image.", "a large green ring"),
    "grounding": ("the blue cross", "a large red circle", "image/png", "text/html"),
    "fine_tuning": ("'Green.', 'Ada.'", "loss"),
}
SECONDS = 120  # for one cell, on a busy machine


def shown(notebook: Any) -> str:
    """Return all that a notebook's cells put out: texts, and the kinds of what is no text."""
    parts = []
    for output in [output for cell in notebook.cells for output in cell.get("outputs", [])]:
        data = output.get("data", {})
        parts += [output.get("text", ""), *data, data.get("text/plain", ""), data.get("text/html", "")]
    return "".join(parts)


def test_every_notebook_is_expected() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_notebooks_are_kept_without_outputs(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    cells = json.loads(path.read_text())["cells"]
    assert path.stat().st_size < 20_000
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
    for cell in cells:
        assert not cell["metadata"] and not cell.get("outputs") and cell.get("execution_count") is None
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_notebooks_run(name: str, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed (the extra 'tests' brings it)")
    nbclient = pytest.importorskip("nbclient")
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    (tmp_path / "images").symlink_to(ROOT / "images")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    output = shown(notebook)
    for text in EXPECTED[name]:
        assert text in output
    assert not list(folder.iterdir()), "a notebook leaves files beside itself"
