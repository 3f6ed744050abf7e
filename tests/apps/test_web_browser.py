"""The web demo in headless Chromium: what visitors do, through the real page.

The model is a script, but for the last test: golden checkpoints answer noise, and noise has no boxes.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from web_support import GIRAFFE, DemoPage, ScriptedBackend, chromium_missing, open_browser, requested_hosts

pytest.importorskip("gradio", reason='needs Gradio: pip install "deepseek_vl2[gradio]"')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(chromium_missing()), reason=chromium_missing()),
]

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "images"
CAT, GIRAFFES = IMAGES / "multi_image_2.jpeg", IMAGES / "visual_grounding_1.jpeg"
LONG = "word " * 4000
RED = (230, 25, 75)


@pytest.fixture
def backend() -> ScriptedBackend:
    answers = {"giraffe": f"Here it is: {GIRAFFE} It looks to the left.", "long": LONG, "boom": RuntimeError("a fuse")}
    return ScriptedBackend({**answers, "": "A plain answer."}, pause=0.04)


@pytest.fixture
def address(backend: ScriptedBackend) -> Iterator[str]:
    from deepseek_vl2.serve.web.layout import build_page
    from deepseek_vl2.serve.web.limits import Limits
    from deepseek_vl2.serve.web.server import launch

    limits = Limits(images=2)
    page = build_page(backend, limits)
    yield launch(page, limits)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = open_browser(1280, 800, folder)
        yield browser
        browser.quit()


def colors_of(address: str) -> set[tuple[int, int, int]]:
    with urllib.request.urlopen(address) as response:
        image = Image.open(io.BytesIO(response.read())).convert("RGB")
    return {color for _, color in image.getcolors(1 << 24)}


def test_a_conversation(browser: Any, address: str, backend: ScriptedBackend) -> None:
    page = DemoPage(browser, address)
    page.upload(CAT, GIRAFFES)
    page.ask("Where is the giraffe?")

    # the answer grows, and no half of a tag is ever seen
    lengths = set()
    while not page.pictures("bot"):
        text = (page.until(page.answers) or [""])[-1]
        assert "<" not in text and "[" not in text
        lengths.add(len(text))
    assert len(lengths) > 3, "the answer did not stream"
    page.until_idle()
    assert page.answers()[0].startswith("Here it is: The giraffe at the back. It looks to the left.")
    assert page.text("#chat .ref") == "The giraffe at the back."
    assert len(page.pictures("user")) == 2

    # drawn on the second picture, in the colour of the label
    (drawing,) = page.pictures("bot")
    reds = [color for color in colors_of(drawing) if max(abs(a - b) for a, b in zip(color, RED, strict=True)) < 25]
    assert reds, "no box is drawn"
    assert page.text("#chat .boxes summary").startswith("1 box in pixels")

    page.press("Regenerate")
    page.until(lambda: len(backend.seen) == 2)
    page.until_idle()
    assert len(page.answers()) == 1
    first, again = (messages for messages, _ in backend.seen)
    assert first == again and first[0]["content"] == "<image>\n<image>\nWhere is the giraffe?"

    page.ask("Tell a long story.")
    page.until(lambda: len(page.answers()) == 2 and "word word" in page.answers()[1])
    page.stop()
    page.until(lambda: page.answers()[1].endswith("Stopped."), seconds=3)
    page.until(lambda: backend.stopped_early == 1 and backend.open_streams == 0, seconds=1)
    page.until_idle()
    assert len(backend.seen[-1][0]) == 3  # question, answer, question

    page.press("Remove last turn")
    page.until(lambda: len(page.answers()) == 1)
    page.press("New conversation")
    page.until(lambda: page.all("#chat .example") and not page.answers())
    page.ask("Something else")
    page.until_idle()
    page.until(lambda: page.answers() == ["A plain answer."])
    assert len(backend.seen[-1][0]) == 1


def test_two_visitors(browser: Any, address: str, backend: ScriptedBackend) -> None:
    first = DemoPage(browser, address)
    first.ask("A long one, please")
    first.until(lambda: any("word" in answer for answer in first.answers()))
    browser.switch_to.new_window("tab")
    second = DemoPage(browser, address)
    second.ask("And mine?")
    second.until(lambda: "Waiting: 1 request is before yours" in "".join(second.answers()))
    assert len(backend.seen) == 1
    first.show()
    first.stop()
    second.show()
    second.until(lambda: second.answers() == ["A plain answer."], seconds=5)
    assert second.questions() == ["And mine?"]
    assert backend.most_open == 1
    # one leaves in the middle of an answer, and keeps nobody waiting
    second.until_idle()
    second.ask("A long one again")
    second.until(lambda: "word" in second.answers()[-1])
    browser.close()
    first.show()
    first.until(lambda: backend.open_streams == 0, seconds=10)
    assert first.questions() == ["A long one, please"] and first.answers()[0].endswith("Stopped.")


def test_errors_and_limits_are_shown(browser: Any, address: str, backend: ScriptedBackend) -> None:
    page = DemoPage(browser, address)
    page.ask("boom")
    page.until(lambda: page.answers() == ["The model failed with RuntimeError: a fuse"])
    page.until_idle()
    page.upload(CAT, CAT, CAT)
    page.ask("Too many?")
    assert "3 pictures; the limit is 2" in page.toast()
    assert page.all("#box textarea")[0].get_attribute("value") == "Too many?"  # to be mended and sent again
    assert page.questions() == ["boom"] and page.answers() == ["The model failed with RuntimeError: a fuse"]
    page.press("New conversation")
    page.until(lambda: not page.questions())
    page.ask("<image>")
    assert "1 <image> tags and 0 pictures" in page.toast()
    assert page.all("#chat .example") and not page.all("#chat .error")


def test_examples(browser: Any, address: str, backend: ScriptedBackend) -> None:
    page = DemoPage(browser, address)
    page.all("#chat .example")[0].click()
    page.until(lambda: page.all("#box .thumbnail-item"))
    page.ask("")
    page.until(lambda: page.pictures("bot"))
    assert len(page.pictures("user")) == 1
    assert backend.seen[0][0][0]["content"] == "<image>\n<|ref|>The giraffe at the back.<|/ref|>"


def test_on_a_phone_nothing_sticks_out_and_nothing_is_asked_of_other_hosts(address: str) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = open_browser(390, 844, folder, dark=True)
        try:
            page = DemoPage(browser, address)
            page.upload(CAT, GIRAFFES)
            page.ask("Where is the giraffe? ![](http://elsewhere.example/spy.png)")
            page.until(lambda: page.pictures("bot"))
            page.until_idle()
            sizes = "const e = document.scrollingElement; return [e.scrollWidth, e.scrollHeight]"
            assert browser.execute_script(sizes) == [390, 844]
            for button in page.all("#buttons button, #box .submit-button"):
                box = button.rect
                assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
            # the browser keeps the page from fetching what a message names elsewhere, and it asks for nothing else
            blocked = [
                entry["message"] for entry in browser.get_log("browser") if "elsewhere.example" in entry["message"]
            ]
            assert blocked and all("Content Security Policy" in message for message in blocked)
            assert requested_hosts(browser) - {"elsewhere.example"} == {"127.0.0.1"}
        finally:
            browser.quit()


SCHEMES = pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
# Stops of the keyboard that nobody sees, and visible ones that a finger misses.
STOPS = """
const reached = e => e.tabIndex >= 0 && !e.disabled && e.getClientRects().length;
const stops = [...document.querySelectorAll("a[href], button, input, textarea, summary, [tabindex]")]
  .filter(e => reached(e) && getComputedStyle(e).visibility != "hidden");
