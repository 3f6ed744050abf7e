"""Measure fine-tuning on one GPU: time of a step, tokens a second and peak memory; about 80 seconds on an H200.

    python benchmarks/finetune_gpu.py [--markdown benchmarks/finetune_gpu.md]
    python benchmarks/finetune_gpu.py --device cpu --sizes demo     # tries the program anywhere

Released shapes with random weights made on the device; each sample is one 1024x768 image (7 tiles) with a question and
an answer of about 100 tokens. A step is what `deepseek-vl2 finetune` does for a batch: forward under bfloat16 autocast,
backward, gradients clipped at 1, a step of AdamW. Weights, gradients and moments are as there: trained weights in
float32, frozen ones in bfloat16; where a case says "all in bfloat16", so are the trained ones. Cases run in the order
of the table; those that do not fit into memory, or for which no time is left, say so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_end_to_end import GB, PICTURE, QUESTION, random_model
from PIL import Image, ImageOps

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.training.collator import ConversationCollator
from deepseek_vl2.training.lora import DEFAULT_PARTS, add_lora
from deepseek_vl2.training.trainer import freeze_parts
from deepseek_vl2.utils.demo import byte_tokenizer, candidate_resolutions

# The tokenizer is one of bytes: 100 characters and the end of the sentence are 101 tokens.
ANSWER = "The giraffe at the back stands between two trees, its head turned to the left, higher than the rest."
WARMUP, MOST_STEPS = 2, 5
SECONDS_OF_A_CASE = 2.5  # at least two steps are timed; more while they stay within this
SMALL_ADAPTERS = ("attention", "mlp")


@dataclass
class Case:
    """What is trained: a size, what of it, and how."""

    size: str
    parts: tuple[str, ...] | None  # of the adapters, rank 16; None: the weights themselves
    batches: tuple[int, ...] = (1, 4)
    checkpointing: bool = False
    halved: bool = False  # trained weights, their gradients and moments in bfloat16

    @property
    def name(self) -> str:
        """What is trained, in words."""
        if self.parts is None:
            return "everything" + (", all in bfloat16" if self.halved else "")
        return "adapters, experts too" if "experts" in self.parts else "adapters without experts"


CASES = [
    Case("tiny", DEFAULT_PARTS),
    Case("tiny", SMALL_ADAPTERS),
    Case("tiny", None),
    Case("tiny", None, (4,), checkpointing=True),
    Case("small", DEFAULT_PARTS),
    Case("small", SMALL_ADAPTERS),
    Case("small", DEFAULT_PARTS, (4,), checkpointing=True),
    Case("small", None, checkpointing=True, halved=True),
    Case("base", SMALL_ADAPTERS),
    Case("base", DEFAULT_PARTS, checkpointing=True),
    Case("base", DEFAULT_PARTS, (1,)),
    Case("demo", DEFAULT_PARTS),
    Case("demo", None, checkpointing=True, halved=True),
]
HEAD = ["size", "trained", "parameters", "checkpointing", "batch", "tokens", "ms a step", "tokens/s", "peak memory, GB"]


def trained_model(case: Case, device: torch.device) -> Any:
    """Build a case's model on the device."""
    model = random_model(case.size, device).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.parts is not None:
        return add_lora(model, rank=16, parts=case.parts)
    freeze_parts(model, {})  # what never runs takes no gradient
    return model if case.halved else model.float()


def batch_of(processor: DeepseekVLV2Processor, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch of different pictures with an answer each."""
    picture = Image.open(PICTURE).convert("RGB")
    views = [picture, ImageOps.mirror(picture), ImageOps.flip(picture), ImageOps.invert(picture)]
    samples = []
    for row in range(rows):
        messages = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER[row:] + ANSWER[:row]},
        ]
        samples.append({"conversation": messages, "images": [views[row % len(views)]]})
    collator = ConversationCollator(processor, image_dtype=torch.bfloat16)
    return {name: tensor.to(device) for name, tensor in collator(samples).items()}


class Stopwatch:
    """Times steps of training on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.processor = DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions())

    def step(self, model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
        """Run one step; return its milliseconds."""
        if self.on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        if not loss.isfinite():
            raise ArithmeticError(f"The loss is {loss.item()}: what is timed is not training.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if self.on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def row(self, case: Case, model: Any, optimizer: torch.optim.Optimizer, rows: int) -> list[str]:
        """Return a row of the table: batch, tokens, time, speed and memory."""
        batch = batch_of(self.processor, rows, self.device)
        tokens = int(batch["attention_mask"].sum())
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARMUP):
            self.step(model, optimizer, batch)
        times: list[float] = []
        while len(times) < 2 or (len(times) < MOST_STEPS and sum(times) < 1e3 * SECONDS_OF_A_CASE):
            times.append(self.step(model, optimizer, batch))
        middle = statistics.median(times)
        peak = f"{torch.cuda.max_memory_allocated() / GB:.1f}" if self.on_gpu else "-"
        return [str(rows), str(tokens), f"{middle:.0f}", f"{1e3 * tokens / middle:,.0f}", peak]

    def measure(self, case: Case) -> list[list[str]]:
        """Return a case's rows; what does not fit into memory is a row too."""
        lines = []
        try:
            model = trained_model(case, self.device)
        except torch.OutOfMemoryError:
            return [self.empty_row(case, rows, "does not fit") for rows in case.batches]
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        for rows in case.batches:
            try:
                figures = self.row(case, model, optimizer, rows)
            except torch.OutOfMemoryError:
                figures = [str(rows), *["-"] * 3, "does not fit"]
                optimizer.zero_grad()
            lines.append([*self.name(case, model), *figures])
            self.free()
        return lines

    def free(self) -> None:
        """Give back what is held no longer."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def empty_row(self, case: Case, rows: int, why: str) -> list[str]:
        """Return the row of a case that was not measured."""
        return [*self.name(case, None), str(rows), *["-"] * 3, why]

    @staticmethod
    def name(case: Case, model: DeepseekVLV2ForCausalLM | None) -> list[str]:
        """Return a row's first cells."""
        trained = 0 if model is None else sum(p.numel() for p in model.parameters() if p.requires_grad)
        number = "-" if not trained else f"{trained / 1e9:.2f} B" if trained > 1e9 else f"{trained / 1e6:.1f} M"
        return [case.size, case.name, number, "yes" if case.checkpointing else "no"]


def line(cells: list[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["tiny", "small", "base"], choices=["tiny", "small", "base", "demo"]
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=75.0, help="start no case after this long (default: 75)")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    start, device = time.perf_counter(), torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    head = f"{name}; {versions}, peft {importlib.metadata.version('peft')}, Python {platform.python_version()}"
    stopwatch, rows = Stopwatch(device), list[list[str]]()
    print(head, flush=True)
    for case in CASES:
        if case.size not in args.sizes:
            continue
        if time.perf_counter() - start > args.seconds:
            found = [stopwatch.empty_row(case, number, "not run") for number in case.batches]
        else:
            found = stopwatch.measure(case)
            stopwatch.free()
        rows += found
        print(*(f"[{time.perf_counter() - start:5.1f} s] {line(row)}" for row in found), sep="\n", flush=True)
    table = "\n".join([line(HEAD), line(["---"] * len(HEAD)), *(line(row) for row in rows)])
    print(f"\n{table}\n\nThe whole run took {time.perf_counter() - start:.0f} s.")
    if args.markdown:
        text = f"# Fine-tuning on one GPU\n\n{(__doc__ or '').strip()}\n\n{head}\n\n{table}\n"
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
