"""Take the pictures of the web demo in images/screenshots, in headless Chromium.

The answers in them are recited, so that they are the same each time: what the pictures show is the page.

    python images/screenshots.py [--out DIR]
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "apps"))

from web_support import DemoPage, ScriptedBackend, chromium_missing, open_browser  # noqa: E402

from deepseek_vl2.serve.web.backend import LoadStatus  # noqa: E402
from deepseek_vl2.serve.web.layout import build_page  # noqa: E402
from deepseek_vl2.serve.web.limits import Limits  # noqa: E402
from deepseek_vl2.serve.web.server import launch  # noqa: E402

COLORS = 256  # of the saved pictures: a page has few
ANSWERS: dict[str, str | Exception] = {
    "trash": "Take the <|ref|>tied rubbish bag<|/ref|><|det|>[[568, 768, 680, 915]]<|/det|> and put it into the "
    "<|ref|>open pedal bin<|/ref|><|det|>[[758, 506, 901, 913]]<|/det|> beside the cupboard.",
    "giraffe": "<|ref|>The giraffe at the back.<|/ref|><|det|>[[704, 438, 917, 686]]<|/det|>",
    "": "",
}
Steps = Callable[[DemoPage], None]


def ask_example(number: int) -> Steps:
    """Return what sends an example and waits for its boxes."""

    def steps(page: DemoPage) -> None:
        page.all("#chat .example")[number].click()
        page.until(lambda: page.all("#box .thumbnail-item"))
        page.ask("")
        page.until(lambda: page.pictures("bot"))
        page.until_idle()

    return steps


def begin(page: DemoPage) -> None:
    """Wait for the examples' pictures."""
    script = "return [...document.querySelectorAll('#chat .example img')].every(e => e.naturalWidth)"
    page.until(lambda: page.browser.execute_script(script))


def open_settings(page: DemoPage) -> None:
    """Open the settings beside the examples."""
    begin(page)
    page.all(".toggle-button")[0].click()


# name, width, height, dark, what to do
SHOTS: tuple[tuple[str, int, int, bool, Steps], ...] = (
    ("demo_desktop", 1280, 1020, False, ask_example(2)),
    ("demo_desktop_dark", 1280, 800, True, open_settings),
    ("demo_phone", 390, 844, False, ask_example(0)),
    ("demo_phone_dark", 390, 844, True, begin),
)


def save(png: bytes, path: Path) -> None:
    """Write a screenshot in few colours, which makes it several times smaller."""
    image = Image.open(BytesIO(png)).convert("RGB")
    image.quantize(COLORS, kmeans=3).save(path, optimize=True)


def take(address: str, out: Path) -> None:
    """Take all pictures."""
    for name, width, height, dark, steps in SHOTS:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            browser: Any = open_browser(width, height, folder, dark)
            try:
                page = DemoPage(browser, address)
                steps(page)
                browser.execute_script("document.activeElement.blur()")
                browser.execute_async_script("setTimeout(arguments[0], 800)")  # for movements to end
                save(browser.get_screenshot_as_png(), out / f"{name}.png")
            finally:
                browser.quit()


def main() -> int:
    """Serve the page with a scripted model, and take its pictures."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "screenshots")
    args = parser.parse_args()
    if chromium_missing():
        sys.stderr.write(f"screenshots.py {chromium_missing()}\n")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    backend = ScriptedBackend(ANSWERS, pause=0.01)
    backend.state = LoadStatus(ready=True, text="recited answers, to show the page")
    limits = Limits()
    page = build_page(backend, limits)
    try:
        take(launch(page, limits), args.out)
    finally:
        page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
