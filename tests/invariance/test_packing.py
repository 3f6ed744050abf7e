"""Samples packed into shared rows give the loss and the gradients that they give one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import KINDS, mini_conversation, mini_model, mini_processor

from deepseek_vl2.training.collator import ConversationCollator

# One sum in another order, over gradients whose largest entries are near 1: float32 gives 1e-6 of that.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}

SAMPLES = [mini_conversation(i, images=i % 3, answer="z" * (3 + 5 * i)) for i in range(6)]


def loss_and_gradients(
    model: Any, batches: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss over all labels of some batches, and its gradients."""
    model.zero_grad()
    items = torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum()
    losses = [model(**batch, num_items_in_batch=items).loss for batch in batches]
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).sum().detach(), gradients


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_give_the_loss_and_gradients_of_single_samples(kind: str, training: bool, attn: str) -> None:
    # The balance loss looks at whole rows, and is another one when rows hold other samples.
    model = mini_model(kind, attn, aux_loss_alpha=0.0).train(training)
    processor = mini_processor()
    plain, packing = ConversationCollator(processor), ConversationCollator(processor, max_length=330, packing=True)
    packed = packing(SAMPLES)
    assert 1 < len(packed["input_ids"]) < len(SAMPLES)
    want_loss, want = loss_and_gradients(model, [plain([sample]) for sample in SAMPLES])
    loss, gradients = loss_and_gradients(model, [packed])
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)  # float32
    assert gradients.keys() == want.keys() and len(want) > 40
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_another_sample_in_the_row_changes_nothing(kind: str) -> None:
    model = mini_model(kind)
    packing = ConversationCollator(mini_processor(), max_length=330, packing=True)
    first = mini_conversation(1, answer="z" * 60)  # the longest: it comes first in its row
    logits = []
    for other in (2, 3):
        batch = packing([first, mini_conversation(other)])
        length = int(torch.nonzero(batch["position_ids"][0] == 0)[1])
        assert batch["input_ids"].shape[0] == 1
        del batch["labels"]
        logits.append(model(**batch).logits[0])
        second = logits[-1][length:]
        alone = model(
            **{
                k: v
                for k, v in ConversationCollator(mini_processor())([mini_conversation(other)]).items()
                if k != "labels"
            }
        )
        torch.testing.assert_close(second, alone.logits[0], rtol=1e-4, atol=1e-5)  # float32, other sizes of products
    torch.testing.assert_close(logits[0][:length], logits[1][:length], rtol=1e-4, atol=1e-5)
