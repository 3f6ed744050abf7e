"""Time vLLM on the same work, where it is installed: a process of its own for `gpu.py`.

    python benchmarks/gpu_vllm.py FOLDER [--rows 1 8 64]

FOLDER holds a model's config.json and the processor's files; vLLM draws the weights itself (``load_format="dummy"``).
Each row has a question of its own about the one picture, and nothing is taken from a cache of prompts or images. Times
include image and text on the host, as a user's would. Prints one JSON object a number of rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from PIL import Image

PICTURE = Path(__file__).resolve().parents[1] / "images" / "visual_grounding.jpeg"
NEW_TOKENS = 32


def wall(llm: Any, requests: list[dict[str, Any]], sampling: Any) -> float:
    """Return the median time of answering requests after one run, in milliseconds."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        answers = llm.generate(requests, sampling, use_tqdm=False)
        times.append(1e3 * (time.perf_counter() - start))
        lengths = {len(answer.outputs[0].token_ids) for answer in answers}
        if lengths != {sampling.max_tokens}:
            raise RuntimeError(f"Answers of {sorted(lengths)} tokens, where {sampling.max_tokens} were asked for.")
    return statistics.median(times[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="config.json and the processor's files")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.folder,
        load_format="dummy",
        dtype="bfloat16",
        hf_overrides={"architectures": ["DeepseekVLV2ForCausalLM"]},
        max_model_len=4096,
        max_num_seqs=max(args.rows),
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
    )
    picture = Image.open(PICTURE).convert("RGB")
    for rows in args.rows:
        requests = [
            {
                "prompt": f"<|User|>: <image>\nWhat is at place {row}?\n\n<|Assistant|>:",
                "multi_modal_data": {"image": picture},
            }
            for row in range(rows)
        ]
        one, many = (
            wall(llm, requests, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
            for tokens in (1, 1 + NEW_TOKENS)
        )
        print(json.dumps({"rows": rows, "first": one, "later": (many - one) / NEW_TOKENS}), flush=True)


if __name__ == "__main__":
    main()
