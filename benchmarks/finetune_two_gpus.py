"""Fine-tune on two GPUs in each documented way: losses beside one GPU's, tokens a second and MFU; a case under 90 s.

    python benchmarks/finetune_two_gpus.py --list
    python benchmarks/finetune_two_gpus.py --cases tiny-full-ddp small-lora-fsdp [--markdown two.md]
    python benchmarks/finetune_two_gpus.py --cpu --cases tiny-full-ddp   # the program anywhere: two processes by gloo

Released shapes with random weights that are drawn on the GPUs, never on the host. A case is two commands, each of a
launcher and options as docs/training.md prints them: one process, then two that copy the model (DDP) or shard it
(FSDP 2), on the same samples a step. Cases of the same model share the first. Each row is printed when its case is
over; a case that fails, or takes longer than --seconds, says why, and the next one starts.

MFU counts the products with weights alone, those that run for a token (6 operations a weight in full, 4 with adapters
and 2 in a frozen tower), over 989 TFLOP/s; what checkpointing computes again does not count. Speeds leave out the
first two steps.
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
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from finetune_worker import CUT, config_of
from gpu_end_to_end import GB, PICTURE, ROOT
from PIL import Image, ImageOps

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.training.collator import ConversationCollator
from deepseek_vl2.training.data import ConversationDataset
from deepseek_vl2.utils.demo import byte_tokenizer, candidate_resolutions

PEAK = 989e12  # bfloat16, H100 and H200
STEPS, WARM = 6, 2
TOLERANCE = 0.03  # bfloat16; where weights are sharded the gates' and norms' are rounded too
FSDP = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_state_dict_type"
SHARDED = [*FSDP.split(), "FULL_STATE_DICT"]
FIXED = "--accumulation 1 --learning_rate 3e-5 --schedule constant --warmup 0 --no_bar --log_every 1 --workers 2"


@dataclass(frozen=True)
class Run:
    """One command: the model, what is trained, and how it is spread."""

    model: str
    trained: str  # "full", "lora", or the kind of weights under adapters
    spread: str  # "one" GPU, "ddp" or "fsdp"
    checkpointing: bool

    @property
    def processes(self) -> int:
        """How many processes run."""
        return 1 if self.spread == "one" else 2

    @property
    def name(self) -> str:
        """A word for its files."""
        return f"{self.model}-{self.trained}-{self.spread}".replace(":", "-")


@dataclass(frozen=True)
class Case:
    """A run on two GPUs, and whether one GPU can hold it too, whose losses it must have."""

    run: Run
    comparable: bool = True
    resumed: bool = False  # ends its second half again, from a checkpoint

    @property
    def name(self) -> str:
        """What ``--cases`` calls it."""
        run = self.run
        short = f"{run.model.removeprefix(CUT)}-{run.trained}-{run.spread}"
        return short + "-cut" * run.model.startswith(CUT) + "-resumed" * self.resumed


CASES = [
    Case(Run("tiny", "full", "ddp", True)),
    Case(Run("tiny", "full", "fsdp", True)),
    Case(Run("tiny", "lora", "ddp", False)),
    Case(Run("tiny", "lora", "fsdp", False)),
    Case(Run("small", "lora", "ddp", True)),
    Case(Run("small", "lora", "fsdp", True)),
    Case(Run("small", "int4", "ddp", True)),
    Case(Run("small", "int4", "fsdp", True)),
    Case(Run("base", "lora", "fsdp", True)),
    Case(Run("small", "full", "fsdp", True), comparable=False),
    Case(Run(f"{CUT}small", "full", "fsdp", True)),
    Case(Run(f"{CUT}tiny", "full", "fsdp", True), resumed=True),
]


@dataclass
class Result:
    """What a run gave."""

    losses: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0  # of one GPU
    peak: float = 0.0  # bytes
    seconds: float = 0.0
    error: str = ""


# ---------------------------------------------------------------- files


def make_data(directory: Path, rows: int, small: bool) -> Path:
    """Write conversations about pictures of several sizes, answers of several lengths; ``small``: small pictures."""
    picture = Image.open(PICTURE).convert("RGB")
    lines = []
    for row in range(rows):
        view = ImageOps.mirror(picture) if row % 2 else picture
        view = view.crop((0, 0, 600 + 25 * (row % 8), 768))
        (view.resize((300, 300)) if small else view).save(directory / f"{row}.jpg", quality=95)
        answer = "The giraffe at the back stands between two trees, its head turned to the left. " * (1 + row % 3)
        question = {"role": "user", "content": "<image>\nWhat is this?", "images": [f"{row}.jpg"]}
        lines.append(json.dumps([question, {"role": "assistant", "content": answer}]))
    file = directory / "train.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def free_port() -> int:
    """Return a port for the processes of a run to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- arithmetic


