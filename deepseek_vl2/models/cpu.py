"""What computing on a CPU needs: which library multiplies, and pages of memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

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


HUGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the system's call that advises on memory, where there is one."""
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None), "madvise", None)
    if call is not None:
        call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return call


def empty_in_huge_pages(like: torch.Tensor) -> torch.Tensor:
    """Return uninitialised memory, in pages of 2 MiB where Linux agrees; elsewhere, and when small, any memory.

    New memory of this size, as gradients are in each step, comes in pages of 4 KiB otherwise, and to hand those out
    takes longer than to fill them.
    """
    tensor = torch.empty_like(like, memory_format=torch.contiguous_format)
    call = _madvise()
    if call is not None and tensor.device.type == "cpu" and tensor.nbytes >= 2 * HUGE_PAGE:
        start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        call(start, length, MADV_HUGEPAGE)  # advice alone: that it was refused changes nothing
    return tensor
