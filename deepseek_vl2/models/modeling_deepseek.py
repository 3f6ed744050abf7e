"""The DeepSeek-V2 language model: decoder layer, stack of layers, causal language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .attention import DeepseekV2Attention, DeepseekV2MultiHeadAttention, Rotation, build_attention
from .attention_inputs import flash_options, positions_from_mask, split_training_mask
from .cache import CACHE_NAME, PackedCache, new_cache, one_cache
from .checkpoint import conversion_rules
from .configuration_deepseek import DeepseekV2Config
from .cpu import is_few_cpu_rows, project, row_products, wants_wide_products, wide_products
from .generate_inputs import check_forward
from .generation import ChunkedGenerationMixin, as_cache, set_generation_ids
from .loading import CheckpointLoadingMixin
from .loss import (
    OutputHead,
    Targets,
    balance_share,
    compute_dtype,
    drop_unseen_labels,
    find_targets,
    linear_cross_entropy,
)
from .model_card import ModelCardMixin
from .moe import (
    EXPERTS_IMPLEMENTATION,
    DeepseekV2Experts,
    DeepseekV2MLP,
    DeepseekV2MoE,
)
from .norm import DeepseekV2RMSNorm
from .parallel import EXPERT_PLAN, HEAD_PLAN, TENSOR_PLAN, ParallelMixin, as_bits, from_bits
from .rope import RotaryEmbedding
from .router import AddAuxiliaryLoss, MoEGate, RoutingContext

__all__ = [
    "AddAuxiliaryLoss",
    "DeepseekV2Attention",
    "DeepseekV2Config",
    "DeepseekV2DecoderLayer",
    "DeepseekV2Experts",
    "DeepseekV2ForCausalLM",
    "DeepseekV2MLP",
    "DeepseekV2MoE",
    "DeepseekV2Model",
    "DeepseekV2MultiHeadAttention",
    "DeepseekV2PreTrainedModel",
    "DeepseekV2RMSNorm",
    "MoEGate",
]


@dataclass
class DeepseekV2CausalLMOutput(CausalLMOutputWithPast):
    """transformers' output and, where logits are skipped, ``last_hidden_state``, [B, T, H], to compute them from."""

    last_hidden_state: torch.Tensor | None = None


class DeepseekV2DecoderLayer(GradientCheckpointingLayer):
    """One pre-norm decoder layer: attention, then a dense MLP or a mixture of experts; [B, T, H] in and out."""

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = build_attention(config, layer_idx)
        self.mlp = DeepseekV2MoE(config) if config.is_moe_layer(layer_idx) else DeepseekV2MLP(config)
        self.input_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: Rotation,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        routing: RoutingContext | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the layer's output and, where they are computed, its attention weights."""
        past_key_values = one_cache(past_key_values, cache)
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states), rotation, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if routing is not None and routing.balance_share is not None:
            routing = routing._replace(balance_share=from_bits(routing.balance_share))
        out = self.mlp(normed, routing) if isinstance(self.mlp, DeepseekV2MoE) else self.mlp(normed)
        return hidden_states + out, weights


class DeepseekV2PreTrainedModel(CheckpointLoadingMixin, ModelCardMixin, ParallelMixin, PreTrainedModel):
    """What transformers needs to know of the language model."""

    config: DeepseekV2Config
    config_class: type = DeepseekV2Config
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV2DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the decorator in this file, but it stands in moe.py

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the implementation to use: ours unless another one is asked for."""
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.get_text_config().initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, (DeepseekV2RMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, DeepseekV2Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MoEGate):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.topk_method == "noaux_tc":
                init.zeros_(module.e_score_correction_bias)


class DeepseekV2Model(DeepseekV2PreTrainedModel):
    """The stack of decoder layers, from token ids or embeddings to normed hidden states."""

    _tp_plan = TENSOR_PLAN
    _ep_plan = EXPERT_PLAN

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DeepseekV2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def _positions(
        self, attention_mask: torch.Tensor | None, past: int | torch.Tensor, embeds: torch.Tensor
    ) -> torch.Tensor:
        length = embeds.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            return positions_from_mask(attention_mask, length)
        return (torch.arange(length, device=embeds.device) + past).expand(embeds.shape[0], -1)

    @contextmanager
    def quick_products(self, hidden_states: torch.Tensor) -> Iterator[None]:
        """Make products on a CPU quicker; not under "eager", which keeps the original's arithmetic."""
        if self.config._attn_implementation == "eager":
            yield
            return
        with (
            row_products() if is_few_cpu_rows(hidden_states) else nullcontext(),
            wide_products(wants_wide_products(hidden_states)),
        ):
            yield

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        routing: RoutingContext | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the layers.

        Args:
            input_ids: token ids, [B, T]; or give ``inputs_embeds``, [B, T, H].
            attention_mask: [B, S], true where a token (cached ones included) is not padding; or a 4-D mask.
            position_ids: [B, T]; by default counted from each row's first real token. Without a cache, and without
                padding on the left, samples packed in a row are kept apart where positions start anew.
            past_key_values: a cache, or a tuple of (key, value) pairs; ``cache`` is another name of it.
            use_cache: return a cache; by default as the config says, but not in training.
            routing: which tokens count as load of the experts in training; by default those of the attention mask.
            output_attentions: return all attention weights ("eager" only).
            output_hidden_states: return the embeddings and the output of every layer, the last one normed.

        Raises:
            ValueError: ids and embeddings both given or neither; attention weights asked of another implementation.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, not both and not neither.")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError("Attention weights need attn_implementation='eager'.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        past_key_values = as_cache(one_cache(past_key_values, cache))
        if past_key_values is None and routing is None and (self.training or position_ids is not None):
            attention_mask, routing = split_training_mask(attention_mask, position_ids)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None and past_key_values is None:
            kwargs.update(flash_options(self.config._attn_implementation, position_ids))
        mask = None
        if not isinstance(past_key_values, PackedCache):  # whose segments have masks of their own
            mask = create_causal_mask(
                self.config,
                hidden_states,
                attention_mask,
                past_key_values,  # not a new one: with any cache packed samples go unseen
                position_ids=position_ids,  # given ones may tell of several samples packed in a row
            )
        if use_cache and past_key_values is None and not (self.training and self.gradient_checkpointing):
            past_key_values = new_cache(self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = self._positions(attention_mask, past, hidden_states)
        rotation = self.rotary_emb(position_ids, compute_dtype(hidden_states))

        all_hidden = [hidden_states] if output_hidden_states else None
        all_weights: list[torch.Tensor | None] | None = [] if output_attentions else None
        with self.quick_products(hidden_states):
            for layer in self.layers:
                hidden_states, weights = layer(
                    hidden_states,
                    rotation,
                    attention_mask=mask,
                    routing=routing,
                    **{CACHE_NAME: past_key_values},  # by the name that gradient checkpointing knows
                    **kwargs,
                )
                if all_hidden is not None:
                    all_hidden.append(hidden_states)
                if all_weights is not None:
                    all_weights.append(weights)
        hidden_states = self.norm(hidden_states)
        if all_hidden is not None:
            all_hidden[-1] = hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=None if all_hidden is None else tuple(all_hidden),
            attentions=None if all_weights is None else tuple(all_weights),
            **{CACHE_NAME: past_key_values if use_cache else None},
        )


