"""What the models call where it is fast: one function for each hook of theirs, each of which may decline.

``model.generate`` takes this path by itself for a model in bfloat16 or float16 on one GPU, and the plain one otherwise.
The environment variable ``DEEPSEEK_VL2_KERNELS=0`` turns it off, read at every call. Logging at level DEBUG for
``deepseek_vl2.engine`` says why a call went the plain way; `unsupported_reason` says it of a model.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from ..ops import SWITCH, turned_off

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ..models.generation import SampleCall
    from ..models.views import Pictures
    from ..ops.cpu.bindings import RowKernels

__all__ = [
    "SWITCH",
    "begin_tiles",
    "encode_tiles",
    "find_row_kernels",
    "may_scale",
    "release",
    "run_experts",
    "sample",
    "scale",
    "unsupported_reason",
]


def _unsupported_here() -> str | None:
    if turned_off():
        return f"{SWITCH} turns it off"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def unsupported_reason(model: Any) -> str | None:
    """Return why a model's ``generate`` would not use the kernels, in a few words; ``None`` when it would."""
    reason = _unsupported_here()
    if reason is not None:
        return reason
    from . import runtime

    return runtime.unsupported_reason(getattr(model, "language", model))


def release(model: Any) -> None:
    """Free the caches and graphs that are kept for a model between calls."""
    if _unsupported_here() is None:
        from . import runtime, vision

        runtime.release(getattr(model, "language", model))
        vision.release(model)


def sample(call: SampleCall) -> torch.Tensor | None:
    """Generate by the kernels; ``None`` where they cannot. Registered with `deepseek_vl2.models.generation`."""
    if call.input_ids.device.type != "cuda" or _unsupported_here() is not None:
        return None
    from . import runtime

    return runtime.sample(call)


def encode_tiles(model: Any, tiles_V3SS: torch.Tensor) -> torch.Tensor | None:
    """Embed tiles by a captured graph; ``None`` where it cannot. Registered with `models.modeling_deepseek_vl_v2`."""
    if tiles_V3SS.device.type != "cuda" or _unsupported_here() is not None:
        return None
    import torch

    from . import runtime, vision

    if runtime.unsupported_device(tiles_V3SS) is not None:
        return None
    with torch.cuda.device(tiles_V3SS.device):
        return vision.encode_tiles(model, tiles_V3SS)


def begin_tiles(model: Any, images: torch.Tensor, crops: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """Begin to embed a batch's tiles; ``None`` where it cannot. Registered with `models.modeling_deepseek_vl_v2`."""
    if images.device.type != "cuda" or _unsupported_here() is not None:
        return None
    import torch

    from . import vision

    with torch.cuda.device(images.device):
        return vision.begin(model, images, crops)


def may_scale() -> bool:
    """Whether this process uses a GPU that may scale images. Registered with `models.views`."""
    import torch

    return _unsupported_here() is None and not _failed_to_scale and torch.cuda.is_initialized()


def scale(pictures: Pictures, device: torch.device) -> torch.Tensor | None:
    """Scale images to tiles on a GPU, as bytes; ``None`` where it cannot. Registered with `models.views`."""
    if device.type != "cuda" or _failed_to_scale or _unsupported_here() is not None:
        return None
    import torch

    from . import images, runtime

    if torch.version.hip is not None:
        return None
    try:
        with torch.cuda.device(device):
            return images.scale(pictures, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or its tools may raise: Pillow still works
        _failed_to_scale.append(f"{type(error).__name__}: {error}")
        runtime.logger.warning("Images are scaled on the host from now on: %s", _failed_to_scale[0])
        return None


def find_row_kernels() -> RowKernels | None:
    """Return what multiplies one row on a CPU; ``None`` where there is none. Registered with `models.cpu`."""
    if turned_off():
        return None
    from ..ops.cpu import bindings

    return bindings.row_kernels()


_failed: list[str] = []
_failed_to_scale: list[str] = []


def run_experts(
    layer: Any, hidden_NH: torch.Tensor, topk_ids_NK: torch.Tensor, topk_weights_NK: torch.Tensor
) -> torch.Tensor | None:
    """Run a layer's experts for many tokens; ``None`` where the kernels cannot. Registered with `models.moe`."""
    if hidden_NH.device.type != "cuda" or _failed or _unsupported_here() is not None:
        return None
    import torch

    from . import experts, runtime

    if runtime.unsupported_device(hidden_NH) is not None or not experts.is_supported(layer, hidden_NH):
        return None
    try:
        with torch.cuda.device(hidden_NH.device):
            return experts.run_experts(layer, hidden_NH, topk_ids_NK, topk_weights_NK)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or its tools may raise: the plain form still works
        _failed.append(f"{type(error).__name__}: {error}")
        runtime.logger.warning("Prompts run without the kernels from now on: %s", _failed[0])
        return None
