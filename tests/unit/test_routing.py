"""Loads are counted once and without padding, and the bias moves towards even ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import KINDS, mini_inputs, mini_language, mini_model

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.router import RoutingContext
from deepseek_vl2.training.routing import RoutingBiasUpdater, find_gates

RATE = 0.001


def loads_by_hand(model: torch.nn.Module, calls: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Count each layer's chosen experts over the real tokens of several batches."""
    gates = list(find_gates(model).values())
    total = [torch.zeros(gate.n_routed_experts) for gate in gates]
    for inputs in calls:
        chosen: list[torch.Tensor] = []
        hooks = [gate.register_forward_hook(lambda m, i, out, c=chosen: c.append(out[0])) for gate in gates]
        with torch.no_grad():
            model(**inputs)
        for hook in hooks:
            hook.remove()
        real = inputs["attention_mask"].bool().flatten()
        for load, ids in zip(total, chosen, strict=True):
            load += torch.bincount(ids[real].flatten(), minlength=len(load))
    return total


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_the_bias_moves_by_the_rate_towards_even_loads_of_a_whole_step(checkpointing: bool | None) -> None:
    model = mini_model("base").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    micro_batches = [mini_inputs([5, (1, 1), 9], [4]), mini_inputs([20], [7], seed=5)]
    want = loads_by_hand(model, micro_batches)
    before = [gate.e_score_correction_bias.clone() for gate in find_gates(model).values()]
    updater = RoutingBiasUpdater(model, rate=RATE)
    for inputs in micro_batches:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    updater.step()
    for load, old, gate in zip(want, before, find_gates(model).values(), strict=True):
        assert load.min() < load.mean() < load.max()
        moved = gate.e_score_correction_bias - old
        torch.testing.assert_close(moved, RATE * torch.sign(load.mean() - load), rtol=1e-3, atol=1e-7)
    figures = updater.statistics()
    assert figures["routed_tokens"] == sum(int(inputs["attention_mask"].sum()) for inputs in micro_batches)
    worst = max((load.max() / load.mean()).item() for load in want)
    assert figures["load_max"] == pytest.approx(worst, rel=1e-5)
    assert figures["load_min"] == pytest.approx(min((load.min() / load.mean()).item() for load in want), rel=1e-5)
    assert figures["dead_experts"] == pytest.approx(sum((load == 0).sum().item() for load in want) / (2 * 8))


def test_a_step_starts_the_count_anew_and_without_tokens_nothing_moves() -> None:
    model, inputs = mini_model("base").train(), mini_inputs([9])
    updater = RoutingBiasUpdater(model, rate=RATE)
    assert updater.statistics() == {}
    model(**inputs, labels=inputs["input_ids"])
    updater.step()
    after = {name: bias.clone() for name, bias in updater.state_dict().items()}
    figures = updater.statistics()
    updater.step()
    assert all(torch.equal(after[name], bias) for name, bias in updater.state_dict().items())
    assert updater.statistics() == figures


def test_evaluation_is_not_counted() -> None:
    model, inputs = mini_model("base").eval(), mini_inputs([9])
    updater = RoutingBiasUpdater(model, rate=RATE)
    model(**inputs)
    updater.step()
    assert updater.statistics() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_kept_for_every_kind_and_only_noaux_tc_has_a_bias(kind: str) -> None:
    model, inputs = mini_model(kind).train(), mini_inputs([30], [10])
    updater = RoutingBiasUpdater(model, rate=RATE)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    updater.step()
    figures = updater.statistics()
    assert {"load_max", "load_min", "load_entropy", "dead_experts", "router_logit_max", "balance_loss"} <= set(figures)
    assert 0 <= figures["load_min"] <= 1 <= figures["load_max"] and 0 < figures["load_entropy"] <= 1
    assert ("bias_max" in figures) == (kind == "base") == bool(updater.state_dict())


def test_a_rate_of_zero_keeps_figures_only() -> None:
    model, inputs = mini_model("base").train(), mini_inputs([30])
    updater = RoutingBiasUpdater(model, rate=0)
    before = updater.state_dict()
    model(**inputs, labels=inputs["input_ids"])
    updater.step()
    assert updater.statistics() and all(torch.equal(before[n], b) for n, b in updater.state_dict().items())


