"""Models and processor. Importing this package makes transformers' Auto classes know them."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .bundled import nano_path
from .configuration_deepseek_vl_v2 import DeepseekVLV2Config
from .image_processor import DeepseekVLV2ImageProcessor
from .modeling_deepseek_vl_v2 import DeepseekVLV2ForCausalLM
from .processing_deepseek_vl_v2 import DeepseekVLV2Processor

__all__ = [
    "DeepseekVLV2Config",
    "DeepseekVLV2ForCausalLM",
    "DeepseekVLV2ImageProcessor",
    "DeepseekVLV2Processor",
    "nano_path",
]

AutoConfig.register(DeepseekVLV2Config.model_type, DeepseekVLV2Config, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(DeepseekVLV2Config, DeepseekVLV2ForCausalLM, exist_ok=True)
AutoProcessor.register(DeepseekVLV2Config, DeepseekVLV2Processor, exist_ok=True)
AutoImageProcessor.register(
    DeepseekVLV2Config,
    image_processor_classes=dict.fromkeys(("pil", "torchvision"), DeepseekVLV2ImageProcessor),
    exist_ok=True,
)
