"""DeepSeek-VL2: vision tower, projector and language model in one.

Shape suffixes: B batch, T sequence, H width of the language model, V tiles of all images, S side of a tile in pixels,
L image tokens of a tile, W image tokens along a tile's side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.utils import ModelOutput, can_return_tuple

from .checkpoint import OPTIONAL_TENSORS, register_conversion
from .configuration_deepseek import DeepseekV2Config
from .configuration_deepseek_vl_v2 import DeepseekVLV2Config, MlpProjectorConfig, VisionEncoderConfig
from .generation import ChunkedGenerationMixin, set_generation_ids
from .modeling_deepseek import DeepseekV2ForCausalLM, DeepseekV2PreTrainedModel
from .projector import MlpProjector, output_side
from .siglip_vit import VisionTransformer
from .tiling import TileGrid, count_image_tokens

__all__ = [
    "DeepSeekVLV2CausalLMOutputWithPast",
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekVLV2Config",
    "DeepseekVLV2ForCausalLM",
    "DeepseekVLV2PreTrainedModel",
    "MlpProjector",
    "MlpProjectorConfig",
    "VisionEncoderConfig",
    "VisionTransformer",
]

register_conversion(DeepseekVLV2Config.model_type)

# What a processor's batch carries beside the model's inputs; `generate(**batch)` and `forward(**batch)` ignore it.
PROCESSOR_ONLY = ("sft_format", "seq_lens", "num_image_tokens", "target_ids")
IMAGE_INPUTS = ("images", "images_seq_mask", "images_spatial_crop")


@dataclass
class DeepSeekVLV2CausalLMOutputWithPast(ModelOutput):
    """What the model returns.

    Fields:
        loss: mean cross entropy, where labels were given.
        logits: [B, T, vocabulary], float32.
        past_key_values: the cache.
        hidden_states: embeddings and every layer's output, [B, T, H] each, where asked for.
        attentions: attention weights of every layer, where asked for.
        rope_deltas: always ``None``; kept for scripts that unpack it.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    rope_deltas: torch.Tensor | None = None


def real_grids(images_spatial_crop: torch.Tensor) -> list[list[TileGrid]]:
    """Return the tile grids of each row of a batch; a row ends at its first [0, 0]."""
    rows = []
    for row in images_spatial_crop.tolist():
        grids = []
        for across, down in row:
            if across == 0 or down == 0:
                break
            grids.append(TileGrid(across, down))
        rows.append(grids)
    return rows


def arrange_image(
    views_VLH: torch.Tensor,
    grid: TileGrid,
    newline_H: torch.Tensor,
    separator_H: torch.Tensor,
    global_first: bool,
) -> torch.Tensor:
    """Lay one image's views out as the sequence that the language model reads.

    Args:
        views_VLH: the global view and then the local tiles, row by row.
        grid: how many tiles there are.
        newline_H: embedding that ends each row of tokens.
        separator_H: embedding between the global view and the tiles.
        global_first: whether the global view comes first.

    Returns:
        [tokens of the image, H].
    """
    side = int(views_VLH.shape[1] ** 0.5)
    global_WWH = views_VLH[0].unflatten(0, (side, side))
    tiles = views_VLH[1:].unflatten(1, (side, side)).unflatten(0, (grid.down, grid.across))
    local = tiles.transpose(1, 2).reshape(grid.down * side, grid.across * side, -1)

    def end_rows(rows: torch.Tensor) -> torch.Tensor:
        newlines = newline_H.expand(rows.shape[0], 1, -1)
        return torch.cat((rows, newlines), dim=1).flatten(0, 1)

    parts = [end_rows(global_WWH), separator_H[None], end_rows(local)]
    return torch.cat(parts if global_first else parts[::-1])


def check_image_inputs(
    input_ids: torch.Tensor,
    images: torch.Tensor,
    images_seq_mask: torch.Tensor | None,
    grids: list[list[TileGrid]],
    side: int,
    tile_size: int,
) -> None:
    """Check that ids, mask and images describe the same images.

    Raises:
        ValueError: they do not; the row and both numbers are named.
    """
    if images_seq_mask is None:
        raise ValueError("images need images_seq_mask: the processor returns it beside input_ids.")
    if images_seq_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids {list(input_ids.shape)} and images_seq_mask {list(images_seq_mask.shape)} differ in shape."
        )
    if images.dim() != 5 or images.shape[0] != input_ids.shape[0] or tuple(images.shape[-2:]) != (tile_size,) * 2:
        raise ValueError(
            f"images must be [batch, tiles, 3, {tile_size}, {tile_size}] with a batch of {input_ids.shape[0]}, "
            f"got {list(images.shape)}."
        )
    marked = images_seq_mask.sum(dim=1).tolist()
    for row, row_grids in enumerate(grids):
        expected = sum(count_image_tokens(grid, side) for grid in row_grids)
        if marked[row] != expected:
            raise ValueError(
                f"Row {row}: images_seq_mask marks {marked[row]} tokens, but its {len(row_grids)} images "
                f"(images_spatial_crop) take {expected}."
            )
        tiles = sum(grid.views for grid in row_grids)
        if tiles > images.shape[1]:
            raise ValueError(f"Row {row}: images_spatial_crop asks for {tiles} tiles, images holds {images.shape[1]}.")
    ids = input_ids[images_seq_mask]
    if ids.numel() and (ids.unique().numel() != 1 or bool((input_ids[~images_seq_mask] == ids[0]).any())):
        raise ValueError("input_ids and images_seq_mask disagree: image tokens stand where the mask is false, or not.")


