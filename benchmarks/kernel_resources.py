"""Compile every kernel at the released shapes, without a GPU, and print what each takes.

    python benchmarks/kernel_resources.py [--sizes tiny small base tower] [--rows 1 8 64 1536]
        [--weights plain int4 int8 fp8 "fp8 blocks"] [--architectures 90 89 80 75]

Up to 64 rows are those of a decoding step; more are the tokens of a prompt. "tower" is the vision tower that all three
releases have, at any number of tiles. Packed weights show only what is compiled for them. 90 is the compute capability
of an H200; 7.5 has no bfloat16, and its kernels are compiled for float16.

Columns: registers a thread, bytes spilled to memory (should be 0), shared memory a program in kB (of 227, 99, 163 and
64), warps, and by which instructions it multiplies matrices: "wgmma" is what an H200's tensor cores are for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_vl2.engine import prefill, vision_kernels
from deepseek_vl2.engine.decode import MAX_SMALL_BATCH, decode_stage
from deepseek_vl2.engine.decode_buffers import MAX_PDL_ROWS, new_buffers
from deepseek_vl2.engine.kv_cache import layer_shapes, new_pool
from deepseek_vl2.engine.rows import new_rows
from deepseek_vl2.engine.weights import read_experts, read_router_config, read_weights, rotary_tables
from deepseek_vl2.models import DeepseekVLV2Config
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM
from deepseek_vl2.models.quantizer import WeightOnlyConfig, plan_formats, replace_layers
from deepseek_vl2.models.siglip_vit import VisionTransformer
from deepseek_vl2.ops.triton import (
    decode_experts_gemm,
    decode_gemm,
    decode_mla,
    grouped_gemm,
    image_resize,
    norm,
    prefill_experts,
    rope,
    router,
)

RELEASES = Path(__file__).resolve().parents[1] / "tests" / "golden" / "releases"
# Bytes of shared memory that a program may have.
SHARED = {90: 232_448, 89: 101_376, 80: 166_912, 75: 65_536}
PACKED: dict[str, dict[str, Any]] = {
    "int4": {"weights": "int4", "head": "int4"},
    "int8": {"weights": "int8", "head": "int8"},
    "fp8": {"weights": "fp8", "head": "fp8"},
    "fp8 blocks": {"weights": "fp8", "block": True},
}
DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
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


@dataclass
class Compiler:
    """Compiles kernels where they would be launched.

    Fields:
        architecture: compute capability, times ten.
        packed_alone: leave out what is the same for plain weights.
        known: what was compiled, by what was launched.
    """

    architecture: int = 90
    packed_alone: bool = False
    known: dict[str, Resources] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """What weights and activations are in."""
        return torch.bfloat16 if self.architecture >= 80 else torch.float16

    @property
    def pdl(self) -> dict[str, Any]:
        """The options of launches, as on the device."""
        return PDL if self.architecture >= 90 else {}

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Compile kernels where they would be launched."""
        before, room = JITFunction.__getitem__, decode_mla.shared_memory
        asking: tuple[Any, ...] = (decode_mla, decode_gemm, decode_experts_gemm)

        def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: build(kernel, args, options, self)

        JITFunction.__getitem__ = launcher
        for module in asking:
            module.shared_memory = lambda device: SHARED[self.architecture]
        try:
            yield
        finally:
            JITFunction.__getitem__ = before
            for module in asking:
                module.shared_memory = room


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


def build(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], compiler: Compiler) -> None:
    """Compile a launch, unless the same was compiled before."""
    if compiler.packed_alone and not options.get("KIND"):
        return
    source, key = describe(kernel, args, options)
    known = compiler.known
    if key in known:
        return
    chosen = {name: options[name] for name in OPTIONS if name in options}
    compiled = triton.compile(source, target=GPUTarget("cuda", compiler.architecture, 32), options=chosen)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        report = assemble(file.name, compiler.architecture)
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


