"""``deepseek-vl2 demo``: the command line of the web demo."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from importlib.util import find_spec

from deepseek_vl2.cli.options import (
    add_model_arguments,
    check_device,
    check_reachable,
    chunk_size,
    default_model,
    loading_options,
    whole_number,
)
from deepseek_vl2.serve.web.limits import Limits
from deepseek_vl2.utils.progress import Progress

DESCRIPTION = "A web page to chat with the model about pictures. Only this machine reaches it unless told otherwise."
EXAMPLES = """\
examples:
  deepseek-vl2 demo
  deepseek-vl2 demo --model deepseek-ai/deepseek-vl2-tiny
  deepseek-vl2 demo --model CHECKPOINT --host 0.0.0.0 --port 8080
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the demo's options; those of the original demo's script are understood too."""
    add_model_arguments(parser)
    parser.add_argument("--model_name", "--local_path", dest="model", help=SUPPRESS)
    parser.add_argument(
        "--chunk_size", type=chunk_size, default=-1, help="read the prompt this many tokens at a time, to save memory"
    )
    page = parser.add_argument_group("page")
    page.add_argument(
        "--host", "--ip", default="127.0.0.1", help="address to listen at; 0.0.0.0: everyone in the network gets in"
    )
    page.add_argument("--port", type=whole_number(1, 65_535), help="default: the first free one from 7860 on")
    page.add_argument("--root_path", help="the path that a proxy serves the page under")
    page.add_argument("--share", action="store_true", help="ask Gradio's service for a public address")
    limits, default = parser.add_argument_group("limits"), Limits()
    for name, value, text in (
        ("--max_images", default.images, "pictures in one message"),
        ("--max_image_mb", default.file_mb, "megabytes of a picture's file"),
        ("--max_waiting", default.waiting, "requests in line; more are turned away"),
    ):
        limits.add_argument(name, type=whole_number(1), default=value, metavar="N", help=f"{text}; default: {value}")


def main(args: Namespace) -> int:
    """Serve the demo until it is interrupted.

    Args:
        args: what `add_arguments` declared.

    Returns:
        The exit code.

    Raises:
        ValueError: Gradio is missing, or there is no such device.
        OSError: the port is taken, or there is no such model.
    """
    if find_spec("gradio") is None:
        raise ValueError('demo needs the package gradio: pip install "deepseek_vl2[gradio]"')
    with Progress("Starting the page", terminal_only=True):
        check_device(args.device)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Gradio keeps visitors' pictures in a folder that every user of the machine shares, and leaves them there.
    with tempfile.TemporaryDirectory(prefix="deepseek_vl2_demo_", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        return _serve(args)


def _serve(args: Namespace) -> int:
    """Put the page up, load the model behind it, wait for Ctrl-C."""
    with Progress("Starting the page"):
        import torch
        from transformers.utils import logging as transformers_logging

        from deepseek_vl2.serve.web.backend import ModelBackend
        from deepseek_vl2.serve.web.layout import build_page
        from deepseek_vl2.serve.web.server import launch

        transformers_logging.disable_progress_bar()  # the page shows it
        limits = Limits(images=args.max_images, file_mb=args.max_image_mb, waiting=args.max_waiting)
        name = args.model or default_model()
        check_reachable(name)  # a mistyped name ends the program, rather than standing on a page that never answers
        backend = ModelBackend(name, loading_options(args), getattr(torch, args.dtype), args.chunk_size)
        page = build_page(backend, limits)
        address = launch(page, limits, args.host, args.port, args.share, args.root_path)
    backend.start()
    sys.stdout.write(f"The demo is at {address} until Ctrl-C ends it.\n")
    sys.stdout.flush()
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    finally:
        page.close(verbose=False)
    return 0
