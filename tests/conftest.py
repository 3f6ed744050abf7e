"""Fixtures: the golden checkpoints, written once a session, and what is loaded from them.

Imports what takes seconds only where tests are collected: the process that hands out work to others has no use for it,
and they start after it.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kinds import KINDS

if TYPE_CHECKING:
    from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

# Before anything imports PyTorch: idle threads of one worker must not spin while another one works.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collectstart() -> None:
    """Before anything imports triton: without a GPU, kernels run on the CPU."""
    if "TRITON_INTERPRET" not in os.environ:
        import torch

        os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"


def pytest_collection_finish() -> None:
    """Make the interpreter quicker before any kernel runs, where one was imported."""
    if "triton.runtime.interpreter" in sys.modules:
        import quick_interpreter

        quick_interpreter.install()


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Provide the directory of a kind's golden checkpoint; it is written at the first call."""
    from support import CHECKPOINTS

    root = tmp_path_factory.mktemp("golden")

    def directory(kind: str) -> Path:
        if not (root / kind).exists():
            CHECKPOINTS.write(kind, root / kind)
        return root / kind

    yield directory
    shutil.rmtree(root, ignore_errors=True)  # 200 MB that pytest would keep for three runs


@pytest.fixture(scope="session")
def golden_model(golden_checkpoint: Callable[[str], Path]) -> Callable[..., DeepseekVLV2ForCausalLM]:
    """Return a kind's golden model in float32, in evaluation mode. Tests share it: change nothing in it."""
    import torch

    from deepseek_vl2.models import DeepseekVLV2ForCausalLM

    loaded: dict[tuple[str, str], DeepseekVLV2ForCausalLM] = {}

    def model(kind: str, attn: str = "sdpa") -> DeepseekVLV2ForCausalLM:
        if (kind, attn) not in loaded:
            loaded.clear()  # one at a time: logits of long prompts need the memory
            loaded[kind, attn] = DeepseekVLV2ForCausalLM.from_pretrained(
                golden_checkpoint(kind), dtype=torch.float32, attn_implementation=attn
            ).eval()
        return loaded[kind, attn]

    return model


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the tokenizer's and the processor's files and no weights."""
    from support import CHECKPOINTS

    out = tmp_path_factory.mktemp("tokenizer")
    CHECKPOINTS.tokenizer_files(out)
    return out


@pytest.fixture(scope="session")
def processor(tokenizer_dir: Path) -> DeepseekVLV2Processor:
    """Return the processor of the golden checkpoints. Tests share it: change nothing in it."""
    from deepseek_vl2.models import DeepseekVLV2Processor

    return DeepseekVLV2Processor.from_pretrained(tokenizer_dir)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Return the name of an architecture."""
    return request.param


@pytest.fixture(autouse=True, scope="module")
def quick_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run small models in one thread: they gain nothing from more, and on a busy machine lose much to waiting.

    What was imported and collected is not looked at by the garbage collector, which takes half a second for it, and
    which each training run of accelerate's calls. A server that ends undoes that: hence for each module.
    """
    import torch

    if not gc.get_freeze_count():
        gc.freeze()
    threads = torch.get_num_threads()
    if request.path.name not in ("test_golden_model.py", "test_golden_training.py"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
