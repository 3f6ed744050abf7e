"""Training one mixture-of-experts layer at tiny's shapes: the original's forward and backward beside ours.

    python benchmarks/train_moe.py --original PATH_OF_CHECKOUT [--device cuda] [--markdown benchmarks/train_moe.md]

Both layers hold the same weights and get the same input; first outputs and gradients are compared, then both are timed
in turns. Of the original's file only the classes of the layer are compiled, from its own source: the rest of the file
imports what current versions of transformers no longer have.
"""

from __future__ import annotations

import argparse
import ast
import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.activations import ACT2FN

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deepseek_vl2.models.configuration_deepseek import DeepseekV2Config
from deepseek_vl2.models.moe import EXPERTS_IMPLEMENTATION, DeepseekV2MoE

SOURCE = "deepseek_vl2/models/modeling_deepseek.py"
CLASSES = ("DeepseekV2MLP", "MoEGate", "AddAuxiliaryLoss", "DeepseekV2MoE")

# The released tiny model.
SHAPES: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 6848, "moe_intermediate_size": 896, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "aux_loss_alpha": 0.001,
    "seq_aux": True, "hidden_act": "silu",
}  # fmt: skip


@dataclass
class Case:
    """What is measured: a precision, and a batch of rows by tokens."""

    dtype: torch.dtype
    rows: int
    tokens: int


# Not under autocast: there the original's assignment of an expert's output to a buffer fails on their dtypes.
CASES = {
    "cpu": [Case(torch.float32, 1, 1433), Case(torch.bfloat16, 1, 1433)],
    "cuda": [Case(torch.bfloat16, 4, 1433), Case(torch.bfloat16, 16, 1024)],
}


def original_layer(checkout: Path) -> nn.Module:
    """Build the original's layer from the classes in its own source."""
    tree = ast.parse((checkout / SOURCE).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in CLASSES]
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math, "ACT2FN": ACT2FN}
    exec(compile(tree, str(checkout / SOURCE), "exec"), names)
    layer: nn.Module = names["DeepseekV2MoE"](SimpleNamespace(**SHAPES, ep_size=1))
    return layer


def our_layer() -> nn.Module:
    """Build this package's layer."""
    config = DeepseekV2Config(**SHAPES, num_hidden_layers=2)
    config._experts_implementation = EXPERTS_IMPLEMENTATION
    return DeepseekV2MoE(config)


@torch.no_grad()
def copy_weights(original: nn.Module, ours: nn.Module) -> None:
    """Draw the original's weights and give ours the same."""
    for parameter in original.parameters():
        parameter.normal_(0.0, 0.02)
    state, theirs = ours.state_dict(), original.state_dict()
    for expert in range(SHAPES["n_routed_experts"]):
        parts = [theirs.pop(f"experts.{expert}.{name}_proj.weight") for name in ("gate", "up", "down")]
        state["experts.gate_up_proj"][expert] = torch.cat(parts[:2])
        state["experts.down_proj"][expert] = parts[2]
    for name, tensor in theirs.items():
        state[name].copy_(tensor)


def fused_gradients(original: nn.Module) -> dict[str, torch.Tensor]:
    """Return the original's gradients under our names."""
    own = {n: p.grad for n, p in original.named_parameters() if p.grad is not None}
    experts = range(SHAPES["n_routed_experts"])
    gate, up, down = (
        torch.stack([own.pop(f"experts.{e}.{name}_proj.weight") for e in experts]) for name in ("gate", "up", "down")
    )
    return {**own, "experts.gate_up_proj": torch.cat((gate, up), dim=1), "experts.down_proj": down}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of a difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


