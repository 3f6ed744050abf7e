"""DeepSeek-VL2: vision tower, projector and language model in one.

Shape suffixes: B batch, T sequence, H width of the language model, V tiles of all images, S side of a tile in pixels,
L image tokens of a tile, W image tokens along a tile's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from .attention_inputs import split_training_mask
from .backend import backend
from .cache import CACHE_NAME, one_cache
from .chat import ChatMixin
from .checkpoint import register_conversion
from .configuration_deepseek import DeepseekV2Config
from .configuration_deepseek_vl_v2 import (
    RELEASED_IMAGE_TOKEN_IDS,
    DeepseekVLV2Config,
    MlpProjectorConfig,
    VisionEncoderConfig,
)
from .generate_inputs import check_finite_tiles, check_forward
from .generation import set_generation_ids
from .image_generation import IMAGE_INPUTS, ImageGenerationMixin
from .image_merge import (
    arrange_images,
    check_image_inputs,
    check_image_shapes,
    check_image_tokens,
    check_no_image_tokens,
    layout_of_images,
    read_image_mask,
    real_grids,
    select_tiles,
)
from .loss import Targets, drop_unseen_labels, find_targets
from .modeling_base import (
    DeepSeekVLV2CausalLMOutputWithPast,
    DeepseekVLV2PreTrainedModel,
    check_keywords,
)
from .modeling_deepseek import DeepseekV2ForCausalLM
from .offloading import execution_device, visiting
from .projector import MlpProjector, output_side
from .siglip_vit import VisionTransformer
from .standard_images import ImageInputs, original_inputs
from .tiling import TileGrid, count_image_tokens

__all__ = [
    "IMAGE_INPUTS",
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


def is_whole_prompt(attention_mask: torch.Tensor | None, past_key_values: Any) -> bool:
    """Whether an empty cache is to be filled with a prompt without padding: its mask says nothing then.

    transformers asks the same of the mask, but when the images are on their way, and would wait for them.
    """
    if attention_mask is None or attention_mask.dim() != 2 or not isinstance(past_key_values, Cache):
        return False
    return int(past_key_values.get_seq_length()) == 0 and bool(attention_mask.all())


def is_one_of_several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class DeepseekVLV2ForCausalLM(DeepseekVLV2PreTrainedModel, ImageGenerationMixin, ChatMixin):
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
        if config.image_token_id is None:
            config.image_token_id = RELEASED_IMAGE_TOKEN_IDS.get(language.vocab_size)
        self.language.unseen_token_id = config.image_token_id
        self.post_init()
        set_generation_ids(self, language)

    def freeze_unused(self) -> None:
        """Take the gradient from the vision tower's pooling head, which never runs."""
        self.vision.freeze_unused()

    # ---------------------------------------------------------------- images into the sequence

    def encode_tiles(self, tiles_V3SS: torch.Tensor) -> torch.Tensor:
        """Return the token embeddings, [V, L, H], of tiles; they are moved and cast to the vision tower's own."""
        tiles = tiles_V3SS.to(device=self.vision_device, dtype=self.vision.patch_embed.proj.weight.dtype)
        if not torch.is_grad_enabled() and (engine := backend()) is not None:
            embeddings: torch.Tensor | None = engine.encode_tiles(self, tiles)
            if embeddings is not None:
                return embeddings
        features = self.vision(tiles)
        with self.language.model.quick_products(features):
            return self.projector(features)

    def arrange_views(self, views_VLH: torch.Tensor, grids: Sequence[TileGrid]) -> torch.Tensor:
        """Return the embeddings of all image tokens, in order, [tokens, H].

        Args:
            views_VLH: what `encode_tiles` gave for the images, each image's global view first.
            grids: the tile grid of each image.
        """
        newline, separator = self._ends(views_VLH)
        global_first = self.global_view_pos == "head"
        views_of_images = views_VLH.split([grid.views for grid in grids])
        return torch.cat(
            [
                arrange_images(views[None], grid, newline, separator, global_first)[0]
                for views, grid in zip(views_of_images, grids, strict=True)
            ]
        )

    def _image_tokens(
        self, images: torch.Tensor, grids: list[list[TileGrid]], side: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings of all image tokens of a batch, [tokens, H], and where each stands among them.

        First those of the views, then all newlines, then all separators: the number of operations on the device grows
        with neither the batch nor its grids. What goes to the device goes before the tiles are encoded: a copy waits.
        """
        every = [grid for row_grids in grids for grid in row_grids]
        layout = layout_of_images(every, side * side, self.global_view_pos == "head")
        places = torch.from_numpy(np.concatenate(layout)).to(device)
        views_VLH = self.encode_tiles(select_tiles(images, grids))
        newline, separator = self._ends(views_VLH)
        ends = newline.expand(len(layout.newlines), -1), separator.expand(len(layout.separators), -1)
        return torch.cat((views_VLH.flatten(0, 1), *ends)), places

    def _ends(self, views_VLH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what ends a row of views and what parts them, [H] each, beside the views."""
        with visiting(self):
            return self.image_newline.to(views_VLH), self.view_seperator.to(views_VLH)

    def _touch_vision(self, tile_13SS: torch.Tensor) -> torch.Tensor:
        """Return 0 with a gradient of 0 for all that images run through.

        Processes that train together must run the same parts: where they are sharded the others wait for this one's
        share of the weights, and where they are copied for its gradients.
        """
        total = self.encode_tiles(tile_13SS).sum()
        return (total + (self.image_newline.sum() + self.view_seperator.sum()).to(total.device)) * 0.0

    def _must_touch_vision(self) -> bool:
        """Whether a batch without images is to give gradients of 0 to what images run through.

        Without several processes an optimizer would leave those weights as they are, where in several it takes a step
        of its momentum and weight decay. And where they alone are trained the loss must have a gradient.
        """
        if not self.training:
            return False
        if is_one_of_several_processes():
            return True
        trained = (*self.vision.parameters(), *self.projector.parameters(), self.image_newline, self.view_seperator)
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in trained)

    @property
    def image_token_side(self) -> int:
        """Image tokens along a tile's side."""
        return output_side(self.config.projector_config, self.vision.patch_embed.grid_size[0])

    @property
    def vision_device(self) -> torch.device:
        """Where tiles go."""
        first = self.vision.patch_embed.proj
        return execution_device(first, first.weight)

    def image_grids(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | None,
        images_seq_mask: torch.Tensor | None,
        images_spatial_crop: torch.Tensor | None,
        ids_checked: bool = False,
    ) -> list[list[TileGrid]]:
        """Return the tile grids of each row's images, none where there are no images; see `prepare_inputs_embeds`.

        Raises:
            ValueError: ids, mask and images disagree.
        """
        image_id = None if ids_checked else self.config.image_token_id
        grids = [] if images is None or images_spatial_crop is None else real_grids(images_spatial_crop.tolist())
        if images is None or not any(grids):
            if images is not None and not ids_checked:
                check_no_image_tokens(input_ids, images_seq_mask, image_id)
            return []
        check_image_shapes(input_ids, images, images_seq_mask, self.config.vision_config.image_size)
        assert images_seq_mask is not None
        marked, consistent = read_image_mask(input_ids, images_seq_mask.to(input_ids.device), image_id)
        check_image_tokens(marked, consistent or ids_checked, grids, self.image_token_side, images.shape[1])
        return grids

    def named_images(
        self,
        input_ids: torch.Tensor | None,
        given: ImageInputs,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
    ) -> ImageInputs:
        """Return the images of a call under the original's names, whichever they were given under.

        Raises:
            TypeError: they were given under both, or only half of them.
            ValueError: those under transformers' names do not fit the ids.
        """
        if pixel_values is None and image_sizes is None:
            return given
        if any(value is not None for value in given):
            raise TypeError(
                "Give images as images, images_seq_mask and images_spatial_crop, or as pixel_values: not both."
            )
        if input_ids is None:
            raise ValueError("pixel_values needs input_ids: their image tokens say where the images stand.")
        size = self.config.vision_config.image_size
        ids = (self.config.image_token_id, self.image_token_side, size)
        return original_inputs(input_ids, pixel_values, image_sizes, *ids)

    def prepare_inputs_embeds(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """Return the embeddings of a batch's text and images, [B, T, H].

        Args:
            input_ids: token ids, [B, T].
            images: tiles, [B, tiles, 3, S, S]; rows with fewer tiles end in anything.
            images_seq_mask: where image tokens stand, [B, T].
            images_spatial_crop: tiles across and down for each image, [B, images, 2]; rows end in [0, 0].
            pixel_values, image_sizes: instead of the three, images under transformers' names; see `StandardBatch`.

        Raises:
            ValueError: ids, mask and images disagree, a prompt with image tokens lacks one of the three, or tiles hold
                what is not finite.
        """
        images, images_seq_mask, images_spatial_crop = self.named_images(
            input_ids, ImageInputs(images, images_seq_mask, images_spatial_crop), pixel_values, image_sizes
        )
        check_image_inputs(input_ids, images, images_seq_mask, images_spatial_crop, self.config.image_token_id)
        check_finite_tiles(images, images_spatial_crop)
        return self._embed(input_ids, images, images_seq_mask, images_spatial_crop)

    def _embed(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | None,
        images_seq_mask: torch.Tensor | None,
        images_spatial_crop: torch.Tensor | None,
        ids_checked: bool = False,
    ) -> torch.Tensor:
        """Do what `prepare_inputs_embeds` does; ``ids_checked``: ids beside the mask may be the image token's."""
        grids = self.image_grids(input_ids, images, images_seq_mask, images_spatial_crop, ids_checked)
        if images is None or images_seq_mask is None or not any(grids):
            embeds = self.get_input_embeddings()(input_ids)
            if images is not None and self._must_touch_vision():
                embeds = embeds + self._touch_vision(images[:1, 0]).to(embeds)
            return embeds
        marked = sum(count_image_tokens(grid, self.image_token_side) for row in grids for grid in row)
        embeds = self.get_input_embeddings()(input_ids)
        # The positions by a sort: a masked scatter would wait for the device in its backward pass.
        text_first = images_seq_mask.to(embeds.device).logical_not().to(torch.uint8).flatten()
        positions = text_first.argsort(stable=True)[:marked]
        tokens_NH, places = self._image_tokens(images, grids, self.image_token_side, embeds.device)
        return embeds.flatten(0, 1).index_copy(0, positions[places], tokens_NH.to(embeds)).view_as(embeds)

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
        loss_weights: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        cache: Any = None,
        num_items_in_batch: Any = None,
        image_tokens_checked: bool = False,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DeepSeekVLV2CausalLMOutputWithPast:
        """Predict the next token at each position of a prompt with images.

        Args:
            images, images_seq_mask, images_spatial_crop, or pixel_values and image_sizes: see `prepare_inputs_embeds`;
                unused with ``inputs_embeds``.
            image_tokens_checked: the ids are generated or were checked before, so that one of them may be the image
                token's without an image.
            others: see `DeepseekV2ForCausalLM.forward`. In training, with labels, no logits are returned unless
                ``skip_logits=False``.
            **kwargs: what else a processor's batch carries.

        Raises:
            ValueError: ids, mask and images disagree, a prompt with image tokens lacks one of the three, or neither ids
                nor embeddings are given.
            TypeError: an unknown keyword.
        """
        check_keywords(kwargs, position_ids)
        if labels is not None and (isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0):
            raise ValueError("labels need the logits of all positions: leave logits_to_keep out.")
        past_key_values = one_cache(past_key_values, cache)
        check_forward(input_ids, inputs_embeds, attention_mask, labels, past_key_values is not None)
        # What reads numbers back from the device comes first, while the device has nothing else to finish.
        if skip_logits is None:
            skip_logits = self.language.skips_logits(labels, logits_to_keep)
        if labels is not None:
            labels = drop_unseen_labels(labels, attention_mask)
        routing = None
        if past_key_values is None and (self.training or position_ids is not None):
            attention_mask, routing = split_training_mask(attention_mask, position_ids)
        targets: torch.Tensor | Targets | None = labels
        if labels is not None and (skip_logits or loss_weights is not None):
            targets = find_targets(labels, loss_weights)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Give either input_ids or inputs_embeds.")
            image_inputs = self.named_images(
                input_ids, ImageInputs(images, images_seq_mask, images_spatial_crop), pixel_values, image_sizes
            )
            shown = image_inputs.images is not None
            if shown and not self.training and is_whole_prompt(attention_mask, past_key_values):
                attention_mask = None
            # A token behind a cache is most often generated, and looking at it would wait for the device.
            checked = image_tokens_checked or (past_key_values is not None and input_ids.shape[1] == 1)
            if not checked:
                check_image_inputs(input_ids, *image_inputs, self.config.image_token_id)
            inputs_embeds = self._embed(input_ids, *image_inputs, ids_checked=checked)
        if attention_mask is not None:
            attention_mask = attention_mask.to(inputs_embeds.device)
        outputs = self.language(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=targets,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
            routing=routing,
            skip_logits=skip_logits,
            return_dict=True,
            num_items_in_batch=num_items_in_batch,
        )
        return DeepSeekVLV2CausalLMOutputWithPast(
            loss=outputs.loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
