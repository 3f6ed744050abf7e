"""DeepSeek-VL2 in vLLM as the checkpoints were trained: the plugin that vLLM finds by its entry point.

vLLM calls `register` in each of its processes. Nothing heavy is imported here: names of modules are handed over, and
vLLM imports them when a DeepSeek-VL2 checkpoint is opened.
"""

from __future__ import annotations

import logging

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "TOKENIZER_MODE", "register"]

ARCHITECTURE = "DeepseekVLV2ForCausalLM"
MODEL_TYPE = "deepseek_vl_v2"
TOKENIZER_MODE = "deepseek_vl2"
CONFIG_CLASS = "DeepseekVL2ReleasedConfig"

logger = logging.getLogger(__name__)


def register() -> None:
    """Put this package's model, config, tokenizer and prompts in the place of vLLM's own; calling it again is harmless.

    A version of vLLM that has moved what is needed beyond the model still serves every other model: a warning says what
    is missing, and opening a DeepSeek-VL2 checkpoint is an error.
    """
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    try:
        _register_parts()
    except (ImportError, AttributeError) as error:
        logger.warning("This version of vLLM cannot run DeepSeek-VL2 through deepseek_vl2: %s.", error)


def _register_parts() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils import configs
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from .settings import PluginSettings

    # vLLM's own config of this type lacks the original's defaults, which released files rely on.
    configs._CLASS_TO_MODULE[CONFIG_CLASS] = f"{__name__}.configuration"
    _CONFIG_REGISTRY[MODEL_TYPE] = CONFIG_CLASS
    # Not by `register`, which warns when a process loads its plugins twice.
    TokenizerRegistry.tokenizers[TOKENIZER_MODE] = (f"{__name__}.tokenizer", "DeepseekVL2Tokenizer")
    RENDERER_REGISTRY.renderers[TOKENIZER_MODE] = (f"{__name__}.renderer", "DeepseekVL2Renderer")
    MODELS_CONFIG_MAP[ARCHITECTURE] = PluginSettings
