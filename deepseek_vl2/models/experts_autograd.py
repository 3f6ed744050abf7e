"""Tokens in the order of their experts and back, with backward passes that keep no copies.

Shape suffixes: N tokens, H hidden size, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def sum_weighted(rows_NKH: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum over K of [N, K, H], in float32, without a float32 copy of all rows."""
    total_NH = rows_NKH[:, 0].float() * weights_NK[:, 0, None]
    for k in range(1, rows_NKH.shape[1]):
        total_NH += rows_NKH[:, k].float().mul_(weights_NK[:, k, None])
    return total_NH


# On a CPU sums over experts are taken for this many tokens at a time: float32 copies of their rows stay in its cache,
# where those of all rows would be new memory in each step, which takes longer to get than the sum to compute.
BLOCK_TOKENS = 128


def in_blocks(x: torch.Tensor) -> bool:
    """Whether rows are summed block by block: on a CPU, outside of compilation."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def take_rows(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return some rows of a matrix; on a CPU indexing is several times slower than this."""
    return x.index_select(0, ids) if x.device.type == "cpu" else x[ids]


class SortRows(torch.autograd.Function):
    """Copy each token's row once for each of its experts, sorted by expert: [N, H] to [N * K, H].

    Autograd's own backward of such a gather adds rows up with atomics, or sorts again; this one reads them in order.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, order: torch.Tensor, restored: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(restored)
        ctx.top_k = top_k
        return take_rows(hidden_NH, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (restored,) = ctx.saved_tensors
        if in_blocks(grad):
            return F.embedding_bag(restored.view(-1, ctx.top_k), grad, mode="sum"), None, None, None
        return grad[restored].unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None


def weighted_sum(rows: torch.Tensor, weights_NK: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum, [N, H] in the weights' dtype, of each token's K rows; ``restored`` says which."""
    return (take_rows(rows, restored).view(*weights_NK.shape, -1) * weights_NK.unsqueeze(-1)).sum(dim=1)


class SumSortedRows(torch.autograd.Function):
    """Weighted sum of each token's rows, which stand sorted by expert: [N * K, H] to [N, H], in float32.

    Keeps neither a reordered nor a float32 copy of the rows for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weights_NK: torch.Tensor, order: torch.Tensor, restored: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weights_NK, order, restored)
        if not in_blocks(rows):
            return weighted_sum(rows, weights_NK, restored)
        sums_NH = weights_NK.new_empty(len(weights_NK), rows.shape[1])
        ids_NK = restored.view(weights_NK.shape)
        blocks = (part.split(BLOCK_TOKENS) for part in (sums_NH, weights_NK, ids_NK))
        for sums, weights, ids in zip(*blocks, strict=True):
            sums.copy_(weighted_sum(rows, weights, ids.flatten()))
        return sums_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows, weights_NK, order, restored = ctx.saved_tensors
        top_k = weights_NK.shape[1]
        tokens = order // top_k
        weights = weights_NK.flatten()[order]
        if not in_blocks(rows):
            grad_rows, grad_weights = scaled_rows(grad_NH, rows, weights, tokens)
            return grad_rows, grad_weights[restored].view_as(weights_NK), None, None
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
        blocks = (part.split(BLOCK_TOKENS * top_k) for part in (grad_rows, grad_weights, rows, weights, tokens))
        for grad_row, grad_weight, *given in zip(*blocks, strict=True):
            for out, computed in zip((grad_row, grad_weight), scaled_rows(grad_NH, *given), strict=True):
                out.copy_(computed)
        return grad_rows, grad_weights[restored].view_as(weights_NK), None, None


def scaled_rows(
    grad_NH: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of rows and of their weights, given those of the weighted sums and each row's token."""
    grad_rows = take_rows(grad_NH, tokens)
    return (grad_rows * weights[:, None]).to(rows.dtype), (grad_rows * rows).sum(dim=-1)


def parts(ends_E: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows and where they are, given where each expert's rows end."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


@torch.library.custom_op("deepseek_vl2::grouped_product", mutates_args=())
def grouped_product(rows: torch.Tensor, weights_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiply sorted rows by their expert's matrix: [S, I] by [E, O, I] to [S, O], as one node of a traced graph.

    What PyTorch's own grouped product traces on a CPU is bfloat16 alone, and transformers' takes gradients in a graph
    from 5.18 on. This one knows any dtype; rows behind the last end are zero.
    """
    out = rows.new_zeros(len(rows), weights_EOI.shape[1])
    for expert, part in parts(ends_E):
        torch.mm(rows[part], weights_EOI[expert].mT, out=out[part])
    return out


@grouped_product.register_fake
def _(rows: torch.Tensor, weights_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(len(rows), weights_EOI.shape[1])


@torch.library.custom_op("deepseek_vl2::grouped_product_of_weights", mutates_args=())
def grouped_weight_grad(grad: torch.Tensor, rows: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Return the gradient, [E, O, I], of `grouped_product`'s matrices."""
    out = rows.new_zeros(len(ends_E), grad.shape[1], rows.shape[1])
    for expert, part in parts(ends_E):
        torch.mm(grad[part].mT, rows[part], out=out[expert])
    return out


@grouped_weight_grad.register_fake
def _(grad: torch.Tensor, rows: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(len(ends_E), grad.shape[1], rows.shape[1])


def keep_for_backward(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    """Keep the tensors that `grouped_product`'s backward reads."""
    ctx.save_for_backward(*inputs)


def grouped_product_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    """Return the gradients of rows and matrices."""
    rows, weights_EOI, ends_E = ctx.saved_tensors
    wants_rows, wants_weights, _ = ctx.needs_input_grad
    return (
        grouped_product(grad, weights_EOI.mT, ends_E) if wants_rows else None,
        grouped_weight_grad(grad, rows, ends_E) if wants_weights else None,
        None,
    )


grouped_product.register_autograd(grouped_product_backward, setup_context=keep_for_backward)