def assemble(path: str, architecture: int) -> str:
    """Return ptxas' report on a file: newer releases of Triton carry several, of which an older one may refuse it."""
    folder, report = Path(triton.__file__).parent / "backends" / "nvidia" / "bin", ""
    for assembler in sorted(folder.glob("ptxas*")):
        command = [
            str(assembler),
            "-v",
            f"-arch=sm_{architecture}" + "a" * (architecture == 90),
            path,
            "-o",
            os.devnull,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stderr
        if done.returncode == 0:
            return report
    raise RuntimeError(f"No ptxas in {folder} took the kernel: {report}")


def language_model(size: str, dtype: torch.dtype, packed: str | None) -> DeepseekV2ForCausalLM:
    """Build a release's language model without memory for its weights; two layers are all there is to see."""
    fields = json.loads((RELEASES / size / "config.json").read_text(encoding="utf-8"))
    config = DeepseekVLV2Config(**fields).language_config
    config.num_hidden_layers = 2
    with torch.device("meta"):
        language = DeepseekV2ForCausalLM(config).to(dtype).eval()
        if packed is not None:
            replace_layers(language, plan_formats(language, WeightOnlyConfig(**PACKED[packed])), dtype)
    return language


def resources(size: str, rows: int, compiler: Compiler, packed: str | None = None) -> list[Resources]:
    """Return what the kernels of a step take."""
    language = language_model(size, compiler.dtype, packed)
    weights = read_weights(language)
    buffers = new_buffers(weights, new_rows(rows, torch.device("meta")), *rotary_tables(language, 2048))
    buffers.pdl = compiler.pdl if rows <= MAX_PDL_ROWS else {}
    pools = [new_pool(shape, 2048) for shape in layer_shapes(language)]
    with compiler.compiling(), torch.no_grad():
        decode_stage(weights, buffers, pools, 0, len(pools))
    return list(compiler.known.values())


def packed_prompt_resources(size: str, tokens: int, compiler: Compiler, packed: str) -> list[Resources]:
    """Return what a prompt's products with packed weights take."""
    language = language_model(size, compiler.dtype, packed)
    layer: Any = language.model.layers[1]
    x = torch.empty(tokens, language.config.hidden_size, dtype=compiler.dtype, device="meta")
    ids = torch.empty(tokens, layer.mlp.gate.top_k, dtype=torch.int32, device="meta")
    with compiler.compiling(), torch.no_grad():
        prefill.run_linear(layer.self_attn.q_proj, x)
        prefill.run_mlp(layer.mlp.shared_experts, x)
        prefill_experts.permuted_experts(x, *read_experts(layer.mlp.experts), ids)
    return list(compiler.known.values())


def prompt_resources(size: str, tokens: int, compiler: Compiler) -> list[Resources]:
    """Return what the kernels of a prompt take: of a layer's attention, of its experts, and of scaling an image."""
    language = language_model(size, compiler.dtype, None)
    layer: Any = language.model.layers[1]
    weights: Any = language.lm_head.weight
    attention, mlp, config = layer.self_attn, layer.mlp, language.config
    routing, last = read_router_config(mlp.gate), torch.zeros(1, dtype=torch.long, device="meta")
    x = weights.new_empty(tokens, config.hidden_size)
    with compiler.compiling(), torch.no_grad():
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
    return list(compiler.known.values())


def vision_tower() -> VisionTransformer:
    """Build the releases' vision tower without memory for its weights, two blocks of it."""
    fields = json.loads((RELEASES / "tiny" / "config.json").read_text(encoding="utf-8"))
    config = DeepseekVLV2Config(**fields).vision_config
    config.layers = 2
    with torch.device("meta"):
        return VisionTransformer.from_config(config).to(torch.bfloat16).eval()


def tower_resources(compiler: Compiler) -> list[Resources]:
    """Return what the kernels of the vision tower take."""
    vision = vision_tower()
    pixels = torch.empty(2, 3, *vision.patch_embed.img_size, dtype=torch.bfloat16, device="meta")
    with compiler.compiling(), torch.no_grad():
        vision_kernels.encode(vision, pixels, PDL)
    return list(compiler.known.values())


def rows_of_table(size: str, numbers: list[int], weights: str, architecture: int) -> Iterator[tuple[str, Resources]]:
    """Yield how many rows, and what a kernel takes then."""
    packed = None if weights == "plain" else weights
    if size == "tower":
        if packed is None:
            yield from (("any", kernel) for kernel in tower_resources(Compiler(architecture)))
        return
    for rows in numbers:
        compiler = Compiler(architecture, packed_alone=packed is not None)
        if rows <= MAX_SMALL_BATCH:
            found = resources(size, rows, compiler, packed)
        elif packed is None:
            found = prompt_resources(size, rows, compiler)
        else:
            found = packed_prompt_resources(size, rows, compiler, packed)
        yield from ((str(rows), kernel) for kernel in found)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base", "tower"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 1536])
    parser.add_argument("--weights", nargs="+", default=["plain"], choices=["plain", *PACKED])
    parser.add_argument("--architectures", nargs="+", type=int, default=[90], choices=SHARED)
    args = parser.parse_args()
    for architecture, weights in itertools.product(args.architectures, args.weights):
        of = "" if weights == "plain" else f", weights in {weights}"
        print(f"\nTriton {triton.__version__}, sm_{architecture}{of}\n")
        print("| size | rows | kernel | warps | registers | spilled | shared, kB | products |\n" + "| --- " * 8 + "|")
        for size in args.sizes:
            for rows, r in rows_of_table(size, args.rows, weights, architecture):
                numbers = f"{r.warps} | {r.registers} | {r.spilled} | {r.shared / 1024:.1f}"
                print(f"| {size} | {rows} | {r.kernel} | {numbers} | {r.products} |", flush=True)


if __name__ == "__main__":
    main()
