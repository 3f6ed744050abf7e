"""A pretended device "mps": tensors that say they lie there and hold their values on the host.

It refuses what Apple's GPUs refuse: float64 and float8 numbers, and operations on tensors of two devices. Which
operations PyTorch has for them a CPU cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MPS = torch.device("mps", 0)
REFUSED = (torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


class MpsTensor(torch.Tensor):
    """A tensor on the pretended device."""

    held: torch.Tensor
    # For PyTorch's own code, which has no such device here, it is one of the host's.
    device = property(lambda self: MPS)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> MpsTensor:
        if held.dtype in REFUSED:
            raise TypeError(f"Cannot convert a MPS Tensor to {held.dtype} as the MPS framework doesn't support it.")
        made: MpsTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy.")

    def __repr__(self, *args: Any) -> str:
        return f"MpsTensor({self.held!r})"


def asked_device(kwargs: dict[str, Any]) -> torch.device | None:
    """Return the device that an operation shall put its result on."""
    device = kwargs.get("device")
    return None if device is None else torch.device(device)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the host, with its result where it belongs."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, MpsTensor)]
    asked = asked_device(kwargs)
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    here = [t for t in tensors if not isinstance(t, MpsTensor) and t.dim() > 0 and t.device.type == "cpu"]
    index = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
    if there and here and not moves and not (index and isinstance(args[0], MpsTensor)):
        raise RuntimeError(f"{func}: expected all tensors on one device, found mps:0 and cpu.")
    if asked is not None and asked.type == "mps":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(MpsTensor, lambda tensor: tensor.held, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    stays = asked.type == "mps" if asked is not None else bool(there)
    if moves and func is torch.ops.aten.copy_.default:
        return args[0]
    if not stays:
        return out
    known = {id(tensor.held): tensor for tensor in there}  # what is changed in place comes back as itself
    return tree_map_only(torch.Tensor, lambda held: known[id(held)] if id(held) in known else MpsTensor(held), out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What makes tensors inside, where no operation is seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], torch.Tensor):
            args = (args[0], args[1].device, args[1].dtype)
        if func in (torch.Tensor.to, torch.Tensor.cpu) and isinstance(args[0], MpsTensor):
            named = kwargs.get("device", args[1] if len(args) > 1 else None)
            if func is torch.Tensor.cpu or (
                isinstance(named, (str, torch.device)) and torch.device(named).type == "cpu"
            ):
                return func(args[0].held, *args[1:], **kwargs)  # to PyTorch it is there already
        if func is F.scaled_dot_product_attention:  # whose own causal mask would be the host's
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def _enter(self: Any) -> None:
    self.instead = torch.no_grad() if self.mode else nullcontext()
    self.instead.__enter__()


def _exit(self: Any, *error: Any) -> None:
    self.instead.__exit__(*error)


@contextmanager
def pretended_mps() -> Iterator[None]:
    """Let tensors be made on, and models be moved to, the pretended device inside; without gradients."""
    replaced = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with pytest.MonkeyPatch.context() as patch:
        # Tensors of inference mode cannot be wrapped.
        patch.setattr(torch.inference_mode, "__enter__", _enter)
        patch.setattr(torch.inference_mode, "__exit__", _exit)
        try:
            with torch.no_grad(), _Operations(), _Functions():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(replaced)
