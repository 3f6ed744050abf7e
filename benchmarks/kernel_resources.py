"""Compile every kernel for an H200 (sm_90) at the released shapes, without a GPU, and print what each takes.

    python benchmarks/kernel_resources.py [--sizes tiny small base tower] [--rows 1 8 64 1536]

Up to 64 rows are those of a decoding step; more are the tokens of a prompt. "tower" is the vision tower that all three
releases have, at any number of tiles.

Columns: registers a thread, bytes spilled to memory (should be 0), shared memory a program in kB (227 at most), warps,
and by which instructions it multiplies matrices: "wgmma" is what an H200's tensor cores are for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_vl2.engine import vision_kernels
from deepseek_vl2.engine.decode import MAX_SMALL_BATCH, decode_stage, new_buffers
from deepseek_vl2.engine.kv_cache import layer_shapes, new_pool
from deepseek_vl2.engine.rows import new_rows
from deepseek_vl2.engine.weights import read_router_config, read_weights, rotary_tables
from deepseek_vl2.models import DeepseekVLV2Config
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM
from deepseek_vl2.models.siglip_vit import VisionTransformer
from deepseek_vl2.ops.triton import grouped_gemm, image_resize, norm, prefill_experts, rope, router

RELEASES = Path(__file__).resolve().parents[1] / "tests" / "golden" / "releases"
ARCHITECTURE = 90
DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
PDL = {"PDL": True, "launch_pdl": True}  # as on the device


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int
    products: str


def describe(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, str]:
    """Return a launch as a source to compile, and a key that tells it from others."""
    values = {name: p.default for name, p in kernel.signature.parameters.items() if p.default is not p.empty}
    values.update(zip(kernel.arg_names, args, strict=False))
    values.update({name: value for name, value in options.items() if name in kernel.arg_names})
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + DTYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, f"{kernel.fn.__name__} {signature} {constants} {sorted(map(str, attributes))}"


def build(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], known: dict[str, Resources]) -> None:
    """Compile a launch, unless the same was compiled before."""
    source, key = describe(kernel, args, options)
    if key in known:
        return
    chosen = {name: options[name] for name in OPTIONS if name in options}
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=chosen)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        report = assemble(file.name)
    registers, spilled = (re.search(p, report) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas said nothing of {kernel.fn.__name__}: {report}")
    module = kernel.fn.__module__.rsplit(".", 1)[-1]
    ptx = compiled.asm["ptx"]
    known[key] = Resources(
        f"{module}.{kernel.fn.__name__}",
        compiled.metadata.num_warps,
        int(registers[1]),
        int(spilled[1]),
        compiled.metadata.shared,
        "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "",
    )


def assemble(path: str) -> str:
    """Return ptxas' report on a file: newer releases of Triton carry several, of which an older one may refuse it."""
    folder, report = Path(triton.__file__).parent / "backends" / "nvidia" / "bin", ""
    for assembler in sorted(folder.glob("ptxas*")):
        command = [str(assembler), "-v", f"-arch=sm_{ARCHITECTURE}a", path, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stderr
        if done.returncode == 0:
            return report
    raise RuntimeError(f"No ptxas in {folder} took the kernel: {report}")


@contextmanager
def compiling(known: dict[str, Resources]) -> Iterator[None]:
    """Compile kernels where they would be launched."""
    before = JITFunction.__getitem__

    def launcher(self: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: build(self, args, options, known)

    JITFunction.__getitem__ = launcher
    try:
        yield
    finally:
        JITFunction.__getitem__ = before


def language_model(size: str) -> DeepseekV2ForCausalLM:
    """Build a release's language model without memory for its weights; two layers are all there is to see."""
    fields = json.loads((RELEASES / size / "config.json").read_text(encoding="utf-8"))
    config = DeepseekVLV2Config(**fields).language_config
    config.num_hidden_layers = 2
    with torch.device("meta"):
        return DeepseekV2ForCausalLM(config).to(torch.bfloat16).eval()


def resources(size: str, rows: int) -> list[Resources]:
    """Return what the kernels of a step take."""
    language, known = language_model(size), dict[str, Resources]()
    weights = read_weights(language)
    buffers = new_buffers(weights, new_rows(rows, torch.device("meta")), *rotary_tables(language, 2048))
    buffers.pdl = PDL
    pools = [new_pool(shape, 2048) for shape in layer_shapes(language)]
    with compiling(known), torch.no_grad():
        decode_stage(weights, buffers, pools, 0, len(pools))
    return list(known.values())


def prompt_resources(size: str, tokens: int) -> list[Resources]:
    """Return what the kernels of a prompt take: of a layer's attention, of its experts, and of scaling an image."""
    language, known = language_model(size), dict[str, Resources]()
    layer: Any = language.model.layers[1]
    weights: Any = language.lm_head.weight
    attention, mlp, config = layer.self_attn, layer.mlp, language.config
    routing, last = read_router_config(mlp.gate), torch.zeros(1, dtype=torch.long, device="meta")
    x = weights.new_empty(tokens, config.hidden_size)
    with compiling(known), torch.no_grad():
        if config.use_mla:
            size_of_head, rank, part = attention.qk_head_dim, attention.kv_lora_rank, attention.qk_rope_head_dim
            cos = weights.new_empty(tokens, part)
            slots = torch.empty(tokens, dtype=torch.int64, device="meta")
            compressed, cache = weights.new_empty(tokens, rank + part), weights.new_empty(tokens, rank + part)
            _, key_rope = rope.cache_latents(compressed, attention.kv_a_layernorm.weight, 1e-6, cos, cos, slots, cache)
            expanded = attention.qk_nope_head_dim + attention.v_head_dim
            heads = weights.new_empty(tokens, attention.num_heads, expanded)
            rope.concat_keys(heads, key_rope, attention.qk_nope_head_dim)
        else:
            size_of_head = attention.head_dim
            cos = weights.new_empty(tokens, size_of_head)
        heads = weights.new_empty(tokens, config.num_attention_heads, size_of_head)
        rope.rotate_heads_(heads, cos, cos, interleaved=config.use_mla)
        bias = mlp.gate.e_score_correction_bias if routing.method == router.NOAUX_TC else None
        ids, topk_weights = router.route_tokens(x, mlp.gate.weight, bias, routing, last, tokens)
        places, ends = prefill_experts.moe_align(ids, routing.num_experts)
        inner = grouped_gemm.grouped_gate_up(prefill_experts.permute_tokens(x, places), mlp.experts.gate_up_proj, ends)
        outputs = grouped_gemm.grouped_down(inner, mlp.experts.down_proj, ends)
        prefill_experts.silu_and_mul(inner, inner)
        prefill_experts.combine_tokens(outputs, places, topk_weights)
        image_resize.resize_axis(
            *(torch.empty(768, width, 3, dtype=torch.uint8, device="meta") for width in (1024, 384))
        )
        norm.fused_add_rms_norm(x, outputs, topk_weights, x, layer.input_layernorm.weight, 1e-6, x, x, places)
    return list(known.values())


def vision_tower() -> VisionTransformer:
    """Build the releases' vision tower without memory for its weights, two blocks of it."""
    fields = json.loads((RELEASES / "tiny" / "config.json").read_text(encoding="utf-8"))
    config = DeepseekVLV2Config(**fields).vision_config
    config.layers = 2
    with torch.device("meta"):
        return VisionTransformer.from_config(config).to(torch.bfloat16).eval()


def tower_resources() -> list[Resources]:
    """Return what the kernels of the vision tower take."""
    vision, known = vision_tower(), dict[str, Resources]()
    pixels = torch.empty(2, 3, *vision.patch_embed.img_size, dtype=torch.bfloat16, device="meta")
    with compiling(known), torch.no_grad():
        vision_kernels.encode(vision, pixels, PDL)
    return list(known.values())


def rows_of_table(size: str, numbers: list[int]) -> Iterator[tuple[str, Resources]]:
    """Yield how many rows, and what a kernel takes then."""
    if size == "tower":
        yield from (("any", kernel) for kernel in tower_resources())
        return
    for rows in numbers:
        found = resources(size, rows) if rows <= MAX_SMALL_BATCH else prompt_resources(size, rows)
        yield from ((str(rows), kernel) for kernel in found)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base", "tower"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 1536])
    args = parser.parse_args()
    print(f"Triton {triton.__version__}, sm_{ARCHITECTURE}\n")
    print("| size | rows | kernel | warps | registers | spilled | shared, kB | products |\n" + "| --- " * 8 + "|")
    for size in args.sizes:
        for rows, r in rows_of_table(size, args.rows):
            numbers = f"{r.warps} | {r.registers} | {r.spilled} | {r.shared / 1024:.1f}"
            print(f"| {size} | {rows} | {r.kernel} | {numbers} | {r.products} |", flush=True)


if __name__ == "__main__":
    main()
