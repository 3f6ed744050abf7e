"""Training computes what inference and the plain definitions do, in every precision and with padding on either side."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support import KINDS, mini_inputs, mini_language, mini_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_vl2.models import experts_autograd, moe
from deepseek_vl2.synthetic.train import compile_layers
from deepseek_vl2.training.routing import RoutingBiasUpdater

Gradients = dict[str, torch.Tensor]

# What makes the host wait for a CUDA device.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal.default",
    "bincount",
    "masked_scatter",
)


def compiles_float32() -> bool:
    """Whether this PyTorch knows the shapes of grouped products of float32; 2.14 knows half precision alone."""
    rows, weights = torch.empty(4, 16, device="meta"), torch.empty(2, 16, 16, device="meta")
    try:
        torch.nn.functional.grouped_mm(rows, weights.mT, offs=torch.empty(2, device="meta", dtype=torch.int32))
    except RuntimeError:
        return False
    return True


compiled = pytest.mark.skipif(not compiles_float32(), reason="this PyTorch compiles no grouped products of float32")


def labelled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch with labels on its text."""
    ignored = inputs["images_seq_mask"] | ~inputs["attention_mask"]
    return {**inputs, "labels": inputs["input_ids"].masked_fill(ignored, -100)}


def loss_and_gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Gradients]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: tuple[torch.Tensor, Gradients], want: tuple[torch.Tensor, Gradients], part: float = 1e-4) -> None:
    """Compare losses, and gradients by the norm of their difference: sums run in another order."""
    torch.testing.assert_close(got[0], want[0], rtol=part, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = (got[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < part, f"{name}: {error:.2e}"


def batch() -> dict[str, torch.Tensor]:
    """Return two rows with images, the first one padded."""
    return labelled(mini_inputs([5, (1, 1), 30], [(2, 1), 12, (1, 1), 9]))


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_experts_give_the_gradients_of_the_loop_over_experts(kind: str) -> None:
    eager = mini_model(kind, attn="eager", experts="eager").train()
    assert_same(loss_and_gradients(mini_model(kind).train(), batch()), loss_and_gradients(eager, batch()))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["", "hidden", "weights", "gate_up_proj", "down_proj", "hidden gate_up_proj"])
def test_experts_train_what_is_not_frozen(trained: str, precision: torch.dtype) -> None:
    experts = mini_language("small").model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, experts.hidden_size, generator=generator)
    weights = torch.rand(300, 3, generator=generator)
    # The first expert is never chosen; more tokens than are summed at once.
    ids = 1 + torch.rand(300, experts.num_experts - 1, generator=generator).topk(3).indices
    gradients, parameters = [], dict(experts.named_parameters())
    for run in (moe.eager_experts_forward, moe.experts_forward):
        leaves = {"hidden": hidden.clone(), "weights": weights.clone(), **parameters}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in trained.split())
            leaf.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            out = run(experts, leaves["hidden"], ids, leaves["weights"])
        assert out.dtype == torch.float32 and out.requires_grad == bool(trained)
        if trained:
            out.square().sum().backward()
        gradients.append([out.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)])
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert got.dtype == want.dtype
        error = float((got - want).norm() / want.norm())
        assert error < (1e-5 if precision == torch.float32 else 2e-2)


def test_an_expert_without_tokens_takes_a_gradient_of_zero() -> None:
    model = mini_language("tiny").train()
    ids = torch.tensor([[5, 6]])
    loss, gradients = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    assert bool(torch.isfinite(loss))
    by_expert = gradients["model.layers.1.mlp.experts.gate_up_proj"].abs().amax(dim=(1, 2))
    assert (by_expert == 0).any() and (by_expert > 0).any() and bool(torch.isfinite(by_expert).all())


@pytest.mark.parametrize("frozen", ["nothing", "language", "vision and projector"])
def test_a_batch_without_images_moves_the_tower_as_several_processes_would(frozen: str) -> None:
    """Where another process has images, the tower takes a step of its momentum here too: a gradient of 0."""
    model = mini_model("tiny").train()
    for name, parameter in model.named_parameters():
        if name.startswith("language.") == (frozen == "language") and frozen != "nothing":
            parameter.requires_grad_(False)
    text = labelled({**mini_inputs([12, (1, 1), 9], [26])})
    text = {name: tensor[1:] for name, tensor in text.items()}
    assert not text["images_spatial_crop"].any()
    _, gradients = loss_and_gradients(model, text)
    seen = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == {name for name in seen if ".attn_pool." not in name}
    of_images = [gradient for name, gradient in gradients.items() if not name.startswith("language.")]
    assert bool(of_images) == (frozen != "vision and projector")
    assert not any(bool(gradient.any()) for gradient in of_images)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_trains_float32_weights(kind: str) -> None:
    model, inputs = mini_model(kind).train(), batch()
    want = loss_and_gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, inputs)
    assert loss.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert gradients.keys() == want[1].keys()
    torch.testing.assert_close(loss, want[0], rtol=2e-2, atol=0)  # bfloat16 keeps 8 bits, through 3 layers
    every = torch.cat([g.flatten() for g in gradients.values()])
    exact = torch.cat([want[1][name].flatten() for name in gradients])
    # A token whose two best experts lie close may go to another one in bfloat16: single tensors may differ more.
    assert torch.nn.functional.cosine_similarity(every, exact, dim=0) > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_model_trains(kind: str) -> None:
    model, inputs = mini_model(kind).train(), batch()
    want = model(**inputs).loss
    loss, gradients = loss_and_gradients(model.to(torch.bfloat16), inputs)
    torch.testing.assert_close(loss, want.detach(), rtol=2e-2, atol=0)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_nothing(kind: str, attn: str) -> None:
    model = mini_model(kind, attn=attn).train()
    left = batch()
    shift = int((~left["attention_mask"][0]).sum())
    assert shift > 0 and bool(left["attention_mask"][1].all())
    right = dict(left)
    for name in ("input_ids", "attention_mask", "images_seq_mask", "labels"):
        right[name] = left[name].clone()
        right[name][0] = left[name][0].roll(-shift)
    want = loss_and_gradients(model, left)
    assert_same(loss_and_gradients(model, right), want)
    # The rows one by one, each with its share of the loss.
    counts = torch.tensor(
        [int((row[real][1:] != -100).sum()) for row, real in zip(left["labels"], left["attention_mask"], strict=True)]
    )
    model.zero_grad()
    for row in range(2):
        inputs = {name: value[row : row + 1] for name, value in left.items()}
        real = inputs["attention_mask"][0]
        for name in ("input_ids", "attention_mask", "images_seq_mask", "labels"):
            inputs[name] = inputs[name][:, real]
        for layer in model.language.model.layers[1:]:
            layer.mlp.gate.alpha = 0.001 * float(counts.sum() / counts[row] / 2)  # rows count alike in it, not labels
        model(**inputs, num_items_in_batch=int(counts.sum())).loss.backward()
    alone = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_same((want[0], alone), want)


