"""``deepseek-vl2 demo``: the command line of the web demo."""

from __future__ import annotations

import logging
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace

EXAMPLES = """\
examples:
  deepseek-vl2 demo
  deepseek-vl2 demo --model_path deepseek-ai/deepseek-vl2-tiny
  deepseek-vl2 demo --model_path CHECKPOINT --host 0.0.0.0 --port 8080
"""
DEFAULT_MODEL = "nano"
DTYPES = ("bfloat16", "float16", "float32")


def _at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return number


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.add_argument(
        "--model_path",
        "--model_name",
        default=DEFAULT_MODEL,
        help="directory or hub id of a checkpoint; default: %(default)s, the small model that ships with the package",
    )
    parser.add_argument(
        "--host", "--ip", default="127.0.0.1", help="address to listen at; 0.0.0.0: everyone in the network gets in"
    )
    parser.add_argument("--port", type=_at_least_one, help="default: the first free one from 7860 on")
    parser.add_argument("--root_path", help="the path that a proxy serves the page under")
    parser.add_argument("--share", action="store_true", help="ask Gradio's service for a public address")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the best there is")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--chunk_size", type=_at_least_one, help="prefill this many tokens at a time, to save memory; default: all"
    )
    parser.add_argument("--max_images", type=_at_least_one, default=8, help="pictures in one message; default: 8")
    parser.add_argument("--max_image_mb", type=_at_least_one, default=20, help="size of a picture's file; default: 20")
    parser.add_argument("--max_waiting", type=_at_least_one, default=16, help="requests in line; default: 16")


def main(args: Namespace) -> int:
    """Serve the demo until it is interrupted.

    Args:
        args: what `add_arguments` declared.

    Returns:
        The exit code: 1 for a user's mistake, after one line that says what is wrong.
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        sys.stderr.write('The web demo needs Gradio: pip install "deepseek_vl2[gradio]"\n')
        return 1
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return _serve(args)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"deepseek-vl2 demo: {error}\n")
        return 1


def _serve(args: Namespace) -> int:
    """Put the page up, load the model behind it, wait."""
    import torch

    from deepseek_vl2.serve.web.backend import ModelBackend
    from deepseek_vl2.serve.web.layout import build_page
    from deepseek_vl2.serve.web.limits import Limits
    from deepseek_vl2.serve.web.server import launch

    limits = Limits(images=args.max_images, file_mb=args.max_image_mb, waiting=args.max_waiting)
    backend = ModelBackend(args.model_path, args.device, getattr(torch, args.dtype), args.chunk_size or -1)
    page = build_page(backend, limits)
    address = launch(page, limits, args.host, args.port, args.share, args.root_path)
    backend.start()
    sys.stdout.write(f"The demo is at {address}; Ctrl-C ends it.\n")
    sys.stdout.flush()
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    finally:
        page.close(verbose=False)
    return 0
