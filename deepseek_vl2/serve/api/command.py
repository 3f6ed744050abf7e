"""The command line of the server: ``deepseek-vl2 serve`` and ``python -m deepseek_vl2.serve.api``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import math
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_vl2.engine.scheduler import EngineOptions
    from deepseek_vl2.serve.api.settings import Settings

from deepseek_vl2.cli.addresses import check_address
from deepseek_vl2.cli.main import run_guarded
from deepseek_vl2.cli.options import add_memory_arguments, default_model
from deepseek_vl2.utils.progress import Progress, weights_reported

PROGRAM = "deepseek-vl2 serve"
MAX_PORT = 65_535
DESCRIPTION = "Serve a model over HTTP, with OpenAI's chat completions API."
EXAMPLES = """\
examples:
  deepseek-vl2 serve deepseek-ai/deepseek-vl2-tiny
  deepseek-vl2 serve ./deepseek-vl2-small --slots 32 --port 9000
  DEEPSEEK_VL2_API_KEY=secret deepseek-vl2 serve nano --host 0.0.0.0 --allow-image-urls
"""
KEY_VARIABLE = "DEEPSEEK_VL2_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
DTYPES = ("bfloat16", "float16", "float32")
MAX_LENGTH = 4096
GPU_SLOTS, CPU_SLOTS = 256, 32


def positive(text: str) -> int:
    """Read a whole number of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def not_negative(text: str) -> int:
    """Read a whole number of at least zero."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def port_number(text: str) -> int:
    """Read the number of a port; 0 is any free one."""
    value = not_negative(text)
    if value > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text} is no port: they end at {MAX_PORT}")
    return value


def seconds(text: str) -> float:
    """Read a time; it must be positive."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0 seconds")
    return value


def above_zero(text: str) -> float:
    """Read a number above zero."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the server's options to a parser."""
    parser.description = parser.description or DESCRIPTION
    parser.epilog = parser.epilog or EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "name", nargs="?", metavar="MODEL",
        help="directory or hub id of a checkpoint, or 'demo' (random weights); default: 'nano', the small model that "
        "ships with the package",
    )  # fmt: skip
    parser.add_argument("--model", "--model_path", "-m", metavar="MODEL", help="the same, as for the other commands")
    _add_http_arguments(parser.add_argument_group("where it listens, and to whom"))
    _add_engine_arguments(parser.add_argument_group("model and batching"))
    _add_limit_arguments(parser.add_argument_group("limits of a request"))


def _add_http_arguments(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=port_number, default=8000, help="port (default: %(default)s)")
    group.add_argument("--served_model_name", metavar="NAME", help="name in requests (default: the model's own)")
    group.add_argument(
        "--api_key", action="append", default=[], metavar="KEY",
        help=f"requests must bear it; may be repeated. Others see a command line: rather set {KEY_VARIABLE}",
    )  # fmt: skip
    group.add_argument(
        "--cors_origin", action="append", default=[], metavar="ORIGIN", help="web pages from there may call; repeatable"
    )
    group.add_argument(
        "--allowed_host", action="append", default=[], metavar="NAME",
        help="a server without a key that listens on this machine alone answers under local names; also under this "
        "one; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--shutdown_seconds", type=seconds, default=120.0, help="time to finish after SIGTERM (default: %(default)g)"
    )
    group.add_argument("--log_level", default="info", choices=("debug", "info", "warning", "error"))


def _add_engine_arguments(group: Any) -> None:
    group.add_argument("--device", help="where the model goes (default: a GPU where there is one)")
    group.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="dtype of the weights (default: %(default)s)"
    )
    add_memory_arguments(group)
    group.add_argument(
        "--slots", type=positive, help=f"answers written together (default: {GPU_SLOTS} on a GPU, {CPU_SLOTS} on a CPU)"
    )
    group.add_argument(
        "--max_length", type=positive,
        help=f"tokens of a prompt and its answer (default: {MAX_LENGTH}, or what the model knows if that is less)",
    )  # fmt: skip
    group.add_argument(
        "--kv_cache_gib", type=above_zero, metavar="GIB",
        help="memory of the KV cache, on all devices together (default: slots times max-length tokens, but at most "
        "half of what is free beside the model)",
    )  # fmt: skip
    group.add_argument(
        "--image_cache_mib", type=not_negative, default=512, metavar="MIB",
        help="memory of image embeddings that are kept for the next question about a picture (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--no_prefix_cache", action="store_true", help="do not reuse the KV cache of prompts that began alike"
    )
    group.add_argument(
        "--queue", type=not_negative, default=64, help="requests that may wait for a slot (default: %(default)s)"
    )
    group.add_argument(
        "--prefill_chunk", type=positive,
        help="tokens of a prompt that run between two tokens of the answers under way (default: 2048 on a GPU, "
        "512 on a CPU)",
    )  # fmt: skip
    group.add_argument(
        "--tiles_a_step", type=positive, help="image tiles encoded at once (default: 32 on a GPU, 4 on a CPU)"
    )


