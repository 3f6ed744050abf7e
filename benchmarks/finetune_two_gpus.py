"""Run the documented training commands on two GPUs, and compare their losses with one GPU's; under 4 minutes.

    python benchmarks/finetune_two_gpus.py [--markdown benchmarks/finetune_two_gpus.md]
    python benchmarks/finetune_two_gpus.py --cpu     # tries the program anywhere, in two processes that talk by gloo

Released shapes with few layers and random weights, made there. Every run is a command of its own, as docs/training.md
prints it: copies of the model (DDP) and shards (FSDP 2), in full and with adapters, with and without gradient
checkpointing, and one that goes on from a checkpoint. Its losses are compared with those of the same command in one
process on the same samples a step. Two last runs measure whole tiny, without saving. A run that fails says why and the
next one starts; what no time is left for says so. The table comes last.

MFU counts the products with weights alone, those that run for a token (6 operations a weight in full, 4 with adapters
and 2 in a frozen tower), over 989 TFLOP/s; what checkpointing computes again does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_end_to_end import PICTURE, ROOT, released_config
from PIL import Image, ImageOps
from random_weights import fill_randomly

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.training.collator import ConversationCollator
from deepseek_vl2.training.data import ConversationDataset
from deepseek_vl2.utils.demo import byte_tokenizer, candidate_resolutions

PEAK = 989e12  # bfloat16, H100 and H200
STEPS, ROWS = 4, 4  # samples a step, over all processes
TOLERANCE = 0.03  # bfloat16; where weights are sharded the gates' and norms' are rounded too
FSDP = [
    "--use_fsdp",
    "--fsdp_version",
    "2",
    "--fsdp_auto_wrap_policy",
    "TRANSFORMER_BASED_WRAP",
    "--fsdp_state_dict_type",
    "FULL_STATE_DICT",
]
FINETUNE = "deepseek_vl2.training.finetune"


@dataclass
class Run:
    """One command: what is trained, how it is spread, and whose losses it must have."""

    size: str
    method: str  # "full" or "lora"
    spread: str  # "one" GPU, "ddp" or "fsdp"
    checkpointing: bool
    like: str | None = None  # the run that it is compared with, by its name
    resume: bool = False  # go on from the middle of the run before
    speed: bool = False  # the whole model, nothing saved
    losses: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0  # of one GPU
    seconds: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        """What tells runs apart."""
        more = " checkpointing" * self.checkpointing + " resumed" * self.resume + " whole" * self.speed
        return f"{self.size} {self.method} {self.spread}{more}"

    @property
    def processes(self) -> int:
        """How many processes run."""
        return 1 if self.spread == "one" else 2


def all_runs(small: str, tiny: str) -> list[list[Run]]:
    """Return the runs in their order; those in a list run at the same time, so that only their losses count."""
    full, lora, other = Run(tiny, "full", "one", True), Run(tiny, "lora", "one", False), Run(small, "lora", "one", True)
    sharded = Run(tiny, "full", "fsdp", True, full.name)
    return [
        [full, lora, other],
        [sharded, Run(tiny, "full", "ddp", True, full.name)],
        [
            Run(tiny, "full", "fsdp", True, full.name, resume=True),
            Run(small, "lora", "fsdp", True, other.name),
            Run(tiny, "lora", "ddp", False, lora.name),
        ],
        [Run(tiny, "full", "fsdp", True, speed=True)],
        [Run(tiny, "lora", "ddp", False, speed=True)],
        [
            Run(tiny, "lora", "fsdp", False, lora.name),
            Run(small, "lora", "ddp", True, other.name),
            Run(small, "full", "fsdp", True),
        ],
    ]


def free_port() -> int:
    """Return a port for the processes of a run to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- files


def cut_config(size: str) -> DeepseekVLV2Config:
    """Return a release's config with two layers, one of them a mixture of experts, and two of the vision tower."""
    config = released_config(size)
    if size != "demo":
        config.language_config.num_hidden_layers = 2
        config.vision_config.layers = 2
    return config


