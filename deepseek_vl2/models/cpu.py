"""Which library multiplies on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_single_cpu_row(x: torch.Tensor) -> bool:
    """Whether [B, T, H] is one token in bfloat16 on a CPU, outside of training and compilation."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.shape[0] * x.shape[1] == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Let oneDNN multiply matrices, or PyTorch's own kernels.

    For a matrix times a single row, PyTorch's kernel reads the weights at the memory's speed, where a call of oneDNN
    costs some 50 us more; for products of small matrices oneDNN is many times faster. Both accumulate in float32.
    """
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
