"""How many threads PyTorch's operations take on a CPU, for the calling thread alone."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .bindings import Unavailable, thread_library


@cache
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that PyTorch uses, or ``None``."""
    try:
        return ctypes.CDLL(thread_library())
    except (OSError, Unavailable):
        return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's operations of this thread without others.

    Threads that have finished their share spin until the next one comes. Where shares are of microseconds and another
    process wants the cores, that is most of the time: a small model is many times slower by two threads than by one.
    OpenMP keeps the number for each thread that asks, so nothing changes for the rest of the process.
    """
    library, threads = _openmp(), torch.get_num_threads()
    if library is None or threads == 1:
        yield
        return
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(threads)
