"""Sixteen clients at once beside sixteen requests one after another, on the same server in the same run.

    python benchmarks/server_batching.py CHECKPOINT [--markdown benchmarks/server_batching.md]

CHECKPOINT is a directory, a hub id, "demo", or "wide": a model of the base architecture made for this question, with
random weights, 1024 channels, 8 layers and 16 experts, wide enough that reading the weights is what a step waits for.
The server is started by itself, and asked over HTTP for greedy answers of one length to prompts that differ. Speeds
mean something beside each other only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.utils.demo import LANGUAGE, VISION, byte_tokenizer, candidate_resolutions

NAME = "model"
WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}


@dataclass
class Result:
    """One after another, and at once: tokens a second, and the server's processor seconds.

    Attributes:
        alone, together: tokens a second, by the clock.
        alone_cpu, together_cpu: processor seconds of the server, which other programs do not stretch.
        same: answers that were the same both times.
    """

    alone: float
    together: float
    alone_cpu: float
    together_cpu: float
    same: int


def write_wide_checkpoint(directory: Path, dtype: torch.dtype) -> str:
    """Write the wide model and return its directory."""
    tokenizer = byte_tokenizer()
    processor = DeepseekVLV2Processor(tokenizer, candidate_resolutions(), patch_size=14, mask_prompt=False)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = DeepseekVLV2Config(
        vision_config=VISION,
        language_config={**LANGUAGE, **WIDE, **ids},
        projector_config={"model_type": "mlp_projector", "input_dim": VISION["width"], "n_embed": WIDE["hidden_size"]},
        candidate_resolutions=candidate_resolutions(),
    )
    torch.manual_seed(0)
    DeepseekVLV2ForCausalLM(config).to(dtype).save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory)


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, checkpoint: str, args: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            *(sys.executable, "-m", "deepseek_vl2.serve.api", checkpoint, "--port", str(self.port)),
            *("--served-model-name", NAME, "--slots", str(args.clients), "--max-length", "1024"),
            *("--dtype", args.dtype, "--log-level", "warning"),
        ]
        self.process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})

    def __enter__(self) -> ServerProcess:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError("The server did not start.") from None
                time.sleep(0.5)
        raise RuntimeError("The server did not start in time.")

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.process.wait()

    def cpu_seconds(self) -> float:
        """Return the processor time that the server has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def ask(self, index: int, tokens: int) -> str:
        """Return the answer to one prompt; it has exactly that many tokens."""
        question = f"Question {index}: what is {index * 37} times {index + 11}? " + "Explain. " * (index % 5)
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        address = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            answer = json.load(response)
        if answer["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"Asked for {tokens} tokens, got {answer['usage']}.")
        return answer["choices"][0]["message"]["content"]


def measure(server: ServerProcess, clients: int, tokens: int) -> Result:
    """Ask everything one after another, and then everything at once."""
    start, start_cpu = time.perf_counter(), server.cpu_seconds()
    alone = [server.ask(index, tokens) for index in range(clients)]
    middle, middle_cpu = time.perf_counter(), server.cpu_seconds()
    with ThreadPoolExecutor(clients) as pool:
        together = list(pool.map(lambda index: server.ask(index, tokens), range(clients)))
    end, end_cpu = time.perf_counter(), server.cpu_seconds()
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    total = clients * tokens
    return Result(total / (middle - start), total / (end - middle), middle_cpu - start_cpu, end_cpu - middle_cpu, same)


def report(name: str, args: argparse.Namespace, results: list[Result]) -> str:
    """Return the results as Markdown."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads"
    lines = [
        f"`{name}`, {args.dtype}, {args.tokens} tokens an answer, {args.clients} clients; {device}; {versions}",
        "",
        "| run | one after another, tokens/s | at once, tokens/s | ratio | processor seconds | ratio | same answers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, r in enumerate(results, 1):
        clock = f"{r.alone:.1f} | {r.together:.1f} | {r.together / r.alone:.1f}"
        cpu = f"{r.alone_cpu:.1f}, {r.together_cpu:.1f} | {r.alone_cpu / r.together_cpu:.1f}"
        lines.append(f"| {number} | {clock} | {cpu} | {r.same} of {args.clients} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and append to the Markdown file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of the server, on a CPU")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = args.checkpoint
        if checkpoint == "wide":
            checkpoint = write_wide_checkpoint(Path(directory), getattr(torch, args.dtype))
        with ServerProcess(checkpoint, args) as server:
            server.ask(0, args.tokens)  # warm-up
            results = [measure(server, args.clients, args.tokens) for _ in range(args.repeats)]
    text = report(Path(args.checkpoint).name, args, results)
    print(text)
    if args.markdown:
        with args.markdown.open("a", encoding="utf-8") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
