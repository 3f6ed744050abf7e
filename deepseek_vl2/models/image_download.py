"""Images from the web, within limits on bytes and time."""

from __future__ import annotations

import time
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

USER_AGENT = "deepseek_vl2"
MOST_BYTES = 50_000_000
MOST_SECONDS = 60.0
SILENT_SECONDS = 15.0  # a server that sends nothing for so long is given up
BLOCK = 1 << 16
MOST_SHOWN = 100  # characters of an address or a path in a message


def shortened(text: str) -> str:
    """Return an address or a path as a message shows it."""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}… ({len(text):,} characters)"


def is_address(source: str) -> bool:
    """Whether a text is an http or https address."""
    return source[:8].lower().startswith(("http://", "https://"))


def download(url: str, most_bytes: int = MOST_BYTES, most_seconds: float = MOST_SECONDS) -> bytes:
    """Return what is at an http(s) address.

    Raises:
        ValueError: it cannot be had, is larger than ``most_bytes``, or takes longer than ``most_seconds``.
    """
    begin = time.monotonic()
    parts = []
    size = 0
    try:
        request = Request(url, headers={"User-Agent": USER_AGENT})
        with urlopen(request, timeout=SILENT_SECONDS) as response:
            while block := response.read1(BLOCK):
                size += len(block)
                parts.append(block)
                if size > most_bytes:
                    raise ValueError(
                        f"{shortened(url)} is larger than {most_bytes // 1_000_000} MB: download it yourself."
                    )
                if time.monotonic() - begin > most_seconds:
                    raise ValueError(f"{shortened(url)} takes longer than {most_seconds:g} s: download it yourself.")
    except (URLError, TimeoutError, ConnectionError, HTTPException, UnicodeError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        if isinstance(error, HTTPError):
            reason = f"{error.code} {reason}"
        raise ValueError(f"{shortened(url)} cannot be downloaded: {reason}.") from error
    return b"".join(parts)
