"""Cross entropy of the next token, computed without the logits of the whole sequence.

Shape suffixes: B batch, T sequence, N = B * T tokens, L positions that predict a label, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .cpu import BARE_LAYERS
from .parallel import is_split_head

IGNORED = -100

# Logits are computed for at most this many (position, vocabulary) pairs at a time: 256 MiB in float32.
CHUNK_ELEMENTS = 1 << 26


class Targets(NamedTuple):
    """Which positions predict a label, and which.

    Fields:
        positions: in the flattened batch, [L].
        ids: the labels, [L].
        weights: what each loss counts, [L], float32; ``None``: 1.
    """

    positions: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor | None = None


def drop_unseen_labels(labels_BT: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return labels without those of tokens that follow padding: nothing real predicts them.

    In a row padded on the left that is the first token's, which takes no loss in the row alone either.
    """
    if attention_mask is None or attention_mask.shape != labels_BT.shape:
        return labels_BT
    before_is_real = F.pad(attention_mask[:, :-1].bool(), (1, 0), value=True)
    return labels_BT.masked_fill(~before_is_real.to(labels_BT.device), IGNORED)


def find_targets(labels_BT: torch.Tensor, weights_BT: torch.Tensor | None = None) -> Targets:
    """Return the positions whose next token has a label, with that label's weight; one wait for the device.

    Call it before anything else is launched: counting the labels then waits for nothing.
    """
    next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    flat_N = next_BT.flatten()
    positions = (flat_N != IGNORED).nonzero().squeeze(1)
    if weights_BT is None:
        return Targets(positions, flat_N[positions])
    # A position and the next one's weight lie in one row, or the position would predict nothing.
    return Targets(positions, flat_N[positions], weights_BT.float().flatten()[positions + 1])


def balance_share(targets: Targets, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """Return the share of a micro-batch in the loss of a step, a scalar of at most 1.

    transformers' Trainer counts the labels of all processes, and lets processes average their gradients.
    """
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return (len(targets.ids) * processes / torch.as_tensor(num_items_in_batch)).clamp(max=1.0)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype that a matrix product with ``tensor`` runs in: autocast's, where it is on."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of ``hidden @ weight.T``, each times its weight, in chunks of positions.

    Gradients are computed beside the value, while a chunk's logits are there: nothing is computed twice, and neither
    logits nor weight are kept for the backward pass (so a sharded weight may be gone by then).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: torch.Tensor,
        weight_VH: torch.Tensor,
        ids_L: torch.Tensor,
        weights_L: torch.Tensor | None,
        rows: int,
    ) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = compute_dtype(weight_VH)
        ctx.dtypes = (hidden_LH.dtype, weight_VH.dtype)
        with torch.autocast(hidden_LH.device.type, enabled=False):
            weight, hidden = weight_VH.to(dtype), hidden_LH.to(dtype)
            hidden_grad = torch.empty_like(hidden) if wants_hidden else None
            weight_grad: torch.Tensor | None = None
            total = hidden.new_zeros((), dtype=torch.float32)
            for start in range(0, len(ids_L), rows):
                part = slice(start, start + rows)
                log_probs = F.linear(hidden[part], weight).float().log_softmax(dim=-1)
                if weights_L is None:
                    total += F.nll_loss(log_probs, ids_L[part], reduction="sum")
                else:
                    total += F.nll_loss(log_probs, ids_L[part], reduction="none") @ weights_L[part]
                if not (wants_hidden or wants_weight):
                    continue
                grad = log_probs.exp_()
                grad[torch.arange(len(grad), device=grad.device), ids_L[part]] -= 1
                if weights_L is not None:
                    grad *= weights_L[part, None]
                grad = grad.to(dtype)
                if hidden_grad is not None:
                    torch.mm(grad, weight, out=hidden_grad[part])
                if wants_weight:
                    product = grad.mT @ hidden[part]
                    weight_grad = product if weight_grad is None else weight_grad.float().add_(product)
            if wants_weight and weight_grad is None:
                weight_grad = torch.zeros_like(weight)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        hidden_dtype, weight_dtype = ctx.dtypes
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else (hidden_grad * grad).to(hidden_dtype),
            None if weight_grad is None else (weight_grad * grad).to(weight_dtype),
            None,
            None,
            None,
        )


class OutputHead(nn.Linear):
    """The output head: logits of hidden states, or the summed cross entropy of given labels without all their logits.

    The latter is a call like any other, so that what shards or offloads the weight brings it in time, once.
    """

    def forward(
        self,
        input: torch.Tensor,
        ids_L: torch.Tensor | None = None,
        weights_L: torch.Tensor | None = None,
        rows: int = 1,
    ) -> torch.Tensor:
        """Return logits; or, given ids, the sum of the losses of [L, H], computed for ``rows`` positions at a time."""
        if ids_L is None:
            return super().forward(input)
        return SummedCrossEntropy.apply(input, self.weight, ids_L, weights_L, rows)


BARE_LAYERS.add(OutputHead)


def _chunk_through_module(
    hidden_LH: torch.Tensor, head: nn.Module, ids_L: torch.Tensor, weights_L: torch.Tensor | None
) -> torch.Tensor:
    if weights_L is None:
        return F.cross_entropy(head(hidden_LH).float(), ids_L, reduction="sum")
    return F.cross_entropy(head(hidden_LH).float(), ids_L, reduction="none") @ weights_L


def linear_cross_entropy(
    hidden_BTH: torch.Tensor,
    head: nn.Module,
    vocab_size: int,
    targets: Targets,
    num_items_in_batch: torch.Tensor | int | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Return the mean cross entropy of the labelled positions, a float32 scalar.

    With weights it is their weighted sum over the number of labels. Value and gradients are those of the plain form,
    ``cross_entropy(head(hidden).float(), labels)``; at most
    ``chunk_elements`` logits exist at a time. Without any label the loss is 0 and so are all gradients.

    Args:
        hidden_BTH: the last hidden states.
        head: the output head; another module than `OutputHead` (an adapter around it, a quantized one) and one that
            is split over processes is called chunk after chunk, and its chunks are computed again in the backward pass.
        vocab_size: rows of the head.
        targets: what `find_targets` returned.
        num_items_in_batch: divide the sum by this rather than by the number of labels, as gradient accumulation needs.
        chunk_elements: bound on positions times vocabulary.

    Source: the idea of Liger Kernel's fused linear cross entropy.
    """
    hidden_LH = hidden_BTH.flatten(0, 1).index_select(0, targets.positions.to(hidden_BTH.device))
    ids_L = targets.ids.to(hidden_BTH.device)
    weights_L = None if targets.weights is None else targets.weights.to(hidden_BTH.device)
    rows = max(1, chunk_elements // vocab_size)
    if isinstance(head, OutputHead) and not is_split_head(head):
        total = head(hidden_LH, ids_L, weights_L, rows)
    else:
        total = hidden_LH.sum().float() * 0.0
        for start in range(0, len(ids_L), rows):
            part = slice(start, start + rows)
            weights = None if weights_L is None else weights_L[part]
            total = total + checkpoint(
                _chunk_through_module, hidden_LH[part], head, ids_L[part], weights, use_reentrant=False
            )
    if num_items_in_batch is None:
        return total / max(1, len(ids_L))
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
