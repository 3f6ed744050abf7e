"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import math
import os
import socket
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from deepseek_vl2.cli.parser import CommandParser, suggestion
from deepseek_vl2.cli.releases import RELEASES
from deepseek_vl2.utils.places import DEMO_NAME, NANO_IS_A_TOY, NANO_NAME, is_nano, nano_directory
from deepseek_vl2.utils.progress import Progress, weights_reported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
    from deepseek_vl2.serve.streaming import GenerationOptions

IMAGE_CACHE_BYTES = 256 << 20  # the next question about a picture does not encode it again
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZED = ("int4", "int8", "fp8")
RANDOM_WEIGHTS = "The demo checkpoint has random weights: what follows shows that everything runs, and is noise."


class Loaded(NamedTuple):
    """A model that is ready."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    processor: DeepseekVLV2Processor
    model: DeepseekVLV2ForCausalLM


def note(text: str) -> None:
    """Tell the user something that is no part of the result: on the error stream, so that pipes stay clean."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def number(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return a converter for options that are numbers in a range; ``above``: the least one excluded."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a number") from None
        if not (least <= value <= most) or (above and value == least) or math.isinf(value):
            bounds = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" * (most < math.inf))
            raise ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    return convert


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a converter for options that are whole numbers from ``least`` on, up to ``most`` if there is one."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise ArgumentTypeError(f"must be {'positive' if least == 1 else f'at least {least}'}, not {text}")
        if most is not None and value > most:
            raise ArgumentTypeError(f"must be at most {most}, not {text}")
        return value

    return convert


def chunk_size(text: str) -> int:
    """Convert the option ``--chunk_size``."""
    try:
        return -1 if text == "-1" else whole_number(1)(text)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"--chunk_size must be positive, or -1 for no chunks, not {text}") from None


def add_image_argument(parser: ArgumentParser, text: str) -> None:
    """Declare ``--image``, which takes several images: as many as a shell makes of ``*.png``."""
    parser.add_argument("--image", "-i", action="append", default=[], metavar="IMAGE", help=text)
    if isinstance(parser, CommandParser):
        parser.images = ("--image", "-i")


def add_model_arguments(parser: ArgumentParser) -> None:
    """Declare which model, where and how."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        "--model_path",
        "-m",
        metavar="MODEL",
        help='directory or hub id of a checkpoint; default: "nano", the small model that ships with the package',
    )
    group.add_argument("--device", help="cuda, cuda:1, mps, cpu, or auto to spread it; default: the best there is")
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights; default: %(default)s")
    add_memory_arguments(group)


def add_memory_arguments(group: Any) -> None:
    """Declare in how many bits the weights are held, and how much memory they may take."""
    group.add_argument(
        "--quantize", choices=QUANTIZED, help="pack the language model's weights while loading, experts included"
    )
    group.add_argument(
        "--quantize_head", choices=QUANTIZED, help="the output head too, in this kind; default: it keeps its dtype"
    )
    group.add_argument("--max_memory", metavar="SIZE", help="most memory on the device, or on each GPU: 16GB, 12GiB")


def loading_options(args: Namespace) -> dict[str, Any]:
    """Return where and in how many bits `load_pretrained_model` shall load, from the options.

    Raises:
        ValueError: the head shall be quantized, and nothing else.
    """
    from deepseek_vl2.models.quantizer import WeightOnlyConfig

    if args.quantize_head is not None and args.quantize is None:
        raise ValueError("--quantize_head needs --quantize: say in which kind the other weights shall be.")
    where: dict[str, Any] = {"device_map": "auto"} if args.device == "auto" else {"device": args.device}
    if args.quantize is not None:
        where["quantize"] = WeightOnlyConfig(args.quantize, head=args.quantize_head)
    if args.max_memory is not None:
        where["max_memory"] = args.max_memory
    return where


def add_generation_arguments(parser: ArgumentParser) -> None:
    """Declare how answers are generated."""
    group = parser.add_argument_group("answer")
    group.add_argument("--max_new_tokens", type=whole_number(1), default=512, help="most tokens; default: %(default)s")
    group.add_argument(
        "--temperature", type=number(0), default=0.0, help="0: the likeliest answer (default); above: sample"
    )
    group.add_argument("--top_p", type=number(0, 1, above=True), default=0.9, help="while sampling; default: 0.9")
    group.add_argument("--top_k", type=whole_number(0), default=0, help="while sampling; default: 0, all tokens")
    group.add_argument(
        "--repetition_penalty", type=number(0, above=True), default=1.1, help="while sampling; default: 1.1"
    )
    group.add_argument(
        "--seed", type=whole_number(-(2**63), 2**63 - 1), help="while sampling; default: another one each time"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")
    group.add_argument("--system_prompt", "--system", default="", metavar="TEXT", help="put in front")
    group.add_argument(
        "--chunk_size", type=chunk_size, default=-1, help="read the prompt this many tokens at a time, to save memory"
    )


def generation_options(args: Namespace) -> GenerationOptions:
    """Return the options of `add_generation_arguments` as the streaming functions take them."""
    from deepseek_vl2.serve.streaming import GenerationOptions

    return GenerationOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty if args.temperature > 0 else 1.0,
        seed=args.seed,
        stop=tuple(args.stop),
        prefill_chunk_size=None if args.chunk_size == -1 else args.chunk_size,
    )


def answer_options(args: Namespace) -> str:
    """Return what is asked for beside the questions, as a text that is the same for the same."""
    kept = ["max_new_tokens", "stop", "system_prompt", "temperature"]
    if args.temperature > 0:
        kept += ["top_p", "top_k", "repetition_penalty", "seed"]
    return repr([getattr(args, name) for name in kept])


def most_tokens(loaded: Loaded) -> int:
    """Return how many tokens a prompt and its answer may have together."""
    return int(loaded.model.config.language_config.max_position_embeddings)


def room_for_answer(most: int, prompt_tokens: int) -> int:
    """Return how many tokens an answer may have of `most_tokens`; raise ``ValueError`` where a prompt leaves none."""
    if prompt_tokens >= most:
        raise ValueError(f"The prompt has {prompt_tokens:,} tokens; the model knows {most:,}, its answer's included.")
    return most - prompt_tokens


def default_model() -> str:
    """Return the model that is used when none is named: nano, or the demo checkpoint where nano is not installed."""
    return DEMO_NAME if nano_directory() is None else NANO_NAME


def loading_line(args: Namespace) -> Progress:
    """Return the line that a terminal shows from a command's first moment on, while images and libraries are read."""
    return Progress(f"Loading {args.model or default_model()}", terminal_only=True)


