"""What vLLM's settings become when the model is DeepSeek-VL2."""

from __future__ import annotations

from typing import Any

NO_ROTARY_KERNEL = "-rotary_embedding"  # vLLM's word for PyTorch's own operations in its place


class PluginSettings:
    """Hooks that vLLM calls while it completes its settings; the names are vLLM's."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Choose this package's tokenizer and prompts.

        "hf" and "slow" would load the class that the released tokenizer_config.json names, under which spaces can
        vanish, and encode conversations as one text. A mode of another name is left as the caller set it.
        """
        from . import TOKENIZER_MODE

        if model_config.tokenizer_mode in ("auto", "hf", "slow"):
            model_config.tokenizer_mode = TOKENIZER_MODE

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Keep vLLM off a kernel that rotates queries of several heads wrongly: the CPU's, under latent attention."""
        language = vllm_config.model_config.hf_config.get_text_config()
        operations = vllm_config.compilation_config.custom_ops
        if vllm_config.device_config.device_type == "cpu" and language.use_mla and NO_ROTARY_KERNEL not in operations:
            operations.append(NO_ROTARY_KERNEL)
