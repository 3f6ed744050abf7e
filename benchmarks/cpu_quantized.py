"""How fast does a CPU decode with packed weights, beside bfloat16?

Some layers of tiny's language model at the released sizes, and its head, with random weights: each token goes through
other experts, as they do in use. Prints milliseconds a token, the bytes read and the rate of both.

    python benchmarks/cpu_quantized.py --layers 4 --threads 2
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from cpu_engine import build_tiny
from torch import nn

from deepseek_vl2.models.moe import DeepseekV2Experts
from deepseek_vl2.models.quantization import quantize
from deepseek_vl2.models.quantized_layers import PackedModule, packed_layers
from deepseek_vl2.models.quantizer import WeightOnlyConfig, plan_formats, replace_layers

KINDS: dict[str, WeightOnlyConfig | None] = {
    "bfloat16": None,
    "int8": WeightOnlyConfig("int8", head="int8"),
    "int4": WeightOnlyConfig("int4", head="int8"),
}


def pack(model: Any, config: WeightOnlyConfig) -> None:
    """Pack a model's weights in place."""
    formats = plan_formats(model, config)
    exact: dict[str, torch.Tensor] = {}
    for name in formats:
        layer = model.get_submodule(name.rpartition(".")[0])
        owner = name if isinstance(layer, DeepseekV2Experts) else f"{name}.weight"
        exact[owner] = model.get_parameter(owner).data
    with torch.device("meta"):
        replace_layers(model, formats, torch.bfloat16)
    for name, layer in packed_layers(model):
        for part, fmt in layer.formats.items():
            layer.set_packed(part, quantize(exact.pop(f"{name}.{part}"), fmt))


def bytes_of_a_token(model: Any) -> int:
    """Return the bytes of weights that a token reads: of experts the chosen ones."""
    chosen, experts = model.config.num_experts_per_tok, model.config.n_routed_experts
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if "embed_tokens" in name:
            continue
        total += size * chosen // experts if ".mlp.experts." in name else size
    return total


@torch.no_grad()
def milliseconds(model: Any, tokens: int) -> list[float]:
    """Return the time of each decoded token."""
    cache = model(input_ids=torch.randint(1000, (1, 16)), use_cache=True).past_key_values
    times = []
    for _ in range(tokens):
        token = torch.randint(1000, (1, 1))
        start = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        times.append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Measure all kinds in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {}
    for kind, config in KINDS.items():
        models[kind] = build_tiny(args.layers)
        if config is not None:
            pack(models[kind], config)
        assert (config is None) == (not any(isinstance(m, PackedModule) for m in models[kind].modules()))
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(args.rounds):
        for kind, model in models.items():
            times[kind] += milliseconds(model, args.tokens)[2:]
    plain, best = median(times["bfloat16"]), min(times["bfloat16"])
    print(f"{args.layers} layers of tiny and its head, {args.threads} threads\n")
    print("| weights | ms a token | best | MB read | GB/s at best | times as fast | at best |")
    print("|---|---|---|---|---|---|---|")
    for kind, model in models.items():
        taken, size = median(times[kind]), bytes_of_a_token(model)
        least = min(times[kind])
        print(
            f"| {kind} | {taken:.2f} | {least:.2f} | {size / 1e6:.0f} | {size / 1e6 / least:.1f} | {plain / taken:.2f} "
            f"| {best / least:.2f} |"
        )


if __name__ == "__main__":
    main()