def check_no_image_tokens(images_seq_mask: torch.Tensor | None) -> None:
    """Raise ``ValueError`` for a mask that marks image tokens where there are no images."""
    if images_seq_mask is not None and bool(images_seq_mask.any()):
        raise ValueError("images_seq_mask marks image tokens, but there are no images (images_spatial_crop).")


class DeepseekVLV2PreTrainedModel(DeepseekV2PreTrainedModel):
    """What transformers needs to know of the whole model."""

    config: DeepseekVLV2Config
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
        elif isinstance(module, DeepseekVLV2ForCausalLM):
            std = module.image_newline.numel() ** -0.5
            init.normal_(module.image_newline, std=std)
            init.normal_(module.view_seperator, std=std)


class DeepseekVLV2ForCausalLM(DeepseekVLV2PreTrainedModel, ChunkedGenerationMixin):
    """DeepSeek-VL2: answers questions about images.

    ``vision`` turns tiles into patch features, ``projector`` turns those into token embeddings, and ``language``
    (also ``language_model``) reads them among the embeddings of the text.

    Source: ``modeling_deepseek_vl_v2.py`` of the original package.
    """

    _tied_weights_keys = {"language.lm_head.weight": "language.model.embed_tokens.weight"}

    def __init__(self, config: DeepseekVLV2Config) -> None:
        super().__init__(config)
        language, projector = config.language_config, config.projector_config
        if projector.input_dim != config.vision_config.width:
            raise ValueError(
                f"The projector takes {projector.input_dim} channels (projector_config.input_dim), but the vision "
                f"tower gives {config.vision_config.width} (vision_config.width)."
            )
        if projector.output_dim != language.hidden_size:
            raise ValueError(
                f"The projector gives {projector.output_dim} channels (projector_config.n_embed), but the language "
                f"model takes {language.hidden_size} (language_config.hidden_size)."
            )
        self.vision = VisionTransformer.from_config(config.vision_config)
        self.projector = MlpProjector(projector)
        self.image_newline = nn.Parameter(torch.empty(language.hidden_size))
        # Misspelt, and the name of a tensor in every checkpoint.
        self.view_seperator = nn.Parameter(torch.empty(language.hidden_size))
        self.language = DeepseekV2ForCausalLM(language)
        self.tile_tag = config.tile_tag
        self.global_view_pos = config.global_view_pos
        self.post_init()
        set_generation_ids(self, language)

    def freeze_unused(self) -> None:
        """Take the gradient from the vision tower's pooling head, which never runs."""
        self.vision.freeze_unused()

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

    # ---------------------------------------------------------------- parts by their common names

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

    # ---------------------------------------------------------------- images into the sequence

    def encode_tiles(self, tiles_V3SS: torch.Tensor) -> torch.Tensor:
        """Return the token embeddings, [V, L, H], of tiles; they are moved and cast to the vision tower's own."""
        weight = self.vision.patch_embed.proj.weight
        device = weight.device if weight.device.type != "meta" else tiles_V3SS.device
        return self.projector(self.vision(tiles_V3SS.to(device=device, dtype=weight.dtype)))

    def arrange_views(self, views_VLH: torch.Tensor, grids: Sequence[TileGrid]) -> torch.Tensor:
        """Return the embeddings of all image tokens, in order, [tokens, H].

        Args:
            views_VLH: what `encode_tiles` gave for the images, each image's global view first.
            grids: the tile grid of each image.
        """
        newline, separator = (p.to(views_VLH.device) for p in (self.image_newline, self.view_seperator))
        sequences, start = [], 0
        for grid in grids:
            views = views_VLH[start : start + grid.views]
            sequences.append(arrange_image(views, grid, newline, separator, self.global_view_pos == "head"))
            start += grid.views
        return torch.cat(sequences)

    def _image_sequences(self, images: torch.Tensor, grids: list[list[TileGrid]]) -> torch.Tensor:
        """Return the embeddings of all image tokens of a batch, in order, [tokens, H]."""
        tiles = [images[row, : sum(grid.views for grid in row_grids)] for row, row_grids in enumerate(grids)]
        return self.arrange_views(self.encode_tiles(torch.cat(tiles)), [grid for row in grids for grid in row])

    def prepare_inputs_embeds(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """Return the embeddings of a batch's text and images, [B, T, H].

        Args:
            input_ids: token ids, [B, T].
            images: tiles, [B, tiles, 3, S, S]; rows with fewer tiles end in anything.
            images_seq_mask: where image tokens stand, [B, T].
            images_spatial_crop: tiles across and down for each image, [B, images, 2]; rows end in [0, 0].

        Raises:
            ValueError: ids, mask and images disagree.
        """
        grids = [] if images is None or images_spatial_crop is None else real_grids(images_spatial_crop)
        if images is None or not any(grids):
            check_no_image_tokens(images_seq_mask)
            return self.get_input_embeddings()(input_ids)
        side = output_side(self.config.projector_config, self.vision.patch_embed.grid_size[0])
        check_image_inputs(input_ids, images, images_seq_mask, grids, side, self.config.vision_config.image_size)
        assert images_seq_mask is not None
        embeds = self.get_input_embeddings()(input_ids)
        sequences = self._image_sequences(images, grids).to(embeds)
        return embeds.masked_scatter(images_seq_mask.to(embeds.device).unsqueeze(-1), sequences)

    # ---------------------------------------------------------------- running

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> DeepSeekVLV2CausalLMOutputWithPast:
        """Predict the next token at each position of a prompt with images.

        Args:
            images, images_seq_mask, images_spatial_crop: see `prepare_inputs_embeds`; unused with ``inputs_embeds``.
            others: see `DeepseekV2ForCausalLM.forward`.

        Raises:
            ValueError: ids, mask and images disagree, or neither ids nor embeddings are given.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Give either input_ids or inputs_embeds.")
            inputs_embeds = self.prepare_inputs_embeds(input_ids, images, images_seq_mask, images_spatial_crop)
        if attention_mask is not None:
            attention_mask = attention_mask.to(inputs_embeds.device)
        outputs = self.language(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )
        return DeepSeekVLV2CausalLMOutputWithPast(
            loss=outputs.loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

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
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand the images to the first forward pass of a generation only: later ones have them in the cache."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
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
            inputs_embeds = self.prepare_inputs_embeds(input_ids, images, images_seq_mask, images_spatial_crop)
        return inputs_embeds, self.prefill_in_chunks(inputs_embeds, attention_mask, chunk_size)

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """Generate an answer: ``model.generate(**processor(...), max_new_tokens=512)``.

        Arguments are those of transformers' ``generate`` and the processor's batch. ``prefill_chunk_size`` bounds the
        memory of a long prompt; ``past_key_values`` may be a tuple of (key, value) pairs; an ``assistant_model`` drafts
        from the text alone.

        Returns:
            Token ids, [B, T + new], the prompt's ids first; only the new ones when just ``inputs_embeds`` is given.

        Raises:
            ValueError: ids, mask and images disagree, or assisted decoding of embeddings without ids.
        """
        for name in (*PROCESSOR_ONLY, "labels"):
            kwargs.pop(name, None)
        if inputs is not None:
            kwargs.setdefault("input_ids", inputs)
        prompt = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs.get("input_ids")
        if prompt is not None:
            copies = self.prepare_call(prompt, generation_config, kwargs)
            self._embed_prompt(generation_config, kwargs, copies)
        return super().generate(None, generation_config=generation_config, **kwargs)

    def _embed_prompt(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any], copies: int) -> None:
        """Embed the images here where transformers would do it wrongly or many times over.

        That is: once rather than for every beam; before the part of the prompt that a given cache holds is cut off;
        and before a prefill in chunks, since images cannot be cut.
        """
        chunk_size = self.generation_setting("prefill_chunk_size", generation_config, kwargs)
        cache = kwargs.get("past_key_values")
        assisted = kwargs.get("assistant_model") is not None or self.generation_setting(
            "prompt_lookup_num_tokens", generation_config, kwargs
        )
        images = {name: kwargs.get(name) for name in IMAGE_INPUTS}
        if kwargs.get("inputs_embeds") is None and images["images"] is None:
            check_no_image_tokens(images["images_seq_mask"])
        embed = chunk_size is not None or copies > 1 or assisted or (cache is not None and cache.get_seq_length() > 0)
        if kwargs.get("inputs_embeds") is None and images["images"] is not None and embed:
            kwargs["inputs_embeds"] = self.prepare_inputs_embeds(kwargs["input_ids"], **images)
        if kwargs.get("inputs_embeds") is not None:
            for name in IMAGE_INPUTS:
                kwargs.pop(name, None)
            if assisted and kwargs.get("input_ids") is None:
                raise ValueError("Assisted decoding needs input_ids beside inputs_embeds: candidates are token ids.")
            if assisted and chunk_size is not None:
                kwargs["past_key_values"] = self.prefill_in_chunks(
                    kwargs["inputs_embeds"], kwargs.get("attention_mask"), chunk_size, cache
                )
