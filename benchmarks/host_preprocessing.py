"""Time the processor on the host, beside an earlier state of the package in the same process.

    git worktree add ../before d751df0
    python benchmarks/host_preprocessing.py --beside ../before [--threads N] [--markdown FILE]

One 1024x768 JPEG (7 tiles) given as a path, and two and four of them; calls alternate between the two states, and
times are medians. "processor" is the call alone, "to bfloat16" is the call and ``.to(torch.bfloat16)``, "read" is the
call and the first look at the float32 images, as on a CPU. Without ``--beside`` only this state is timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "images" / "visual_grounding.jpeg"  # 1024 x 768
CASES: dict[str, Callable[[Any], Any]] = {
    "processor": lambda inputs: inputs,
    "to bfloat16": lambda inputs: inputs.to(torch.bfloat16),
    "read": lambda inputs: inputs.images,
    "to bfloat16, read": lambda inputs: inputs.to(torch.bfloat16).images,
}


def load(root: Path) -> Any:
    """Return a processor of the package that lies in a folder; modules of another one are forgotten first."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepseek_vl2"]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    try:
        from deepseek_vl2.models import DeepseekVLV2Processor
        from deepseek_vl2.utils.demo import byte_tokenizer, candidate_resolutions
    finally:
        sys.path.remove(str(root))
    source = sys.modules["deepseek_vl2"].__file__
    if source is None or not Path(source).is_relative_to(root.resolve()):
        raise ValueError(f"There is no package deepseek_vl2 in {root}.")
    return DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions())


def interleaved(processors: list[Any], images: int, then: Callable[[Any], Any], repeats: int) -> list[float]:
    """Return the median milliseconds of each processor, called in turn."""
    times: list[list[float]] = [[] for _ in processors]
    for repeat in range(repeats + 3):
        for processor, taken in zip(processors, times, strict=True):
            start = time.perf_counter()
            then(processor(prompt="<image>\n" * images + "What is this?", images=[str(PICTURE)] * images))
            if repeat >= 3:
                taken.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="a checkout of the state to compare with")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that PyTorch may use")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processors = [load(root.resolve()) for root in (args.beside, ROOT) if root is not None]
    if len(processors) == 2:
        first, second = (p(prompt="<image>", images=[str(PICTURE)]).images for p in processors)
        if not torch.equal(first, second):
            raise ValueError("The two states give other images.")
    lines = [
        f"{os.cpu_count()} cores, {args.threads} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, Pillow {PIL.__version__}, numpy "
        f"{np.__version__}; medians of {args.repeats}, in ms.",
        "",
        "| images | what | before | after | ratio |" if len(processors) == 2 else "| images | what | ms |",
        "| --- | --- | --- | --- | --- |" if len(processors) == 2 else "| --- | --- | --- |",
    ]
    for images in (1, 2, 4):
        for name, then in CASES.items():
            taken = interleaved(processors, images, then, args.repeats)
            ratio = f" {taken[0] / taken[1]:.2f} |" if len(taken) == 2 else ""
            lines.append(f"| {images} | {name} | " + " | ".join(f"{value:.1f}" for value in taken) + f" |{ratio}")
    table = "\n".join(lines) + "\n"
    print(table)
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
