"""Key/value caches: one that grows in place, and one of several sequences packed in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

SPARE_TOKENS = 256
# What transformers calls a cache in its calls and outputs: "past_key_values" up to 5.23, "cache" since.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return what a call was given as its cache, by either of the names it goes by.

    Raises:
        ValueError: both were given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("Give either past_key_values or cache, not both: they are names of the same argument.")
    return cache if past_key_values is None else past_key_values


class GrowingLayer(DynamicLayer):
    """transformers' dynamic layer, with room to spare behind its tokens.

    The stock layer copies all it holds for each new token; this one writes the token behind the others, and copies once
    in `SPARE_TOKENS` tokens. ``keys`` and ``values`` are views of the tokens held, so that cropping, reordering and
    repeating work as in the stock layer.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, T, size] keys and values; return all of them."""
        if key_states.requires_grad and torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)  # autograd forbids writing in place
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("_key_room", self.keys, key_states)
        self.values = self._append("_value_room", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if held.numel() == 0:
            return new.clone(memory_format=torch.contiguous_format)  # a prompt takes no more than its own room
        length = held.shape[-2]
        total = length + new.shape[-2]
        room = getattr(self, name, None)
        # After a reordering, say, the tokens held are no longer a view of the room behind them.
        fits = (
            room is not None
            and room.data_ptr() == held.data_ptr()
            and room.shape[:2] == new.shape[:2]
            and room.shape[2] >= total
            and room.stride() == held.stride()
            and (torch.is_inference_mode_enabled() or not room.is_inference())
        )
        if not fits:
            room = new.new_empty(*new.shape[:2], total + SPARE_TOKENS, new.shape[-1])
            room[:, :, :length] = held
            setattr(self, name, room)
        assert room is not None
        room[:, :, length:total] = new
        return room[:, :, :total]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.is_initialized = False


def new_cache(config: PretrainedConfig) -> Cache:
    """Return an empty cache for a language model of that config."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() for _ in range(config.num_hidden_layers)]
    return cache


class Segment(NamedTuple):
    """New tokens of one sequence in a packed forward pass.

    Fields:
        start: index of the sequence's token 0 in the pool.
        past: tokens of the sequence that are cached already.
        new: tokens that this pass adds.
    """

    start: int
    past: int
    new: int

    @property
    def end(self) -> int:
        """Tokens cached after the pass."""
        return self.past + self.new


class PackedCache(Cache):
    """Segments of several sequences as one row of tokens, over pools in which each sequence is a contiguous extent.

    Everything but attention treats the tokens alike; attention runs segment by segment, each over its own extent. So
    nothing is padded and nothing is gathered, and what a sequence gets does not depend on its neighbours.

    Args:
        pools: of each layer, ([S, M, D], [S, M, D]): rotated keys and values, or rotated keys and latents with M = 1.
        segments: in the order of their tokens.
    """

    def __init__(self, pools: Sequence[tuple[torch.Tensor, torch.Tensor]], segments: Sequence[Segment]) -> None:
        super().__init__(layers=[])
        self.pools = pools
        self.segments = segments
        self.starts = [segment.start for segment in segments]
        self.lengths = [segment.end for segment in segments]
        self.is_decoding = all(segment.new == 1 for segment in segments)
        self._last: torch.Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given, since each segment has its own."""
        return 0

    def append_tokens(
        self, keys_1MTD: torch.Tensor, values_1MTD: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a new token's key and value of each segment; return the layer's pool, [S, M, D] each."""
        keys_SMD, values_SMD = self.pools[layer_idx]
        if self._last is None or self._last.device != keys_SMD.device:
            last = [segment.start + segment.past for segment in self.segments]
            self._last = torch.tensor(last, device=keys_SMD.device)
        keys_SMD.index_copy_(0, self._last, keys_1MTD[0].transpose(0, 1))
        values_SMD.index_copy_(0, self._last, values_1MTD[0].transpose(0, 1))
        return keys_SMD, values_SMD

    def append(
        self, keys_1MTD: torch.Tensor, values_1MTD: torch.Tensor, layer_idx: int
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Write the new tokens' keys and values; yield each segment's tokens and all its keys and values, [1, M, S, D].

        Args:
            keys_1MTD: of all segments' new tokens.
            values_1MTD: likewise.
            layer_idx: the layer.
        """
        first = 0
        for segment in self.segments:
            tokens = slice(first, first + segment.new)
            first += segment.new
            held = []
            for pool_SMD, new in zip(self.pools[layer_idx], (keys_1MTD, values_1MTD), strict=True):
                extent = pool_SMD[segment.start : segment.start + segment.end]
                extent[segment.past :] = new[0, :, tokens].transpose(0, 1)
                held.append(extent.transpose(0, 1)[None])
            yield tokens, held[0], held[1]


def causal_mask(new: int, held: int, device: torch.device) -> torch.Tensor | None:
    """Return which of ``held`` tokens each of the last ``new`` ones sees, [1, 1, new, held]; ``None``: as usual.

    Fused attention aligns its own causal mask with the first key, not with the last.
    """
    if new == 1 or new == held:
        return None
    return torch.ones(new, held, dtype=torch.bool, device=device).tril(held - new)[None, None]