def operations_per_token(config: DeepseekVLV2Config, full: bool, patches_per_token: float) -> float:
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
    trained, tower = (6, 6) if full else (4, 2)
    return trained * counts["language"] + tower * counts["vision"] * patches_per_token


def patches_of(data: Path, config: DeepseekVLV2Config) -> float:
    """Return how many patches of the vision tower there are for a token of the language model."""
    collator = ConversationCollator(DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions()))
    dataset = ConversationDataset([str(data)])
    batch = collator([dataset[row] for row in range(8)])
    crops = batch["images_spatial_crop"].prod(dim=-1)
    tiles = int((crops + (crops > 0)).sum())
    side = config.vision_config.image_size // config.vision_config.patch_size
    return tiles * side**2 / int(batch["attention_mask"].sum())


# ---------------------------------------------------------------- runs


class Machine:
    """Runs commands, on two GPUs or in processes on the CPU."""

    def __init__(self, root: Path, cpu: bool, rows: int) -> None:
        self.root, self.cpu, self.rows = root, cpu, rows
        self.data = make_data(root, 2 * rows * STEPS, cpu)
        DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions()).save_pretrained(root / "processor")

    def model(self, run: Run) -> str:
        """Return the worker's name of a run's model."""
        return "demo" if self.cpu else run.model

    def launcher(self, run: Run) -> list[str]:
        """Return what starts a run's processes, as docs/training.md has it."""
        if run.spread == "one":
            return []
        if self.cpu and run.spread == "ddp":  # accelerate's launcher starts one process on a CPU
            return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", str(free_port())]
        return [*launch, *SHARDED] if run.spread == "fsdp" else launch

    def command(self, run: Run, output: Path, halves: bool) -> list[str]:
        """Return a run's command; ``halves``: it writes a checkpoint in its middle."""
        options = ["--method", "full" if run.trained == "full" else "lora", "--model", str(self.root / "processor")]
        options += ["--quantize", run.trained] if run.trained not in ("full", "lora") else []
        options += [
            "--data",
            str(self.data),
            "--output",
            str(output),
            "--batch_size",
            str(2 * self.rows // run.processes),
        ]
        options += [*FIXED.split(), "--max_steps", str(STEPS), "--save_every", str(STEPS // 2 if halves else 1000)]
        options += ["--gradient_checkpointing"] * run.checkpointing
        options += ["--cpu", "--precision", "bf16", "--workers", "0"] * self.cpu
        worker = str(Path(__file__).with_name("finetune_worker.py"))
        figures = str(output.with_suffix(".json"))
        return [sys.executable, *self.launcher(run), worker, self.model(run), figures, *options]

    def environment(self, run: Run) -> dict[str, str]:
        """Return the environment of a run: one GPU, or all."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1" if self.cpu else "4"}
        alone = {"CUDA_VISIBLE_DEVICES": "" if self.cpu else "0"} if self.cpu or run.spread == "one" else {}
        return {**os.environ, "PYTHONPATH": path, **quiet, **alone}

    def execute(self, run: Run, seconds: float, halves: bool = False, resume: bool = False) -> Result:
        """Run a command and return what it logged; it is ended after ``seconds``."""
        output = self.root / run.name
        log, result, begin = output / "training_log.jsonl", Result(), time.perf_counter()
        log.unlink(missing_ok=True)
        command = [*self.command(run, output, halves), *["--resume"] * resume]
        printed = output.with_suffix(".txt")
        with printed.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment(run), stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                code = process.wait(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                result.error = f"ended after {seconds:.0f} s"
                return result
        result.seconds = time.perf_counter() - begin
        if code:
            result.error = reason(printed.read_text(errors="replace"))
            return result
        logs = [entry for entry in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if "loss" in entry]
        result.losses = [entry["loss"] for entry in logs]
        steady = [entry["tokens_per_second"] for entry in logs[WARM:]] or [0.0]
        result.tokens_per_second = statistics.median(steady) / run.processes
        result.peak = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["peak"]
        return result


def reason(printed: str) -> str:
    """Return the line of a failed run's output that says most."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    named = [
        line for line in lines if re.search(r"\w(Error|Exception)\b.*: |different metadata|^finetune|usage:", line)
    ]
    named = [line for line in named if "ChildFailedError" not in line]
    return " / ".join([*named[:1], *lines[-2:]])[:400] if named else " / ".join(lines[-3:])[:400]


# ---------------------------------------------------------------- the table

HEAD = ["case", "checkpointing", "on", "tokens/s a GPU", "MFU", "of one GPU's", "peak, GB", "losses", "off by", "s", ""]
SPREADS = {"one": "one GPU", "ddp": "DDP, 2", "fsdp": "FSDP 2, 2"}


def line(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


class Measurement:
    """Runs cases one after another and makes their rows."""

    def __init__(self, machine: Machine, seconds: float) -> None:
        self.machine, self.seconds = machine, seconds
        self.alone: dict[Run, Result] = {}
        self.patches: dict[str, float] = {}

    def mfu(self, run: Run, result: Result) -> float:
        """Return the share of a GPU's products that a run used."""
        config = config_of(self.machine.model(run))
        model = self.machine.model(run)
        if model not in self.patches:
            self.patches[model] = patches_of(self.machine.data, config)
        return (
            result.tokens_per_second * operations_per_token(config, run.trained == "full", self.patches[model]) / PEAK
        )

    def row(self, case: Case) -> list[str]:
        """Measure a case, with the run on one GPU unless that was measured already; returns its row."""
        start, run = time.perf_counter(), case.run
        one = replace(run, spread="one")
        if case.comparable and one not in self.alone:
            self.alone[one] = self.machine.execute(one, self.seconds)
        want = self.alone.get(one, Result())

        def left() -> float:
            return self.seconds - (time.perf_counter() - start)

        got = self.machine.execute(run, left(), halves=case.resumed)
        if case.resumed and not got.error:
            shutil.rmtree(self.machine.root / run.name / f"checkpoint-{STEPS}")
            got = self.machine.execute(run, left(), halves=True, resume=True)
        word = verdict(case, got, want)
        off = f"{distance(got, want):.4f}" if got.losses and want.losses else "-"
        speed, share, scaled, peak = "-", "-", "-", "-"
        if got.tokens_per_second and not case.resumed:
            speed, share = f"{got.tokens_per_second:,.0f}", f"{100 * self.mfu(run, got):.1f} %"
            peak = f"{got.peak / GB:.1f}"
        if got.tokens_per_second and want.tokens_per_second and not case.resumed:
            scaled = f"{got.tokens_per_second / want.tokens_per_second:.2f}"
        losses = " ".join(f"{loss:.3f}" for loss in got.losses) or "-"
        checkpointing, seconds = "yes" if run.checkpointing else "no", f"{time.perf_counter() - start:.0f}"
        return [case.name, checkpointing, SPREADS[run.spread], speed, share, scaled, peak, losses, off, seconds, word]


def distance(got: Result, want: Result) -> float:
    """Return the largest difference of losses; a resumed run has the last ones."""
    expected = want.losses[-len(got.losses) :]
    return max(abs(a - b) for a, b in zip(got.losses, expected, strict=True))


def verdict(case: Case, got: Result, want: Result) -> str:
    """Return a word for what a case gave."""
    if got.error:
        return f"FAILED: {got.error}"
    if want.error:
        return f"nothing to compare with: {want.error}"
    if not case.comparable:
        return "ran"
    if case.resumed and len(got.losses) != STEPS - STEPS // 2:
        return f"RESUMED at the wrong step: {len(got.losses)} steps were left"
    return "equal" if distance(got, want) <= TOLERANCE else "DIFFERS"


def measure(root: Path, cases: Sequence[Case], cpu: bool, rows: int, seconds: float) -> str:
    """Measure cases; returns the table."""
    start = time.perf_counter()
    measurement = Measurement(Machine(root, cpu, rows), seconds)
    table = [line(HEAD), line(["---"] * len(HEAD))]
    print("\n".join(table), flush=True)
    for case in cases:
        table.append(line(measurement.row(case)))
        print(table[-1], flush=True)
    return "\n".join([*table, "", f"The whole run took {time.perf_counter() - start:.0f} s."])


def main() -> None:
    """Measure and print."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help="some of --list")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--cpu", action="store_true", help="two processes on the CPU, a small model")
    parser.add_argument("--rows", type=int, default=4, help="samples a step on each GPU (default: 4)")
    parser.add_argument("--seconds", type=float, default=90.0, help="most for a case (default: 90)")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    if args.list:
        print("\n".join(names))
        return
    gpus = 0 if args.cpu else torch.cuda.device_count()
    if not args.cpu and gpus < 2:
        parser.error(f"two GPUs are needed, there are {gpus}; --cpu tries the program without")
    name = torch.cuda.get_device_name(0) if gpus else platform.processor() or "CPU"
    head = f"{gpus} x {name}; torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{head}\n", flush=True)
    cases = [case for case in CASES if case.name in args.cases]
    with tempfile.TemporaryDirectory() as directory:
        table = measure(Path(directory), cases, args.cpu, args.rows, args.seconds)
    print(f"\n{table.splitlines()[-1]}")
    if args.markdown:
        text = f"# Fine-tuning on two GPUs\n\n{(__doc__ or '').strip()}\n\n{head}\n\n{table}\n"
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
