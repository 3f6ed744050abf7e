"""How matrices are multiplied on a CPU: by which library, and in which precision."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .backend import backend

# From this many rows on, widening a weight costs less than imitated products of bfloat16 (measured: 10 to 16 rows).
MANY_ROWS = 16
# Most rows that compiled kernels know: products of bfloat16 take a single one, those of packed weights
# a few, and attention as many as a decoding step has.
FEW_ROWS = 256
# Numbers of a weight that are widened at a time: 128 MB.
MOST_WIDENED = 1 << 25


def is_few_cpu_rows(x: torch.Tensor) -> bool:
    """Whether [B, T, H] is a token, or a few, in bfloat16 on a CPU, outside of training and compilation."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.shape[0] * x.shape[1] <= FEW_ROWS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; others imitate them, at a fifth of float32's rate.

    Known for x86 alone; elsewhere it is taken for granted.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    known = [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
    return not known or any(supported() for supported in known)


def wants_wide_products(x: torch.Tensor) -> bool:
    """Whether products of many rows of ``x`` are faster in float32: bfloat16 on a CPU that only imitates it."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and not multiplies_bfloat16()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `F.linear` of bfloat16, multiplied in float32 and rounded once.

    Products of bfloat16 are exact in float32, where `F.linear` sums them too: but for the order of sums it is the same.
    """
    wide = x.float()
    parts = [F.linear(wide, part.float()) for part in weight.split(max(1, MOST_WIDENED // weight.shape[1]))]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


_WIDE: ContextVar[bool] = ContextVar("products in float32", default=False)


class _WideProducts(TorchFunctionMode):
    """Takes the place of `F.linear` for many rows of bfloat16, whichever module calls it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and args[0].dtype == args[1].dtype == torch.bfloat16:
            x, weight = args[:2]
            if x.numel() >= MANY_ROWS * x.shape[-1] and type(weight) in (torch.Tensor, torch.nn.Parameter):
                return wide_linear(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def wide_products(wanted: bool) -> Iterator[None]:
    """Multiply many rows of bfloat16 in float32 within, where that is wanted; see `wants_wide_products`."""
    if not wanted or _WIDE.get():
        yield
        return
    token = _WIDE.set(True)
    try:
        with _WideProducts():
            yield
    finally:
        _WIDE.reset(token)


# Layers that multiply by their weight, add their bias and do nothing else.
BARE_LAYERS: set[type[nn.Module]] = {nn.Linear}
# Hooks that are called for every module: PyTorch's own dictionaries.
_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
_ROWS: ContextVar[Any] = ContextVar("kernels of few rows", default=None)


def row_kernels() -> Any:
    """Return the kernels of few rows that are in use, `deepseek_vl2.ops.cpu.bindings.RowKernels`, or ``None``."""
    return None if torch.compiler.is_compiling() else _ROWS.get()


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else: no hook, nothing in its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or _GLOBAL_HOOKS[0] or _GLOBAL_HOOKS[1]
    return not hooks and "forward" not in vars(module)


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is no more than `F.linear`: no adapter, quantization, offloading or hook stands in its place."""
    return type(layer) in BARE_LAYERS and is_untouched(layer)


def _computes_as_written() -> bool:
    """Whether PyTorch itself would run what is called, in its dtype: neither traced nor transformed nor cast."""
    return (
        not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16)
    )


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return ``layer(x)``, by the kernels of few rows where they are in use and the layer is bare."""
    if (kernels := row_kernels()) is not None and is_bare(layer):
        out: torch.Tensor | None = kernels.linear(x, layer.weight, layer.bias)
        if out is not None:
            return out
    return layer(x)  # type: ignore[no-any-return]


@contextmanager
def row_products() -> Iterator[None]:
    """Multiply few rows of bfloat16 by compiled kernels, as fast as the memory gives weights, where there are any."""
    kernels = None
    if _computes_as_written():
        engine = backend()
        kernels = None if engine is None else engine.find_row_kernels()
    token = _ROWS.set(kernels)
    try:
        yield
    finally:
        _ROWS.reset(token)


def grouped_products(rows: torch.Tensor, weights_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Return products of sorted rows with a matrix for each group, whose rows end at ``ends_E``."""
    if not _WIDE.get():
        return F.grouped_mm(rows, weights_EOI.mT, offs=ends_E)
    out, start = rows.new_empty(len(rows), weights_EOI.shape[1]), 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            out[start:end] = F.linear(rows[start:end], weights_EOI[expert])
        start = end
    return out
