"""Try block sizes of the decoding kernels on a GPU, at a release's shapes.

    python benchmarks/gpu_tune.py [--sizes small] [--rows 1 8 64] [--best 3]

Each candidate runs over all layers' own weights in one graph, so that no weight is in a cache; the figures are
microseconds a call, its launch included (each starts while the one before ends), and the bandwidth of the weights it
reads. A candidate that does not compile, or needs more shared memory than there is, is left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_end_to_end import random_model
from triton.errors import TritonError

from deepseek_vl2.engine.decoder_weights import DecoderWeights, LayerWeights
from deepseek_vl2.engine.weights import read_weights
from deepseek_vl2.ops.triton import decode_align, decode_experts_gemm, decode_experts_gemv, decode_gemm, decode_gemv
from deepseek_vl2.ops.triton.common import pdl_options

Blocks = dict[str, Any]
Run = Callable[[LayerWeights, Blocks], None]


def listed(names: str, *candidates: tuple[int, ...]) -> list[Blocks]:
    """Return block sizes by name; the first ones, empty, stand for the kernel's own."""
    return [{}, *(dict(zip(names.split(), values, strict=True)) for values in candidates)]


# Candidates of products, gate and up, and down: each must leave two programs or more on a multiprocessor.
ONE_ROW = (
    listed("BLOCK_N BLOCK_K num_warps", (4, 512, 4), (4, 1024, 4), (2, 1024, 4), (4, 1024, 8), (8, 1024, 8)),
    listed("BLOCK_N BLOCK_K num_warps", (2, 512, 4), (2, 1024, 4), (4, 512, 8), (4, 1024, 8), (8, 512, 8)),
    listed(
        "BLOCK_N BLOCK_K AHEAD num_warps", (4, 512, 6, 8), (2, 512, 6, 4), (2, 1024, 3, 4), (4, 256, 11, 4),
        (2, 512, 6, 2), (8, 256, 11, 8), (1, 1024, 3, 4), (4, 512, 2, 4),
    ),
)  # fmt: skip
FEW_ROWS = (
    listed("BLOCK_N BLOCK_K STAGES num_warps", (16, 128, 4, 4), (32, 64, 4, 4), (32, 128, 3, 4), (16, 256, 3, 4)),
    listed("BLOCK_N BLOCK_K STAGES num_warps", (32, 64, 4, 4), (32, 128, 3, 4), (64, 64, 3, 4), (64, 128, 2, 8)),
    listed("BLOCK_N BLOCK_K STAGES num_warps", (32, 64, 4, 4), (32, 128, 3, 4), (64, 128, 3, 4), (128, 64, 3, 8)),
)


