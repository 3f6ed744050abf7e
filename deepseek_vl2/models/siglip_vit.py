"""The SigLIP vision tower: timm's VisionTransformer, configured as SigLIP and run up to its last norm."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration_deepseek import check_choice
from .configuration_deepseek_vl_v2 import VISION_ATTENTION_BACKENDS, VisionEncoderConfig
from .cpu import multiplies_bfloat16, wants_wide_products, wide_products

SigLIP_MODEL_CONFIG: dict[str, dict[str, Any]] = {
    "siglip_so400m_patch14_384": {
        "image_size": 384,
        "patch_size": 14,
        "width": 1152,
        "layers": 27,
        "heads": 16,
        "mlp_ratio": 3.7362,
        "global_pool": "map",
        "use_checkpoint": False,
    },
    "siglip_so400m_patch14_224": {
        "image_size": 224,
        "patch_size": 14,
        "width": 1152,
        "layers": 27,
        "heads": 16,
        "mlp_ratio": 3.7362,
        "global_pool": "map",
        "use_checkpoint": False,
    },
    "siglip_large_patch16_384": {
        "image_size": 384,
        "patch_size": 16,
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "mlp_ratio": 4,
        "global_pool": "map",
        "use_checkpoint": False,
    },
}


def check_attention_backend(backend: str) -> None:
    """Raise ``ValueError`` for an unknown backend, ``ImportError`` for xformers where it is not installed."""
    check_choice("vision attention_backend", backend, VISION_ATTENTION_BACKENDS)
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ImportError(
            "The vision attention backend 'xformers' needs the package xformers: pip install deepseek_vl2[xformers], "
            "or use the backend 'sdpa'."
        )


def quick_cpu_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend among [B, N, T, D]: what `scaled_dot_product_attention` computes, quicker on a CPU in bfloat16."""
    shape = q.shape
    q, k, v = (part.contiguous().flatten(0, 1) for part in (q, k, v))
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), v).view(shape)


