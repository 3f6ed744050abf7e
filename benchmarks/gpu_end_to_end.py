"""Run the three released sizes end to end on a GPU: peak memory over the weights, first token, decoding.

    python benchmarks/gpu_end_to_end.py [--markdown benchmarks/gpu_end_to_end.md]

Released shapes with random weights in bfloat16, made on the GPU; one 1024x768 image (7 tiles) and a short question,
about 1,450 prompt tokens, greedy. Times are medians over the repeats after one warm-up. With `--device cpu --sizes
demo` the program can be tried anywhere.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from random_weights import fill_randomly
from transformers.generation.streamers import BaseStreamer

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.utils.demo import LANGUAGE, VISION, byte_tokenizer, candidate_resolutions

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "tests" / "golden" / "releases"
PICTURE = ROOT / "images" / "visual_grounding.jpeg"  # 1024 x 768
QUESTION = "<image>\n<|ref|>The giraffe at the back.<|/ref|>."
GB = 1e9


@dataclass
class Result:
    """What one size gave: gigabytes and milliseconds."""

    size: str
    weights_gb: float
    peak_over_weights_gb: float
    prompt_tokens: int
    first_token_ms: float
    decode_ms: float


class Clock(BaseStreamer):
    """Notes when the prompt and each token came."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note one arrival."""
        self.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def released_config(size: str) -> DeepseekVLV2Config:
    """Return a release's config; "demo" is a small one."""
    if size == "demo":
        return DeepseekVLV2Config(vision_config=VISION, language_config=LANGUAGE)
    return DeepseekVLV2Config(**json.loads((CONFIGS / size / "config.json").read_text(encoding="utf-8")))


def random_config(size: str) -> DeepseekVLV2Config:
    """Return a release's config for a model that reads what `byte_tokenizer` writes."""
    config = released_config(size)
    config.image_token_id = byte_tokenizer().convert_tokens_to_ids("<image>")
    return config


def random_model(size: str, device: torch.device) -> DeepseekVLV2ForCausalLM:
    """Build a model on the device, its weights drawn from a normal distribution scaled to keep activations even."""
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(random_config(size)).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    fill_randomly(model, device)
    return model


def prompt(processor: DeepseekVLV2Processor) -> Any:
    """Return the processed question about one picture."""
    conversation = [{"role": "user", "content": QUESTION}]
    return processor(conversations=conversation, images=[Image.open(PICTURE)])


def measure(size: str, device: torch.device, new_tokens: int, repeats: int) -> Result:
    """Run one size end to end."""
    on_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    model = random_model(size, device)
    processor = DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first, decode, length = [], [], 0
    for _ in range(repeats + 1):
        clock = Clock(synchronize)
        synchronize()
        start = time.perf_counter()
        inputs = prompt(processor).to(device)
        length = inputs.input_ids.shape[1]
        model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, streamer=clock)
        arrivals = clock.times[1:]  # the first one is the prompt's
        first.append(1e3 * (arrivals[0] - start))
        decode.append(1e3 * statistics.median(b - a for a, b in pairwise(arrivals)))
    peak = torch.cuda.max_memory_allocated() if on_gpu else weights
    del model
    if on_gpu:
        torch.cuda.empty_cache()
    return Result(
        size, weights / GB, (peak - weights) / GB, length, statistics.median(first[1:]), statistics.median(decode[1:])
    )


def table(results: list[Result], device: torch.device) -> str:
    """Return the results as Markdown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    lines = [
        f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        "",
        "| size | weights, GB | peak over the weights, GB | prompt tokens | first token, ms | decoding, ms a token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        lines.append(
            f"| {r.size} | {r.weights_gb:.2f} | {r.peak_over_weights_gb:.2f} | {r.prompt_tokens} | "
            f"{r.first_token_ms:.1f} | {r.decode_ms:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    device = torch.device(args.device)
    text = table([measure(size, device, args.new_tokens, args.repeats) for size in args.sizes], device)
    print(text)
    if args.markdown:
        args.markdown.write_text(f"# End to end on a GPU\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
