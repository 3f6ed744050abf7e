"""What the language model and the whole model share in generating: caches, ids, prefill in chunks."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from .backend import backend
from .cache import CACHE_NAME, new_cache, one_cache
from .configuration_deepseek import DeepseekV2Config
from .generate_inputs import NOT_FOR_FORWARD, check_prompt, check_settings, check_unseen_images, describe


@dataclass(frozen=True)
class SampleCall:
    """What transformers' ``generate`` hands to its greedy and sampling loop; see ``GenerationMixin._sample``."""

    model: Any
    input_ids: torch.Tensor
    logits_processor: Any
    stopping_criteria: Any
    generation_config: GenerationConfig
    synced_gpus: bool
    streamer: Any
    model_kwargs: dict[str, Any]


def as_cache(past_key_values: Any) -> Cache | None:
    """Return a cache object; a tuple or list of (key, value) pairs, one for each layer, becomes a `DynamicCache`.

    Under latent attention "key" is the rotated key and "value" the latent, as in the original package.
    """
    if past_key_values is None or isinstance(past_key_values, Cache):
        return past_key_values
    layers: Any = past_key_values if isinstance(past_key_values, (tuple, list)) else [None]
    if not all(isinstance(layer, (tuple, list)) and all(map(torch.is_tensor, layer)) for layer in layers):
        raise ValueError(
            "past_key_values must be a Cache, or a (key, value) pair of tensors for each layer, got "
            f"{describe(past_key_values)}."
        )
    return DynamicCache([tuple(layer) for layer in layers])


def set_generation_ids(model: PreTrainedModel, config: DeepseekV2Config) -> None:
    """Give ``generate`` the end, begin and pad ids of the checkpoint, which ships no generation_config.json."""
    generation = model.generation_config
    generation.bos_token_id = config.bos_token_id
    generation.eos_token_id = config.eos_token_id
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    generation.pad_token_id = eos if config.pad_token_id is None else config.pad_token_id


def check_padding(input_ids: torch.Tensor | None, attention_mask: Any, pad_id: Any, other_ids: Any) -> None:
    """Raise ``ValueError`` for a batch whose mask takes the padding in front of a prompt for tokens.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], true where a token is not padding.
        pad_id: of the padding tokens.
        other_ids: ids that a prompt may begin with; where ``pad_id`` is one, nothing can be told.
    """
    if input_ids is None or len(input_ids) < 2 or not isinstance(attention_mask, torch.Tensor):
        return
    others = other_ids if isinstance(other_ids, (list, tuple)) else [other_ids]
    if not isinstance(pad_id, int) or pad_id in others or attention_mask.shape != input_ids.shape:
        return
    first = attention_mask[:, 0].to(input_ids.device).bool()
    if bool(((input_ids[:, 0] == pad_id) & first).any()):
        raise ValueError(
            "A row of input_ids begins with padding that attention_mask takes for tokens. Pass the processor's "
            "attention_mask on; for TRL's GRPOTrainer, which pads prompts itself, load the processor with "
            "DeepseekVLV2Processor.from_pretrained(..., transformers_defaults=True)."
        )


