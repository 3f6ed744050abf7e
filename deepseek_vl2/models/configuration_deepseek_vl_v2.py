"""Configuration of the vision tower, of the projector and of the whole model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from transformers import PretrainedConfig

from .bundled import locate_bundled
from .config_fields import (
    COUNT,
    DEPTH,
    FROM_ZERO,
    LAYERS,
    MERGED,
    OPTIONAL_FROM_ZERO,
    PIXELS,
    POSITIVE,
    FieldError,
    check_fields,
    check_mapping,
    check_sizes,
)
from .configuration_deepseek import DeepseekV2Config, check_choice
from .tiling import check_tiles

VISION_FIELDS = {
    "image_size": PIXELS,
    "patch_size": PIXELS,
    "width": COUNT,
    "layers": LAYERS,
    "heads": COUNT,
    "mlp_ratio": POSITIVE,
    "num_classes": FROM_ZERO,
    "num_recomputing_layers": FROM_ZERO,
}
PROJECTOR_FIELDS = {
    "input_dim": COUNT,
    "n_embed": COUNT,
    "depth": DEPTH,
    "mlp_ratio": POSITIVE,
    "downsample_ratio": MERGED,
}

PROJECTOR_TYPES = ("identity", "linear", "mlp_gelu", "downsample_mlp_gelu")
GLOBAL_POOLS = ("", "avg", "token", "map")
VISION_ATTENTION_BACKENDS = ("sdpa", "eager", "xformers")
TILE_TAGS = ("2D",)
# Releases do not name the id of <image>; their embeddings' sizes tell which tokenizer they come with.
RELEASED_IMAGE_TOKEN_IDS = {129280: 128815, 102400: 100003}

Loaded = TypeVar("Loaded", bound="DeepseekVLV2Config")


class VisionEncoderConfig(PretrainedConfig):
    """Sizes of the SigLIP vision tower.

    Args:
        model_name: name of the tower, for the reader; the sizes below decide.
        image_size: side of a square tile, in pixels.
        patch_size: side of a patch, in pixels; a remainder at the tile's right and bottom edge is dropped.
        width: channels of a patch feature.
        layers: transformer blocks.
        heads: attention heads.
        mlp_ratio: inner width of a block's MLP over ``width``.
        global_pool: pooling head that the checkpoint carries ("map" in all releases); it is not run.
        ignore_head: return the sequence of patch features (the only use here).
        class_token: prepend a class token.
        num_classes: size of a classification head, 0 for none.
        use_checkpoint: recompute the blocks' activations in the backward pass.
        weight_init: kept for old configs; weights come from the checkpoint.
        deterministic: kept for old configs; every backend here is deterministic in inference.
        num_recomputing_layers: with ``use_checkpoint``, how many blocks from the bottom are recomputed; 0: all.
        attention_backend: "sdpa" (PyTorch), "eager" or "xformers" (needs that package).

    Raises:
        ValueError: an unknown choice, or a width that the heads do not divide.

    Source: ``VisionEncoderConfig`` of the original package.
    """

    model_type = "vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        model_name: str = "siglip_large_patch16_384",
        image_size: int = 384,
        patch_size: int = 16,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        mlp_ratio: float = 4,
        global_pool: str = "map",
        ignore_head: bool = True,
        class_token: bool = False,
        num_classes: int = 0,
        use_checkpoint: bool = False,
        weight_init: str = "skip",
        deterministic: bool = False,
        num_recomputing_layers: int = 0,
        attention_backend: str = "sdpa",
        **kwargs: Any,
    ) -> None:
        self.model_name = model_name
        self.image_size = image_size
        self.patch_size = patch_size
        self.width = width
        self.layers = layers
        self.heads = heads
        self.mlp_ratio = mlp_ratio
        self.global_pool = global_pool
        self.ignore_head = ignore_head
        self.class_token = class_token
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.weight_init = weight_init
        self.deterministic = deterministic
        self.num_recomputing_layers = num_recomputing_layers
        self.attention_backend = attention_backend
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        check_fields(self, VISION_FIELDS)
        check_choice("global_pool", self.global_pool, GLOBAL_POOLS)
        check_choice("vision attention_backend", self.attention_backend, VISION_ATTENTION_BACKENDS)
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} is not a multiple of heads {self.heads}.")
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size {self.patch_size} does not fit image_size {self.image_size}.")


class MlpProjectorConfig(PretrainedConfig):
    """Sizes of the projector from patch features to language embeddings.

    Args:
        projector_type: "identity", "linear", "mlp_gelu" or "downsample_mlp_gelu".
        input_dim: channels of a patch feature.
        n_embed: width of the language model.
        depth: linear layers of the MLP kinds.
        mlp_ratio: inner width of "downsample_mlp_gelu" over ``n_embed``.
        downsample_ratio: side of the square of patches that become one token ("downsample_mlp_gelu").
        token_pooling: merge 2 x 2 patches by a linear layer first.

    Raises:
        ValueError: an unknown projector type, a depth or ratio below its minimum, or two kinds of merging at once.

    Source: ``MlpProjectorConfig`` of the original package.
    """

    model_type = "mlp_projector"
    base_config_key = "projector_config"

    def __init__(
        self,
        projector_type: str = "downsample_mlp_gelu",
        input_dim: int = 1152,
        n_embed: int = 2048,
        depth: int = 2,
        mlp_ratio: int = 1,
        downsample_ratio: int = 2,
        token_pooling: bool = False,
        **kwargs: Any,
    ) -> None:
        self.projector_type = projector_type
        self.input_dim = input_dim
        self.n_embed = n_embed
        self.depth = depth
        self.mlp_ratio = mlp_ratio
        self.downsample_ratio = downsample_ratio
        self.token_pooling = token_pooling
        self._check()
        super().__init__(**kwargs)

    @property
    def output_dim(self) -> int:
        """Channels of the projected tokens."""
        return self.input_dim if self.projector_type == "identity" else self.n_embed

    def _check(self) -> None:
        check_choice("projector type", self.projector_type, PROJECTOR_TYPES)
        check_fields(self, PROJECTOR_FIELDS)
        least_depth = 2 if self.projector_type == "downsample_mlp_gelu" else 1
        if self.depth < least_depth:
            raise ValueError(f"{self.projector_type!r} needs a depth of at least {least_depth}, got {self.depth}.")
        if self.token_pooling and self.projector_type == "downsample_mlp_gelu":
            raise ValueError("token_pooling merges patches already: it needs identity, linear or mlp_gelu.")


class DeepseekVLV2Config(PretrainedConfig):
    """Configuration of the whole model: vision tower, projector, language model and tiling.

    Args:
        vision_config: a `VisionEncoderConfig` or its fields.
        projector_config: a `MlpProjectorConfig` or its fields; ``input_dim`` and ``n_embed`` that are left out
            follow the vision tower's width and the language model's.
        language_config: a `DeepseekV2Config` or its fields.
        tile_tag: how tiles are marked in the sequence; only "2D" was ever released.
        global_view_pos: "head" puts the global view before the tiles, anything else after them.
        candidate_resolutions: (width, height) pairs, in pixels, that an image may be fitted into.
        image_token_id: id of the tokens that stand for an image; ``None``: not known, and found when a model is made of
            the config or loaded with its tokenizer.

    Raises:
        ValueError: an unknown choice, here or in one of the three parts.

    Source: ``DeepseekVLV2Config`` of the original package.
    """

    model_type = "deepseek_vl_v2"
    attribute_map = {"text_config": "language_config"}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "last_hidden_state"]
    sub_configs = {
        "vision_config": VisionEncoderConfig,
        "projector_config": MlpProjectorConfig,
        "language_config": DeepseekV2Config,
    }

    def __init__(
        self,
        vision_config: VisionEncoderConfig | dict[str, Any] | None = None,
        projector_config: MlpProjectorConfig | dict[str, Any] | None = None,
        language_config: DeepseekV2Config | dict[str, Any] | None = None,
        tile_tag: str = "2D",
        global_view_pos: str = "head",
        candidate_resolutions: Sequence[Sequence[int]] = ((384, 384),),
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(vision_config, VisionEncoderConfig):
            vision_config = VisionEncoderConfig(**check_mapping("vision_config", vision_config))
        # transformers hands the renamed part over under either of its names
        language_config = kwargs.pop("text_config", None) if language_config is None else language_config
        if not isinstance(language_config, DeepseekV2Config):
            language_config = DeepseekV2Config(**check_mapping("language_config", language_config))
        if not isinstance(projector_config, MlpProjectorConfig):
            widths = {"input_dim": vision_config.width, "n_embed": language_config.hidden_size}
            given = check_mapping("projector_config", projector_config)
            projector_config = MlpProjectorConfig(**{**widths, **given})
        self.vision_config = vision_config
        self.projector_config = projector_config
        self.language_config = language_config
        check_choice("tile_tag", tile_tag, TILE_TAGS)
        self.tile_tag = tile_tag
        self.global_view_pos = global_view_pos
        if not isinstance(global_view_pos, str):
            raise FieldError(f"global_view_pos must be a text, 'head' in all releases, got {global_view_pos!r}.")
        self.image_token_id = image_token_id
        check_fields(self, {"image_token_id": OPTIONAL_FROM_ZERO})
        self.candidate_resolutions = tuple(check_sizes("candidate_resolutions", candidate_resolutions))
        for resolution in self.candidate_resolutions:
            try:
                check_tiles(resolution, vision_config.image_size)
            except ValueError as error:
                raise FieldError(f"candidate_resolutions: {error}") from None
        kwargs.setdefault("architectures", ["DeepseekVLV2ForCausalLM"])
        kwargs.setdefault("tie_word_embeddings", language_config.tie_word_embeddings)
        self.tie_word_embeddings = kwargs.pop("tie_word_embeddings")
        self.auto_map: dict[str, Any] = kwargs.pop("auto_map", None) or {}  # trainers read it of every config
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        content = super().to_dict()
        if not content.get("auto_map"):
            content.pop("auto_map", None)
        return content

    @classmethod
    def from_pretrained(
        cls: type[Loaded], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Loaded:
        """Load a checkpoint's config, or that of "nano"; arguments as in transformers."""
        return super().from_pretrained(locate_bundled(pretrained_model_name_or_path), **kwargs)

    @property
    def use_cache(self) -> bool:
        """Whether the language model returns a cache by default."""
        return self.language_config.use_cache

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        self.language_config.use_cache = value

    @property
    def vision_attention_backend(self) -> str:
        """Attention backend of the vision tower; also a keyword of ``from_pretrained``."""
        return self.vision_config.attention_backend

    @vision_attention_backend.setter
    def vision_attention_backend(self, backend: str) -> None:
        check_choice("vision attention_backend", backend, VISION_ATTENTION_BACKENDS)
        self.vision_config.attention_backend = backend
