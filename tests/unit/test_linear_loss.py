"""The chunked loss is the plain one: its value, its gradients, and what happens at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import mini_inputs, mini_language, mini_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_vl2.training.loss import OutputHead, find_targets, linear_cross_entropy

VOCABULARY, HIDDEN = 50, 16


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """Return hidden states [2, 9, H], a head, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, HIDDEN, generator=generator).to(dtype).requires_grad_()
    head = OutputHead(HIDDEN, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.3)
    labels = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
    labels[0, :4] = -100
    labels[1, 5] = -100
    return hidden, head.to(dtype), labels


def plain(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, items: int | None = None) -> torch.Tensor:
    logits = head(hidden).float()[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / (int((labels[:, 1:] != -100).sum()) if items is None else items)


def with_gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 3, inputs)]  # times 3: the outer gradient is not always 1


def chunked(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, rows: int, items: Any = None) -> torch.Tensor:
    return linear_cross_entropy(hidden, head, VOCABULARY, find_targets(labels), items, rows * VOCABULARY)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("items", [None, 31, torch.tensor(31)])
def test_value_and_gradients_are_the_plain_ones(rows: int, items: Any) -> None:
    hidden, head, labels = example()
    want = with_gradients(plain(hidden, head, labels, items), hidden, head.weight)
    got = with_gradients(chunked(hidden, head, labels, rows, items), hidden, head.weight)
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_weights_count_losses_and_the_divisor_stays_the_number_of_labels(rows: int, bare: bool) -> None:
    hidden, head, labels = example()
    weights = torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    losses = F.cross_entropy(head(hidden).float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    number = int((labels[:, 1:] != -100).sum())
    want = with_gradients((losses * weights[:, 1:].flatten()).sum() / number, hidden, head.weight)
    targets = find_targets(labels, weights)
    module = head if bare else nn.Sequential(head)
    loss = linear_cross_entropy(hidden, module, VOCABULARY, targets, None, rows * VOCABULARY)
    for mine, its in zip(with_gradients(loss, hidden, head.weight), want, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_a_head_that_is_more_than_a_matrix_is_called() -> None:
    hidden, head, labels = example()
    wrapped = nn.Sequential(head, nn.Tanh())
    want = with_gradients(plain(hidden, wrapped, labels), hidden, head.weight)
    got = with_gradients(chunked(hidden, wrapped, labels, 3), hidden, head.weight)
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_takes_no_gradient() -> None:
    hidden, head, labels = example()
    want = with_gradients(plain(hidden, head, labels), hidden)
    head.requires_grad_(False)
    for mine, its in zip(with_gradients(chunked(hidden, head, labels, 3), hidden), want, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    assert head.weight.grad is None


@pytest.mark.parametrize("rows", [3, 100])
def test_bfloat16_rounds_as_the_plain_form_does(rows: int) -> None:
    hidden, head, labels = example(torch.bfloat16)
    want = with_gradients(plain(hidden, head, labels), hidden, head.weight)
    got = with_gradients(chunked(hidden, head, labels, rows), hidden, head.weight)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    for mine, its in zip(got[1:], want[1:], strict=True):
        # The factor of the mean is multiplied before the rounding there and after it here: one part in 128.
        torch.testing.assert_close(mine, its, rtol=2**-6, atol=2e-3)


def test_under_autocast_gradients_are_of_the_weights_dtype() -> None:
    hidden, head, labels = example()
    with torch.autocast("cpu", torch.bfloat16):
        want = with_gradients(plain(hidden, head, labels), hidden, head.weight)
        got = with_gradients(chunked(hidden, head, labels, 3), hidden, head.weight)
    assert all(x.dtype == torch.float32 for x in got)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    for mine, its in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=2**-6, atol=2e-3)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("items", [None, 7])
def test_without_labels_loss_and_gradients_are_zero(bare: bool, items: int | None) -> None:
    hidden, head, labels = example()
    module = head if bare else nn.Sequential(head)
    loss = chunked(hidden, module, torch.full_like(labels, -100), 3, items)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()
    assert head.weight.grad is None or not head.weight.grad.any()


def test_the_last_label_of_a_row_is_not_predicted_from_the_next_row() -> None:
    targets = find_targets(torch.tensor([[5, -100, 7], [8, 9, -100]]))
    assert targets.positions.tolist() == [1, 3] and targets.ids.tolist() == [7, 9]


# ---------------------------------------------------------------- in the model


@pytest.mark.parametrize("skip_logits", [True, False])
def test_a_model_weighs_its_labels(skip_logits: bool) -> None:
    model = mini_language("base").train()
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(2, 12, generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(12) < 5, -100)

    def loss(**others: Any) -> torch.Tensor:
        return model(input_ids=ids, labels=labels, skip_logits=skip_logits, **others).loss

    logits = model(input_ids=ids).logits[:, 4:-1].flatten(0, 1)
    losses = F.cross_entropy(logits, ids[:, 5:].flatten(), reduction="none")
    balance = loss() - losses.mean()
    expected = (losses * weights[:, 5:].flatten()).mean()
    torch.testing.assert_close(loss(loss_weights=weights) - balance, expected, rtol=1e-5, atol=1e-6)
    assert model(input_ids=ids, labels=labels, loss_weights=weights, skip_logits=False).logits is not None


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that one result held."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_training_never_holds_the_logits_of_the_whole_sequence() -> None:
    model = mini_language("base", vocab_size=5000).train()
    ids = torch.randint(3, 5000, (2, 200), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-8] = -100
    with LargestTensor() as seen:
        out = model(ids, labels=labels)
        out.loss.backward()
    assert out.logits is None
    assert seen.numbers <= 5000 * 64  # the head itself; 400 positions would take 2 million


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_same_with_logits_and_without(training: bool) -> None:
    model = mini_model("small").train(training)
    inputs = mini_inputs([5, (1, 1), 30], [(1, 1), 12])
    labels = inputs["input_ids"].masked_fill(inputs["images_seq_mask"] | ~inputs["attention_mask"], -100)
    shown = model(**inputs, labels=labels, skip_logits=False)
    hidden = model(**inputs, labels=labels, skip_logits=True)
    assert shown.logits.shape == (*labels.shape, 320) and hidden.logits is None
    torch.testing.assert_close(hidden.loss, shown.loss, rtol=1e-6, atol=0)
    default = model(**inputs, labels=labels)
    assert (default.logits is None) == training
    assert model(**inputs).logits is not None


def test_items_of_a_whole_step_divide_the_loss() -> None:
    model = mini_model("tiny").train()
    inputs = mini_inputs([9], [9])
    labels = inputs["input_ids"]
    mean = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=64).loss, mean * 16 / 64)
