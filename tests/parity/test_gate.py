"""The gate chooses and weighs experts as loops over tokens do, and its loss is the original's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import language_fields

from deepseek_vl2.models.modeling_deepseek import AddAuxiliaryLoss, DeepseekV2Config, MoEGate

TOKENS, EXPERTS = 40, 8


def build(**changes: Any) -> MoEGate:
    gate = MoEGate(DeepseekV2Config(**language_fields("small", **changes))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(EXPERTS, 64, generator=generator) * 0.2)
        if gate.topk_method == "noaux_tc":
            # Positive: below 0 an expert of a kept group would lose to the zeros of the others.
            gate.e_score_correction_bias.copy_(torch.rand(EXPERTS, generator=generator))
    return gate


def hidden() -> torch.Tensor:
    return torch.randn(2, TOKENS // 2, 64, generator=torch.Generator().manual_seed(1))


def chosen_by_loop(gate: MoEGate, scores: list[float]) -> dict[int, float]:
    """Return one token's experts and weights, by the words of the definition."""
    size = EXPERTS // gate.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(gate.n_group)]
    choice = list(scores)
    if gate.topk_method == "noaux_tc":
        choice = [s + b for s, b in zip(scores, gate.e_score_correction_bias.tolist(), strict=True)]
        ranks = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in groups]
    else:
        ranks = [max(choice[e] for e in group) for group in groups]
    if gate.topk_method != "greedy":
        kept = sorted(range(gate.n_group), key=lambda g: -ranks[g])[: gate.topk_group]
        choice = [c if e // size in kept else 0.0 for e, c in enumerate(choice)]
    best = sorted(range(EXPERTS), key=lambda e: -choice[e])[: gate.top_k]
    total = sum(scores[e] for e in best) + 1e-20 if gate.norm_topk_prob and gate.top_k > 1 else 1.0
    return {e: scores[e] / total * gate.routed_scaling_factor for e in best}


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(
    ("method", "groups", "kept"),
    [
        ("greedy", 1, 1),
        ("group_limited_greedy", 1, 1),
        ("group_limited_greedy", 4, 2),
        ("noaux_tc", 1, 1),
        ("noaux_tc", 4, 2),
        ("noaux_tc", 2, 1),
    ],
)
@torch.no_grad()
def test_experts_and_weights_equal_a_loop(
    method: str, groups: int, kept: int, top_k: int, norm_topk_prob: bool, scoring_func: str
) -> None:
    gate = build(
        topk_method=method, n_group=groups, topk_group=kept, num_experts_per_tok=top_k,
        norm_topk_prob=norm_topk_prob, scoring_func=scoring_func, routed_scaling_factor=1.7,
    )  # fmt: skip
    ids, weights, loss = gate(hidden())
    logits = (hidden().view(-1, 64).double() @ gate.weight.double().T).float()
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    assert ids.shape == weights.shape == (TOKENS, top_k) and loss is None and weights.dtype == torch.float32
    for token in range(TOKENS):
        want = chosen_by_loop(gate, scores[token].tolist())
        got = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        assert got == pytest.approx(want, abs=1e-6)  # float32 logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_scores_are_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    gate = build().to(dtype)
    x = hidden().to(dtype)
    want = (x.view(-1, 64).float() @ gate.weight.float().T).softmax(-1)
    got = gate.scores(x.view(-1, 64))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # float32 sums in another order
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate.scores(x.view(-1, 64)), got)


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("method", ["greedy", "noaux_tc"])
def test_the_balance_loss_is_the_originals(seq_aux: bool, method: str) -> None:
    gate = build(seq_aux=seq_aux, aux_loss_alpha=0.01, topk_method=method).train()
    ids, _, loss = gate(hidden())
    scores = (hidden().view(-1, 64) @ gate.weight.T).softmax(-1)
    picked = torch.nn.functional.one_hot(ids, EXPERTS).float()  # [tokens, k, experts]
    if seq_aux:
        counts = picked.view(2, -1, EXPERTS).sum(1) / (TOKENS // 2 * 3 / EXPERTS)
        want = (counts * scores.view(2, -1, EXPERTS).mean(1)).sum(1).mean() * 0.01
    else:
        want = (picked.view(-1, EXPERTS).mean(0) * EXPERTS * scores.mean(0)).sum() * 0.01
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)  # float32 sums in another order
    loss.backward()
    assert gate.weight.grad is not None and gate.weight.grad.abs().max() > 0


def test_without_a_weight_or_in_evaluation_there_is_no_balance_loss() -> None:
    assert build(aux_loss_alpha=0.0).train()(hidden())[2] is None
    assert build(aux_loss_alpha=0.1)(hidden())[2] is None


def test_the_auxiliary_loss_joins_the_gradient_and_not_the_value() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    extra = torch.tensor(3.0, requires_grad=True)
    out = AddAuxiliaryLoss.apply(x, extra * 5)
    assert torch.equal(out, x)
    (out * torch.tensor([2.0, 7.0])).sum().backward()
    assert x.grad.tolist() == [2.0, 7.0] and extra.grad.item() == 5.0