def load(args: Namespace, tell: Callable[[str], None] = note) -> Loaded:
    """Load the model that the options name; ``tell`` is told, once, when it is a toy or its weights are random.

    Without ``--model`` that is nano, or the demo checkpoint where nano is not installed. A checkpoint of the hub that
    is not in the cache is downloaded first.

    Raises:
        ValueError, OSError: there is no such model or device, or it does not fit its config.
    """
    name = args.model or default_model()
    with loading_line(args):
        import torch
        from transformers.utils import logging

        from deepseek_vl2.engine.holder import engine_of
        from deepseek_vl2.engine.scheduler import EngineOptions
        from deepseek_vl2.utils.io import load_pretrained_model

        logging.set_verbosity_error()
        check_device(args.device)
        check_reachable(name)
    source, options = fetch_missing(name), loading_options(args)
    with Progress(f"Loading {name}") as line, weights_reported(line.report):
        loaded = Loaded(name, *load_pretrained_model(source, dtype=getattr(torch, args.dtype), **options))
        engine_of(loaded.model, EngineOptions(share_prefixes=True, image_cache_bytes=IMAGE_CACHE_BYTES))
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        tell_toys(name, tell)
    return loaded


def tell_toys(name: str, tell: Callable[[str], None] = note) -> None:
    """Say that a model is a toy, or that its weights are random, where that is so."""
    if is_nano(name):
        tell(NANO_IS_A_TOY)
    elif name == DEMO_NAME:
        tell(RANDOM_WEIGHTS)


def fetch_missing(name: str) -> str:
    """Return where a model is to be loaded from; download what the hub's cache lacks of it, and show how far that is.

    A checkpoint that the cache holds whole is loaded as it is there, without asking the hub; ``pull`` asks it.

    Raises:
        ValueError, OSError: see `deepseek_vl2.cli.pull.download`.
    """
    from deepseek_vl2.cli.hub_cache import cached_checkpoint
    from deepseek_vl2.utils.io import resolve_model_path

    if isinstance(resolve_model_path(name), Path):
        return name
    found = cached_checkpoint(name)
    if found is not None and not found.missing:
        return str(found.path)
    from deepseek_vl2.cli import pull

    return str(pull.download(name))


def check_reachable(name: str) -> None:
    """Raise ``FileNotFoundError`` for a hub id that is not in the cache while the hub cannot be reached.

    The hub's own library would try again and again, for minutes.
    """
    from transformers.utils import cached_file

    from deepseek_vl2.utils.io import resolve_model_path

    source = resolve_model_path(name)
    if isinstance(source, Path) or any(os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    if cached_file(source, "config.json", local_files_only=True, **quiet) is not None:
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise FileNotFoundError(
            f"There is no directory {name}, and the hub ({host}) cannot be reached: {error.strerror or error}."
            f"{suggestion(name, RELEASES)}"
        ) from error


def check_device(device: str | None) -> None:
    """Raise ``ValueError`` for a device that torch does not know or this machine does not have."""
    import torch

    if device is None or device == "auto":
        return
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        raise ValueError(f"There is no kind of device {device!r}: use cuda, cuda:1, mps, cpu or auto.") from None
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise ValueError(f"There is no device {device} here: torch sees {torch.cuda.device_count()} CUDA devices.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("There is no device mps here: it needs a Mac with an Apple GPU.")


def check_writable(directory: Path) -> None:
    """Raise ``OSError`` for a directory that files cannot be written into, there already or not."""
    there = directory
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file: {directory} cannot be written into.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{directory} cannot be written into: {there} is not yours to write.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's "out of memory", of a GPU or of the host; without importing torch."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