@pytest.mark.parametrize("kind", ["small", "base"])
def test_training_does_not_hold_the_scores_of_all_heads(kind: str) -> None:
    """For few queries absorbed attention is the cheaper one, but its scores would be kept for the backward pass."""
    attention = mini_language(kind).model.layers[1].self_attn
    hidden = torch.zeros(1, 2, 64)
    assert attention.prefers_absorbed(hidden, None)
    assert not attention.train().prefers_absorbed(hidden, None)
    with torch.no_grad():
        assert attention.prefers_absorbed(hidden, None)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_of_both_towers_gives_the_same_gradients(kind: str) -> None:
    model = mini_model(kind).train()
    want = loss_and_gradients(model, batch())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.vision.grad_checkpointing
    recomputed = loss_and_gradients(model, batch())
    assert_same(recomputed, want, part=1e-6)


# ---------------------------------------------------------------- speed on a GPU, as far as a CPU can tell


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def waiting(self) -> int:
        return sum(count for name, count in self.counts.items() if any(word in name for word in WAITING))

    def __enter__(self) -> Any:
        self.tolist = torch.Tensor.tolist  # reads the memory without an operation
        torch.Tensor.tolist = lambda tensor: (self.counts.update(["_local_scalar_dense"]), self.tolist(tensor))[1]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.Tensor.tolist = self.tolist
        super().__exit__(*raised)


def operations_of_a_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Operations, Operations]:
    with Operations() as forward:
        loss = model(**inputs).loss
    with Operations() as backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_the_device_at_its_start_only(kind: str) -> None:
    """Whatever the number of layers and images; and not once in the backward pass."""
    inputs = labelled(mini_inputs(*[[(1, 1), 12]] * 3))  # without padding, as with padding on the right
    many = labelled(mini_inputs(*[[(1, 1), 12]] * 9))
    forward, backward = operations_of_a_step(mini_model(kind, num_hidden_layers=2).train(), inputs)
    deep, deep_backward = operations_of_a_step(mini_model(kind, num_hidden_layers=5).train(), many)
    assert forward.waiting() == deep.waiting() <= 4
    assert backward.waiting() == deep_backward.waiting() == 0


def test_the_number_of_operations_does_not_grow_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_autograd, "in_blocks", lambda x: False)  # as on a GPU
    model = mini_model("tiny").train()
    few, many = (
        sum(
            sum(part.counts.values()) for part in operations_of_a_step(model, labelled(mini_inputs(*[[(1, 1), 9]] * n)))
        )
        for n in (2, 12)
    )
    assert many == few


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compile_without_a_break(kind: str) -> None:
    torch._dynamo.reset()
    inputs = batch()
    want = loss_and_gradients(mini_model(kind).train(), inputs)
    model = mini_model(kind).train()
    for layer in (*model.language.model.layers, *model.vision.blocks):
        layer.compile(fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(model, inputs), want)


@compiled
def test_layers_share_a_graph_and_still_say_what_their_gates_did() -> None:
    """One graph for the dense layer, one for all layers with experts; loads, bias and figures as without compiling."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    figures, biases = [], []
    for compiled in (False, True):
        model = mini_model("base", num_hidden_layers=5).train()
        updater = RoutingBiasUpdater(model)
        if compiled:
            compile_layers(model, backend=graphs)
        for seed in (0, 1):
            model(**labelled(mini_inputs([(1, 1), 12], [(2, 1), 7], [5], seed=seed))).loss.backward()
        updater.step()
        figures.append(updater.statistics())
        biases.append(updater.state_dict())
    assert graphs.frame_count == 3  # tower and projector, dense layer, mixture of experts
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    for name, bias in biases[0].items():
        torch.testing.assert_close(biases[1][name], bias, rtol=0, atol=0)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_as_nano_is_the_gradients_stay_the_same(kind: str) -> None:
    torch._dynamo.reset()
    inputs = batch()
    want = loss_and_gradients(mini_model(kind).train(), inputs)
    model = mini_model(kind).train()
    compile_layers(model, backend="aot_eager")
    assert_same(loss_and_gradients(model, inputs), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_examples_are_learnt_by_heart(kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = mini_model(kind).train(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(60):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.01
