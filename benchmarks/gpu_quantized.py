"""Measure packed weights on an NVIDIA GPU, beside bfloat16 in the same run, in at most 10 minutes.

    python benchmarks/gpu_quantized.py [--markdown benchmarks/gpu_quantized.md]
    python benchmarks/gpu_quantized.py --sizes base --weights bf16 int4     # less of it
    TRITON_INTERPRET=1 python benchmarks/gpu_quantized.py --dry-run         # the program, on a CPU: no figure counts

Released shapes; weights are drawn as packed numbers on the GPU, so that no model of 16 bits is in memory. For each size
and format: the captured step against the model's own modules on two layers; the peak memory and first token of a
question about one 1024x768 picture, about 1,450 tokens; the step at batch 1, 8 and 64, its floor, which is the bytes of
the packed weights and the cache that it reads over the copy bandwidth of the same run, and the ratio. A case that fails
is reported and the others go on; when the time is over, the rest is left out. The last table has the goals.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from gpu import CONTEXT, EXTENT, GB, Bench, Report, bytes_read, give_memory_back
from gpu_end_to_end import prompt, random_config
from random_weights import fill_packed_randomly, fill_randomly, pack_shapes

from deepseek_vl2.engine import backend, decode, support
from deepseek_vl2.engine.decode import experts_hit
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.holder import engine_of
from deepseek_vl2.engine.kv_cache import SCRATCH, KVCache, layer_shapes
from deepseek_vl2.engine.rows import Rows
from deepseek_vl2.engine.runner import ModuleRunner, Part
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.engine.triton_runner import TritonRunner
from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.cache import Segment
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM
from deepseek_vl2.models.quantizer import WeightOnlyConfig

SIZES = ("small", "base", "tiny")  # what matters most comes first
WEIGHTS = ("bf16", "int4", "int8", "fp8")
WITH_HEADS = ("int4+int8", "int4+int4", "int8+int8")  # weights, and the output head
BATCHES = (1, 8, 64)
# Goals on an H200: milliseconds a token at batch 1, gigabytes at the peak, and factors of bfloat16's.
STEP = {("tiny", "int4"): 0.38, ("small", "int4"): 1.1, ("base", "int4"): 1.6, ("small", "int8"): 1.4}
STEP[("base", "int8")] = 2.1
PEAK = {("tiny", "int4"): 3.2, ("small", "int4"): 10.8, ("base", "int4"): 17.6}
PEAK |= {("tiny", "int8"): 4.6, ("small", "int8"): 17.8, ("base", "int8"): 29.6}
BATCH_FACTOR = 0.6
FIRST_FACTOR = 1.15
# Logits of kernels and modules, both in bfloat16 and both rounded in places of their own.
LARGEST_ERROR = 0.05


@dataclass
class Case:
    """What was measured of one size and format."""

    size: str
    weights: str
    gigabytes: float = float("nan")
    peak: float = float("nan")
    first: float = float("nan")
    error: float = float("nan")
    same: str = "-"
    steps: dict[int, float] = field(default_factory=dict)
    floors: dict[int, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """Return a row of the table."""
        steps = [
            f"{self.steps[b]:.3f} / {self.floors[b]:.3f} = {self.steps[b] / self.floors[b]:.2f}"
            if b in self.steps
            else "-"
            for b in BATCHES
        ]
        numbers = [f"{self.gigabytes:.2f}", f"{self.peak:.2f}", f"{self.first:.1f}"]
        check = [f"{self.error:.1e}", self.same]
        return [self.size, self.weights, *numbers, *steps, *check, "; ".join(self.failures) or "-"]


def config_of(weights: str) -> WeightOnlyConfig | None:
    """Return how weights are packed, the head as usual in 16 bits if none is named; ``None``: they are not."""
    kind, _, head = weights.partition("+")
    return None if kind == "bf16" else WeightOnlyConfig(kind, head=head or None)  # type: ignore[arg-type]


def build(model: Any, weights: str, device: torch.device) -> Any:
    """Give a model without memory random weights of that format on the device."""
    config = config_of(weights)
    if config is None:
        model = model.to_empty(device=device)
        fill_randomly(model, device)
        return model.eval()
    pack_shapes(model, config, torch.bfloat16)
    model = model.to_empty(device=device)
    fill_packed_randomly(model, device)
    return model.eval()


def whole_model(size: str, weights: str, device: torch.device) -> DeepseekVLV2ForCausalLM:
    """Return a release with random weights."""
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(random_config(size)).to(torch.bfloat16)
    out: DeepseekVLV2ForCausalLM = build(model, weights, device)
    return out


def two_layers(size: str, weights: str, device: torch.device) -> DeepseekV2ForCausalLM:
    """Return a dense layer and one of experts of a release's language model.

    All experts that a token may have are chosen: where some are, roundings decide between two about as good.
    """
    config = random_config(size).language_config
    config.num_hidden_layers = 2
    config.n_routed_experts = config.num_experts_per_tok
    config.n_group = config.topk_group = 1
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
    out: DeepseekV2ForCausalLM = build(model, weights, device)
    return out


def kernels_of(engine: Engine) -> TritonRunner:
    """Return an engine's kernels.

    Raises:
        RuntimeError: it has none.
    """
    if not isinstance(engine.runner, TritonRunner):
        raise RuntimeError(f"no kernels: {engine.placement.reason}")
    return engine.runner


class QuantizedBench:
    """The measurements of one run."""

    def __init__(self, bench: Bench, dry: bool) -> None:
        self.bench, self.dry, self.device = bench, dry, bench.device
        self.batches = (1,) if dry else BATCHES

    # ---------------------------------------------------------------- right or wrong

    @torch.inference_mode()
    def check(self, case: Case) -> None:
        """Compare the step's logits with those of the model's own modules, on the same tokens."""
        language = two_layers(case.size, case.weights, self.device)
        length, worst, same, count = (3 if self.dry else 40), 0.0, 0, 0
        for rows in self.batches:
            engine = Engine(language, EngineOptions(kv_cache_tokens=rows * 2 * length + SCRATCH))
            logits = self._forced(engine, kernels_of(engine), language, rows, length)
            for got, want in logits:
                errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
                worst = max(worst, float(errors.median()))
                same += int((got.argmax(-1) == want.argmax(-1)).sum())
                count += len(got)
        case.error, case.same = worst, f"{same} of {count}"
        if not worst <= LARGEST_ERROR:
            raise RuntimeError(f"the step's logits are off by {worst:.3f}")

    def _forced(
        self, engine: Engine, runner: TritonRunner, language: Any, rows: int, length: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return logits behind prompts and one more token, of kernels and of modules."""
        generator = torch.Generator().manual_seed(rows)
        vocabulary = language.config.vocab_size
        ids = torch.randint(3, vocabulary, (rows, length + 1), generator=generator).tolist()
        plain_cache = KVCache(layer_shapes(language), SCRATCH + rows * 2 * length)
        plain, caches = ModuleRunner(language, plain_cache, rows), (engine.kv_cache, plain_cache)
        starts = [[cache.allocate(length + 1).start for _ in ids] for cache in caches]
        found = []
        for run, start in zip((runner, plain), starts, strict=True):
            parts = [Part(Segment(s, 0, length), line[:length]) for s, line in zip(start, ids, strict=True)]
            found.append([run.prefill(parts).float().clone()])  # type: ignore[attr-defined]
        step_rows = Rows(rows, self.device)
        step_rows.set([line[length] for line in ids], [length] * rows, starts[0])
        found[0].append(runner._run_step(step_rows, rows)[0].float().clone())
        last = [Part(Segment(s, length, 1), [line[length]]) for s, line in zip(starts[1], ids, strict=True)]
        found[1].append(plain.prefill(last).float())
        return list(zip(*found, strict=True))

    # ---------------------------------------------------------------- one question

    def request(self, case: Case, model: Any) -> None:
        """Ask one question about a picture: peak memory, and the first token."""
        processor = self.bench.processor

        def ask(tokens: int) -> None:
            inputs = processor(prompt="Hi") if self.dry else prompt(processor)
            model.generate(**inputs.to(self.device), max_new_tokens=tokens, do_sample=False, eos_token_id=None)

        if self.bench.on_gpu:
            give_memory_back()
            torch.cuda.reset_peak_memory_stats()
        ask(1 if self.dry else 8)
        kernels_of(engine_of(model))
        if self.bench.on_gpu:
            case.peak = torch.cuda.max_memory_allocated() / GB
        repeats = 1 if self.dry else 7
        # The second of a length is captured.
        first = [self.bench.wall(lambda: ask(1)) for _ in range(repeats if self.dry else 1 + repeats)]
        case.first = statistics.median(first[-repeats:])

    # ---------------------------------------------------------------- steps

    def steps(self, case: Case, model: Any) -> None:
        """Time the captured step of each batch."""
        backend.release(model)
        give_memory_back()
        most, context = max(self.batches), 20 if self.dry else CONTEXT
        runner = kernels_of(engine_of(model, EngineOptions(kv_cache_tokens=most * EXTENT)))
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.inference_mode():
            for pool in runner.kv_cache.pools:
                for part in pool:
                    part.normal_(generator=generator)
            for count in self.batches:
                rows = Rows(count, self.device)
                ids = torch.randint(3, runner.weights.head.shape[0], (count,), generator=generator, device=self.device)
                rows.set(ids.tolist(), [context] * count, [SCRATCH + row * EXTENT for row in range(count)])
                step = runner._step(rows, count)
                repeats = 1 if self.dry else 50
                if self.dry:
                    times = [self.bench.wall(step)]
                else:
                    times = [statistics.median(self.bench.milliseconds(step, repeats)) for _ in range(2)]
                read = bytes_read(runner, count * (context + 50), experts_hit(runner.weights, step.buffers[-1]))
                case.steps[count], case.floors[count] = min(times), 1e3 * read / self.bench.bandwidth

    # ---------------------------------------------------------------- all

    def measure(self, case: Case, report: Report) -> None:
        """Run all sections of a case; one that fails does not keep the next from running."""
        name, sections = f"{case.size}, {case.weights}", {}

        def run(title: str, section: Any, *given: Any) -> None:
            before = len(report.failures)
            with report.section(f"{name}: {title}"):
                section(case, *given)
            if len(report.failures) > before:
                case.failures.append(title)

        run("check", self.check)
        give_memory_back()
        with report.section(f"{name}: model"):
            sections["model"] = whole_model(case.size, case.weights, self.device)
        model = sections.pop("model", None)
        if model is None:
            case.failures.append("model")
            return
        case.gigabytes = sum(p.nbytes for p in model.parameters()) / GB
        run("request", self.request, model)
        run("steps", self.steps, model)
        backend.release(model)


