"""Show the notebooks under docs/notebooks as pages of the site: their text and code, and the files to take along.

Outputs are not kept in the repository, and nothing is run while the site is built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = ".ipynb"


def page_of(notebook: Path) -> str:
    """Return a notebook as Markdown."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(
            text.replace(f"{SUFFIX})", ".md)") if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        )
    # below the title, which is the first cell's first line
    title, _, rest = parts[0].partition("\n")
    download = f'[Download this notebook]({notebook.name}){{ .md-button download="{notebook.name}" }}'
    return "\n\n".join([title, download, rest, *parts[1:]]) + "\n"


def notebook_of(page: str) -> Path | None:
    """Return the notebook that a page, by its path in the repository, is made from."""
    notebook = (ROOT / page).with_suffix(SUFFIX)
    return notebook if notebook.is_file() else None


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every notebook, beside the notebook itself."""
    for file in [file for file in files if file.src_uri.endswith(SUFFIX)]:
        page = file.src_uri.removesuffix(SUFFIX) + ".md"
        files.append(File.generated(config, page, content=page_of(Path(file.abs_src_path))))
    return files