def test_uneven_loads_even_out() -> None:
    model = mini_language("base", num_hidden_layers=2).train()
    gate = next(iter(find_gates(model).values()))
    gate.e_score_correction_bias.zero_()
    with torch.no_grad():
        gate.weight[0] += gate.weight[0].sign()  # noise apart, favours or avoids one expert
    ids = torch.randint(3, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    updater = RoutingBiasUpdater(model, rate=0.02)
    seen = []
    for _ in range(60):
        with torch.no_grad():
            model(ids)
        updater.step()
        seen.append(updater.statistics()["load_entropy"])
    assert seen[-1] > 0.97 > seen[0]


def test_close_lets_go_of_the_model() -> None:
    model, inputs = mini_model("base").train(), mini_inputs([9])
    updater = RoutingBiasUpdater(model)
    updater.close()
    model(**inputs, labels=inputs["input_ids"])
    updater.step()
    assert updater.statistics() == {} and all(gate.observer is None for gate in find_gates(model).values())


# ---------------------------------------------------------------- the bias in bfloat16, and on disk


def test_small_steps_survive_a_bfloat16_model_its_checkpoint_and_the_updaters_state(tmp_path: Path) -> None:
    model = mini_model("base").to(torch.bfloat16).train()
    inputs = mini_inputs([30])
    updater = RoutingBiasUpdater(model, rate=1e-4)
    before = updater.state_dict()
    for _ in range(3):
        with torch.no_grad():
            model(**inputs)
        updater.step()
    after = updater.state_dict()
    for name, bias in after.items():
        steps = (bias - before[name]) / 1e-4
        assert bias.dtype == torch.float32
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=5e-3)  # float32 near 1: 6e-8
        assert steps.abs().max() == 3 or steps.abs().max().round() == 3
    model.save_pretrained(tmp_path)
    for reloaded in (
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(torch.bfloat16),
    ):
        assert reloaded.dtype == torch.bfloat16
        fresh = RoutingBiasUpdater(reloaded)
        assert all(torch.equal(bias, after[name]) for name, bias in fresh.state_dict().items())
    other = RoutingBiasUpdater(mini_model("base"))
    other.load_state_dict(after)
    assert all(torch.equal(bias, after[name]) for name, bias in other.state_dict().items())


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no mixture-of-experts layers"):
        RoutingBiasUpdater(mini_language("tiny", n_routed_experts=None))
    with pytest.raises(ValueError, match="negative"):
        RoutingBiasUpdater(mini_language("tiny"), rate=-1)
    state = RoutingBiasUpdater(mini_language("base")).state_dict()
    with pytest.raises(ValueError, match="another model"):
        RoutingBiasUpdater(mini_language("tiny")).load_state_dict(state)


# ---------------------------------------------------------------- the auxiliary loss


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_in_the_balance_loss(seq_aux: bool, side: str) -> None:
    gate = next(iter(find_gates(mini_language("small", seq_aux=seq_aux, aux_loss_alpha=0.1)).values())).train()
    hidden = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    mask = mask if side == "left" else mask.flip(1)
    got = gate(hidden, mask)[2]
    rows = [gate(row[m][None])[2] for row, m in zip(hidden, mask, strict=True)]
    want = torch.stack(rows).mean() if seq_aux else gate(hidden[mask][None])[2]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)  # float32 sums in another order


def test_micro_batches_share_the_balance_loss_as_they_share_the_loss() -> None:
    """With seq_aux and labels of equal number, accumulated gradients are those of the batch as a whole."""
    model = mini_language("small", aux_loss_alpha=1.0).train()
    ids = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids, num_items_in_batch=60).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part in ids.split(2):
        model(part, labels=part, num_items_in_batch=torch.tensor(60)).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)  # float32, other order


def test_the_share_weighs_the_balance_loss_alone() -> None:
    layer = mini_language("small", aux_loss_alpha=1.0).model.layers[1].mlp.train()
    hidden = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    grads = []
    for share in (0.0, 0.5, 1.0):
        layer.zero_grad()
        layer(hidden, RoutingContext(None, torch.tensor(share))).sum().backward()
        grads.append(layer.gate.weight.grad.clone())
    torch.testing.assert_close(grads[1], (grads[0] + grads[2]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(grads[0], grads[2])
