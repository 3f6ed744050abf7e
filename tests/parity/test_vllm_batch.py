"""The workers of ``batch --ray --backend vllm`` against those of our engine, where vLLM is installed; without Ray.

Without a GPU: ``VLLM_CPU_KVCACHE_SPACE=1 pytest tests/parity/test_vllm_batch.py``.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import noise_image
from vllm_support import vllm_checkpoint

from deepseek_vl2.cli import batch
from deepseek_vl2.cli.batch_files import Job
from deepseek_vl2.cli.batch_window import answer_lines
from deepseek_vl2.cli.batch_worker import LineWorker
from deepseek_vl2.cli.options import load

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SEED = 5


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    """Return the command's options for a checkpoint of tiny's head sizes, in its directory."""
    folder = tmp_path_factory.mktemp("vllm")
    noise_image(1, 300, 200).save(folder / "one.png")
    parser = ArgumentParser()
    batch.add_arguments(parser)
    checkpoint = vllm_checkpoint().write_checkpoint("tiny", folder / "tiny")
    given = ["--model", str(checkpoint), "--dtype", "float32", "--max_new_tokens", "6", "--batch_size", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.chdir(folder)
        yield parser.parse_args(["q.jsonl", "a.jsonl", "--ray", "--backend", "vllm", *given])


def test_a_worker_with_vllm_answers_as_one_with_our_engine(options: Namespace) -> None:
    lines: list[Any] = [
        {"prompt": "Write two words.", "id": 7},
        {"prompt": "What is this?", "images": ["one.png"]},
        {"prompt": "What?", "images": ["missing.png"]},
        {"prompt": "Which?", "images": ["one.png"] * 3},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
        "none",
    ]
    jobs = [Job(number, str(number), json.dumps(line)) for number, line in enumerate(lines, 1)]
    worker = LineWorker(options, SEED, os.getcwd())
    assert worker.start().notes == []
    records, _ = worker.exchange(jobs)
    while len(records) < len(jobs):
        records += worker.exchange([])[0]
    ours = Namespace(**{**vars(options), "backend": "engine"})
    assert sorted(records, key=lambda record: record["line"]) == list(answer_lines(load(ours), jobs, ours, SEED))
    assert [record["line"] for record in records if "error" in record] != []


def test_a_checkpoint_that_is_not_there_is_told(options: Namespace, tmp_path: Path) -> None:
    missing = Namespace(**{**vars(options), "model": str(tmp_path / "none")})
    with pytest.raises((ValueError, OSError)):
        LineWorker(missing, SEED, os.getcwd()).start()