def make_checkpoint(size: str, directory: Path, device: torch.device) -> None:
    """Write a checkpoint with random weights."""
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(cut_config(size)).to(torch.bfloat16)
    model = model.to_empty(device=device)
    fill_randomly(model, device)
    processor = DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions())
    language = model.config.language_config
    language.bos_token_id = processor.tokenizer.bos_token_id
    language.eos_token_id = language.pad_token_id = processor.tokenizer.eos_token_id
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def make_data(directory: Path, rows: int, cpu: bool) -> Path:
    """Write conversations about pictures of several sizes, answers of several lengths; on a CPU small pictures."""
    picture = Image.open(PICTURE).convert("RGB")
    lines = []
    for row in range(rows):
        view = ImageOps.mirror(picture) if row % 2 else picture
        view = view.crop((0, 0, 600 + 25 * (row % 8), 768))
        (view.resize((300, 300)) if cpu else view).save(directory / f"{row}.png")
        answer = "The giraffe at the back stands between two trees, its head turned to the left. " * (1 + row % 3)
        question = {"role": "user", "content": "<image>\nWhat is this?", "images": [f"{row}.png"]}
        lines.append(json.dumps([question, {"role": "assistant", "content": answer}]))
    file = directory / "train.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


# ---------------------------------------------------------------- arithmetic


def operations_per_token(config: DeepseekVLV2Config, method: str, patches_per_token: float) -> float:
    """Return the operations of training one token; see the module's text."""
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(config)
    language = config.language_config
    counts = {"language": 0.0, "vision": 0.0}
    for name, parameter in model.named_parameters():
        part, size = name.split(".")[0], float(parameter.numel())
        if ".experts." in name:
            size *= (language.num_experts_per_tok or 0) / (language.n_routed_experts or 1)
        if part in counts and "embed_tokens" not in name and "lm_head" not in name:
            counts[part] += size
    trained, tower = (6, 6) if method == "full" else (4, 2)
    return trained * counts["language"] + tower * counts["vision"] * patches_per_token


def patches_of(data: Path, config: DeepseekVLV2Config) -> float:
    """Return how many patches of the vision tower there are for a token of the language model."""
    collator = ConversationCollator(DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions()))
    dataset = ConversationDataset([str(data)])
    batch = collator([dataset[row] for row in range(ROWS)])
    crops = batch["images_spatial_crop"].prod(dim=-1)
    tiles = int((crops + (crops > 0)).sum())
    side = config.vision_config.image_size // config.vision_config.patch_size
    return tiles * side**2 / int(batch["attention_mask"].sum())


# ---------------------------------------------------------------- runs


