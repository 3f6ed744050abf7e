"""What the whole model returns, and what transformers needs to know of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from .checkpoint import OPTIONAL_TENSORS, find_token_id
from .configuration_deepseek_vl_v2 import DeepseekVLV2Config
from .messages import IMAGE_TOKEN
from .modeling_deepseek import DeepseekV2ForCausalLM, DeepseekV2PreTrainedModel
from .siglip_vit import VisionTransformer

# What a processor's batch carries beside the model's inputs: `generate(**batch)` and `forward(**batch)` accept it.
PROCESSOR_ONLY = ("sft_format", "seq_lens", "num_image_tokens", "target_ids")
# Where packed samples begin, as collators that pad nothing say it beside the positions.
PACKING_HINTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class DeepSeekVLV2CausalLMOutputWithPast(CausalLMOutputWithPast):
    """What the model returns.

    Fields:
        loss: mean cross entropy, where labels were given.
        logits: [B, T, vocabulary], float32.
        past_key_values: the cache; a property, and the field is called ``cache``, from transformers 5.24 on.
        hidden_states: embeddings and every layer's output, [B, T, H] each, where asked for.
        attentions: attention weights of every layer, where asked for.
        rope_deltas: always ``None``; kept for scripts that unpack it.
        last_hidden_state: what the logits are computed from, [B, T, H].
    """

    rope_deltas: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


def check_keywords(unknown: dict[str, Any], position_ids: torch.Tensor | None = None) -> None:
    """Raise ``TypeError`` for keywords that are neither inputs of the model nor parts of a processor's batch.

    ``PACKING_HINTS`` repeat what positions say, and are known beside them alone.
    """
    names = [
        name for name in unknown if name not in PROCESSOR_ONLY and (position_ids is None or name not in PACKING_HINTS)
    ]
    if names:
        raise TypeError(
            f"forward() takes no {', '.join(names)}: images come as images, images_seq_mask and images_spatial_crop, "
            "or as pixel_values and image_sizes, as the processor returns them."
        )


class ModelBody(nn.Module):
    """The model without its output head: what trainers run that compute the loss from the hidden states themselves.

    It holds no module of its own, so that the model's parameters have one name each.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.whole: Any
        self.__dict__["whole"] = model  # past Module's own, which would register it
        self._tp_plan, self._pp_plan = model._tp_plan, model._pp_plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output with ``last_hidden_state``, [B, T, H], and without logits."""
        return type(self.whole).forward(self.whole, *args, **{**kwargs, "skip_logits": True})


class DeepseekVLV2PreTrainedModel(DeepseekV2PreTrainedModel):
    """What transformers needs to know of the whole model."""

    config: DeepseekVLV2Config
    language: DeepseekV2ForCausalLM
    image_newline: nn.Parameter
    view_seperator: nn.Parameter
    config_class: type = DeepseekVLV2Config
    base_model_prefix = "deepseek_vl_v2"
    input_modalities = ("image", "text")
    _no_split_modules = ["DeepseekV2DecoderLayer", "VisionTransformer", "MlpProjector"]
    _keys_to_ignore_on_load_missing = [OPTIONAL_TENSORS]
    _keys_to_ignore_on_load_unexpected = [OPTIONAL_TENSORS]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionTransformer):
            init.normal_(module.pos_embed, std=0.02)
            if module.cls_token is not None:
                init.normal_(module.cls_token, std=1e-6)
            if module.attn_pool is not None:
                init.normal_(module.attn_pool.latent, std=module.embed_dim**-0.5)
        elif isinstance(module, DeepseekVLV2PreTrainedModel):
            std = module.image_newline.numel() ** -0.5
            init.normal_(module.image_newline, std=std)
            init.normal_(module.view_seperator, std=std)

    @classmethod
    def complete_config(cls, config: PretrainedConfig, source: Any, hub: dict[str, Any]) -> None:
        """Fill in the id of the image token as the checkpoint's tokenizer knows it, where the config lacks it."""
        if getattr(config, "image_token_id", 0) is None:
            config.image_token_id = find_token_id(source, IMAGE_TOKEN, **hub)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save in the released layout; arguments as in transformers.

        After ``register_for_auto_class`` the code is saved too, for both Auto classes that know the model.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        config_file = Path(save_directory) / "config.json"
        if self._auto_class is None or not config_file.is_file():
            return
        config = json.loads(config_file.read_text(encoding="utf-8"))
        reference = config["auto_map"][self._auto_class]
        config["auto_map"].update(dict.fromkeys(("AutoModelForCausalLM", "AutoModelForImageTextToText"), reference))
        config["auto_map"].setdefault("AutoConfig", "configuration_deepseek_vl_v2.DeepseekVLV2Config")
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @property
    def base_model(self) -> nn.Module:
        """The model without its output head, see `ModelBody`."""
        return ModelBody(self)

    @property
    def language_model(self) -> DeepseekV2ForCausalLM:
        """The language model, by the name that the model card uses."""
        return self.language

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self.language.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output head."""
        self.language.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """Return the language model's stack of layers."""
        return self.language.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the language model's stack of layers."""
        self.language.set_decoder(decoder)
