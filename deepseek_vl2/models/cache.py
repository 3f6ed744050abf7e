"""A key/value cache that grows in place."""

from __future__ import annotations

from typing import Any

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
