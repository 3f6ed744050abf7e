"""The SigLIP tower over kernels: products are its modules' own, kernels take what lies between them.

A sum and the norm of it are one pass over memory; attention reads the projection's output where it lies and writes
what the next product reads; GELU is in place. Results are those of the modules but for roundings.

Shape suffixes: V tiles, S side of a tile in pixels, T patches of a tile, C width, I inner width, R = V * T rows.
"""

from __future__ import annotations

from typing import Any

import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

from ..models.siglip_vit import Attention, VisionTransformer
from .attention import MAX_HEAD, attend
from .norm import add_layer_norm
from .primitives import early_start, let_next_start, wait_for_inputs

SLOPE: tl.constexpr = tl.constexpr(-2 * 0.7978845608028654 * 1.4426950408889634)  # -2 sqrt(2 / pi), to base 2
CUBIC: tl.constexpr = tl.constexpr(0.044715)
BLOCKS: dict[str, Any] = {"BLOCK": 2048, "num_warps": 4}


def gelu_plain(x: torch.Tensor) -> torch.Tensor:
    """Return GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


@triton.jit
def _gelu_kernel(x_ptr: tl.tensor, numbers: tl.tensor, BLOCK: tl.constexpr, EARLY: tl.constexpr = False) -> None:
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < numbers, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u))
    out = x / (1.0 + tl.exp2((x + x * x * x * CUBIC) * SLOPE))
    tl.store(x_ptr + place, out.to(x_ptr.dtype.element_ty), mask=place < numbers)


def gelu_(x: torch.Tensor, **blocks: Any) -> torch.Tensor:
    """Apply `gelu_plain` to a contiguous tensor in place, in float32, and return it. Options: BLOCK, num_warps."""
    if not x.is_contiguous():
        raise ValueError(f"GELU is for a tensor without gaps; got {list(x.shape)}, {x.stride()}.")
    options = {**BLOCKS, **blocks}
    _gelu_kernel[(triton.cdiv(x.numel(), options["BLOCK"]),)](x, x.numel(), **options)
    return x


# ---------------------------------------------------------------- what it is for


def why_not_norm(norm: nn.Module, width: int) -> str | None:
    """Return why a norm is none for the kernel."""
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        return f"a norm is a {type(norm).__name__}, or has no weight and bias"
    return None if norm.normalized_shape == (width,) else f"a norm is over {norm.normalized_shape}"


def why_not_block(block: Any, width: int) -> str | None:
    """Return why a block of the tower is not for the kernels."""
    if type(block) is not timm_vit.Block:
        return f"a block is a {type(block).__name__}"
    attention, mlp = block.attn, block.mlp
    if type(attention) is not Attention or attention.backend != "sdpa":
        return f"attention is a {type(attention).__name__}, or not by sdpa"
    if type(mlp) is not timm_vit.Mlp or type(mlp.act) is not nn.GELU or mlp.act.approximate != "tanh":
        return f"the MLP is a {type(mlp).__name__}, or has another activation than GELU by tanh"
    products = (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
    if any(type(product) is not nn.Linear for product in products):
        return "a product is not a plain one"
    inner = attention.num_heads * attention.head_dim
    if attention.qkv.out_features != 3 * inner or attention.head_dim > MAX_HEAD:
        return f"{attention.num_heads} heads of {attention.head_dim} are not for the kernel"
    # In evaluation mode dropout does nothing.
    parts = (block.ls1, block.drop_path1, block.ls2, block.drop_path2, mlp.drop1, mlp.norm, mlp.drop2)
    if foreign := [type(part).__name__ for part in parts if type(part) not in (nn.Identity, nn.Dropout)]:
        return f"a block has more parts: {', '.join(foreign)}"
    return why_not_norm(block.norm1, width) or why_not_norm(block.norm2, width)


def why_not_tower(tower: Any) -> str | None:
    """Return why a tower, in evaluation mode and without hooks, must run as its modules do."""
    if type(tower) is not VisionTransformer or not tower.ignore_head:
        return f"the tower is a {type(tower).__name__}, or has a head"
    if type(tower.blocks) is not nn.Sequential or len(tower.blocks) == 0:
        return "the tower has no blocks, or not one after the other"
    for block in tower.blocks:
        if (reason := why_not_block(block, tower.embed_dim)) is not None:
            return reason
    return why_not_norm(tower.norm, tower.embed_dim)


def why_not_pixels(pixels_V3SS: torch.Tensor) -> str | None:
    """Return why tiles, or the device that they are on, are not for the kernels; the interpreter is far too slow."""
    if pixels_V3SS.device.type != "cuda":
        return "the tiles are on the host"
    if pixels_V3SS.dtype not in (torch.bfloat16, torch.float16):
        return f"the tiles are in {pixels_V3SS.dtype}"
    # Made for its tensor cores and launches, which older GPUs do not have.
    if torch.version.hip is not None or torch.cuda.get_device_capability(pixels_V3SS.device) < (9, 0):
        return "the GPU is older than compute capability 9.0"
    return None


def why_not(tower: Any, pixels_V3SS: torch.Tensor) -> str | None:
    """Return why these tiles go through the modules of the tower."""
    return why_not_pixels(pixels_V3SS) or why_not_tower(tower)


# ---------------------------------------------------------------- the tower


def encode(tower: Any, pixels_V3SS: torch.Tensor, early: dict[str, Any] | None = None) -> torch.Tensor:
    """Return the tower's normed features, [V, T, C], of tiles.

    Args:
        tower: one that `why_not` has nothing against.
        pixels_V3SS: the tiles.
        early: how kernels are launched, see `primitives.early_start`, whose answer is the default.
    """
    early = early_start(pixels_V3SS.device) if early is None else early
    embedded = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(pixels_V3SS))))
    shape = embedded.shape
    hidden_RC = embedded.contiguous().flatten(0, 1)
    normed_RC = tower.blocks[0].norm1(hidden_RC)
    following = [*(block.norm1 for block in tower.blocks[1:]), tower.norm]

    def add_and_norm(new_RC: torch.Tensor, norm: Any) -> None:
        add_layer_norm(hidden_RC, new_RC, norm.weight, norm.bias, norm.eps, hidden_RC, normed_RC, **early)

    for block, norm in zip(tower.blocks, following, strict=True):
        attention, mlp = block.attn, block.mlp
        qkv = attention.qkv(normed_RC).view(*shape[:2], 3, attention.num_heads, attention.head_dim)
        add_and_norm(attention.proj(attend(qkv, **early).flatten(0, 1)), block.norm2)
        inner_RI = gelu_(mlp.fc1(normed_RC), **early)
        add_and_norm(mlp.fc2(inner_RI), norm)
    return normed_RC.view(shape)
