"""The default experts on a CPU: in every dtype, with gradients and without, compiled whole or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import mini_inputs, mini_language

from deepseek_vl2.models.moe import eager_experts_forward, experts_forward


def routed(experts: Any, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, experts.hidden_size, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(experts.num_experts, generator=generator)[:3] for _ in range(tokens)])
    return hidden, ids, torch.rand(tokens, 3, generator=generator)


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_the_default_is_the_plain_definition(tokens: int, dtype: torch.dtype, training: bool) -> None:
    experts = mini_language("base").to(dtype).model.layers[-1].mlp.experts
    results = []
    for forward in (experts_forward, eager_experts_forward):
        experts.zero_grad()
        hidden, ids, weights = routed(experts, tokens, dtype)
        hidden.requires_grad_(training)
        with torch.set_grad_enabled(training):
            out = forward(experts, hidden, ids, weights)
        assert out.dtype == dtype
        if training:
            (out * torch.arange(out.numel(), dtype=dtype).view_as(out)).sum().backward()
            results.append([out, hidden.grad, experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone()])
        else:
            results.append([out])
    for got, want in zip(*results, strict=True):
        # Sums over experts are float32 whatever the dtype: so are the weights.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("kind", "tokens"), [("tiny", 1), ("base", 1), ("base", 20)])
def test_the_language_model_compiles_in_one_graph(kind: str, tokens: int) -> None:
    model = mini_language(kind, num_hidden_layers=2)  # a dense one and one of experts
    ids = mini_inputs([tokens], seed=1)["input_ids"]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind,dtype", [("base", torch.float32), ("tiny", torch.float64)])
def test_layers_train_in_one_graph(kind: str, dtype: torch.dtype) -> None:
    """Each layer is a graph of its own, gradients included."""
    plain, compiled = (mini_language(kind, aux_loss_alpha=0.1, num_hidden_layers=2).to(dtype).train() for _ in range(2))
    torch._dynamo.reset()
    for layer in compiled.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    ids = mini_inputs([20], seed=1)["input_ids"]
    for model in (plain, compiled):
        model(ids, labels=ids).loss.backward()
    for (name, want), got in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
