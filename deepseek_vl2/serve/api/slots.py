"""A key/value cache of fixed size, in which every sequence has a row of its own.

Shape suffixes: B rows at work, M key/value heads, T new positions, S key positions, D size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from deepseek_vl2.models.configuration_deepseek import DeepseekV2Config


@dataclass(frozen=True)
class Window:
    """Which part of the cache a forward pass works on.

    Attributes:
        first, last: the rows, ``last`` not included.
        start: the position of the first new token (of the longest row, where rows differ).
        end: how many positions are read.
        positions_B: where each row's single new token goes; ``None`` for a chunk, which goes to ``start``.
    """

    first: int
    last: int
    start: int
    end: int
    positions_B: torch.Tensor | None = None


def cached_shapes(config: DeepseekV2Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (heads, size) of what a layer caches as "key" and as "value" for one token."""
    if config.use_mla:
        assert config.kv_lora_rank is not None
        return (1, config.qk_rope_head_dim), (1, config.kv_lora_rank)
    head = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    return head, head


def cache_bytes(config: DeepseekV2Config, slots: int, max_length: int, dtype: torch.dtype) -> int:
    """Return the memory, in bytes, of a cache of that many rows and positions."""
    numbers = sum(heads * size for heads, size in cached_shapes(config))
    return slots * max_length * config.num_hidden_layers * numbers * dtype.itemsize


class SlotLayer(DynamicLayer):
    """One layer's keys and values, [slots, M, max_length, D], seen through the cache's window."""

    def __init__(self, owner: SlotCache, room: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.owner = owner
        self.key_room, self.value_room = room
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, M, T, D] keys and values into the window; return all that its rows may look at."""
        return self._write(self.key_room, key_states), self._write(self.value_room, value_states)

    def _write(self, room: torch.Tensor, new_BMTD: torch.Tensor) -> torch.Tensor:
        window = self.owner.window
        rows = room[window.first : window.last]
        if window.positions_B is None:
            rows[:, :, window.start : window.end] = new_BMTD
        else:
            index = self.owner.row_numbers[: window.last - window.first].to(room.device)
            rows[index, :, window.positions_B.to(room.device)] = new_BMTD[:, :, 0]
        return rows[:, :, : window.end]

    def get_seq_length(self) -> int:
        """Return how many positions stand before the new ones."""
        return self.owner.window.start

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one row over another."""
        for room in (self.key_room, self.value_room):
            room[target, :, :length] = room[source, :, :length]


class SlotCache(DynamicCache):
    """The cache of an engine: ``slots`` sequences of up to ``max_length`` tokens each.

    All of its memory is taken at once, so that a request never fails for want of it. Rows at work are kept together at
    the front: a decoding step reads views, and gathers nothing.

    Args:
        model: a language model of this package; layers may lie on several devices.
        slots: number of rows.
        max_length: positions of a row.
    """

    def __init__(self, model: Any, slots: int, max_length: int) -> None:
        decoder = model.get_decoder()
        super().__init__(config=decoder.config)
        self.window = Window(0, 0, 0, 0)
        self.slots = slots
        self.max_length = max_length
        self.row_numbers = torch.arange(slots, device=model.device)
        shapes = cached_shapes(decoder.config)
        self.layers = []
        for layer in decoder.layers:
            like = layer.input_layernorm.weight
            device = model.device if like.device.type == "meta" else like.device  # offloaded weights visit the device
            # Zeros, since what stands behind a row's end is read and given no weight: it must be finite.
            key, value = (
                torch.zeros(slots, heads, max_length, size, dtype=like.dtype, device=device) for heads, size in shapes
            )
            self.layers.append(SlotLayer(self, (key, value)))

    def show_chunk(self, first: int, last: int, start: int, end: int) -> None:
        """Let the next forward pass write positions ``start`` to ``end`` of some rows."""
        self.window = Window(first, last, start, end)

    def show_rows(self, first: int, last: int, positions_B: torch.Tensor, longest: int) -> None:
        """Let the next forward pass write one token to each row, of which the longest becomes ``longest`` long."""
        self.window = Window(first, last, longest - 1, longest, positions_B)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one row over another."""
        for layer in self.layers:
            layer.move(source, target, length)