class Pair:
    """Both layers with one input."""

    def __init__(self, checkout: Path, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        with torch.device(device):
            self.original, self.ours = original_layer(checkout), our_layer()
        copy_weights(self.original, self.ours)
        for layer in (self.original, self.ours):
            layer.to(case.dtype).train()
        shape = (case.rows, case.tokens, SHAPES["hidden_size"])
        self.hidden = torch.randn(shape, device=device).to(case.dtype)
        self.upstream = torch.randn(shape, device=device).to(case.dtype)

    def step(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Run forward and backward; return the output and the input's gradient."""
        layer.zero_grad(set_to_none=True)
        hidden = self.hidden.detach().requires_grad_()
        out = layer(hidden)
        out.backward(self.upstream)
        assert hidden.grad is not None
        return out.detach(), hidden.grad

    def compare(self) -> dict[str, float]:
        """Return how far our output and gradients are from the original's, as parts of their norms."""
        (want, want_input), (got, got_input) = self.step(self.original), self.step(self.ours)
        wanted = fused_gradients(self.original)
        errors = {"output": distance(got, want), "gradient of the input": distance(got_input, want_input)}
        own = dict(self.ours.named_parameters())
        for name, gradient in wanted.items():
            mine = own[name].grad
            assert mine is not None
            errors[f"gradient of {name}"] = distance(mine, gradient)
        return errors

    def time(self, layer: nn.Module) -> float:
        """Return the milliseconds of a step, waiting for the device before and after."""
        self.wait()
        start = time.perf_counter()
        self.step(layer)
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def race(self, rounds: int) -> tuple[float, float, float]:
        """Return the median times of the original and of ours, in ms, and the median ratio of neighbouring rounds."""
        self.time(self.ours)
        times = [(self.time(self.original), self.time(self.ours)) for _ in range(rounds)]
        original, ours = zip(*times, strict=True)
        ratio = statistics.median(theirs / mine for theirs, mine in times)
        return statistics.median(original), statistics.median(ours), ratio


# Float32 sums in another order; bfloat16 rounds each of the few steps of a chain by up to one part in 256.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def describe(device: str) -> str:
    """Name hardware and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}, transformers {transformers.__version__}"


def measure(checkout: Path, device: str, rounds: int) -> tuple[list[str], bool]:
    """Compare and time all cases; return the table's lines, and whether all agree."""
    lines = [
        "| precision | rows x tokens | original, ms | ours, ms | times faster | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    agree = True
    for case in CASES[device]:
        pair = Pair(checkout, case, device)
        errors = pair.compare()
        worst = max(errors, key=lambda name: errors[name])
        agree &= errors[worst] < TOLERANCE[case.dtype]
        original, ours, ratio = pair.race(rounds)
        precision = str(case.dtype).removeprefix("torch.")
        lines.append(
            f"| {precision} | {case.rows} x {case.tokens} | {original:.1f} | {ours:.1f} | {ratio:.2f} | "
            f"{errors[worst]:.1e} ({worst}) |"
        )
        print(lines[-1], flush=True)
        del pair
        if device == "cuda":
            torch.cuda.empty_cache()
    return lines, agree


def page(lines: list[str], device: str, rounds: int) -> str:
    """Return the results as Markdown."""
    return "\n".join(
        [
            "# Training one mixture-of-experts layer: the original beside ours",
            "",
            "Forward and backward of tiny's layer (1280 wide, 64 experts of 896, 6 chosen, 2 shared, balance loss),",
            "the same weights and input, in turns in one process.",
            f"Medians of {rounds} rounds, and the median of the rounds' ratios. The difference is the norm of the",
            "difference over the norm, of the output or of a gradient, whichever is largest.",
            "",
            f"{describe(device)}. Command: `python benchmarks/train_moe.py --original PATH --device {device}`",
            "",
            *lines,
            "",
        ]
    )


def main() -> int:
    """Run the benchmark; the exit code is 1 where outputs or gradients disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="checkout of the original package")
    parser.add_argument("--device", choices=tuple(CASES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="rounds (default: 5 on a CPU, 20 on a GPU)")
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    parser.add_argument("--markdown", type=Path, help="write the results to this file too")
    args = parser.parse_args()
    if not (args.original / SOURCE).is_file():
        parser.error(f"{args.original} is no checkout of the original: {SOURCE} is not there.")
    if args.threads:
        torch.set_num_threads(args.threads)
    rounds = args.rounds or (20 if args.device == "cuda" else 5)
    print(describe(args.device))
    lines, agree = measure(args.original, args.device, rounds)
    if args.markdown:
        args.markdown.write_text(page(lines, args.device, rounds), encoding="utf-8")
    if not agree:
        print("Outputs or gradients disagree.")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
