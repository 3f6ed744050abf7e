"""Bring into the site what its pages link to outside of docs/: pictures, results of benchmarks, nano's card.

Links stay as they are written, relative to the file, so that they work in the repository too.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from notebooks import notebook_of, page_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
CARD = "deepseek_vl2/assets/nano/README.md"
LOGO = "images/logo.svg"
# [text](target#part), and the src and srcset of pictures written as HTML.
LINK = re.compile(r"""(\]\(|\bsrc=["']|\bsrcset=["'])(?!https?:|#|mailto:|data:)([^)#"'\s]+)""")


def repository_path(page: str) -> str:
    """Return where a page of the site lies in the repository."""
    return DOCS + page if (ROOT / DOCS / page).is_file() or notebook_of(DOCS + page) else page


def text_of(path: str) -> str:
    """Return the Markdown of a page by its path in the repository."""
    notebook = notebook_of(path)
    return page_of(notebook) if notebook else (ROOT / path).read_text(encoding="utf-8")


def linked_files(path: str) -> Iterator[str]:
    """Return the repository's files that a Markdown file links to."""
    for match in LINK.finditer(text_of(path)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if (ROOT / target).is_file() and not target.startswith(".."):
            yield target


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and what those link to."""
    waiting = [DOCS + file.src_uri for file in files.documentation_pages()] + [CARD, LOGO]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith(DOCS):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            found = set(linked_files(path)) - seen
            seen |= found
            waiting.extend(found)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that are relative to a file in the repository into those between the site's pages."""
    path = repository_path(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if not (ROOT / target).is_file():
            return match[0]
        inside = target.removeprefix(DOCS)
        if match[1] == "](" and posixpath.basename(target) != posixpath.basename(path).replace(".md", ".ipynb"):
            inside = inside.replace(".ipynb", ".md")  # a notebook's page; its own page offers the file itself
        if match[1] == "](":
            return match[1] + posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")
        # mkdocs leaves HTML as it is: relative to the page's own address
        return match[1] + posixpath.relpath(inside, page.url or ".")

    return LINK.sub(moved, markdown)
