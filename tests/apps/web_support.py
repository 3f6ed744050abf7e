"""A backend that recites, for tests of the web demo, and a browser to look at it with."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from deepseek_vl2.serve.streaming import Answer
from deepseek_vl2.serve.web.backend import LoadStatus, Prompt
from deepseek_vl2.serve.web.state import Settings

GIRAFFE = "<|ref|>The giraffe at the back.<|/ref|><|det|>[[704, 438, 917, 686]]<|/det|>"


class ScriptedBackend:
    """Streams fixed answers at a fixed pace, through the same door as a model.

    Args:
        answers: by a word of the question; "" is the answer to any other. An exception is raised.
        pause: seconds between two pieces.
        characters: length of a piece.
    """

    def __init__(self, answers: Mapping[str, str | Exception], pause: float = 0.02, characters: int = 4) -> None:
        self.answers, self.pause, self.characters = dict(answers), pause, characters
        self.state = LoadStatus(ready=True, text="scripted · 0 parameters · cpu", fraction=1.0)
        self.seen: list[tuple[list[dict[str, Any]], Settings]] = []
        self.open_streams = 0
        self.most_open = 0
        self.stopped_early = 0

    def status(self) -> LoadStatus:
        return self.state

    def wait(self, timeout: float) -> bool:
        if not self.state.ready:
            time.sleep(timeout)
        if self.state.failed:
            raise ValueError(self.state.text)
        return self.state.ready

    def prepare(self, messages: Sequence[Mapping[str, Any]], budget: int) -> Prompt:
        return Prompt([dict(message) for message in messages])

    def stream(self, prompt: Prompt, settings: Settings) -> ScriptedPieces:
        self.seen.append((prompt.inputs, settings))
        question = prompt.inputs[-1]["content"]
        answer = next((text for word, text in self.answers.items() if word and word in question), self.answers[""])
        return ScriptedPieces(self, answer, settings.new_tokens)


class ScriptedPieces:
    """An answer being recited; a character stands for a token."""

    def __init__(self, backend: ScriptedBackend, text: str | Exception, tokens: int) -> None:
        self.backend, self.text, self.tokens = backend, text, tokens
        self.answer = Answer()
        self.stop = threading.Event()

    def __iter__(self) -> Iterator[str]:
        backend = self.backend
        backend.open_streams += 1
        backend.most_open = max(backend.most_open, backend.open_streams)
        try:
            if isinstance(self.text, Exception):
                raise self.text
            text = self.text[: self.tokens]
            for start in range(0, len(text), backend.characters):
                if self.stop.wait(backend.pause):
                    backend.stopped_early += 1
                    return
                yield text[start : start + backend.characters]
            self.answer.finish_reason = "stop" if len(text) == len(self.text) else "length"
        finally:
            backend.open_streams -= 1

    def cancel(self) -> None:
        self.stop.set()

    def close(self) -> None:
        self.stop.set()


def chromium_missing() -> str:
    """Say why no browser test can run; empty where one can."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "needs Chromium and ChromeDriver (Debian: apt-get install chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "needs selenium"
    return ""


def open_browser(width: int, height: int, folder: str, dark: bool = False) -> Any:
    """Start headless Chromium with a profile of its own in ``folder``, which logs what the page asks the network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={folder}",
        f"--window-size={width},{height}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return browser


class DemoPage:
    """What a visitor does and sees, in one tab of a browser.

    Args:
        browser: from `open_browser`.
        address: where the demo is.
    """

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        browser.get(address)
        self.tab = browser.current_window_handle
        self.until(lambda: self.all("#box textarea") and self.all("#chat"))

    def until(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """Wait until something is true, and return it."""
        from selenium.common.exceptions import StaleElementReferenceException, WebDriverException

        end = time.monotonic() + seconds
        while True:
            try:
                value = condition()
            except (StaleElementReferenceException, WebDriverException):  # the page is being redrawn
                value = None
            if value:
                return value
            if time.monotonic() > end:
                raise AssertionError(f"it did not happen in {seconds} s; the page says: {self.text('body')!r}")
            time.sleep(0.05)

    def show(self) -> None:
        """Bring this tab to the front."""
        self.browser.switch_to.window(self.tab)

    def all(self, selector: str) -> list[Any]:
        """Find elements."""
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """Return the text of the first such element, or nothing."""
        found = self.all(selector)
        return found[0].text if found else ""

    def upload(self, *files: object) -> None:
        """Attach pictures, and wait until they are there."""
        before = len(self.all("#box .thumbnail-item"))
        self.all("#box input[type=file]")[0].send_keys("\n".join(map(str, files)))
        self.until(lambda: len(self.all("#box .thumbnail-item")) == before + len(files))

    def ask(self, question: str) -> None:
        """Write a question and send it."""
        self.all("#box textarea")[0].send_keys(question)
        self.until(lambda: self.all("#box .submit-button"))[0].click()

    def press(self, name: str) -> None:
        """Press one of the buttons below the input, once it can be pressed."""
        button = next(button for button in self.all("#ways button, #buttons button") if button.text == name)
        self.until(button.is_enabled)
        button.click()

    def stop(self) -> None:
        """Press the stop button."""
        self.until(lambda: self.all("#box .stop-button"))[0].click()

    def until_idle(self) -> None:
        """Wait until the answer is finished."""
        self.until(lambda: self.all("#box .submit-button") and self.all("#buttons button")[0].is_enabled())

    def answers(self) -> list[str]:
        """Return the texts of the answers."""
        return [element.text for element in self.all("#chat .bot.message")]

    def questions(self) -> list[str]:
        """Return the texts of the questions."""
        return [element.text for element in self.all("#chat .user.message")]

    def pictures(self, who: str) -> list[str]:
        """Return the addresses of the pictures that have arrived, of "user" or "bot"."""
        script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.naturalWidth).map(e => e.src)"
        return self.browser.execute_script(script, f"#chat .{who}.message img")

    def toast(self) -> str:
        """Wait for a message at the corner of the page, close it and return its text."""
        text = self.until(lambda: self.text(".toast-body"))
        self.all(".toast-close")[0].click()
        self.until(lambda: not self.all(".toast-body"))
        return text


def requested_hosts(browser: Any) -> set[str]:
    """Return the hosts that the browser asked since this was last called."""
    urls = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.add(urlsplit(message["params"]["request"]["url"]))
    return {url.hostname or "" for url in urls if url.scheme in ("http", "https", "ws", "wss")}
