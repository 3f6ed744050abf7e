"""The cache that grows in place holds what transformers' own holds, whatever is done to it."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from support import mini_config
from transformers.cache_utils import DynamicLayer

from deepseek_vl2.models.cache import SPARE_TOKENS, GrowingLayer, new_cache


def tokens(count: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys of 4 and values of 6 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, count, 4, generator=generator), torch.randn(batch, 1, count, 6, generator=generator)


def assert_same(ours: GrowingLayer, stock: DynamicLayer) -> None:
    assert int(ours.get_seq_length()) == int(stock.get_seq_length())
    if int(stock.get_seq_length()):
        assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_operations_leaves_what_the_stock_layer_leaves(seed: int) -> None:
    chosen, ours, stock, batch = random.Random(seed), GrowingLayer(), DynamicLayer(), 2
    for step in range(60):
        action = chosen.choice(["append"] * 6 + ["crop", "reorder", "repeat", "select"]) if step else "append"
        if action == "append":
            new = tokens(chosen.choice([1, 1, 1, 5, 300]), batch, seed=step)
            got, want = ours.update(*new), stock.update(*new)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        length = int(stock.get_seq_length())
        for layer in (ours, stock):
            if action == "crop" and length > 2:
                layer.crop(-2)
            elif action == "reorder":
                layer.reorder_cache(torch.arange(batch - 1, -1, -1))
            elif action == "repeat" and batch < 4:
                layer.batch_repeat_interleave(2)
            elif action == "select" and batch > 2:
                layer.batch_select_indices(torch.tensor([1, 2]))
        batch = stock.keys.shape[0]
        assert_same(ours, stock)


def test_a_token_is_written_behind_the_others_without_a_copy() -> None:
    layer = GrowingLayer()
    layer.update(*tokens(10))
    layer.update(*tokens(1))
    places = set()
    for step in range(SPARE_TOKENS - 1):
        layer.update(*tokens(1, seed=step))
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) == 1


def test_a_prompt_takes_no_more_than_its_own_room() -> None:
    layer = GrowingLayer()
    layer.update(*tokens(1000))
    assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4


def test_what_was_given_is_not_written_to() -> None:
    layer, prompt = GrowingLayer(), tokens(10)
    before = [tensor.clone() for tensor in prompt]
    layer.update(*prompt)
    layer.keys.zero_()
    layer.update(*tokens(1))
    assert all(torch.equal(a, b) for a, b in zip(prompt, before, strict=True))


def test_a_deep_copy_goes_its_own_way() -> None:
    one = GrowingLayer()
    one.update(*tokens(10))
    one.update(*tokens(1, seed=1))
    other = copy.deepcopy(one)
    one.update(*tokens(1, seed=2))
    other.update(*tokens(1, seed=3))
    assert torch.equal(one.keys[:, :, :11], other.keys[:, :, :11])
    assert torch.equal(one.keys[:, :, 11:], tokens(1, seed=2)[0])
    assert torch.equal(other.keys[:, :, 11:], tokens(1, seed=3)[0])


def test_gradients_pass_through() -> None:
    layer, (keys, values) = GrowingLayer(), tokens(3)
    layer.update(keys.requires_grad_(), values)
    layer.update(*(t.requires_grad_() for t in tokens(1)))
    layer.keys.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_a_reset_layer_starts_anew() -> None:
    layer = GrowingLayer()
    layer.update(*tokens(10))
    layer.reset()
    new = tokens(3, batch=4, seed=5)
    layer.update(*new)
    assert torch.equal(layer.keys, new[0]) and torch.equal(layer.values, new[1])


def test_a_model_gets_one_layer_for_each_of_its_own(kind: str) -> None:
    cache = new_cache(mini_config(kind).language_config)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 3
    assert int(cache.get_seq_length()) == 0