class Attention(timm_vit.Attention):
    """timm's attention with a choice of backend: "sdpa", "eager" or "xformers"."""

    backend = "sdpa"
    quick_on_cpu = True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend among all patches; [B, N, C] in and out."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
        if self.backend == "xformers":
            from xformers.ops import memory_efficient_attention

            out = memory_efficient_attention(*qkv.unbind(2))
            return self.proj(out.reshape(batch, length, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.backend == "eager":
            out = ((q * self.scale) @ k.mT).softmax(dim=-1) @ v
        elif self.quick_on_cpu and x.device.type == "cpu" and x.dtype == torch.bfloat16 and multiplies_bfloat16():
            out = quick_cpu_attention(q, k, v, self.scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, -1))


class VisionTransformer(timm_vit.VisionTransformer):
    """SigLIP: tanh GELU, layer norms with epsilon 1e-6, biased qkv, the normed sequence of patch features as output.

    Args:
        img_size: side of a tile, in pixels.
        patch_size: side of a patch, in pixels.
        embed_dim: channels of a patch feature.
        depth: transformer blocks.
        num_heads: attention heads.
        mlp_ratio: inner width of a block's MLP over ``embed_dim``.
        class_token: prepend a class token.
        global_pool: kind of the pooling head.
        ignore_head: return the sequence of features; otherwise the pooled head's output.
        weight_init: "skip" leaves initialisation to the caller.
        num_classes: size of a classification head.
        deterministic: accepted for old callers; every backend is deterministic in inference.
        num_recomputing_layers: with gradient checkpointing, how many blocks from the bottom are recomputed; 0: all.
        attention_backend: "sdpa", "eager" or "xformers".

    Source: ``siglip_vit.py`` of the original package; timm.
    """

    def __init__(
        self,
        img_size: int = 384,
        patch_size: int = 14,
        embed_dim: int = 1152,
        depth: int = 27,
        num_heads: int = 16,
        mlp_ratio: float = 3.7362,
        class_token: bool = False,
        global_pool: str = "map",
        ignore_head: bool = True,
        weight_init: str = "skip",
        num_classes: int = 0,
        deterministic: bool = False,
        num_recomputing_layers: int = 0,
        attention_backend: str = "sdpa",
    ) -> None:
        check_attention_backend(attention_backend)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_token=class_token,
            global_pool=global_pool,
            weight_init=weight_init,
            num_classes=num_classes,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            act_layer=partial(nn.GELU, approximate="tanh"),
            attn_layer=Attention,
        )
        self.ignore_head = ignore_head
        self.num_recomputing_layers = num_recomputing_layers
        self.set_attention_backend(attention_backend)
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Take the gradient from the pooling head where it never runs: unused parameters break distributed training."""
        if not self.ignore_head:
            return
        for head in (self.attn_pool, self.fc_norm, self.head):
            if isinstance(head, nn.Module):
                head.requires_grad_(False)

    @classmethod
    def from_config(cls, config: VisionEncoderConfig) -> VisionTransformer:
        """Build the tower that a checkpoint's vision config describes."""
        tower = cls(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            class_token=config.class_token,
            global_pool=config.global_pool,
            ignore_head=config.ignore_head,
            weight_init="skip",
            num_classes=config.num_classes,
            deterministic=config.deterministic,
            num_recomputing_layers=config.num_recomputing_layers,
            attention_backend=config.attention_backend,
        )
        tower.set_grad_checkpointing(config.use_checkpoint)
        # A model loaded with attn_implementation="eager" keeps the original's arithmetic throughout.
        for block in tower.blocks:
            block.attn.quick_on_cpu = config._attn_implementation != "eager"
        return tower

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass; transformers' name for it, set with the whole model's."""
        return self.grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.set_grad_checkpointing(enable)

    def set_attention_backend(self, backend: str) -> None:
        """Choose how all blocks attend.

        Raises:
            ValueError: an unknown backend.
            ImportError: xformers is chosen and not installed.
        """
        check_attention_backend(backend)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def forward_features(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the normed patch features, [B, patches, C], of tiles [B, 3, S, S]."""
        wide = wants_wide_products(x)
        # Not where the original's arithmetic is kept.
        wide = wide and all(module.quick_on_cpu for module in self.modules() if isinstance(module, Attention))
        with wide_products(wide):
            return self._features(x)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and len(x) > 1 and not torch.is_grad_enabled():
            # One tile's activations stay in the cache; those of several do not.
            return torch.cat([self._features(tile) for tile in x.split(1)])
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        # The convolution puts channels first, every sum would keep that, and every norm would copy.
        x = x.contiguous()
        recomputed = min(self.num_recomputing_layers, len(self.blocks) - 1) or len(self.blocks)
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled() and index < recomputed:
                # Never reentrant, whatever the language model uses: tiles take no gradient, nor would the blocks.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return patch features [B, patches, C], or the head's output where the head is kept."""
        x = self.forward_features(x)
        return x if self.ignore_head else self.forward_head(x)


def create_siglip_vit(
    model_name: str = "siglip_so400m_patch14_384",
    image_size: int = 384,
    select_layer: int = -1,
    ckpt_path: str = "",
    **kwargs: Any,
) -> VisionTransformer:
    """Build a named SigLIP tower, with weights from a file where one is given.

    Args:
        model_name: a key of `SigLIP_MODEL_CONFIG`.
        image_size: side of a tile, in pixels.
        select_layer: keep the blocks up to this one; negative values count from the end (-1: all).
        ckpt_path: a state dict saved by ``torch.save``; only tensors are read from it.
        **kwargs: ``ignore_head``, ``weight_init``, ``deterministic``, ``num_recomputing_layers`` and
            ``attention_backend`` of `VisionTransformer`.

    Raises:
        ValueError: an unknown name, or a file whose tensors do not fit.
    """
    check_choice("SigLIP model name", model_name, tuple(SigLIP_MODEL_CONFIG))
    sizes = SigLIP_MODEL_CONFIG[model_name]
    layers = sizes["layers"]
    depth = min(layers, layers + select_layer + 1) if select_layer <= 0 else min(layers, select_layer)
    tower = VisionTransformer(
        img_size=image_size,
        patch_size=sizes["patch_size"],
        embed_dim=sizes["width"],
        depth=depth,
        num_heads=sizes["heads"],
        mlp_ratio=sizes["mlp_ratio"],
        global_pool=sizes["global_pool"],
        **{"weight_init": "", **kwargs},
    )
    if ckpt_path:
        state = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        missing, unexpected = tower.load_state_dict(state, strict=False)
        if missing or unexpected:
            raise ValueError(f"{ckpt_path} does not fit {model_name}: missing {missing}, unexpected {unexpected}.")
    return tower
