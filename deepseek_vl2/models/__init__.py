"""Models and processor. Importing this package makes transformers' Auto classes know them."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from ..kernels import begin_tiles, encode_tiles, find_row_kernels, may_scale, run_experts, sample, scale
from ..ops.cpu.quant_rows import run_packed_experts, run_packed_linear
from .configuration_deepseek_vl_v2 import DeepseekVLV2Config
from .cpu import ROW_KERNELS
from .generation import FAST_SAMPLERS
from .modeling_deepseek_vl_v2 import EARLY_ENCODERS, FAST_ENCODERS, DeepseekVLV2ForCausalLM
from .moe import FAST_EXPERTS
from .processing_deepseek_vl_v2 import DeepseekVLV2Processor
from .quantized_layers import FAST_PACKED_EXPERTS, FAST_PACKED_LINEAR
from .views import DEVICE_SCALERS, DeviceScaler

__all__ = ["DeepseekVLV2Config", "DeepseekVLV2ForCausalLM", "DeepseekVLV2Processor"]

AutoConfig.register(DeepseekVLV2Config.model_type, DeepseekVLV2Config, exist_ok=True)
AutoModelForCausalLM.register(DeepseekVLV2Config, DeepseekVLV2ForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(DeepseekVLV2Config, DeepseekVLV2ForCausalLM, exist_ok=True)
AutoProcessor.register(DeepseekVLV2Config, DeepseekVLV2Processor, exist_ok=True)

if sample not in FAST_SAMPLERS:
    FAST_SAMPLERS.append(sample)
if run_experts not in FAST_EXPERTS:
    FAST_EXPERTS.append(run_experts)
if encode_tiles not in FAST_ENCODERS:
    FAST_ENCODERS.append(encode_tiles)
if begin_tiles not in EARLY_ENCODERS:
    EARLY_ENCODERS.append(begin_tiles)
if DeviceScaler(may_scale, scale) not in DEVICE_SCALERS:
    DEVICE_SCALERS.append(DeviceScaler(may_scale, scale))
if run_packed_linear not in FAST_PACKED_LINEAR:
    FAST_PACKED_LINEAR.append(run_packed_linear)
if run_packed_experts not in FAST_PACKED_EXPERTS:
    FAST_PACKED_EXPERTS.append(run_packed_experts)
if find_row_kernels not in ROW_KERNELS:
    ROW_KERNELS.append(find_row_kernels)