def _add_limit_arguments(group: Any) -> None:
    group.add_argument("--max_choices", type=positive, default=8, help="largest n (default: %(default)s)")
    group.add_argument(
        "--stored_responses", type=not_negative, default=256, metavar="N",
        help="responses kept for previous_response_id; 0: none (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--max_body_mib", type=positive, default=32, help="size of a body (default: %(default)s)")
    group.add_argument(
        "--body_seconds", type=seconds, default=30.0, help="time for it to arrive (default: %(default)g)"
    )
    group.add_argument(
        "--request_seconds", type=seconds, default=600.0, help="time of a whole request (default: %(default)g)"
    )
    group.add_argument(
        "--max_connections", type=positive,
        help="open at the same time (default: 512, or four times the requests there is room for if that is more)",
    )  # fmt: skip
    group.add_argument(
        "--max_connections_per_address", type=positive, help="of them, from one address (default: half of them)"
    )
    group.add_argument(
        "--header_seconds", type=seconds, default=10.0, help="time for a request's headers (default: %(default)g)"
    )
    group.add_argument(
        "--idle_seconds", type=seconds, default=15.0, help="time between two requests (default: %(default)g)"
    )
    group.add_argument("--max_images", type=positive, default=16, help="images of a request (default: %(default)s)")
    group.add_argument(
        "--max_image_mib", type=positive, default=20, help="size of an image file (default: %(default)s)"
    )
    group.add_argument(
        "--max_megapixels", type=positive, default=50, help="of all images of a request (default: %(default)s)"
    )
    group.add_argument("--allow_image_urls", action="store_true", help="fetch images from http(s) addresses")
    group.add_argument(
        "--allow_private_image_urls", action="store_true",
        help="also from loopback and private addresses: whoever may ask can then reach your network through the server",
    )  # fmt: skip
    group.add_argument(
        "--image_seconds", type=seconds, default=10.0, help="time for fetching an image (default: %(default)g)"
    )


def check_extra() -> None:
    """Raise ``ValueError`` when the packages of the extra are not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f'The server needs {", ".join(missing)}: pip install "deepseek_vl2[serve]"')


def model_name(path: str) -> str:
    """Return the name that a model is served under: its directory's, or its id on the hub."""
    return Path(path).resolve().name if Path(path).exists() else path


def chosen_model(args: argparse.Namespace) -> str:
    """Return the model that the options name: nano without one, or the demo checkpoint where nano is not installed.

    Raises:
        ValueError: two are named.
    """
    if args.name is not None and args.model is not None and args.name != args.model:
        raise ValueError(f"Two models are named, {args.name} and {args.model}: a server has one.")
    return args.name or args.model or default_model()


def api_keys(given: list[str]) -> tuple[str, ...]:
    """Return the keys of the options and the environment, without the line breaks that files and secrets end in.

    Raises:
        ValueError: one is empty, or cannot be sent in a header.
    """
    keys = tuple(key.strip() for key in (*given, *filter(None, [os.environ.get(KEY_VARIABLE)])))
    if not all(keys):
        raise ValueError("An API key is empty, as from a variable that is not set: name one, or leave --api-key out.")
    if not all(key.isprintable() for key in keys):
        raise ValueError("An API key has characters that no header can bear, such as a line break.")
    return keys


