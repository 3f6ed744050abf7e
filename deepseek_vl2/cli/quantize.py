"""``deepseek-vl2 quantize``: write a checkpoint with packed weights, and say what that costs."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from deepseek_vl2.cli.options import (
    DTYPES,
    QUANTIZED,
    check_device,
    check_reachable,
    fetch_missing,
    note,
    whole_number,
)
from deepseek_vl2.utils.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepseek_vl2.models.quantizer import WeightOnlyConfig

DESCRIPTION = "Pack a released checkpoint's weights, experts included, and report what that costs."
EXAMPLES = """\
examples:
  deepseek-vl2 quantize deepseek-ai/deepseek-vl2-small small-int4
  deepseek-vl2 quantize path/to/checkpoint small-int4 --to int4 --group_size 32 --head int8
  deepseek-vl2 quantize nano nano-int8 --to int8 --suite 100

The output is in compressed-tensors' layout and is loaded like any other checkpoint. report.json lies beside it.
"""
GB = 1e9
REPORT = "quantization_report.json"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", metavar="MODEL", help='directory or hub id of a released checkpoint, or "nano"')
    parser.add_argument("output", metavar="OUTPUT", help="directory to write; it must be new or empty")
    parser.add_argument("--to", choices=QUANTIZED, default="int4", help="kind of weights; default: %(default)s")
    parser.add_argument("--group_size", type=int, help="int4: columns that share a scale, 32, 64 or 128; default: 64")
    parser.add_argument("--block", action="store_true", help="fp8: a scale for 128 x 128 weights, not for each channel")
    parser.add_argument("--head", choices=QUANTIZED, help="pack the output head too, in this kind")
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
    config = WeightOnlyConfig(args.to, args.group_size, args.block, args.head)
    source, dtype = resolve_model_path(fetch_missing(args.model)), getattr(torch, args.dtype)
    exact = measure_exact(args, source, dtype)
    report = pack_and_compare(args, source, dtype, config, exact, output)
    (output / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report) if args.json else describe(report))
    return 0


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


def progress(text: str, total: int) -> Any:
    """Return a context whose value is called after each step; it draws a bar where somebody looks."""
    from contextlib import contextmanager

    from tqdm import tqdm

    @contextmanager
    def bar() -> Any:
        with tqdm(total=total, desc=text, disable=not sys.stderr.isatty()) as drawn:
            step: Callable[[], Any] = drawn.update
            yield step

    return bar()


def describe(report: dict[str, Any]) -> str:
    """Return a report as a person reads it."""
    before, after = report["bytes_before"], report["bytes_after"]
    lines = [f"{report['model']}: {before / GB:.2f} GB become {after / GB:.2f} GB ({100 * after / before:.0f} %)"]
    lines.append("error of the weights (norm over norm), mean of each layer's matrices")
    layers: dict[str, list[float]] = {}
    for entry in report["errors"]:
        head, _, rest = entry["name"].partition(".layers.")
        layer = f"layer {rest.partition('.')[0]}" if rest else head.rpartition(".")[2]
        layers.setdefault(layer, []).append(entry["relative_error"])
    lines += [f"  {layer:12} {100 * fmean(errors):6.2f} %" for layer, errors in layers.items()]
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
