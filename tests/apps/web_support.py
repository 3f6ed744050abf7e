"""A backend that recites, for tests of the web demo, and a browser to look at it with."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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

    def stream(self, prompt: Prompt, settings: Settings, stop: threading.Event) -> Iterator[str]:
        self.seen.append((prompt.inputs, settings))
        question = prompt.inputs[-1]["content"]
        answer = next((text for word, text in self.answers.items() if word and word in question), self.answers[""])
        self.open_streams += 1
        self.most_open = max(self.most_open, self.open_streams)
        try:
            if isinstance(answer, Exception):
                raise answer
            for start in range(0, len(answer), self.characters):
                if stop.wait(self.pause):
                    self.stopped_early += 1
                    return
                yield answer[start : start + self.characters]
        finally:
            self.open_streams -= 1


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
