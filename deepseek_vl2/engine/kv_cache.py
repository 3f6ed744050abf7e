"""The KV cache: a pool of tokens in which each sequence has a contiguous extent.

Attention reads an extent as it lies, with nothing between it and the memory's speed; memory follows what sequences
need, not the longest that one may become. An extent that is too small moves to a larger one, and a sequence that begins
like another copies that one's beginning: both are copies of a few megabytes on the device.

Shape suffixes: S tokens of the pool, M key/value heads, D head size, R rank of the latent, P rotated part of a head.
"""

from __future__ import annotations

import os
from bisect import insort
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_vl2.models.offloading import execution_device

# Tokens at the front that belong to nobody: padding is written there.
SCRATCH = 64


class OutOfTokens(Exception):
    """The pool has no extent of that size."""


@dataclass(eq=False)
class Extent:
    """Consecutive tokens of the pool: ``start`` is the index of the first of ``capacity``."""

    start: int
    capacity: int


@dataclass(frozen=True)
class LayerShape:
    """What a layer caches for a token: ``heads`` keys and values, or with a rank one latent beside its rotated key."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    size: int
    rank: int | None = None

    @property
    def numbers(self) -> int:
        """Numbers a token."""
        return 2 * self.heads * self.size if self.rank is None else self.rank + self.size


def layer_shapes(language: Any) -> list[LayerShape]:
    """Return what each layer of a language model caches."""
    config, shapes = language.config, []
    for layer in language.get_decoder().layers:
        norm, projection = layer.input_layernorm.weight, layer.self_attn.o_proj
        device = device_of(layer.input_layernorm)
        dtype = norm.dtype if norm.dtype.is_floating_point else getattr(projection, "compute_dtype", torch.float32)
        if config.use_mla:
            shapes.append(LayerShape(device, dtype, 1, config.qk_rope_head_dim, config.kv_lora_rank))
        else:
            heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
            shapes.append(LayerShape(device, dtype, heads, size))
    return shapes


def bytes_per_token(shapes: list[LayerShape]) -> int:
    """Return the bytes that a token takes in all layers."""
    return sum(shape.numbers * shape.dtype.itemsize for shape in shapes)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_AVPHYS_PAGES" not in names:  # not every system says
        return 4 << 30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def affordable_tokens(shapes: list[LayerShape], share: float) -> int:
    """Return how many tokens fit into a share of the memory that is free, on each of the devices."""
    devices = dict.fromkeys(shape.device for shape in shapes)
    return min(
        int(share * free_memory(device)) // bytes_per_token([shape for shape in shapes if shape.device == device])
        for device in devices
    )


def device_of(module: Any) -> torch.device:
    """Return where a module with a weight computes."""
    return execution_device(module, module.weight)


def new_pool(shape: LayerShape, tokens: int) -> tuple[torch.Tensor, ...]:
    """Return a layer's pool: ([S, R + P],), latent first, or keys and values, [S, M, D] each."""
    if shape.rank is not None:
        return (torch.zeros(tokens, shape.rank + shape.size, dtype=shape.dtype, device=shape.device),)
    size = (tokens, shape.heads, shape.size)
    return tuple(torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(2))


class KVCache:
    """Pools of all layers, and which of their tokens are free.

    Args:
        shapes: of each layer.
        tokens: that the pool holds.
    """

    def __init__(self, shapes: list[LayerShape], tokens: int) -> None:
        self.shapes = shapes
        self.tokens = 0
        self.pools = [new_pool(shape, 0) for shape in shapes]
        self._free: list[tuple[int, int]] = []  # start and size, in order
        self.grow(tokens)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes in all layers."""
        return bytes_per_token(self.shapes)

    @property
    def free_tokens(self) -> int:
        """Tokens that no extent holds."""
        return sum(size for _, size in self._free)

    @property
    def free_at_end(self) -> int:
        """Tokens of the pool's end that no extent holds: an enlarged pool joins them to the new ones."""
        start, size = self._free[-1] if self._free else (0, 0)
        return size if start + size == self.tokens else 0

    def grow(self, tokens: int) -> None:
        """Enlarge the pool; extents stay where they are, but tensors are new: captured graphs must go.

        Layer by layer, so that the old pool and the new one are never held both. Where memory ends in between, some
        layers have room that is not used.
        """
        if tokens <= self.tokens:
            return
        with torch.inference_mode(False), torch.no_grad():
            for layer, shape in enumerate(self.shapes):
                new = new_pool(shape, tokens)
                for source, target in zip(self.pools[layer], new, strict=True):
                    target[: self.tokens].copy_(source[: self.tokens])
                self.pools[layer] = new
        first = max(self.tokens, SCRATCH)
        self.tokens = tokens
        self._release(first, tokens - first)

    def keys_and_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's pool as transformers' caches name its parts, [S, M, D] each: rotated key and latent too."""
        pool, rank = self.pools[layer], self.shapes[layer].rank
        if rank is None:
            return pool[0], pool[1]
        return pool[0][:, None, rank:], pool[0][:, None, :rank]

    def allocate(self, tokens: int) -> Extent:
        """Take an extent, the first that fits.

        Raises:
            OutOfTokens: none does.
        """
        for index, (start, size) in enumerate(self._free):
            if size >= tokens:
                if size == tokens:
                    del self._free[index]
                else:
                    self._free[index] = (start + tokens, size - tokens)
                return Extent(start, tokens)
        raise OutOfTokens(f"No {tokens} consecutive tokens are free.")

    def free(self, extent: Extent) -> None:
        """Give an extent back."""
        self._release(extent.start, extent.capacity)
        extent.capacity = 0

    def trim(self, extent: Extent, tokens: int) -> None:
        """Give back what an extent holds beyond its first tokens."""
        if 0 < tokens < extent.capacity:
            self._release(extent.start + tokens, extent.capacity - tokens)
            extent.capacity = tokens

    def _release(self, start: int, size: int) -> None:
        if size <= 0:
            return
        insort(self._free, (start, size))
        merged = [self._free[0]]
        for start, size in self._free[1:]:
            last_start, last_size = merged[-1]
            if last_start + last_size == start:
                merged[-1] = (last_start, last_size + size)
            else:
                merged.append((start, size))
        self._free = merged

    def copy(self, source: Extent, target: Extent, tokens: int) -> None:
        """Copy the first tokens of an extent to another, in all layers."""
        if tokens <= 0 or source.start == target.start:
            return
        for pool in self.pools:
            for part in pool:
                part[target.start : target.start + tokens] = part[source.start : source.start + tokens]

    def write(self, extent: Extent, layer: int, keys_MTD: torch.Tensor, values_MTD: torch.Tensor) -> None:
        """Write a sequence's first T tokens in a layer, given as transformers' caches hold them."""
        tokens = keys_MTD.shape[1]
        for pool_SMD, given in zip(self.keys_and_values(layer), (keys_MTD, values_MTD), strict=True):
            pool_SMD[extent.start : extent.start + tokens] = given.transpose(0, 1)

    def read(self, extent: Extent, layer: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of some tokens, [M, T, D] each."""
        start = extent.start
        keys, values = (pool[start + first : start + last].transpose(0, 1) for pool in self.keys_and_values(layer))
        return keys, values
