"""vLLM's server with this package's plugin, random weights of a released size: section "vllm" of `serving.py`.

vLLM draws weights so small that all image tokens would choose the same experts; a plugin of this file draws them as
`random_weights` does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_end_to_end import CONFIGS, random_config
from serving_http import worded_tokenizer
from vllm_plugin import plugin_path, without_flashinfer

NAME = "model"
BENCHMARKS = Path(__file__).resolve().parent
MAX_LENGTH = 4096


def spread_weights() -> None:
    """Have vLLM draw weights from a normal distribution scaled to keep activations even: the plugin's entry point."""
    import torch
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @torch.no_grad()
    def load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.8 * parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)

    DummyModelLoader.load_weights = load_weights


def vllm_environment(work: Path) -> dict[str, str]:
    """Return the environment of the server, with what it finds its plugins by."""
    path = plugin_path(work / "entry", {"deepseek_vl2_spread": "serving_vllm:spread_weights"})
    path = os.pathsep.join([path, str(BENCHMARKS)])
    more = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **without_flashinfer()}
    return {**os.environ, **more}


def vllm_server(size: str, work: Path, most: int) -> Callable[[int], list[str]]:
    """Return the command that serves a size on a port, to ``most`` requests at once; its files are written.

    No prompt and no picture is taken from a cache, since none comes twice.
    """
    folder = work / size
    folder.mkdir(parents=True)
    fields = json.loads((CONFIGS / size / "config.json").read_text(encoding="utf-8"))
    # As `serving_http` has it: prompts are the same.
    tokenizer = worded_tokenizer(random_config(size).language_config.vocab_size)
    tokenizer.save_pretrained(folder)
    fields["language_config"] |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    resolutions = [[384 * x, 384 * y] for x in range(1, 10) for y in range(1, 10) if x * y <= 9]
    fields = {"candidate_resolutions": resolutions, "processor_class": "DeepseekVLV2Processor"}
    (folder / "processor_config.json").write_text(json.dumps(fields), encoding="utf-8")
    options = ["--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", str(MAX_LENGTH)]
    options += ["--max-num-seqs", str(min(most, 256)), "--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    options += ["--served-model-name", NAME, "--host", "127.0.0.1", "--disable-uvicorn-access-log"]
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *options]
    return lambda port: [*serve, "--port", str(port)]