const seen = e => { const r = e.getBoundingClientRect(); return r.width > 1 && r.right > 0 && r.left < innerWidth };
const pressed = e => e.type == "radio" ? e.closest("label") : e;
const small = e => { const r = pressed(e).getBoundingClientRect(); return r.width < 44 || r.height < 44 };
const named = e => `${e.tagName} ${e.getAttribute("aria-label") || e.textContent}`;
return [stops.filter(e => !seen(e)).map(named), stops.filter(e => seen(e) && small(e)).map(named)];
"""


def serious_findings(browser: Any) -> list[str]:
    """Return what axe finds on the page as it stands, but for minor remarks."""
    axe = pytest.importorskip("axe_selenium_python", reason="axe-selenium-python is not installed")
    (script,) = Path(axe.__file__).parent.rglob("axe.min.js")
    browser.execute_script(script.read_text(encoding="utf-8"))
    run = "axe.run(document).then(arguments[0], error => arguments[0]({violations: [{id: String(error)}]}))"
    found = browser.execute_async_script(run)["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v.get("impact") != "minor"]


@SCHEMES
def test_the_page_can_be_used_by_ear_by_keyboard_and_by_finger(address: str, width: int, dark: bool) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = open_browser(width, 844, folder, dark)
        try:
            page = DemoPage(browser, address)
            page.until(lambda: page.all('#chat .examples[role="group"]'))
            assert serious_findings(browser) == [] and browser.execute_script(STOPS) == [[], []]
            page.upload(CAT, GIRAFFES)
            page.until(lambda: len(page.all("#box .thumbnail-item")) == 2)
            page.ask("Where is the giraffe?")
            page.until(lambda: page.pictures("bot"))
            page.until_idle()
            page.until(lambda: len(page.all("#chat .copy-answer")) == len(page.all("#chat .download-link")) > 0)
            assert serious_findings(browser) == [] and browser.execute_script(STOPS) == [[], []]
            scheme = "return getComputedStyle(document.querySelector('#chat')).colorScheme"
            assert browser.execute_script(scheme) == ("dark" if dark else "light")
            page.all(".sidebar .toggle-button")[0].click()
            page.until(lambda: page.all(".sidebar.open"))
            browser.execute_async_script("setTimeout(arguments[0], 600)")  # for it to slide in
            assert serious_findings(browser) == [] and browser.execute_script(STOPS)[1] == []
        finally:
            browser.quit()


def test_find_and_with_boxes(browser: Any, address: str, backend: ScriptedBackend) -> None:
    page = DemoPage(browser, address)
    page.upload(GIRAFFES)
    for number, (name, asked) in enumerate(
        (("Find", "<image>\n<|ref|>the giraffe<|/ref|>."), ("With boxes", "<|grounding|>the giraffe"))
    ):
        page.all("#box textarea")[0].send_keys("the giraffe")
        page.press(name)
        page.until(lambda number=number: len(page.pictures("bot")) == number + 1)
        page.until_idle()
        assert backend.seen[-1][0][-1]["content"] == asked
    browser.execute_script(
        "window.copied = []; navigator.clipboard.writeText = async text => { window.copied.push(text) };"
        "[...document.querySelectorAll('#chat .copy-answer')].at(-1).click()"
    )
    copied = page.until(lambda: browser.execute_script("return window.copied"))
    assert copied == ["Here it is: The giraffe at the back. It looks to the left."]
    page.press("Find")
    assert "Write what to find first." in page.toast()


def test_a_real_checkpoint(browser: Any, golden_checkpoint: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "web_demo.py"), "--model_path", str(golden_checkpoint("tiny"))]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("GRADIO_TEMP_DIR", None)
    server = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("The demo is at http://127.0.0.1:"), line
        page = DemoPage(browser, line.split()[4])
        page.until(lambda: "parameters · bfloat16 · cpu" in page.text("#status"), seconds=60)
        page.upload(CAT)
        page.ask("What do you see?")
        page.until(lambda: any(len(answer) > 20 for answer in page.answers()), seconds=120)
        page.stop()
        page.until(lambda: page.answers()[0].endswith("Stopped."), seconds=10)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".jpeg", ".webp")]
        assert not left, "visitors' pictures stay on the disk"
    finally:
        server.kill()
        server.wait()
