"""Generation of the whole model: its images are embedded once, and handed on where they are not in the cache yet.

Shape suffixes: B batch, T sequence, H width of the language model, S side of a tile in pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig

from .backend import backend
from .cache import CACHE_NAME, one_cache
from .configuration_deepseek_vl_v2 import DeepseekVLV2Config
from .generate_inputs import check_finite_embeds, check_finite_tiles
from .generation import ChunkedGenerationMixin, check_padding
from .image_merge import check_image_inputs, check_no_images
from .modeling_base import PROCESSOR_ONLY
from .standard_images import ImageInputs

IMAGE_INPUTS = ImageInputs._fields


class ImageGenerationMixin(ChunkedGenerationMixin):
    """``generate``, and what it asks of `DeepseekVLV2ForCausalLM`."""

    if TYPE_CHECKING:
        config: DeepseekVLV2Config

        def named_images(
            self, input_ids: Any, given: ImageInputs, pixel_values: Any, image_sizes: Any
        ) -> ImageInputs: ...
        def prepare_inputs_embeds(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool = True,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand the images to the first forward pass of a generation only: later ones have them in the cache."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=one_cache(past_key_values, cache),
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        # `generate` looked at a prompt without images; one with images is looked at where they are merged.
        model_inputs["image_tokens_checked"] = images is None or not is_first_iteration
        if images is not None and (is_first_iteration or not use_cache) and model_inputs.get("inputs_embeds") is None:
            length = model_inputs["input_ids"].shape[1]
            mask = images_seq_mask
            if mask is not None and mask.shape[1] < length:  # without a cache the answer so far is run again
                mask = torch.cat((mask, mask.new_zeros(mask.shape[0], length - mask.shape[1])), dim=1)
            model_inputs.update(images=images, images_seq_mask=mask, images_spatial_crop=images_spatial_crop)
        return model_inputs

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def incremental_prefilling(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        chunk_size: int = 1024,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """Embed a prompt and prefill all of it but the last token, in chunks; hand both results to ``generate``.

        Args:
            chunk_size: tokens a chunk.
            others: see `prepare_inputs_embeds`.

        Returns:
            The prompt's embeddings, [B, T, H], and the filled cache.

        Raises:
            ValueError: neither ids nor embeddings are given, or ids, mask and images disagree.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Give either input_ids or inputs_embeds.")
            inputs_embeds = self.prepare_inputs_embeds(
                input_ids, images, images_seq_mask, images_spatial_crop, pixel_values, image_sizes
            )
        else:
            check_finite_embeds(inputs_embeds, attention_mask)
        return inputs_embeds, self.prefill_in_chunks(inputs_embeds, attention_mask, chunk_size)

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Generate an answer: ``model.generate(**processor(...), max_new_tokens=512)``.

        Arguments are those of transformers' ``generate`` and the processor's batch. ``prefill_chunk_size`` bounds the
        memory of a long prompt; ``past_key_values`` may be a tuple of (key, value) pairs; an ``assistant_model`` drafts
        from the text alone.

        Returns:
            Token ids, [B, T + new], the prompt's ids first; only the new ones when just ``inputs_embeds`` is given.
            With ``return_dict_in_generate=True`` transformers' output object, which no type tells.

        Raises:
            ValueError: ids, mask and images disagree, a prompt with image tokens lacks one of the three, or assisted
                decoding of embeddings without ids.
        """
        for name in (*PROCESSOR_ONLY, "labels"):
            kwargs.pop(name, None)
        if inputs is not None:
            kwargs.setdefault("input_ids", inputs)
        self.check_call(kwargs.get("input_ids"), generation_config, kwargs)
        ids = [self.generation_setting(f"{n}_token_id", generation_config, kwargs) for n in ("pad", "eos")]
        check_padding(kwargs.get("input_ids"), kwargs.get("attention_mask"), *ids)
        standard = [kwargs.pop(name, None) for name in ("pixel_values", "image_sizes")]
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            check_no_images({name: kwargs.get(name) for name in IMAGE_INPUTS}, *standard)
        if kwargs.get("inputs_embeds") is None and any(value is not None for value in standard):
            given = ImageInputs(*(kwargs.get(name) for name in IMAGE_INPUTS))
            kwargs.update(self.named_images(kwargs.get("input_ids"), given, *standard)._asdict())
        if kwargs.get("inputs_embeds") is None:
            check_finite_tiles(kwargs.get("images"), kwargs.get("images_spatial_crop"))
        prompt = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs.get("input_ids")
        if prompt is not None:
            copies = self.prepare_call(prompt, generation_config, kwargs)
            self._embed_prompt(generation_config, kwargs, copies)
        images = None if kwargs.get("inputs_embeds") is not None else kwargs.get("images")
        held, crops = kwargs.get(CACHE_NAME), kwargs.get("images_spatial_crop")
        early = backend() if getattr(held, "is_private", False) else None
        if early is not None and held is not None and images is not None and crops is not None:
            held.begun = early.begin_tiles(self, images, crops)  # while transformers prepares the call
        out: torch.Tensor = super().generate(None, generation_config=generation_config, **kwargs)
        return out

    def _embed_prompt(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any], copies: int) -> None:
        """Embed the images here where transformers would do it wrongly or many times over.

        That is: once rather than for every beam; before the part of the prompt that a given cache holds is cut off;
        and before a prefill in chunks, since images cannot be cut.
        """
        chunk_size = self.generation_setting("prefill_chunk_size", generation_config, kwargs)
        cache = kwargs.get(CACHE_NAME)
        assisted = kwargs.get("assistant_model") is not None or self.generation_setting(
            "prompt_lookup_num_tokens", generation_config, kwargs
        )
        images = {name: kwargs.get(name) for name in IMAGE_INPUTS}
        if kwargs.get("inputs_embeds") is None and kwargs.get("input_ids") is not None:
            held = 0 if cache is None or images["images"] is not None else int(cache.get_seq_length())
            check_image_inputs(kwargs["input_ids"][:, held:], **images, image_token_id=self.config.image_token_id)
        embed = chunk_size is not None or copies > 1 or assisted or (cache is not None and cache.get_seq_length() > 0)
        if kwargs.get("inputs_embeds") is None and images["images"] is not None and embed:
            kwargs["inputs_embeds"] = self.prepare_inputs_embeds(kwargs["input_ids"], **images)
        if kwargs.get("inputs_embeds") is not None:
            for name in IMAGE_INPUTS:
                kwargs.pop(name, None)
            if assisted and kwargs.get("input_ids") is None:
                raise ValueError("Assisted decoding needs input_ids beside inputs_embeds: candidates are token ids.")
            if assisted and chunk_size is not None:
                kwargs[CACHE_NAME] = self.prefill_in_chunks(
                    kwargs["inputs_embeds"], kwargs.get("attention_mask"), chunk_size, cache
                )
