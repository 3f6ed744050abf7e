"""What tests of captured CUDA graphs share: a capture for the host, tensors that pretend to lie on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_vl2.engine import cuda_graphs

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Capture:
    """Captures on a GPU; elsewhere keeps the function. Counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.cuda = cuda_graphs.GraphCapture(DEVICE) if ON_GPU else None

    def __call__(self, run: cuda_graphs.Run, before: cuda_graphs.Run | None = None) -> cuda_graphs.Run:
        self.captures += 1
        if self.cuda is None and before is not None:
            before()
        replay = run if self.cuda is None else self.cuda(run, before)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


def poison(*tensors: torch.Tensor) -> None:
    """Overwrite what must not be read again."""
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


class NoHost(TorchDispatchMode):
    """Refuses what waits for the device, or copies from the host or to it."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        masks = name.startswith("index") and isinstance(args[1], (list, tuple))
        if name in self.WAITING or (masks and any(x is not None and x.dtype == torch.bool for x in args[1])):
            raise AssertionError(f"{name} waits for the device")
        tensors = [x for x in (*args, *(kwargs or {}).values(), out) if isinstance(x, torch.Tensor)]
        if any(x.device.type != "cuda" for x in tensors if x.dim() > 0 or name in ("_to_copy", "copy_")):
            raise AssertionError(f"{name} has a tensor on the host")
        return out


class NoLaunch:
    """Stands in for a kernel whose tensors have no numbers."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


def pretend(model: torch.nn.Module) -> None:
    """Put bfloat16 weights without numbers in the place of a model's, on a GPU that need not exist."""
    for module in model.modules():
        for name, held in list(module._parameters.items()):
            if held is not None:
                weight = torch.empty(held.shape, dtype=torch.bfloat16, device="cuda")
                module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
        for name, held in list(module._buffers.items()):
            if held is not None:
                module._buffers[name] = torch.empty(held.shape, dtype=held.dtype, device="cuda")
