"""What the models know of the engine: functions that they call, each of which may decline by returning ``None``.

``model.generate`` runs on the engine, and by kernels where `support.unsupported_reason` has nothing against the model.
The environment variable ``DEEPSEEK_VL2_KERNELS=0`` turns the kernels off. Importing this module loads neither Triton
nor the engine.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..ops import SWITCH, turned_off

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from ..models.generation import SampleCall
    from ..models.views import Pictures
    from ..ops.cpu.bindings import RowKernels

__all__ = [
    "SWITCH",
    "begin_tiles",
    "encode_tiles",
    "find_row_kernels",
    "generate",
    "may_scale",
    "release",
    "run_experts",
    "run_packed_experts",
    "run_packed_linear",
    "run_packed_mlp",
    "run_packed_queries_keys_values",
    "scale",
    "unsupported_reason",
    "warm_up_images",
]

logger = logging.getLogger(__name__)


def unsupported_reason(model: Any) -> str | None:
    """Return why a model does not run by the kernels, in a few words, or ``None``: it does."""
    from . import holder, support

    engine = holder.existing_engine(model)
    return support.unsupported_reason(getattr(model, "language", model)) if engine is None else engine.placement.reason


def release(model: Any) -> None:
    """Free the KV cache and the captured graphs that are kept for a model."""
    from . import holder

    holder.release_model(model)


def generate(call: SampleCall) -> torch.Tensor | None:
    """Generate on the engine; ``None`` where it does not take the call. Called by `models.generation`."""
    from . import generation

    return generation.generate(call)


def _is_for_kernels(tensor: torch.Tensor) -> bool:
    if tensor.device.type != "cuda":
        return False
    from . import support

    return support.unsupported_here() is None


def encode_tiles(model: Any, tiles_V3SS: torch.Tensor) -> torch.Tensor | None:
    """Embed tiles by a captured graph; ``None`` where it cannot. Called by `models.modeling_deepseek_vl_v2`."""
    if not _is_for_kernels(tiles_V3SS):
        return None
    import torch

    from . import support, vision

    if support.unsupported_device(tiles_V3SS) is not None:
        return None
    with torch.cuda.device(tiles_V3SS.device):
        return vision.encode_tiles(model, tiles_V3SS)


def begin_tiles(model: Any, images: torch.Tensor, crops: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """Begin to embed a batch's tiles; ``None`` where it cannot. Called by `models.modeling_deepseek_vl_v2`."""
    if not _is_for_kernels(images):
        return None
    import torch

    from . import vision

    with torch.cuda.device(images.device):
        return vision.begin(model, images, crops)


def warm_up_images(model: Any) -> None:
    """Capture and compile what images go through, which takes seconds on a GPU; elsewhere nothing is done.

    Called by servers before they listen.
    """
    weight = model.vision.patch_embed.proj.weight
    if not _is_for_kernels(weight):
        return
    import torch

    from . import images, support, vision

    with torch.cuda.device(weight.device):
        if support.unsupported_device(weight) is None:
            vision.warm_up(model)
        try:
            if may_scale():
                images.warm_up(model.config.vision_config.image_size, weight.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or its tools may raise: `scale` leaves images to Pillow then
            logger.warning("What resizes images did not compile: %s: %s", type(error).__name__, error)


def may_scale() -> bool:
    """Whether this process uses a GPU that may resize images. Called by `models.views`."""
    import torch

    from . import support

    return torch.cuda.is_initialized() and torch.version.hip is None and support.unsupported_here() is None


def scale(pictures: Pictures, device: torch.device) -> torch.Tensor | None:
    """Resize images to tiles on a GPU, as bytes; ``None`` where it cannot. Called by `models.views`."""
    import torch

    if device.type != "cuda" or not may_scale():
        return None
    from . import images

    try:
        with torch.cuda.device(device):
            return images.scale(pictures, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or its tools may raise: Pillow still works
        logger.warning("These images are resized on the host: %s: %s", type(error).__name__, error)
        return None


def find_row_kernels() -> RowKernels | None:
    """Return what multiplies few rows on a CPU; ``None`` where there is none. Called by `models.cpu`."""
    if turned_off():
        return None
    from ..ops.cpu import bindings

    return bindings.row_kernels()


def run_experts(
    layer: Any, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor | None:
    """Run a layer's experts for many tokens; ``None`` where the kernels cannot. Called by `models.moe`."""
    if not _is_for_kernels(hidden_NH):
        return None
    import torch

    from . import experts, support

    if support.unsupported_device(hidden_NH) is not None or not experts.is_supported(layer, hidden_NH):
        return None
    try:
        with torch.cuda.device(hidden_NH.device):
            return experts.run_experts(layer, hidden_NH, ids_NK, weights_NK)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or its tools may raise: the plain form still works
        logger.warning("These experts run without kernels: %s: %s", type(error).__name__, error)
        return None


def run_packed_linear(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Run a linear layer over packed weights; ``None`` where it is computed as written."""
    if x.device.type != "cpu":
        return None
    from . import packed

    return packed.run_packed_linear(layer, x)


def run_packed_experts(
    layer: Any, hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor | None:
    """Run experts over packed weights; ``None`` where they are computed as written."""
    if hidden_NH.device.type != "cpu":
        return None
    from . import packed

    return packed.run_packed_experts(layer, hidden_NH, ids_NK, weights_NK)


def run_packed_mlp(layers: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
    """Run a SwiGLU MLP of linear layers over packed weights; ``None`` where it is computed as written."""
    from . import packed

    return packed.run_packed_mlp(layers, x)


def run_packed_queries_keys_values(
    layers: Sequence[Any], hidden_BTH: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> Sequence[torch.Tensor] | None:
    """Return queries, keys and values by linear layers over packed weights; ``None``: they are computed as written."""
    from . import packed

    return packed.run_packed_queries_keys_values(layers, hidden_BTH, rotation)
