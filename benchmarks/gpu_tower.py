"""What the vision tower's kernel gives on an NVIDIA GPU, alone and in all, and how far off it is.

    python benchmarks/gpu_tower.py                  # 1, 7 and 10 tiles, about 20 seconds
    python benchmarks/gpu_tower.py --tiles 7

The released tower with random bfloat16 weights. Every time is the median over replays of a CUDA graph, between events:
of a part in microseconds a call, of the tower in milliseconds. Errors are against the same weights in float32.

`--device cpu` tries the program without a GPU, on a small tower (set TRITON_INTERPRET=1); its times mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import kernel_table, on_device

from deepseek_vl2.engine import vision_kernels
from deepseek_vl2.models.siglip_vit import VisionTransformer
from deepseek_vl2.ops.triton import norm
from deepseek_vl2.ops.triton.common import pdl_options

Run = Callable[[], Any]

# Rows of a program, numbers at once, warps.
NORMS = ((1, 256, 1), (2, 128, 1), (2, 256, 2), (4, 256, 4), (1, 2048, 4), (1, 2048, 8), (8, 128, 8))


class Table:
    """Lines of numbers, a column for each number of tiles, printed as they come and all together at the end."""

    def __init__(self, columns: list[int]) -> None:
        self.columns = columns
        self.lines: dict[str, dict[int, str]] = {}

    def add(self, name: str, column: int, value: str) -> None:
        """Note a value."""
        print(f"{column:3} tiles: {name}: {value}", flush=True)
        self.lines.setdefault(name, {})[column] = value

    def show(self) -> None:
        """Print all."""
        print("\n| | " + " | ".join(f"{n} tile{'s' * (n > 1)}" for n in self.columns) + " |")
        print("| --- " * (1 + len(self.columns)) + "|")
        for name, line in self.lines.items():
            print(f"| {name} | " + " | ".join(line.get(n, "") for n in self.columns) + " |")


def captured(run: Run, device: torch.device) -> Run:
    """Return a function's replay; on a CPU the function."""
    if device.type != "cuda":
        return run
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def microseconds(run: Callable[[int], Any], device: torch.device, calls: int = 12) -> float:
    """Return the time of one call among several that are recorded together; each is given its number."""
    calls = calls if device.type == "cuda" else 1
    return 1e3 * on_device(device, captured(lambda: [run(call) for call in range(calls)], device)) / calls


def relative(out: torch.Tensor, want: torch.Tensor) -> float:
    """Return the relative error of a tensor."""
    return float((out.double() - want.double()).norm() / want.double().norm())


def new_tower(device: torch.device, small: bool) -> VisionTransformer:
    """Build a tower with random weights that keep signals at their size."""
    fields: dict[str, Any] = {"img_size": 42, "embed_dim": 144, "depth": 1, "num_heads": 2} if small else {}
    with torch.device(device):
        vision = VisionTransformer(**fields).eval().requires_grad_(False)
        for name, weight in vision.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.1
            weight.copy_(torch.randn_like(weight) * scale + ("norm" in name and name.endswith("weight")))
    return vision.bfloat16()


def draw(device: torch.device, *shape: int) -> list[torch.Tensor]:
    """Return a few tensors that calls take in turn."""
    return [torch.randn(*shape, device=device).bfloat16() for _ in range(3)]


