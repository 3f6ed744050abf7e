"""What vLLM's settings become when the model is DeepSeek-VL2."""

from __future__ import annotations

from typing import Any


class PluginSettings:
    """Hooks that vLLM calls while it completes its settings; the names are vLLM's."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Choose this package's tokenizer and prompts.

        The released tokenizer_config.json names a class that loses spaces under today's transformers, so "hf" and
        "slow" are no choice either. A mode of another name is left as the caller set it.
        """
        from . import TOKENIZER_MODE

        if model_config.tokenizer_mode in ("auto", "hf", "slow"):
            model_config.tokenizer_mode = TOKENIZER_MODE

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Nothing beyond the model's own settings changes."""