def goals(cases: dict[tuple[str, str], Case]) -> list[list[str]]:
    """Return the goals, what was measured, and whether they are met."""
    rows = []

    def row(case: Case, what: str, value: float, limit: float) -> None:
        verdict = "-" if value != value else "yes" if value <= limit else "**no**"
        rows.append([case.size, case.weights, what, f"{value:.3f}", f"{limit:.3f}", verdict])

    for case in cases.values():
        kind = case.weights.partition("+")[0]
        key = case.size, kind
        plain, missing = cases.get((case.size, "bf16"), Case(case.size, "bf16")), float("nan")
        if key in STEP:
            row(case, "ms a token, batch 1", case.steps.get(1, missing), STEP[key])
        if key in PEAK:
            row(case, "peak memory, GB", case.peak, PEAK[key])
        if kind == "int4":
            for batch in BATCHES[1:]:
                factor = case.steps.get(batch, missing) / plain.steps.get(batch, missing)
                row(case, f"step of batch {batch} over bfloat16's", factor, BATCH_FACTOR)
        if kind != "bf16":
            row(case, "first token over bfloat16's", case.first / plain.first, FIRST_FACTOR)
    return rows


def dry_run() -> torch.device:
    """Let kernels run in Triton's interpreter, for a model that is on a CPU."""
    if not triton.knobs.runtime.interpret:
        sys.exit("--dry-run needs Triton's interpreter: set TRITON_INTERPRET=1.")
    support.unsupported_device = lambda weight: None  # type: ignore[assignment]
    support._unsupported_weights = lambda language: None  # type: ignore[assignment]
    decode.multiprocessors = lambda device: 2  # type: ignore[assignment]  # run one after the other
    return torch.device("cpu")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, choices=WEIGHTS + WITH_HEADS)
    parser.add_argument("--seconds", type=float, default=570, help="no case begins when fewer than a twelfth are left")
    parser.add_argument("--markdown", type=Path, help="write the report there too")
    parser.add_argument("--dry-run", action="store_true", help="try the program on a CPU, on a small model")
    args = parser.parse_args()
    start, report = time.perf_counter(), Report(args.markdown)
    device = dry_run() if args.dry_run else torch.device("cuda", 0)
    name = "a dry run on a CPU" if args.dry_run else torch.cuda.get_device_name(device)
    report.add("# Packed weights on a GPU\n", f"{name}; torch {torch.__version__}, Triton {triton.__version__}.")
    bench = Bench(device, report, quick=True)
    with report.section("ceilings"):
        bench.ceilings()
    measured, cases = QuantizedBench(bench, args.dry_run), dict[tuple[str, str], Case]()
    for size in ("demo",) if args.dry_run else args.sizes:
        for weights in args.weights:
            case = cases[size, weights] = Case(size, weights)
            if time.perf_counter() - start > args.seconds * 11 / 12:
                case.failures.append("no time left")
                continue
            measured.measure(case, report)
            print(" | ".join(case.cells()), flush=True)  # a run that is ended has at least this to show
            give_memory_back()
    steps = [f"step of {batch}: ms / floor" for batch in BATCHES]
    head = ["size", "weights", "weights, GB", "peak, GB", "first token, ms", *steps]
    head += ["error of logits", "same tokens", "failed"]
    report.table("Measured", head, [case.cells() for case in cases.values()])
    report.add(f"\nThe whole run took {time.perf_counter() - start:.0f} s.")
    report.table("Goals", ["size", "weights", "what", "measured", "at most", "met"], goals(cases))


if __name__ == "__main__":
    main()