def measure_norms(table: Table, vision: Any, tiles: int, device: torch.device) -> None:
    """Time a sum and its norm; the best blocks become the kernel's."""
    layer, rows = vision.blocks[0].norm2, tiles * vision.patch_embed.num_patches
    hidden, new = draw(device, rows, vision.embed_dim), draw(device, rows, vision.embed_dim)
    out, normed = torch.empty_like(new[0]), torch.empty_like(new[0])
    weights = (layer.weight, layer.bias, layer.eps)
    spent = microseconds(lambda call: layer(hidden[call % 3] + new[call % 3]), device)
    table.add("sum and norm: PyTorch", tiles, f"{spent:.1f} us")

    want = norm.add_layer_norm_plain(hidden[0], new[0], *weights)[1]
    best, least = norm.BLOCKS, float("inf")
    for sizes in NORMS[: None if device.type == "cuda" else 1]:
        blocks: dict[str, Any] = dict(zip(("BLOCK_B", "BLOCK_H", "num_warps"), sizes, strict=True))

        def run(call: int, blocks: dict[str, Any] = blocks) -> None:
            norm.add_layer_norm(hidden[call % 3], new[call % 3], *weights, out, normed, **blocks)

        run(0)
        off, spent = relative(normed, want), microseconds(run, device)
        wrong = not off < 2e-2
        table.add(
            f"sum and norm: rows, numbers, warps: {sizes}",
            tiles,
            f"{spent:.1f} us" + (f" **WRONG: {off:.1e}**" if wrong else ""),
        )
        if spent < least and not wrong:
            best, least = blocks, spent
    norm.BLOCKS |= best


def measure_tower(table: Table, vision: Any, tiles: int, device: torch.device) -> None:
    """Time the whole tower both ways, and compare both with float32."""
    side = vision.patch_embed.img_size[0]
    pixels = torch.randn(tiles, 3, side, side, device=device).bfloat16()
    reason = (
        vision_kernels.unsupported_tower(vision)
        if device.type != "cuda"
        else vision_kernels.unsupported_reason(vision, pixels)
    )
    if reason is not None:
        table.add("why not by the kernel", tiles, reason)
    pdl = pdl_options(device)
    ways: dict[str, Run] = {
        "tower, modules recorded": lambda: vision(pixels),
        "tower, kernel recorded, without early start": lambda: vision_kernels.encode(vision, pixels, {}),
        "tower, kernel recorded": lambda: vision_kernels.encode(vision, pixels, pdl),
    }
    for name, run in ways.items():
        table.add(name, tiles, f"{on_device(device, captured(run, device)):.3f} ms")
    wide = new_tower(device, small=vision.embed_dim < 1000).float()
    wide.load_state_dict({name: weight.float() for name, weight in vision.state_dict().items()})
    want = torch.cat([wide(tile.float()) for tile in pixels.split(1)])
    for name, run in (("modules", ways["tower, modules recorded"]), ("the kernel", ways["tower, kernel recorded"])):
        table.add(f"relative error of {name}", tiles, f"{relative(run(), want):.3e}")
    again = torch.empty_like(want, dtype=pixels.dtype)
    replay = captured(lambda: again.copy_(vision_kernels.encode(vision, pixels, pdl)), device)
    replay()
    same = torch.equal(again, vision_kernels.encode(vision, pixels, pdl))
    table.add("a replay has the bits of a run", tiles, "yes" if same else "**NO**")


def show_kernels(vision: Any, tiles: int, device: torch.device) -> None:
    """Print what the tower runs on the device, both ways."""
    side = vision.patch_embed.img_size[0]
    pixels = torch.randn(tiles, 3, side, side, device=device).bfloat16()
    for name, run in (
        ("modules", lambda: vision(pixels)),
        ("the kernel", lambda: vision_kernels.encode(vision, pixels)),
    ):
        print(f"\n{tiles} tiles by {name}\n\n| kernel | calls | us |\n| --- | --- | --- |")
        for kernel, calls, spent in kernel_table(captured(run, device))[:12]:
            print(f"| {kernel} | {calls} | {spent:.0f} |")


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", nargs="+", type=int, default=[7, 1, 10])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device, start = torch.device(args.device), time.perf_counter()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # of the float32 tower
    tiles = args.tiles if device.type == "cuda" else [1, 2]
    table = Table(sorted(tiles))
    vision = new_tower(device, small=device.type != "cuda")
    for number in tiles:
        for measure in (measure_norms, measure_tower):
            measure(table, vision, number, device)
        # The tower's line for each number of tiles is by the blocks that were best for it.
        print(f"    the tower by {norm.BLOCKS}", flush=True)
    if device.type == "cuda":
        show_kernels(vision, tiles[0], device)
        print(f"\n{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    print(f"{time.perf_counter() - start:.0f} s")
    table.show()


if __name__ == "__main__":
    main()