def time_calls(layers: list[LayerWeights], run: Run, blocks: Blocks) -> float:
    """Return the microseconds of one call."""
    for layer in layers[:2]:
        run(layer, blocks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(layer, blocks)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / len(layers)


class Tuner:
    """The kernels that read weights, with random inputs."""

    def __init__(self, weights: DecoderWeights, rows: int) -> None:
        self.layers = [layer for layer in weights.layers if layer.routing is not None]
        self.rows, like = rows, weights.embedding
        first = self.layers[0]
        assert first.routing is not None
        e, a, routing, hidden = first.experts, first.attention, first.routing, like.shape[1]

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=like.device).to(like.dtype)

        width = sum(weight.shape[0] for weight in a.projections)
        self.x, self.mixed, self.projected = draw(rows, hidden), draw(rows, a.out.shape[1]), draw(rows, width)
        self.out, self.inner = (
            draw(rows, hidden),
            draw(routing.top_k * e.intermediate_size + e.shared_intermediate_size),
        )
        self.routed, self.shared = (
            draw(rows, routing.top_k, e.intermediate_size),
            draw(rows, e.shared_intermediate_size),
        )
        self.routed_out, self.shared_out = draw(rows, routing.top_k, hidden), draw(rows, hidden)
        chosen = torch.rand(rows, routing.num_experts, device=like.device).argsort(dim=1)[:, : routing.top_k]
        self.ids, self.topk_weights = chosen.int(), torch.rand(rows, routing.top_k, device=like.device)
        self.tokens = decode_align.align_plain(self.ids, routing.num_experts, decode_align.tile_rows(e.gate_up))
        self.hit = int(chosen.unique().numel())

    def project(self, layer: LayerWeights, blocks: Blocks) -> None:
        """Norm and projections."""
        if self.rows == 1:
            parts = layer.attention.projections
            decode_gemv.linear_gemv(self.x[0], parts, self.projected[0], layer.input_norm, 1e-6, **blocks)
        else:
            decode_gemm.linear_gemm(self.x, layer.attention.projections, self.projected, **blocks)

    def output(self, layer: LayerWeights, blocks: Blocks) -> None:
        """Output projection."""
        if self.rows == 1:
            decode_gemv.linear_gemv(
                self.mixed[0], [layer.attention.out], self.out[0], residual_N=self.out[0], **blocks
            )  # fmt: skip
        else:
            decode_gemm.linear_gemm(self.mixed, [layer.attention.out], self.out, self.out, **blocks)

    def up(self, layer: LayerWeights, blocks: Blocks) -> None:
        """Gate and up of the experts."""
        if self.rows == 1:
            decode_experts_gemv.gate_up_gemv(
                self.x[0], layer.post_norm, 1e-6, layer.experts, self.inner, self.ids[0], **blocks,
            )  # fmt: skip
        else:
            decode_experts_gemm.gate_up_gemm(self.x, layer.experts, self.routed, self.shared, self.tokens, **blocks)

    def down(self, layer: LayerWeights, blocks: Blocks) -> None:
        """Down of the experts."""
        if self.rows == 1:
            decode_experts_gemv.down_gemv(
                self.inner, layer.experts, self.x[0], self.out[0], self.ids[0], self.topk_weights[0], **blocks
            )
        else:
            decode_experts_gemm.down_gemm(
                self.routed, self.shared, layer.experts, self.routed_out, self.shared_out, self.tokens, **blocks
            )

    def tasks(self) -> list[tuple[str, Run, int, list[Blocks]]]:
        """Return each kernel's name, what runs it, the bytes of weights it reads, and its candidates."""
        layer = self.layers[0]
        a, e = layer.attention, layer.experts
        assert e.gate_up is not None and e.down is not None and e.shared_gate is not None
        projections = sum(weight.nbytes for weight in a.projections)
        inner = self.hit * e.gate_up.nbytes // e.num_experts + 2 * e.shared_gate.nbytes
        down = self.hit * e.down.nbytes // e.num_experts + e.shared_gate.nbytes
        linears, ups, downs = ONE_ROW if self.rows == 1 else FEW_ROWS
        return [
            ("projections", self.project, projections, linears),
            ("output projection", self.output, a.out.nbytes, linears),
            ("experts, gate and up", self.up, inner, ups),
            ("experts, down", self.down, down, downs),
        ]


@torch.no_grad()
def tune(size: str, rows: int, weights: DecoderWeights, best: int) -> None:
    """Print the best candidates of each kernel beside its own block sizes."""
    tuner = Tuner(weights, rows)
    # Kernels of several rows are timed as they are launched alone.
    pdl = pdl_options(weights.head.device) if rows == 1 else {}
    for name, run, read, candidates in tuner.tasks():
        found: list[tuple[float, Blocks]] = []
        for blocks in candidates:
            try:
                found.append((time_calls(tuner.layers, run, {**pdl, **blocks}), blocks))
            except (TritonError, RuntimeError) as error:
                print(f"{name} {blocks}: {type(error).__name__}: {str(error)[:120]}")
        for place, (time, blocks) in enumerate([*found[:1], *sorted(found, key=lambda pair: pair[0])[:best]]):
            shown = "as it is" if place == 0 else str(blocks or "as it is")
            print(f"| {size} | {rows} | {name} | {shown} | {time:.2f} | {read / time / 1e6:.2f} |", flush=True)


def main() -> None:
    """Tune and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--best", type=int, default=3)
    args = parser.parse_args()
    print("| size | batch | kernel | blocks | us a call | TB/s |\n" + "| --- " * 6 + "|")
    for size in args.sizes:
        model = random_model(size, torch.device("cuda"))
        weights = read_weights(model.language)
        for rows in args.rows:
            tune(size, rows, weights, args.best)


if __name__ == "__main__":
    main()
