"""The SigLIP tower with a kernel for each sum and the norm of it: one pass over memory, where the modules take two.

Attention is the tower's own module. Patches are embedded by a matrix product: cuDNN's convolution puts channels last
and first again around it. Sums have the modules' bits, products and norms differ from theirs by roundings.

Shape suffixes: V tiles, S side of a tile in pixels, T patches of a tile, I numbers of a patch, C width.
"""

from __future__ import annotations

from typing import Any

import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from torch import nn

from ..models.siglip_vit import VisionTransformer
from ..ops.triton.common import pdl_options
from ..ops.triton.norm import add_layer_norm

# ---------------------------------------------------------------- what it is for


def unsupported_norm(norm: nn.Module, width: int) -> str | None:
    """Return why a norm is none for the kernel."""
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        return f"a norm is a {type(norm).__name__}, or has no weight and bias"
    return None if norm.normalized_shape == (width,) else f"a norm is over {norm.normalized_shape}"


def unsupported_block(block: Any, width: int) -> str | None:
    """Return why a block of the tower is not two sums with a norm in front of each."""
    if type(block) is not timm_vit.Block:
        return f"a block is a {type(block).__name__}"
    parts = (block.ls1, block.drop_path1, block.ls2, block.drop_path2)
    if foreign := [type(part).__name__ for part in parts if type(part) is not nn.Identity]:
        return f"a block has more parts: {', '.join(foreign)}"
    return unsupported_norm(block.norm1, width) or unsupported_norm(block.norm2, width)


def unsupported_tower(tower: Any) -> str | None:
    """Return why a tower, in evaluation mode and without hooks, must run as its modules do."""
    if type(tower) is not VisionTransformer or not tower.ignore_head:
        return f"the tower is a {type(tower).__name__}, or has a head"
    if type(tower.blocks) is not nn.Sequential or len(tower.blocks) == 0:
        return "the tower has no blocks, or not one after the other"
    for block in tower.blocks:
        if (reason := unsupported_block(block, tower.embed_dim)) is not None:
            return reason
    return unsupported_norm(tower.norm, tower.embed_dim)


def unsupported_pixels(pixels_V3SS: torch.Tensor) -> str | None:
    """Return why tiles, or the device that they are on, are not for the kernel; the interpreter is far too slow."""
    if pixels_V3SS.device.type != "cuda" or torch.version.hip is not None:
        return "the tiles are not on an NVIDIA GPU"
    if pixels_V3SS.dtype not in (torch.bfloat16, torch.float16):
        return f"the tiles are in {pixels_V3SS.dtype}"
    return None


def unsupported_reason(tower: Any, pixels_V3SS: torch.Tensor) -> str | None:
    """Return why these tiles go through the modules of the tower."""
    return unsupported_pixels(pixels_V3SS) or unsupported_tower(tower)


# ---------------------------------------------------------------- the tower

# Matrix products read rows by TMA where these begin at multiples of 16 bytes: a row is padded to so many numbers.
ALIGNED = 8


def is_matrix_product(patch_embed: nn.Module) -> bool:
    """Whether patches, side by side, are multiplied by one matrix each, and what is left of a tile by none."""
    if type(patch_embed) is not PatchEmbed or type(patch_embed.proj) is not nn.Conv2d:
        return False
    if not patch_embed.flatten or patch_embed.dynamic_img_pad or type(patch_embed.norm) is not nn.Identity:
        return False
    conv = patch_embed.proj
    plain = conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.dilation == (1, 1)
    return plain and conv.groups == 1 and conv.padding_mode == "zeros"


def embed_patches(patch_embed: Any, pixels_V3SS: torch.Tensor) -> torch.Tensor:
    """Return what the module makes of the patches of tiles, [V, T, C]."""
    if not is_matrix_product(patch_embed) or pixels_V3SS.shape[-2:] != patch_embed.img_size:
        embedded: torch.Tensor = patch_embed(pixels_V3SS)
        return embedded
    conv, (rows, columns), (height, width) = patch_embed.proj, patch_embed.grid_size, patch_embed.patch_size
    whole = pixels_V3SS[:, :, : rows * height, : columns * width]
    patches = whole.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
    inputs = patches.shape[3:].numel()
    padding = -inputs % ALIGNED
    patches_VTI = pixels_V3SS.new_empty(len(pixels_V3SS), rows * columns, inputs + padding)
    patches_VTI[..., inputs:] = 0
    patches_VTI[..., :inputs].unflatten(-1, patches.shape[3:]).unflatten(1, (rows, columns)).copy_(patches)
    return F.linear(patches_VTI, F.pad(conv.weight.flatten(1), (0, padding)), conv.bias)


def encode(tower: Any, pixels_V3SS: torch.Tensor, pdl: dict[str, Any] | None = None) -> torch.Tensor:
    """Return the tower's normed features, [V, T, C], of tiles.

    Args:
        tower: one that `unsupported_reason` has nothing against.
        pixels_V3SS: the tiles.
        pdl: how kernels are launched, see `common.pdl_options`, whose answer is the default.
    """
    pdl = pdl_options(pixels_V3SS.device) if pdl is None else pdl
    embedded = tower.norm_pre(tower.patch_drop(tower._pos_embed(embed_patches(tower.patch_embed, pixels_V3SS))))
    hidden_VTC = embedded.contiguous()
    normed_VTC = tower.blocks[0].norm1(hidden_VTC)
    following = [*(block.norm1 for block in tower.blocks[1:]), tower.norm]

    def add_and_norm(new_VTC: torch.Tensor, norm: Any) -> None:
        hidden, new, normed = (tensor.flatten(0, 1) for tensor in (hidden_VTC, new_VTC, normed_VTC))
        add_layer_norm(hidden, new, norm.weight, norm.bias, norm.eps, hidden, normed, **pdl)

    for block, norm in zip(tower.blocks, following, strict=True):
        add_and_norm(block.attn(normed_VTC), block.norm2)
        add_and_norm(run_mlp(block.mlp, normed_VTC), norm)
    return normed_VTC


def run_mlp(mlp: Any, x_VTC: torch.Tensor) -> torch.Tensor:
    """Return a block's MLP of [V, T, C]; on a GPU its tanh GELU ends the first product, and is no pass of its own."""
    out: torch.Tensor
    if x_VTC.device.type != "cuda" or type(mlp) is not Mlp or not is_tanh_gelu(mlp.act):
        out = mlp(x_VTC)
        return out
    wide = torch._addmm_activation(mlp.fc1.bias, x_VTC.flatten(0, 1), mlp.fc1.weight.mT, use_gelu=True)
    out = mlp.fc2(wide).view_as(x_VTC)
    return out


def is_tanh_gelu(activation: nn.Module) -> bool:
    """Whether an activation is the GELU that cuBLAS applies."""
    return type(activation) is nn.GELU and activation.approximate == "tanh"