class DeepseekV2ForCausalLM(DeepseekV2PreTrainedModel, ChunkedGenerationMixin):
    """The language model with its output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = HEAD_PLAN

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__(config)
        self.model: Any = DeepseekV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head: nn.Module = OutputHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        set_generation_ids(self, config)
        # On its own the language model is saved in the released layout too; transformers has no rule for its class,
        # and one for the model type would bind its own DeepSeek-V2.
        self._weight_conversions = conversion_rules()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output head."""
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        """Return the stack of layers."""
        return self.model

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the stack of layers."""
        self.model = decoder

    def skips_logits(self, labels: Any, logits_to_keep: int | torch.Tensor) -> bool:
        """Whether a call that does not say so wants the loss alone: in training, with labels."""
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        return self.training and labels is not None and keeps_all

    def _logits(self, hidden_BTH: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept_states = hidden_BTH[:, kept, :]
        with self.model.quick_products(kept_states):
            return project(self.lm_head, kept_states).float()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | Targets | None = None,
        loss_weights: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        routing: RoutingContext | None = None,
        skip_logits: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> DeepseekV2CausalLMOutput:
        """Predict the next token at each position.

        Args:
            labels: [B, T], shifted inside; -100 takes no loss, and neither does a token behind padding. Or what
                `find_targets` made of them, weights included.
            loss_weights: what the loss of each label counts, [B, T], or ``None``: 1. The weighted sum is divided by
                the number of labels, whatever the weights sum to.
            logits_to_keep: compute the logits of this many last positions (0: all), or of these positions.
            skip_logits: return no logits, and compute the loss without those of the whole sequence; by default in
                training, where labels are given.
            others: see `DeepseekV2Model.forward`. ``num_items_in_batch``: what the sum of the losses is divided by.

        Returns:
            ``logits`` [B, T, vocabulary] in float32, ``loss`` where labels are given, the cache, and what was asked.
        """
        past_key_values = one_cache(past_key_values, cache)
        check_forward(input_ids, inputs_embeds, attention_mask, labels, past_key_values is not None)
        if skip_logits is None:
            skip_logits = self.skips_logits(labels, logits_to_keep)
        if isinstance(labels, torch.Tensor):
            labels = drop_unseen_labels(labels, attention_mask)
        if isinstance(labels, torch.Tensor) and (skip_logits or loss_weights is not None):
            labels = find_targets(labels, loss_weights)  # before the layers are launched: it waits for the device
        items = kwargs.get("num_items_in_batch")
        if self.training and past_key_values is None and routing is None:
            attention_mask, routing = split_training_mask(attention_mask, position_ids)
        if routing is not None and isinstance(labels, Targets) and items is not None:
            routing = routing._replace(balance_share=as_bits(balance_share(labels, items)))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            routing=routing,
            return_dict=True,
        )
        logits = None if skip_logits else self._logits(outputs.last_hidden_state, logits_to_keep)
        loss = None
        if isinstance(labels, Targets):
            loss = linear_cross_entropy(outputs.last_hidden_state, self.lm_head, self.vocab_size, labels, items)
        elif labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, num_items_in_batch=items
            )
        return DeepseekV2CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """Generate as transformers does; tuple caches and embeddings with ``prefill_chunk_size`` work too.

        Raises:
            ValueError: what was given is no prompt, or one with image tokens: images are the whole model's to embed.
        """
        self.check_call(kwargs.get("input_ids") if inputs is None else inputs, generation_config, kwargs)
        prompts = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), inputs)
        prompt = next((given for given in prompts if given is not None), None)
        if prompt is not None:
            self.prepare_call(prompt, generation_config, kwargs)
        return super().generate(inputs, generation_config=generation_config, **kwargs)
