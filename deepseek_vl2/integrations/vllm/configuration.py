"""The config that vLLM reads a released config.json into."""

from __future__ import annotations

from typing import Any

from deepseek_vl2.models.configuration_deepseek import DeepseekV2Config
from deepseek_vl2.models.configuration_deepseek_vl_v2 import DeepseekVLV2Config

from . import ARCHITECTURE

LANGUAGE_ARCHITECTURE = "DeepseekV2ForCausalLM"
LATENT_NORM_EPS = 1e-6


class LanguageConfig(DeepseekV2Config):
    """The language model's config, in the terms of vLLM's DeepSeek model.

    Raises:
        ValueError: a choice that vLLM's DeepSeek model computes otherwise, or not at all.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.architectures = [LANGUAGE_ARCHITECTURE]
        self._refuse_what_differs()
        if not self.use_mla:
            # How vLLM tells plain attention from latent attention. There must be no `head_dim` of 0 beside them: it
            # would be the size of the KV cache's heads, and FlashAttention divides by it.
            self.kv_lora_rank = self.q_lora_rank = None
            self.qk_nope_head_dim = self.qk_rope_head_dim = self.v_head_dim = 0
        if self.topk_method == "greedy":
            # vLLM always looks at groups; of one group it keeps all.
            self.n_group = self.topk_group = 1
        self.n_group, self.topk_group = self.n_group or 1, self.topk_group or 1

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies; vLLM writes it back."""
        return float(self.rope_parameters["rope_theta"])

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters["rope_theta"] = float(value)

    def _refuse_what_differs(self) -> None:
        refused = {
            "a dense model (n_routed_experts is null)": self.n_routed_experts is None,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            f"hidden_act {self.hidden_act!r}": self.hidden_act != "silu",
            f"a rope of type {self.rope_parameters['rope_type']!r}": self.rope_parameters["rope_type"] != "default",
            f"rms_norm_eps {self.rms_norm_eps} with latent attention (its own norms use {LATENT_NORM_EPS})": (
                self.use_mla and self.rms_norm_eps != LATENT_NORM_EPS
            ),
        }
        found = [what for what, is_set in refused.items() if is_set]
        if found:
            raise ValueError(
                f"vLLM's DeepSeek model does not compute what this config.json asks for: {', '.join(found)}. "
                "Use `deepseek-vl2 serve` for this checkpoint."
            )


class DeepseekVL2ReleasedConfig(DeepseekVLV2Config):
    """Reads config.json for vLLM; what it makes is a `DeepseekVLV2Config` whose language part is a `LanguageConfig`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of a config.json's content; arguments as in transformers.

        DeepSeek-OCR's files have the same ``model_type`` and name another architecture: those go to vLLM's own config.
        """
        named = kwargs.get("architectures") or config_dict.get("architectures") or [ARCHITECTURE]
        if ARCHITECTURE not in named:
            from vllm.transformers_utils.configs.deepseek_vl2 import DeepseekVLV2Config as TheirConfig

            return TheirConfig.from_dict(config_dict, **kwargs)
        made = DeepseekVLV2Config.from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        fields = config.language_config.to_dict()
        config.language_config = LanguageConfig(**fields)
        return made
