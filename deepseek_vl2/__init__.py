"""DeepSeek-VL2 on today's PyTorch and transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_vl2.models import (
        DeepseekVLV2Config,
        DeepseekVLV2ForCausalLM,
        DeepseekVLV2ImageProcessor,
        DeepseekVLV2Processor,
        nano_path,
    )
    from deepseek_vl2.utils.grounding import draw_boxes, parse_grounding
    from deepseek_vl2.utils.io import load_pil_images, load_pretrained_model

__version__ = "0.1.0"

__all__ = [
    "DeepseekVLV2Config",
    "DeepseekVLV2ForCausalLM",
    "DeepseekVLV2ImageProcessor",
    "DeepseekVLV2Processor",
    "draw_boxes",
    "load_pil_images",
    "load_pretrained_model",
    "nano_path",
    "parse_grounding",
]

# Imported when first asked for: the command line shows its help without PyTorch.
_HOMES = {
    "DeepseekVLV2Config": "deepseek_vl2.models",
    "DeepseekVLV2ForCausalLM": "deepseek_vl2.models",
    "DeepseekVLV2ImageProcessor": "deepseek_vl2.models",
    "DeepseekVLV2Processor": "deepseek_vl2.models",
    "draw_boxes": "deepseek_vl2.utils.grounding",
    "load_pil_images": "deepseek_vl2.utils.io",
    "load_pretrained_model": "deepseek_vl2.utils.io",
    "nano_path": "deepseek_vl2.models",
    "parse_grounding": "deepseek_vl2.utils.grounding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
