"""``deepseek-vl2 quantize``: write a checkpoint with packed weights, and say what that costs."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from deepseek_vl2.cli.options import (
    DTYPES,
    QUANTIZED,
    check_device,
    check_reachable,
    check_writable,
    fetch_missing,
    note,
    whole_number,
)
from deepseek_vl2.utils.errors import UsageError
from deepseek_vl2.utils.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deepseek_vl2.models.quantizer import WeightOnlyConfig

DESCRIPTION = "Pack a released checkpoint's weights, experts included, and report what that costs."
EXAMPLES = """\
examples:
  deepseek-vl2 quantize deepseek-ai/deepseek-vl2-small small-int4
  deepseek-vl2 quantize path/to/checkpoint small-int4 --to int4 --group_size 32 --head int8
  deepseek-vl2 quantize deepseek-ai/deepseek-vl2-small small-int4 --calibration conversations.jsonl
  deepseek-vl2 quantize nano nano-int8 --to int8 --suite 100

--calibration: one conversation a line, as `deepseek-vl2 finetune` takes them, or a question, as `deepseek-vl2 batch`
does. int4 is then packed for what its layers get of these; 64 to 128 lines like those to come are enough.

The output is in compressed-tensors' layout and is loaded like any other checkpoint. report.json lies beside it.
"""
GB = 1e9
REPORT = "quantization_report.json"
SHARD_SIZE = re.compile(r"0*[1-9]\d*[KMGT]B", re.IGNORECASE)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", metavar="MODEL", help='directory or hub id of a released checkpoint, or "nano"')
    parser.add_argument("output", metavar="OUTPUT", help="directory to write; it must be new or empty")
    parser.add_argument("--to", choices=QUANTIZED, default="int4", help="kind of weights; default: %(default)s")
    parser.add_argument("--group_size", type=int, help="int4: columns that share a scale, 32, 64 or 128; default: 64")
    parser.add_argument("--block", action="store_true", help="fp8: a scale for 128 x 128 weights, not for each channel")
    parser.add_argument("--head", choices=QUANTIZED, help="pack the output head too, in this kind")
    parser.add_argument("--calibration", metavar="FILE.jsonl", help="int4: conversations to pack the weights for")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what stays; default: %(default)s")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the best there is")
    parser.add_argument("--max_shard_size", default="5GB", help="of the files written; default: %(default)s")
    parser.add_argument(
        "--no_agreement", action="store_true", help="do not run both models to compare their next tokens"
    )
    parser.add_argument(
        "--suite", type=whole_number(1), metavar="N", help="ask both N questions of each task of the synthetic suite"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: Namespace) -> int:
    """Pack, compare, save, report."""
    if args.suite is not None:
        from deepseek_vl2.synthetic.fonts import font_files

        font_files()  # which say what to install, before hours of packing
    with Progress(f"Looking at {args.model}", terminal_only=True):
        import torch
        from transformers.utils import logging

        from deepseek_vl2.models.quantizer import WeightOnlyConfig
        from deepseek_vl2.utils.io import resolve_model_path

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        check_device(args.device)
        check_reachable(args.model)
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already and is not an empty directory.")
    check_writable(output)
    if SHARD_SIZE.fullmatch(args.max_shard_size) is None:
        raise UsageError(f"--max_shard_size must be like 5GB or 500MB, not {args.max_shard_size!r}.")
    config = WeightOnlyConfig(args.to, args.group_size, args.block, args.head)
    source, dtype = resolve_model_path(fetch_missing(args.model)), getattr(torch, args.dtype)
    config.calibrate_with(read_samples(args, source))  # before anything that takes long: the file may be wrong
    exact = measure_exact(args, source, dtype)
    report = pack_and_compare(args, source, dtype, config, exact, output)
    (output / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report) if args.json else describe(report))
    return 0


def read_samples(args: Namespace, source: Any) -> Any:
    """Return the conversations to pack the weights for, or ``None``."""
    if args.calibration is None:
        return None
    from deepseek_vl2.models import DeepseekVLV2Processor
    from deepseek_vl2.utils.calibration import read_calibration

    with Progress(f"Reading {args.calibration}", terminal_only=True):
        return read_calibration(DeepseekVLV2Processor.from_pretrained(source), args.calibration)


def measure_exact(args: Namespace, source: Any, dtype: Any) -> dict[str, Any]:
    """Return what the released model answers, where it fits the device and is asked to."""
    from deepseek_vl2.utils import quantization_report as reports
    from deepseek_vl2.utils.io import load_pretrained_model

    if args.no_agreement and args.suite is None:
        return {}
    try:
        _, processor, model = load_pretrained_model(source, device=args.device, dtype=dtype)
    except ValueError as error:
        if "What fits" not in str(error):
            raise
        note(f"The two models are not compared: {error}")
        return {"left_out": str(error)}
    found: dict[str, Any] = {}
    if not args.no_agreement:
        note("Asking the released model")
        found["prompts"] = reports.example_prompts(processor)
        found["answers"] = reports.write_answers(model, found["prompts"])
        found["logits"] = reports.next_token_logits(model, found["prompts"], found["answers"])
    if args.suite is not None:
        found["suite"] = run_suite(model, processor, args.suite)
    return found


def run_suite(model: Any, processor: Any, number: int) -> dict[str, dict[str, float]]:
    """Return the mean scores of each task of the synthetic suite."""
    from deepseek_vl2.synthetic.samples import TASKS
    from deepseek_vl2.synthetic.suite import run_task

    scores = {}
    for task in TASKS:
        note(f"Asking {number} questions: {task}")
        scores[task] = run_task(model, processor, task, number).means
    return scores


def pack_and_compare(
    args: Namespace, source: Any, dtype: Any, config: WeightOnlyConfig, exact: dict[str, Any], output: Path
) -> dict[str, Any]:
    """Pack and save the model; returns the report."""
    from deepseek_vl2.models.checkpoint import find_files
    from deepseek_vl2.models.quantized_config import refused_by_vllm
    from deepseek_vl2.utils import quantization_report as reports
    from deepseek_vl2.utils.io import load_pretrained_model

    logging_progress()
    with calibrating(config.calibration):
        _, processor, model = load_pretrained_model(source, device=args.device, dtype=dtype, quantize=config)
    model.save_pretrained(output, max_shard_size=args.max_shard_size)
    processor.save_pretrained(output)
    total = len(model.config.quantization_config.formats)
    with progress("Comparing weights", total) as step:
        errors = reports.matrix_errors(model, source, step)
    report: dict[str, Any] = {
        "model": args.model,
        "kind": args.to,
        "head": args.head,
        "bytes_before": sum(Path(file).stat().st_size for file in find_files(source) or []),
        "bytes_after": sum(file.stat().st_size for file in output.glob("*.safetensors")),
        "refused_by_vllm": refused_by_vllm(model.config.quantization_config.formats),
        "errors": [{"name": e.name, "format": str(e.format), "relative_error": e.error} for e in errors],
    }
    if config.calibration is not None:
        report["calibration"] = {
            "samples": len(config.calibration.samples),
            "errors": [asdict(error) for error in config.calibration.errors],
        }
    if "logits" in exact:
        logits = reports.next_token_logits(model, exact["prompts"], exact["answers"])
        report["next_tokens"] = asdict(reports.compare_logits(exact["logits"], logits))
    if "suite" in exact:
        report["suite"] = {"before": exact["suite"], "after": run_suite(model, processor, args.suite)}
    if "left_out" in exact:
        report["left_out"] = exact["left_out"]
    return report


def logging_progress() -> None:
    """Let transformers show how far loading, which packs, is; on the error stream."""
    from transformers.utils import logging

    if sys.stderr.isatty():
        logging.enable_progress_bar()


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[], Any]]:
    """Yield what is to be called after each step; it draws a bar where somebody looks."""
    from tqdm import tqdm

    with tqdm(total=total, desc=text, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


@contextmanager
def calibrating(calibration: Any) -> Iterator[None]:
    """Draw a bar of the layers that are calibrated, where somebody looks."""
    from tqdm import tqdm

    if calibration is None:
        yield
        return
    with tqdm(desc="Calibrating layers", disable=not sys.stderr.isatty()) as bar:

        def done(layer: int, layers: int) -> None:
            bar.total = layers
            bar.update()
            if layer == layers:
                bar.close()  # the bar of loading comes next

        calibration.done = done
        yield


def describe(report: dict[str, Any]) -> str:
    """Return a report as a person reads it."""
    before, after = report["bytes_before"], report["bytes_after"]
    lines = [f"{report['model']}: {before / GB:.2f} GB become {after / GB:.2f} GB ({100 * after / before:.0f} %)"]
    lines.append("error of the weights (norm over norm), mean of each layer's matrices")
    errors = [(entry["name"], 100 * entry["relative_error"]) for entry in report["errors"]]
    lines += [f"  {layer:12} {found:6.2f} %" for layer, found in layer_means(errors)]
    if "calibration" in report:
        found = report["calibration"]
        lines.append(f"error of products with {found['samples']} samples, packed without them and for them")
        plain = layer_means([(entry["name"], 100 * entry["plain"]) for entry in found["errors"]])
        fitted = layer_means([(entry["name"], 100 * entry["calibrated"]) for entry in found["errors"]])
        lines += [f"  {layer:12} {p:6.2f} -> {c:5.2f} %" for (layer, p), (_, c) in zip(plain, fitted, strict=True)]
    lines += [f"vLLM will refuse it: {reason}" for reason in report["refused_by_vllm"]]
    if "next_tokens" in report:
        found = report["next_tokens"]
        lines.append(
            f"next tokens: {100 * found['same']:.1f} % of {found['positions']} are the same, "
            f"divergence {found['divergence']:.4f} nats"
        )
    for task, scores in report.get("suite", {}).get("before", {}).items():
        changes = report["suite"]["after"][task]
        parts = (f"{name} {100 * value:.1f} -> {100 * changes[name]:.1f} %" for name, value in scores.items())
        lines.append(f"{task}: {', '.join(parts)}")
    return "\n".join(lines)


def layer_means(values: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return the mean value of each layer's matrices, by the layer's short name."""
    layers: dict[str, list[float]] = {}
    for name, value in values:
        head, _, rest = name.partition(".layers.")
        layer = f"layer {rest.partition('.')[0]}" if rest else head.rpartition(".")[2]
        layers.setdefault(layer, []).append(value)
    return [(layer, fmean(found)) for layer, found in layers.items()]