class ChunkedGenerationMixin(GenerationMixin):
    """transformers' ``generate``, with tuple caches and a prefill in chunks that runs on embeddings.

    transformers cuts token ids into chunks; a prompt with images exists whole only as embeddings.
    """

    # Of image tokens, where the model does not see the images itself.
    unseen_token_id: int | None = None

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse what ``generate_batch`` and ``continuous_batching_context_manager`` start with."""
        raise NotImplementedError(
            "Continuous batching by transformers (generate_batch) is not supported: its cache holds no latents, and it "
            "takes no images. generate() takes a padded batch, and deepseek-vl2 serve batches requests as they come."
        )

    def generation_setting(self, name: str, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
        """Return a setting of a call of ``generate``: its keyword, its config's field or the model's own."""
        for source in (kwargs.get(name), getattr(generation_config, name, None)):
            if source is not None:
                return source
        return getattr(self.generation_config, name, None)

    def check_call(self, input_ids: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        """Check what a call of ``generate`` is given; errors as `check_prompt`, and for images that nobody embeds."""
        given = [kwargs.get(name) for name in ("past_key_values", "cache")]
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        check_settings(lambda name: self.generation_setting(name, generation_config, kwargs), generation_config)
        streamer = kwargs.get("streamer")
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(f"streamer must have put and end, as TextIteratorStreamer has, got {describe(streamer)}.")
        fresh = all(held is None for held in given)
        check_prompt(input_ids, embeds, mask, self.get_decoder().config, fresh)
        drafts = getattr(generation_config, "is_assistant", False)  # from the text alone
        if self.unseen_token_id is not None and fresh and not drafts and input_ids is not None and embeds is None:
            check_unseen_images(input_ids, self.unseen_token_id)

    def prepare_call(self, prompt: torch.Tensor, generation_config: GenerationConfig | None, kwargs: Any) -> int:
        """Warn about a prompt that is too long, see to the cache, and return how many sequences each prompt gets.

        Args:
            prompt: ids [B, T] or embeddings [B, T, H].
            generation_config: the call's own config.
            kwargs: the call's keywords; the cache is replaced where it must be, and named as transformers does.
        """

        def setting(name: str) -> Any:
            return self.generation_setting(name, generation_config, kwargs)

        config = self.get_decoder().config
        new_tokens = setting("max_new_tokens")
        total = prompt.shape[1] + new_tokens if new_tokens else max(setting("max_length") or 0, prompt.shape[1])
        if total > config.max_position_embeddings:
            warnings.warn(
                f"The prompt and max_new_tokens together exceed max_position_embeddings="
                f"{config.max_position_embeddings}: answers may degrade beyond it.",
                stacklevel=3,
            )
        copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        cache = as_cache(one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None)))
        if cache is not None:
            if copies > 1 and cache.get_seq_length() > 0 and cache.layers[0].keys.shape[0] == prompt.shape[0]:
                cache = copy.deepcopy(cache)  # the caller may go on with theirs
                cache.batch_repeat_interleave(copies)
                cache.is_private = True
            kwargs[CACHE_NAME] = cache
        elif setting("cache_implementation") is None and kwargs.get("use_cache", True):
            kwargs[CACHE_NAME] = new_cache(config)
            kwargs[CACHE_NAME].is_private = True  # nobody looks at it after the call
        return copies

    def prefill_in_chunks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        chunk_size: int,
        past_key_values: Cache | None = None,
    ) -> Cache:
        """Run all tokens but the last through the layers, ``chunk_size`` at a time, and return the filled cache.

        Tokens that the cache holds already are skipped. Peak memory falls with the chunk size.

        Args:
            inputs_embeds: embeddings of the whole prompt, [B, T, H].
            attention_mask: [B, T], true where a token is not padding.
            chunk_size: tokens a chunk.
            past_key_values: the cache to fill.

        Raises:
            ValueError: a chunk size below one.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        decoder = self.get_decoder()
        cache = new_cache(decoder.config) if past_key_values is None else past_key_values
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool)
        attention_mask = attention_mask.to(inputs_embeds.device)
        last = inputs_embeds.shape[1] - 1
        for start in range(int(cache.get_seq_length()), last, chunk_size):
            end = min(start + chunk_size, last)
            decoder(
                inputs_embeds=inputs_embeds[:, start:end],
                attention_mask=attention_mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
        return cache

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare a forward pass as transformers does; candidate tokens behind a prompt of embeddings are embedded.

        Assisted decoding appends candidates to the ids alone, and expects their logits.
        """
        cache = one_cache(past_key_values, cache)
        kwargs = {name: value for name, value in kwargs.items() if name not in NOT_FOR_FORWARD}
        if is_first_iteration and inputs_embeds is not None:
            candidates = input_ids.shape[1] - inputs_embeds.shape[1]
            if candidates > 0:
                embedded = self.get_input_embeddings()(input_ids[:, -candidates:])
                inputs_embeds = torch.cat((inputs_embeds, embedded.to(inputs_embeds)), dim=1)
            past = int(cache.get_seq_length()) if cache is not None else 0
            if past and next_sequence_length is None:
                next_sequence_length = inputs_embeds.shape[1] - past
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Fill the cache in chunks, where asked for, before transformers runs what is left of the prompt.

        Here, unlike in ``generate``, the cache exists, of whatever kind, and beams have been laid out.
        """
        if generation_config.prefill_chunk_size is not None:
            cache = model_kwargs.get(CACHE_NAME)
            if cache is None:
                raise ValueError("prefill_chunk_size needs a cache: do not set use_cache=False.")
            for layer in cache.layers:
                # transformers laid a static cache out for chunks already, as if keys and values were of one size.
                if layer.is_initialized and int(layer.get_seq_length()) == 0:
                    layer.is_initialized = False
            embeds = model_kwargs.get("inputs_embeds")
            if embeds is None:
                embeds = self.get_input_embeddings()(input_ids)
            self.prefill_in_chunks(
                embeds, model_kwargs.get("attention_mask"), generation_config.prefill_chunk_size, cache
            )
            generation_config.prefill_chunk_size = None  # of transformers' own copy for this call
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode greedily or by sampling: on the engine where it takes the call, or as transformers does."""
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in NOT_FOR_FORWARD}
        settings = (logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        if (engine := backend()) is not None:
            ids = engine.generate(SampleCall(self, input_ids, *settings, model_kwargs))
            if ids is not None:
                return ids
        return super()._sample(input_ids, *settings, **model_kwargs)
