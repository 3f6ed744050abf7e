"""DeepSeek-VL2 as a vLLM model: this package's tower and projector in front of vLLM's DeepSeek language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from deepseek_vl2.models import DeepseekVLV2Config
from deepseek_vl2.models.image_merge import arrange_images
from deepseek_vl2.models.projector import MlpProjector
from deepseek_vl2.models.siglip_vit import VisionTransformer
from deepseek_vl2.models.tiling import TileGrid
from deepseek_vl2.models.views import ByteTiles

from .configuration import LANGUAGE_ARCHITECTURE, LanguageConfig
from .processing import DummyInputsBuilder, MultiModalProcessor, ProcessingInfo

UNUSED = "vision.attn_pool."


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor,
    info=ProcessingInfo,
    dummy_inputs=DummyInputsBuilder,
)
class DeepseekVLV2ForCausalLM(nn.Module, SupportsMultiModal, SupportsPP):
    """The whole model. Its modules have the names of the checkpoint's tensors.

    Each process of tensor parallelism has the tower and the projector whole; the language model is split.

    Raises:
        TypeError: vLLM read config.json into another class, so the plugin does not fit this version.
    """

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return the tag that stands for an image."""
        if modality.startswith("image"):
            return "<image>"
        raise ValueError(f"DeepSeek-VL2 takes images, not {modality}.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if not isinstance(config, DeepseekVLV2Config) or not isinstance(config.language_config, LanguageConfig):
            raise TypeError(
                f"vLLM read config.json into {type(config).__module__}.{type(config).__name__}: this version does not "
                "fit the plugin of deepseek_vl2. docs/vllm.md has those that do."
            )
        self.config = config
        width = config.language_config.hidden_size
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.vision = VisionTransformer.from_config(config.vision_config)
            self.vision.attn_pool = None  # released files carry it, and it never runs
            self.projector = MlpProjector(config.projector_config)
        self.image_newline = nn.Parameter(torch.empty(width))
        self.view_seperator = nn.Parameter(torch.empty(width))  # misspelt, and the name of a tensor in every checkpoint
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.language_config,
                prefix=maybe_prefix(prefix, "language"),
                architectures=[LANGUAGE_ARCHITECTURE],
            )
        self.make_empty_intermediate_tensors = self.language.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """Return the embeddings of each image, [its tokens, H].

        Args:
            tiles: uint8 [V, S, S, 3] of all images, each image's global view first.
            images_spatial_crop: [images, 2], tiles across and down.
            values: [images, 3, 256], what each byte becomes.
        """
        tiles = kwargs.get("tiles")
        if tiles is None:
            return []
        if isinstance(tiles, (list, tuple)):
            tiles = torch.cat(list(tiles))
        grids = [TileGrid(*pair) for pair in kwargs["images_spatial_crop"].tolist()]
        weight = self.vision.patch_embed.proj.weight
        values = kwargs["values"][0].to(weight)
        pixels = ByteTiles(tiles.to(weight.device), values, (len(tiles),)).numbers()
        views = self.projector(self.vision(pixels))
        return [
            self._arrange(views_of_image, grid)
            for views_of_image, grid in zip(views.split([grid.views for grid in grids]), grids, strict=True)
        ]

    def _arrange(self, views_VLH: torch.Tensor, grid: TileGrid) -> torch.Tensor:
        global_first = self.config.global_view_pos == "head"
        return arrange_images(views_VLH[None], grid, self.image_newline, self.view_seperator, global_first)[0]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """Return hidden states, or what goes to the next stage of a pipeline."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the logits of hidden states."""
        return self.language.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a released checkpoint's tensors, and return the names of the parameters that got theirs.

        Raises:
            ValueError: a tensor without a place.
        """
        used = ((name, tensor) for name, tensor in weights if not name.startswith(UNUSED))
        return AutoWeightsLoader(self).load_weights(used)