class Machine:
    """Starts the runs, on two GPUs or in processes on the CPU."""

    def __init__(self, root: Path, cpu: bool) -> None:
        self.root, self.cpu = root, cpu
        self.data = make_data(root, STEPS * ROWS, cpu)

    def command(self, run: Run, output: Path) -> list[str]:
        """Return a run's command."""
        arguments = ["--method", run.method, "--model", str(self.root / run.size), "--data", str(self.data)]
        arguments += ["--output", str(output), "--batch_size", str(ROWS // run.processes), "--accumulation", "1"]
        arguments += [
            "--learning_rate",
            "3e-5",
            "--schedule",
            "constant",
            "--warmup",
            "0",
            "--no_bar",
            "--log_every",
            "1",
            "--workers",
            "1",
        ]
        arguments += ["--max_steps", str(STEPS), "--save_every", str(STEPS // 2 if self.is_resumed(run) else 1000)]
        arguments += ["--gradient_checkpointing"] * run.checkpointing + ["--resume"] * run.resume
        arguments += ["--cpu", "--precision", "bf16"] * self.cpu
        script = [__file__, "--worker", run.size] if run.speed else ["-m", FINETUNE]
        if run.spread == "one":
            return [sys.executable, *script, *arguments]
        if self.cpu and run.spread == "ddp":  # accelerate's launcher starts one process on a CPU
            return [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                "2",
                *script,
                *arguments,
            ]
        if self.cpu:
            script = [str(ROOT / "tests" / "fsdp_finetune.py")]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
        launch += ["--main_process_port", str(free_port())]
        return [*launch, *(FSDP if run.spread == "fsdp" else []), *script, *arguments]

    def is_resumed(self, run: Run) -> bool:
        """Whether another run goes on from this one's middle, or it goes on itself."""
        return (run.size, run.method, run.spread) == ("tiny" if not self.cpu else "demo", "full", "fsdp")

    def environment(self, gpu: int | None) -> dict[str, str]:
        """Return the environment of a run: with one GPU, or with all."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1" if self.cpu else "4"}
        chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        return {**os.environ, "PYTHONPATH": path, **quiet, **chosen}

    def start(self, run: Run, gpu: int | None) -> tuple[subprocess.Popen[str], Path, Path]:
        """Start a run; returns its process, its output directory and the file of what it prints."""
        output = self.root / re.sub(r" resumed", "", run.name).replace(" ", "-")
        if run.resume:
            last = output / f"checkpoint-{STEPS}"
            shutil.rmtree(last)
            (output / "training_log.jsonl").unlink()
        printed = self.root / f"{output.name}.txt"
        with printed.open("w") as stream:
            process = subprocess.Popen(
                self.command(run, output),
                cwd=ROOT,
                env=self.environment(gpu),
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        return process, output, printed

    def finish(self, run: Run, started: tuple[subprocess.Popen[str], Path, Path], seconds: float) -> None:
        """Wait for a run, and read what it logged."""
        process, output, printed = started
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            run.error = f"ended after {seconds:.0f} s"
            return
        if code:
            run.error = reason(printed.read_text(errors="replace"))
            return
        lines = (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
        logs = [log for log in map(json.loads, lines) if "loss" in log]
        run.losses = [log["loss"] for log in logs]
        steady = [log["tokens_per_second"] for log in logs[1:]] or [0.0]
        run.tokens_per_second = statistics.median(steady) / run.processes

    def run(self, runs: Sequence[Run], seconds: float) -> None:
        """Run commands at the same time; the first that are for one GPU see one each, the rest all of them."""
        begin = time.perf_counter()
        started: list[tuple[Run, Any]] = []
        for index, run in enumerate(runs):
            try:
                alone = run.spread == "one" and index < 2
                started.append((run, self.start(run, index if alone else None)))
            except OSError as error:
                run.error = str(error)
        for run, process in started:
            try:
                self.finish(run, process, max(1.0, seconds - (time.perf_counter() - begin)))
            except (OSError, ValueError, KeyError) as error:
                run.error = f"{type(error).__name__}: {error}"
            run.seconds = time.perf_counter() - begin


def reason(printed: str) -> str:
    """Return the line of a failed run's output that says most."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    named = [
        line for line in lines if re.search(r"\w(Error|Exception)\b.*: |different metadata|^finetune|usage:", line)
    ]
    named = [line for line in named if "ChildFailedError" not in line]
    return " / ".join([*named[:1], *lines[-2:]])[:400] if named else " / ".join(lines[-3:])[:400]


# ---------------------------------------------------------------- a whole model, nothing saved


def worker(size: str, argv: list[str]) -> None:
    """Train a released shape with all its layers, for speed: the command's own pieces, but for loading and saving."""
    from deepseek_vl2.training import finetune, finetune_run

    def random_base(args: argparse.Namespace) -> DeepseekVLV2ForCausalLM:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        with torch.device("meta"):
            model = DeepseekVLV2ForCausalLM(released_config(size)).to(torch.bfloat16)
        model = model.to_empty(device=device)
        fill_randomly(model, device)
        model = model.float() if args.method == "full" else model
        return model.cpu() if args.method == "full" else model  # accelerate shards from the host's memory

    finetune_run.load_base = random_base  # type: ignore[assignment]
    args = finetune.build_parser().parse_args(argv)
    args.precision = "bf16"
    trainer = finetune_run.build_trainer(args)
    trainer.args.save_strategy = "no"
    trainer.train()


# ---------------------------------------------------------------- the table

HEAD = ["size", "trained", "spread", "checkpointing", "losses", "off by", "tokens/s a GPU", "MFU", "seconds", ""]


def verdict(run: Run, finished: dict[str, Run]) -> tuple[str, str]:
    """Return how far a run's losses are from the one's that it must equal, and a word for it."""
    if run.error:
        return "-", f"FAILED: {run.error}"
    if run.like is None:
        return "-", "ran"
    want = finished.get(run.like)
    if want is None or not want.losses:
        return "-", "nothing to compare with"
    expected = want.losses[-len(run.losses) :]
    off = max(abs(a - b) for a, b in zip(run.losses, expected, strict=True))
    return f"{off:.4f}", "equal" if off <= TOLERANCE else "DIFFERS"


def row(run: Run, finished: dict[str, Run], operations: dict[tuple[str, str, bool], float]) -> list[str]:
    """Return a row of the table."""
    off, word = verdict(run, finished)
    each = operations.get((run.size, run.method, run.speed), 0.0)
    mfu = f"{100 * run.tokens_per_second * each / PEAK:.1f} %" if run.tokens_per_second and run.speed else "-"
    losses = " ".join(f"{loss:.3f}" for loss in run.losses) or "-"
    spread = {"one": "one GPU", "ddp": "DDP, 2", "fsdp": "FSDP 2, 2"}[run.spread] + ", resumed" * run.resume
    size = run.size + (", whole" if run.speed else ", 2 layers")
    checkpointing = "yes" if run.checkpointing else "no"
    speed = f"{run.tokens_per_second:,.0f}" if run.tokens_per_second and run.speed else "-"
    return [size, run.method, spread, checkpointing, losses, off, speed, mfu, f"{run.seconds:.0f}", word]


def line(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def measure(root: Path, cpu: bool, seconds: float) -> str:
    """Run everything that there is time for; returns the table."""
    start = time.perf_counter()
    tiny, small = ("demo", "demo") if cpu else ("tiny", "small")
    device = torch.device("cpu" if cpu else "cuda")
    machine = Machine(root, cpu)
    operations: dict[tuple[str, str, bool], float] = {}
    for size in dict.fromkeys((tiny, small)):
        make_checkpoint(size, root / size, device)
        for whole in (False, True):
            config = released_config(size) if whole else cut_config(size)
            patches = patches_of(machine.data, config)
            for method in ("full", "lora"):
                operations[size, method, whole] = operations_per_token(config, method, patches)
    if not cpu:
        torch.cuda.empty_cache()
    print(f"[{time.perf_counter() - start:5.1f} s] files are written", flush=True)
    finished: dict[str, Run] = {}
    rows: list[list[str]] = []
    for runs in all_runs(small, tiny):
        runs = [run for run in runs if run.name not in finished and not (cpu and run.speed)]
        for group in [[run] for run in runs] if cpu else [runs]:
            left = seconds - (time.perf_counter() - start)
            if left < 15:
                for run in group:
                    run.error = "no time left"
            else:
                machine.run(group, min(left, 100.0))
            for run in group:
                finished[run.name] = run
                rows.append(row(run, finished, operations))
                print(f"[{time.perf_counter() - start:5.1f} s] {line(rows[-1])}", flush=True)
    table = [line(HEAD), line(["---"] * len(HEAD)), *map(line, rows)]
    return "\n".join([*table, "", f"The whole run took {time.perf_counter() - start:.0f} s."])


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="two processes on the CPU, a small model")
    parser.add_argument("--seconds", type=float, default=225.0, help="start nothing after this long (default: 225)")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    gpus = 0 if args.cpu else torch.cuda.device_count()
    name = torch.cuda.get_device_name(0) if gpus else platform.processor() or "CPU"
    head = f"{gpus} x {name}; torch {torch.__version__}, transformers {transformers.__version__}"
    print(head, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        table = measure(Path(directory), args.cpu, args.seconds)
    print(f"\n{table}")
    if args.markdown:
        text = f"# Fine-tuning on two GPUs\n\n{(__doc__ or '').strip()}\n\n{head}\n\n{table}\n"
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
