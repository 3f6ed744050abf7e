"""Time the original package on a GPU: a process of its own for `gpu.py --original CHECKOUT --original-packages FOLDER`.

    PYTHONPATH=FOLDER python benchmarks/gpu_original.py CHECKOUT CONFIG INPUTS [--device cuda] [--rows 1 8]

FOLDER holds transformers 4.38 and what it needs, as ``pip install --target FOLDER transformers==4.38.2`` leaves it:
both packages have one name, and need other releases of transformers. Random weights in bfloat16 at the config's shapes;
the inputs are the tensors that this package's processor made, so that image and text on the host are not in the times.
Answers as the original's README asks for them, greedily. Prints one JSON object a number of rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare_original import import_original
from random_weights import fill_randomly

NEW_TOKENS = 16


def build(checkout: str, config: dict[str, Any], device: torch.device) -> Any:
    """Return the original's model with random weights."""
    models = import_original(checkout)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = models.DeepseekVLV2ForCausalLM(models.DeepseekVLV2ForCausalLM.config_class(**config))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # tables of rotary angles, for one
    fill_randomly(model, device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model.eval()


def wall(device: torch.device, run: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median time of a function after one run, in milliseconds, waited for."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


@torch.no_grad()
def measure(model: Any, inputs: dict[str, torch.Tensor], device: torch.device, rows: int) -> dict[str, float]:
    """Return milliseconds to the first token, without preprocessing, and for each token after it."""
    batch = {name: tensor.to(device).repeat_interleave(rows, 0) for name, tensor in inputs.items()}
    batch["images"] = batch["images"].to(torch.bfloat16)
    attention_mask = batch.pop("attention_mask")

    def answer(tokens: int) -> None:
        embeds = model.prepare_inputs_embeds(**batch)
        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "use_cache": True}
        model.language.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=1,
            **options,
        )

    first = wall(device, lambda: answer(1))
    later = (wall(device, lambda: answer(1 + NEW_TOKENS)) - first) / NEW_TOKENS
    return {"rows": rows, "first": first, "later": later}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="a checkout of the original")
    parser.add_argument("config", type=Path, help="the model's config.json")
    parser.add_argument("inputs", type=Path, help="tensors of a batch of one, by torch.save")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    args = parser.parse_args()
    device = torch.device(args.device)
    model = build(args.checkout, json.loads(args.config.read_text(encoding="utf-8")), device)
    inputs = torch.load(args.inputs, weights_only=True)
    for rows in args.rows:
        print(json.dumps(measure(model, inputs, device, rows)), flush=True)


if __name__ == "__main__":
    main()