def is_local(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


def room(wanted: int | None, positions: int) -> int:
    """Return the tokens of a prompt and its answer: what was asked for, else the default or all the model knows.

    Raises:
        ValueError: more is asked for than the model knows.
    """
    if wanted is not None and wanted > positions:
        raise ValueError(f"--max-length {wanted} exceeds the {positions} positions the model knows.")
    return min(MAX_LENGTH, positions) if wanted is None else wanted


def server_settings(
    args: argparse.Namespace, keys: tuple[str, ...], name: str, slots: int, replica: str = ""
) -> Settings:
    """Return what the options say of the HTTP side."""
    from deepseek_vl2.serve.api.settings import MEBI, ConnectionLimits, ImageLimits, Settings

    images = ImageLimits(
        max_images=args.max_images,
        max_bytes=args.max_image_mib * MEBI,
        max_pixels=args.max_megapixels * 1_000_000,
        allow_urls=args.allow_image_urls or args.allow_private_image_urls,
        allow_private=args.allow_private_image_urls,
        seconds=args.image_seconds,
    )
    requests = 2 * (slots + args.queue)
    most = args.max_connections or max(512, 4 * requests)
    connections = ConnectionLimits(
        most=most,
        per_address=args.max_connections_per_address or (most + 1) // 2,
        header_seconds=args.header_seconds,
        idle_seconds=args.idle_seconds,
    )
    return Settings(
        model_name=args.served_model_name or model_name(name),
        api_keys=keys,
        cors_origins=tuple(args.cors_origin),
        images=images,
        max_body_bytes=args.max_body_mib * MEBI,
        body_seconds=args.body_seconds,
        request_seconds=args.request_seconds,
        max_choices=args.max_choices,
        stored_responses=args.stored_responses,
        max_requests=requests,
        # A page of the web can reach what listens here, under its own name (DNS rebinding); a key keeps it out.
        allowed_hosts=None if keys or not is_local(args.host) else tuple(args.allowed_host),
        connections=connections,
        replica=replica,
    )


def engine_options(args: argparse.Namespace, model: Any) -> EngineOptions:
    """Return the engine's bounds for a loaded model.

    Raises:
        ValueError: more tokens are asked for than the model knows.
    """
    from deepseek_vl2.engine.kv_cache import affordable_tokens, bytes_per_token, layer_shapes
    from deepseek_vl2.engine.scheduler import EngineOptions

    on_gpu = model.device.type == "cuda"
    slots = args.slots or (GPU_SLOTS if on_gpu else CPU_SLOTS)
    length = room(args.max_length, model.config.language_config.max_position_embeddings)
    shapes = layer_shapes(model.language)
    if args.kv_cache_gib is not None:
        tokens = int(args.kv_cache_gib * 2**30) // bytes_per_token(shapes)
    else:
        tokens = min(slots * length, max(length, affordable_tokens(shapes, share=0.5)))
    chunk = args.prefill_chunk or (2048 if on_gpu else 512)
    size = tokens * bytes_per_token(shapes) / 2**30
    logging.getLogger(__name__).info("The KV cache of %d tokens takes %.2f GiB on %s.", tokens, size, model.device)
    return EngineOptions(
        max_batch=slots,
        max_length=length,
        queue_size=args.queue,
        kv_cache_tokens=tokens,
        prefill_tokens=4 * chunk if on_gpu else chunk,
        prefill_chunk=chunk,
        tiles_a_pass=args.tiles_a_step or (32 if on_gpu else 4),
        image_cache_bytes=args.image_cache_mib << 20,
        share_prefixes=not args.no_prefix_cache,
    )


def build_server(args: argparse.Namespace, replica: str = "") -> Any:
    """Load the model and return a `Server`; ``replica`` tells it from others behind one address.

    Raises:
        ValueError, OSError: see `load_pretrained_model`.
    """
    keys = api_keys(args.api_key)
    name = chosen_model(args)
    with Progress(f"Loading {name}", terminal_only=True):
        import torch

        from deepseek_vl2.cli.options import check_device, check_reachable, fetch_missing, loading_options, tell_toys
        from deepseek_vl2.serve.api.app import Server
        from deepseek_vl2.utils.io import load_pretrained_model

        if args.device is not None:
            check_device(args.device)
        check_reachable(name)
    source = fetch_missing(name)
    with Progress(f"Loading {name}") as line, weights_reported(line.report):
        _, processor, model = load_pretrained_model(source, dtype=getattr(torch, args.dtype), **loading_options(args))
    tell_toys(name)
    options = engine_options(args, model)
    return Server(model, processor, server_settings(args, keys, name, options.max_batch, replica), options)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, then finish what runs; returns the exit code.

    Raises:
        ValueError, OSError: see `build_server` and `check_address`; or a package is missing.
    """
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    check_extra()
    check_address(args.host, args.port)
    server = build_server(args)
    from deepseek_vl2.serve.api.serving import http_server

    # uvicorn finishes what runs, and then raises the signal once more, which would end in an error code.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if not is_local(args.host) and not server.settings.api_keys:
        logging.getLogger(__name__).warning(
            "Listening on %s without an API key: whoever reaches the port may use the model. Set %s.",
            args.host,
            KEY_VARIABLE,
        )
    gc.collect()  # what stays is never looked at again while the server runs
    listening = http_server(server, args.shutdown_seconds, host=args.host, port=args.port, log_level=args.log_level)
    with contextlib.suppress(KeyboardInterrupt):
        listening.run()
    return 0


def main(args: argparse.Namespace) -> int:
    """Serve as `run` does; an error is told in a line, and is exit code 1."""
    return run_guarded(PROGRAM, lambda: run(args), show_traceback=getattr(args, "traceback", False))
