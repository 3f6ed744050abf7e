"""Serving the page, to this machine alone unless asked otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_vl2.cli.addresses import check_address
from deepseek_vl2.serve.web.examples import LOGO
from deepseek_vl2.serve.web.layout import theme
from deepseek_vl2.serve.web.limits import Limits

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("page.js")
# The browser itself sees to it that the page, and an answer that names a picture on the web, fetch nothing elsewhere.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'"
)


class SecurityHeaders:
    """Adds the policy to every response; plain ASGI, so that streams pass unbuffered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_headers)


def launch(
    page: gr.Blocks,
    limits: Limits,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    root_path: str | None = None,
) -> str:
    """Serve a page in the background and return its address.

    Args:
        page: from `build_page`.
        limits: the largest upload.
        host: address to listen at; 0.0.0.0 for every network the machine is in.
        port: by default the first free one from 7860 on.
        share: ask Gradio's service for a public address that leads here.
        root_path: the path a proxy serves the page under.

    Raises:
        OSError: see `check_address`; or no port is free.
    """
    options: dict[str, Any] = {
        "server_name": host,
        "server_port": port,
        "share": share,
        "root_path": root_path,
        "max_file_size": f"{limits.file_mb}mb",
        "app_kwargs": {"middleware": [Middleware(SecurityHeaders)]},
        "theme": theme(),
        "css_paths": STYLE,
        "head": f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
        "favicon_path": LOGO,
    }
    # Each would listen, record or fetch more than the page needs, and some follow environment variables by default.
    quiet = dict.fromkeys(("enable_monitoring", "run_history", "ssr_mode", "pwa", "mcp_server"), False)
    check_address(host, port or 0)  # what is wrong with it Gradio does not say
    _, local, shared = page.launch(
        prevent_thread_lock=True, quiet=True, show_error=True, footer_links=[], **options, **quiet
    )
    return shared or local
