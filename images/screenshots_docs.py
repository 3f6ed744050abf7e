"""Take the pictures of the documentation and of the README's top in images/screenshots, in headless Chromium.

mkdocs build --strict && python images/screenshots_docs.py [--site site] [--out DIR]
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import markdown
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests" / "apps"))

from web_support import chromium_missing, open_browser  # noqa: E402

QUALITY = 80
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
PAGES = {"docs": "", "docs_performance": "performance/", "docs_nano": "nano/#curves"}
README = "README.html"
# Much like the page that a code host makes of a README, in its light and its dark colours.
FRAME = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>README</title><style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 860px; margin: 24px auto; padding: 0 16px; font: 16px/1.5 system-ui, sans-serif;
  color: light-dark(#1f2328, #f0f6fc); background: light-dark(#fff, #0d1117); }}
h1, h2 {{ padding-bottom: .3em; border-bottom: 1px solid light-dark(#d1d9e0, #3d444d); }}
a {{ color: light-dark(#0969da, #4493f8); }}
img {{ max-width: 100%; }}
code, pre {{ background: light-dark(#f6f8fa, #151b23); border-radius: 6px; font-size: 85%; }}
pre {{ padding: 16px; overflow: auto; }}
table {{ display: block; overflow: auto; border-collapse: collapse; }}
td, th {{ padding: 6px 13px; border: 1px solid light-dark(#d1d9e0, #3d444d); }}
</style><body>{}"""


class Files(SimpleHTTPRequestHandler):
    """Serves the site, the README as a page, and the pictures that it shows."""

    def __init__(self, *args: Any, site: Path, **options: Any) -> None:
        self.site = site
        super().__init__(*args, directory=str(ROOT), **options)

    def translate_path(self, path: str) -> str:
        """Return the file for an address: below /site/ the built site, else the repository."""
        found = super().translate_path(path)
        inside = Path(found).relative_to(ROOT)
        return str(self.site.joinpath(*inside.parts[1:])) if inside.parts[:1] == ("site",) else found

    def do_GET(self) -> None:
        """Answer with a file, or with the README."""
        if self.path != f"/{README}":
            super().do_GET()
            return
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        page = FRAME.format(markdown.markdown(text, extensions=["tables", "fenced_code", "md_in_html"])).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve on this machine alone, and give the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, site=site))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def take(address: str, out: Path) -> None:
    """Take all pictures: each page, light and dark, on a desktop and on a phone."""
    pages = {name: f"{address}/site/{path}" for name, path in PAGES.items()} | {"readme": f"{address}/{README}"}
    for size, (width, height) in SIZES.items():
        for dark in (False, True):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                browser = open_browser(width, height, folder, dark)
                try:
                    for name, page in pages.items():
                        browser.get(page)
                        browser.execute_async_script("setTimeout(arguments[0], 500)")  # for pictures and colours
                        shot = Image.open(BytesIO(browser.get_screenshot_as_png())).convert("RGB")
                        shot.save(out / f"{name}_{size}{'_dark' if dark else ''}.webp", quality=QUALITY, method=6)
                finally:
                    browser.quit()


def main() -> int:
    """Serve the built site and the README, and take their pictures."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, default=ROOT / "site", help="what mkdocs built (default: site)")
    parser.add_argument("--out", type=Path, default=HERE / "screenshots")
    args = parser.parse_args()
    missing = chromium_missing()
    if missing or not (args.site / "index.html").is_file():
        sys.stderr.write(f"screenshots_docs.py {missing or 'needs the built site: run mkdocs build first'}\n")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    with served(args.site.resolve()) as address:
        take(address, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
