"""How fast does the engine decode on a CPU: one answer alone, and sixteen callers of `generate` at once?

    python benchmarks/cpu_engine.py nano [--before CHECKOUT]
    python benchmarks/cpu_engine.py tiny --layers 4 --threads 2

"nano" is the model of the package; "tiny" is some layers of tiny's language model at the released sizes, with random
weights. With --before another checkout of the repository answers alone beside this one, in turns, each in a process of
its own. Processor seconds tell what other programs on the machine do not stretch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

import torch

CONFIG = Path(__file__).parents[1] / "tests" / "golden" / "releases" / "tiny" / "config.json"


def build_tiny(layers: int) -> Any:
    """Return so many of tiny's layers in bfloat16, the first one dense, with random weights."""
    from deepseek_vl2.models.configuration_deepseek import DeepseekV2Config
    from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM

    fields = json.loads(CONFIG.read_text(encoding="utf-8"))["language_config"]
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**{**fields, "num_hidden_layers": layers}))
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    pattern = torch.randn(1 << 20).bfloat16() * 0.03
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            if parameter.dim() == 1:
                flat.fill_(1.0)
                continue
            for start in range(0, len(flat), len(pattern)):
                part = flat[start : start + len(pattern)]
                part.copy_(pattern.roll(len(name) + start // len(pattern))[: len(part)])
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def load(name: str, layers: int) -> Any:
    """Return the language model to ask."""
    torch.manual_seed(0)
    if name == "tiny":
        return build_tiny(layers)
    from deepseek_vl2.utils.io import load_pretrained_model

    return load_pretrained_model("nano")[2].language


def answer(model: Any, client: int, tokens: int) -> torch.Tensor:
    """Return an answer of that many tokens to a prompt of the client's own."""
    length = 20 + 3 * client
    generator = torch.Generator().manual_seed(client)
    prompt = torch.randint(min(250, model.config.vocab_size), (1, length), generator=generator)
    kwargs: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    found: torch.Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **kwargs)
    return found[0, -tokens:]


def at_once(model: Any, clients: int, tokens: int) -> None:
    """Let clients, a thread each, ask at the same time."""
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda client: answer(model, client, tokens), range(clients)))


def work(args: argparse.Namespace) -> None:
    """Measure what each line of the standard input asks for; answer with seconds, and processor seconds."""
    torch.set_num_threads(args.threads)
    model = load(args.model, args.layers)
    answer(model, 0, 3)
    print("ready", flush=True)
    for line in sys.stdin:
        clients = int(line)
        start, used = time.perf_counter(), time.process_time()
        if clients == 1:
            answer(model, args.clients // 2, args.tokens)  # a prompt of the usual length
        else:
            at_once(model, clients, args.tokens)
        print(json.dumps([time.perf_counter() - start, time.process_time() - used]), flush=True)


class Worker:
    """A process that measures, by the code of a checkout."""

    def __init__(self, checkout: Path, args: argparse.Namespace) -> None:
        options = ("--layers", args.layers, "--threads", args.threads, "--tokens", args.tokens)
        command = [sys.executable, __file__, args.model, "--worker", *map(str, options)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(args.threads)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        return cast(IO[str], self.process.stdout).readline().strip()

    def measure(self, clients: int) -> tuple[float, float]:
        """Return seconds and processor seconds of so many clients' answers."""
        stdin = cast(IO[str], self.process.stdin)
        stdin.write(f"{clients}\n")
        stdin.flush()
        seconds, processor = json.loads(self._line())
        return seconds, processor

    def end(self) -> None:
        """End the process."""
        cast(IO[str], self.process.stdin).close()
        self.process.wait(timeout=60)


def report(title: str, times: list[tuple[float, float]], tokens: int) -> str:
    """Return a line of the table."""
    clock, processor = ([one[kind] for one in times] for kind in (0, 1))
    rates = [f"{tokens / value:.1f}" for value in (median(clock), min(clock), median(processor), min(processor))]
    return f"| {title} | " + " | ".join(rates) + " |"


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("nano", "tiny"))
    parser.add_argument("--before", type=Path, help="another checkout, to answer alone beside this one")
    parser.add_argument("--layers", type=int, default=4, help="of tiny")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    worker = Worker(Path(__file__).parents[1], args)
    before = None if args.before is None else Worker(args.before.resolve(), args)
    alone, together, old = [], [], []
    for _ in range(args.rounds):
        alone.append(worker.measure(1))
        if before is not None:
            old.append(before.measure(1))
        together.append(worker.measure(args.clients))
    for each in filter(None, (worker, before)):
        each.end()
    print(f"{args.model}, {args.tokens} tokens an answer, {args.threads} threads; tokens a second\n")
    print("| answers | median | best | a processor second, median | best |\n|---|---|---|---|---|")
    if old:
        print(report("one alone, before", old, args.tokens))
    print(report("one alone", alone, args.tokens))
    print(report(f"{args.clients} at once", together, args.clients * args.tokens))


if __name__ == "__main__":
    main()
