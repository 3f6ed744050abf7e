"""The short cuts of decoding on a CPU give what the plain forms give."""

from __future__ import annotations

import threading

import pytest
import torch
from support import mini_language

from deepseek_vl2.models.attention import eager_attention_forward, one_query_attention_forward
from deepseek_vl2.models.moe import cpu_experts_forward, one_token_experts_forward
from deepseek_vl2.utils.demo import LANGUAGE

# Float32 sums of some hundred products in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_one_query_attends_as_eager_does(groups: int, masked: bool) -> None:
    query = torch.randn(3, 4, 1, 16)
    key, value = torch.randn(2, 3, 4 // groups, 9, 16).unbind(0)
    mask = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., :4] = False
    given = mask if masked else None
    want, _ = eager_attention_forward(torch.nn.Module().eval(), query, key, value, given, scaling=0.25)
    torch.testing.assert_close(one_query_attention_forward(query, key, value, given, 0.25), want, **TOLERANCE)


@torch.no_grad()
def test_experts_of_one_token_equal_the_grouped_ones() -> None:
    from deepseek_vl2.models.modeling_deepseek import DeepseekV2Config, DeepseekV2Experts

    experts = DeepseekV2Experts(DeepseekV2Config(**LANGUAGE))
    for parameter in experts.parameters():
        parameter.normal_(std=0.2)
    for seed in range(5):
        torch.manual_seed(seed)
        hidden, ids, weights = torch.randn(2, 64), torch.stack([torch.randperm(8)[:3]] * 2), torch.rand(2, 3)
        want = cpu_experts_forward(experts, hidden, ids, weights)[:1]
        got = one_token_experts_forward(experts, hidden[:1], ids[:1], weights[:1])
        torch.testing.assert_close(got, want, **TOLERANCE)


def test_two_answers_at_once_leave_the_library_of_products_alone() -> None:
    """It is a switch of the whole process: who flips it for a token leaves it off for whoever else runs."""
    model = mini_language("tiny").bfloat16()
    seen: list[bool] = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(torch._C._get_mkldnn_enabled()))
    before = torch._C._get_mkldnn_enabled()
    ids = torch.arange(20)[None]
    threads = [
        threading.Thread(target=lambda: model.generate(ids, max_new_tokens=8, do_sample=False)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {before} and torch._C._get_mkldnn_enabled() == before


def test_a_small_models_steps_take_one_thread_and_leave_others_theirs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, seen = mini_language("tiny"), set[int]()
        model.model.norm.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
        elsewhere: list[int] = []

        def look(*_: object) -> None:
            thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
            thread.start()
            thread.join()

        model.model.norm.register_forward_hook(look)
        model.generate(torch.arange(20)[None], max_new_tokens=3, do_sample=False)
        assert seen == {1} and set(elsewhere) == {2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
