"""Products of one row and of a few, and what ends a layer: each kernel against the plain function beside it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernel_support import DEVICE, DTYPES, ON_GPU, ROWS, check, draw, poisoned

from deepseek_vl2.ops.triton import decode_gemm, decode_gemv, norm

# ---------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "width", "normed"),
    [((40,), 64, False), ((96, 41), 48, True), ((33, 7, 70), 640, True), ((16, 16, 16), 1280, False)],
)
def test_one_row_linear(dtype: torch.dtype, sizes: tuple[int, ...], width: int, normed: bool) -> None:
    x, weights = draw(width, dtype=dtype), [draw(size, width, dtype=dtype, scale=width**-0.5) for size in sizes]
    weight = 1 + 0.1 * draw(width, dtype=dtype) if normed else None
    residual = draw(sum(sizes), dtype=dtype)
    out = poisoned(sum(sizes), dtype=dtype)
    decode_gemv.linear_gemv(x, weights, out, weight, 1e-6, residual)
    wide = [w.float() for w in weights]
    plain_norm = None if weight is None else weight.float()
    check(out, decode_gemv.norm_linear_plain(x[None].float(), wide, plain_norm, 1e-6, residual[None].float())[0], dtype)
    in_place = residual.clone()
    decode_gemv.linear_gemv(x, weights, in_place, weight, 1e-6, in_place)
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 320, *([3000] if ON_GPU else [])])
def test_best_of_one_row(dtype: torch.dtype, size: int) -> None:
    x, weight = draw(64, dtype=dtype), draw(size, 64, dtype=dtype)
    weight[-1] = weight[size // 2] = 10 * x  # two that are equal and largest
    out, chosen = poisoned(size), torch.full((1,), -1, device=DEVICE)
    best = (poisoned(-(-size // 8)), torch.full((-(-size // 8),), -1, device=DEVICE, dtype=torch.int32))
    decode_gemv.linear_gemv(x, [weight], out, rounded=True, partials=best)
    decode_gemv.reduce_argmax(best, chosen)
    assert torch.equal(out, out.to(dtype).float())
    check(out, weight.float() @ x.float(), dtype)
    assert chosen.item() == size // 2
    decode_gemv.linear_gemv(x * float("nan"), [weight], out, rounded=True, partials=best)
    decode_gemv.reduce_argmax(best, chosen)
    assert 0 <= chosen.item() < size  # it will be looked up in the table of embeddings


@pytest.mark.parametrize("parts", [1, 2048, 5000])
def test_of_many_parts_the_first_of_the_best_is_chosen(parts: int) -> None:
    values, ids = draw(2, parts), torch.randperm(2 * parts, device=DEVICE).int().view(2, parts)
    # Two that are equal and largest; where there are several blocks, at the same place of two of them.
    best = [parts // 3, parts // 3 + 2048 if parts > 4096 else parts - 1]
    values[0, best] = 10.0
    values[1] = float("nan")
    chosen = torch.full((2,), -1, device=DEVICE)
    decode_gemv.reduce_argmax((values, ids), chosen)
    assert chosen.tolist() == [int(ids[0, best].min()), 0]


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("size", [100, decode_gemv.ARGMAX_BLOCK, 3 * decode_gemv.ARGMAX_BLOCK + 17])
def test_best_of_rows(rows: int, size: int) -> None:
    logits, parts = draw(rows, size), -(-size // decode_gemv.ARGMAX_BLOCK)
    logits[0, -1] = logits[0, size // 2] = 10.0  # two that are equal and largest
    logits[-1, : size - 1] = float("-inf")
    expected = logits.argmax(dim=-1)
    expected[0] = size // 2 if rows > 1 else size - 1
    best = (poisoned(rows, parts), torch.full((rows, parts), -1, device=DEVICE, dtype=torch.int32))
    chosen = torch.full((rows,), -1, device=DEVICE)
    decode_gemv.partial_argmax(logits, best)
    decode_gemv.reduce_argmax(best, chosen)
    assert torch.equal(chosen, expected)
    decode_gemv.partial_argmax(logits.fill_(float("nan")), best)
    decode_gemv.reduce_argmax(best, chosen)
    assert bool(((chosen >= 0) & (chosen < size)).all())  # it will be looked up in the table of embeddings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("sizes", "width"), [((40,), 64), ((96, 40), 48), ((130, 17, 64), 320)])
def test_few_rows_linear(dtype: torch.dtype, rows: int, sizes: tuple[int, ...], width: int) -> None:
    x = draw(rows, width + 8, dtype=dtype)[:, :width]  # a row has a gap behind it
    weights = [draw(size, width, dtype=dtype, scale=width**-0.5) for size in sizes]
    residual = draw(rows, sum(sizes), dtype=dtype)
    out = poisoned(rows, sum(sizes), dtype=dtype)
    decode_gemm.linear_gemm(x, weights, out, residual)
    wide = [weight.float() for weight in weights]
    check(out, decode_gemv.norm_linear_plain(x.float(), wide, residual_BN=residual.float()), dtype)
    logits = poisoned(rows, sizes[0])
    decode_gemm.linear_gemm(x, weights[:1], logits, rounded=True)
    assert torch.equal(logits, logits.to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("transposed", [False, True])
def test_few_rows_of_groups(dtype: torch.dtype, rows: int, transposed: bool) -> None:
    groups, width, size = 3, 32, 24
    x = draw(rows, groups, width + 8, dtype=dtype)[..., :width]
    stored = draw(groups, *((width, size) if transposed else (size, width)), dtype=dtype, scale=width**-0.5)
    weight = stored.mT if transposed else stored
    out = poisoned(rows, groups, size + 8, dtype=dtype)
    decode_gemm.batched_gemm(x, weight, out[..., :size])
    check(out[..., :size], torch.einsum("bgk,gnk->bgn", x.float(), weight.float()), dtype)
    assert out[..., size:].isnan().all()


def test_rows_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="rows without gaps"):
        decode_gemv.linear_gemv(draw(128)[::2], [draw(8, 64)], poisoned(8))


# ---------------------------------------------------------------- norm, end of a layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chosen", "shared"), [(0, False), (0, True), (3, False), (6, True)])
@pytest.mark.parametrize("width", [64, 640])
def test_finish_layer(dtype: torch.dtype, chosen: int, shared: bool, width: int) -> None:
    rows = 5
    residual, weight = draw(rows, width, dtype=dtype), 1 + 0.1 * draw(width, dtype=dtype)
    routed = draw(rows, chosen, width, dtype=dtype) if chosen else None
    weights = torch.rand(rows, chosen, device=DEVICE) if chosen else None
    common = draw(rows, width, dtype=dtype) if shared else None
    out, normed = poisoned(rows, width, dtype=dtype), poisoned(rows, width, dtype=dtype)
    norm.fused_add_rms_norm(residual, routed, weights, common, weight, 1e-6, out, normed)
    none = torch.zeros_like(residual)
    if routed is None or weights is None:
        routed, weights = none[:, None], torch.ones(rows, 1, device=DEVICE)
    plain = norm.fused_add_rms_norm_plain(residual, routed, weights, none if common is None else common, weight, 1e-6)
    check(out, plain[0], dtype)
    check(normed, plain[1], dtype)
