"""Each kernel against the plain function beside it: on a GPU, or on a CPU through Triton's interpreter.

Inputs are drawn anew in every run. Outputs are poisoned before: what a kernel does not write stays NaN. The measure is
|out - plain| / |plain|, the plain form computed in float32 from the same rounded inputs. float32 agrees to 1e-5, which
leaves room for another order of sums; half precision to the rounding of inputs of a product and of results, 2^-8 of
bfloat16 and 2^-11 of float16, some of which add up where results are rounded twice. The interpreter cuts bfloat16 off
where a GPU rounds it: twice the error, and all in one direction.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support import mini_language

from deepseek_vl2.engine import experts
from deepseek_vl2.models.moe import eager_experts_forward
from deepseek_vl2.ops.triton import (
    common,
    decode_experts,
    decode_experts_gemm,
    decode_experts_gemv,
    decode_gemm,
    decode_gemv,
    decode_mha,
    decode_mla,
    grouped_gemm,
    norm,
    prefill_experts,
    rope,
    router,
)
from deepseek_vl2.ops.triton.decode_align import PACKED_TILE, PLAIN_TILE, ExpertTokens, align_plain, max_further
from deepseek_vl2.ops.triton.router import GREEDY, GROUP_LIMITED, NOAUX_TC, RouterConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# Half precisions differ in rounding alone: the slow interpreter sees one of them, a GPU all.
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if ON_GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3 if ON_GPU else 1.6e-2}
ROWS = [2, 16, pytest.param(33, marks=pytest.mark.slow), *([5, 64] if ON_GPU else [])]


def slow(*values: int) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def with_widths(*widths: int) -> list[tuple[torch.dtype, int]]:
    """Return dtypes with widths: all on a GPU, where each is compiled; the interpreter sees each of both once."""
    return list(product(DTYPES, widths)) if ON_GPU else list(zip(DTYPES, widths, strict=True))


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def check(out: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.shape == plain.shape
    assert torch.isfinite(out).all(), "a result was not written, or not finite"
    error = (out.double() - plain.double()).norm() / plain.double().norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


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


# ---------------------------------------------------------------- gate

ROUTERS = [
    RouterConfig(8, 3),
    RouterConfig(64, 6, scale=1.5),
    RouterConfig(72, 6, sigmoid=True, method=NOAUX_TC, norm_topk_prob=True, scale=2.0),
    RouterConfig(24, 4, method=GROUP_LIMITED, num_groups=6, topk_groups=2),
    RouterConfig(24, 5, sigmoid=True, method=NOAUX_TC, num_groups=4, topk_groups=2, norm_topk_prob=True),
    RouterConfig(16, 2, method=GREEDY, num_groups=4, topk_groups=2),
]


@pytest.mark.parametrize(("dtype", "width"), with_widths(320, 64))
@pytest.mark.parametrize("routing", ROUTERS)
def test_route(dtype: torch.dtype, routing: RouterConfig, width: int) -> None:
    rows = 7
    x, weight = draw(rows, width, dtype=dtype), 1 + 0.1 * draw(width, dtype=dtype)
    matrix = draw(routing.num_experts, width, dtype=dtype, scale=width**-0.5)
    bias = 0.3 * draw(routing.num_experts) if routing.method == NOAUX_TC else None
    normed = poisoned(rows, width, dtype=dtype)
    ids = torch.full((rows, routing.top_k), -1, device=DEVICE, dtype=torch.int32)
    weights = poisoned(rows, routing.top_k)
    logits, counters = poisoned(rows, routing.num_experts), torch.zeros(rows, device=DEVICE, dtype=torch.int32)
    for _ in range(2):  # the second time it finds the counters as the first one left them
        router.route(x, weight, 1e-6, matrix, bias, routing, logits, counters, ids, weights, normed)
        assert not counters.any()
    plain_normed, _, _ = router.route_plain(x, weight, 1e-6, matrix, bias, routing)
    check(normed, plain_normed, dtype)
    # From here the kernel's own normed rows: a bit's difference in them may exchange two experts of all but one score.
    logits = torch.nn.functional.linear(normed.float(), matrix.float())
    plain_ids, plain_weights = router.select_topk_plain(logits, bias, routing)
    assert torch.equal(ids.sort(dim=1).values.long(), plain_ids.sort(dim=1).values)
    order, plain_order = ids.argsort(dim=1), plain_ids.argsort(dim=1)
    check(weights.gather(1, order), plain_weights.gather(1, plain_order), torch.float32)


@pytest.mark.parametrize(("dtype", "width"), with_widths(64, 640))
@pytest.mark.parametrize("routing", ROUTERS)
def test_route_of_one_row(dtype: torch.dtype, routing: RouterConfig, width: int) -> None:
    x, weight = draw(1, width, dtype=dtype), 1 + 0.1 * draw(width, dtype=dtype)
    matrix = draw(routing.num_experts, width, dtype=dtype, scale=width**-0.5)
    bias = 0.3 * draw(routing.num_experts) if routing.method == NOAUX_TC else None
    logits, counter = poisoned(1, routing.num_experts), torch.zeros(1, device=DEVICE, dtype=torch.int32)
    ids, weights = torch.full((1, routing.top_k), -1, device=DEVICE, dtype=torch.int32), poisoned(1, routing.top_k)
    for _ in range(2):  # the second time it finds the counter as the first one left it
        router.route(x, weight, 1e-6, matrix, bias, routing, logits, counter, ids, weights)
        assert counter.item() == 0
    normed = norm.rms_norm_plain(x.float(), weight.float(), 1e-6)
    check(logits, torch.nn.functional.linear(normed, matrix.float()), torch.float32)
    plain_ids, plain_weights = router.select_topk_plain(logits, bias, routing)
    assert torch.equal(ids.sort().values.long(), plain_ids.sort().values)
    check(weights[0, ids[0].argsort()], plain_weights[0, plain_ids[0].argsort()], torch.float32)


@pytest.mark.parametrize("live", [1, 4, 6])
def test_padding_rows_get_no_expert(live: int) -> None:
    routing, rows, width = RouterConfig(8, 3), 6, 64
    x, weight, matrix = draw(rows, width), 1 + 0.1 * draw(width), draw(8, width)
    x[live:] = float("nan")
    ids, weights = torch.full((rows, 3), -7, device=DEVICE, dtype=torch.int32), poisoned(rows, 3)
    counters, normed = torch.zeros(rows, device=DEVICE, dtype=torch.int32), poisoned(rows, width)
    live_rows = torch.tensor([live], device=DEVICE, dtype=torch.int32)
    given = (x, weight, 1e-6, matrix, None, routing, poisoned(rows, 8), counters, ids, weights, normed)
    router.route(*given, live_rows=live_rows)
    _, plain_ids, _ = router.route_plain(x[:live], weight, 1e-6, matrix, None, routing)
    assert torch.equal(ids[:live].sort(dim=1).values.long(), plain_ids.sort(dim=1).values)
    assert bool((ids[live:] == -1).all()) and not counters.any()
    one = (part[:1] if isinstance(part, torch.Tensor) and len(part) == rows else part for part in given)
    with pytest.raises(ValueError, match="single row"):
        router.route(*one, live_rows=live_rows)


def entries(tokens: ExpertTokens) -> tuple[list[int], list[list[int]], list[int]]:
    """Return counts, and lists and further tiles in order of size: theirs is of no account."""
    counts, listed = tokens.counts.tolist(), tokens.tokens.tolist()
    further = tokens.further[: counts[-1]].tolist()
    return counts, [sorted(own[:count]) for own, count in zip(listed, counts[:-1], strict=True)], sorted(further)


@pytest.mark.parametrize(("rows", "live", "tile"), [(6, 6, PLAIN_TILE), (40, 33, PACKED_TILE)])
def test_the_router_lists_the_rows_of_each_expert(rows: int, live: int, tile: int) -> None:
    routing, width = RouterConfig(5, 3), 32
    x, matrix = draw(rows, width), draw(5, width)
    matrix[0] = 0.1 * x.sum(dim=0)  # more often than the others: several tiles
    ids, weights = torch.zeros(rows, 3, device=DEVICE, dtype=torch.int32), poisoned(rows, 3)
    counters = torch.zeros(rows, device=DEVICE, dtype=torch.int32)
    counts = torch.zeros(6, device=DEVICE, dtype=torch.int32)
    lists = (torch.full((5, rows), -9), torch.full((max_further(rows, 3, tile),), -9))
    tokens = ExpertTokens(counts, *(part.to(DEVICE, torch.int32) for part in lists), 3, tile)
    live_rows = torch.tensor([live], device=DEVICE, dtype=torch.int32)
    given = (
        x,
        draw(width),
        1e-6,
        matrix,
        None,
        routing,
        poisoned(rows, 5),
        counters,
        ids,
        weights,
        poisoned(rows, width),
    )
    router.route(*given, live_rows=live_rows, tokens=tokens)
    want = align_plain(ids, 5, tile)
    assert entries(tokens) == entries(want)
    found = entries(want)
    assert sum(found[0][:-1]) == 3 * live and len(found[2]) == sum(max(-(-n // tile), 1) - 1 for n in found[0][:-1])
    assert found[2] or rows <= tile


def most_further(rows: int, top_k: int, tile: int) -> int:
    """Return what `max_further` bounds: tiles behind the first ones, however the routed tokens fall."""
    most = [0]
    for count in range(1, rows * top_k + 1):
        most.append(max(most[count - own] + (own - 1) // tile for own in range(1, min(rows, count) + 1)))
    return most[-1]


@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("tile", [PACKED_TILE, PLAIN_TILE])
def test_all_further_tiles_find_room(top_k: int, tile: int) -> None:
    for rows in (2, tile, tile + 1, 2 * tile + 1, 3 * tile + 2, 64):
        assert most_further(rows, top_k, tile) <= max_further(rows, top_k, tile)


def unused_lists(rows: int, routing: RouterConfig, tile: int) -> tuple[ExpertTokens, list[torch.Tensor]]:
    """Return lists for a router, and the memory behind each, which nobody is to write."""
    sizes = (routing.num_experts + 1, routing.num_experts * rows, max_further(rows, routing.top_k, tile))
    memory = [torch.zeros(size + 100 * rows * routing.num_experts, device=DEVICE, dtype=torch.int32) for size in sizes]
    counts, tokens, further = (part[:size] for part, size in zip(memory, sizes, strict=True))
    lists = ExpertTokens(counts, tokens.view(-1, rows), further, routing.top_k, tile)
    return lists, [part[size:] for part, size in zip(memory, sizes, strict=True)]


def test_rows_that_are_alike_are_all_listed() -> None:
    routing, rows, width, tile = RouterConfig(8, 3), 17, 32, PACKED_TILE
    tokens, behind = unused_lists(rows, routing, tile)
    ids, counters = (torch.zeros(rows, n, device=DEVICE, dtype=torch.int32) for n in (3, 1))
    x, matrix, norm_weight = draw(1, width).repeat(rows, 1), draw(8, width), draw(width)
    given = (x, norm_weight, 1e-6, matrix, None, routing, poisoned(rows, 8), counters, ids)
    router.route(*given, poisoned(rows, 3), poisoned(rows, width), tokens=tokens)
    assert entries(tokens) == entries(align_plain(ids, 8, tile)) and int(tokens.counts[-1]) == 6
    assert not any(part.any() for part in behind)


@pytest.mark.parametrize(
    "routing", [RouterConfig(12, 3), RouterConfig(12, 3, True, NOAUX_TC, 4, 2), RouterConfig(12, 3, sigmoid=True)]
)
def test_a_row_that_is_not_a_number_has_experts_that_there_are(routing: RouterConfig) -> None:
    rows, width, tile = 4, 32, PACKED_TILE
    tokens, behind = unused_lists(rows, routing, tile)
    x, matrix, norm_weight, bias = draw(rows, width), draw(12, width), draw(width), draw(12)
    x[1] = float("nan")
    ids, counters = (torch.zeros(rows, n, device=DEVICE, dtype=torch.int32) for n in (3, 1))
    weights = poisoned(rows, 3)
    router.route(
        x, norm_weight, 1e-6, matrix, bias, routing, poisoned(rows, 12), counters, ids, weights, poisoned(rows, width),
        tokens=tokens,
    )  # fmt: skip
    assert entries(tokens) == entries(align_plain(ids, 12, tile))
    assert bool((ids[1].sort().values.diff() > 0).all()) and 0 <= int(ids.min()) <= int(ids.max()) < 12
    assert bool(weights[1].isnan().all()) and not weights[[0, 2, 3]].isnan().any()
    assert not any(part.any() for part in behind)


@pytest.mark.parametrize("rows", [5, 17])
def test_experts_of_padding_rows_are_not_run(rows: int) -> None:
    width, count, inner, live = 64, 4, 32, 3
    weights, x = layer(width, count, inner, 0, torch.float32), draw(rows, width)
    ids = random_ids(rows, count - 1, 2)  # the last expert is padding's alone
    ids[live:] = -1
    for part in (weights.gate_up, weights.down):
        assert part is not None
        part[-1] = float("nan")
    routed, out = poisoned(rows, 2, inner), poisoned(rows, 2, width)
    tokens = align_plain(ids, count, PLAIN_TILE)
    decode_experts_gemm.gate_up_gemm(x, weights, routed, None, tokens)
    decode_experts_gemm.down_gemm(routed, None, weights, out, None, tokens)
    part, _ = decode_experts.gate_up_plain(x[:live], weights, ids[:live])
    plain, _ = decode_experts.down_plain(part, None, weights, ids[:live])
    assert plain is not None
    check(out[:live], plain, torch.float32)
    assert bool(routed[live:].isnan().all()) and bool(out[live:].isnan().all())


def test_ties_go_to_the_first_expert() -> None:
    routing = RouterConfig(8, 3)
    weights, ids = poisoned(1, 3), torch.full((1, 3), -1, device=DEVICE, dtype=torch.int32)
    counters = torch.zeros(1, device=DEVICE, dtype=torch.int32)
    matrix = torch.zeros(8, 64, device=DEVICE)
    router.route(draw(1, 64), draw(64), 1e-6, matrix, None, routing, poisoned(1, 8), counters, ids, weights)
    assert ids.tolist() == [[0, 1, 2]]
    assert torch.allclose(weights, torch.full_like(weights, 1 / 8))


# ---------------------------------------------------------------- experts


def layer(width: int, experts_: int, inner: int, shared: int, dtype: torch.dtype) -> decode_experts.ExpertWeights:
    def matrix(*shape: int) -> torch.Tensor:
        return draw(*shape, dtype=dtype, scale=shape[-1] ** -0.5)

    return decode_experts.ExpertWeights(
        matrix(experts_, 2 * inner, width) if experts_ else None,
        matrix(experts_, width, inner) if experts_ else None,
        matrix(shared, width) if shared else None,
        matrix(shared, width) if shared else None,
        matrix(width, shared) if shared else None,
    )


def wide(weights: decode_experts.ExpertWeights) -> decode_experts.ExpertWeights:
    parts = (weights.gate_up, weights.down, weights.shared_gate, weights.shared_up, weights.shared_down)
    return decode_experts.ExpertWeights(*(None if part is None else part.float() for part in parts))


def random_ids(rows: int, experts_: int, chosen: int) -> torch.Tensor:
    return torch.rand(rows, experts_, device=DEVICE).argsort(dim=1)[:, :chosen].int()


SHAPES = [(64, 8, 32, 64), slow(64, 0, 0, 96), (48, 5, 40, 0), slow(320, 12, 24, 72)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "count", "inner", "shared"), SHAPES)
def test_experts_of_one_row(dtype: torch.dtype, width: int, count: int, inner: int, shared: int) -> None:
    weights = layer(width, count, inner, shared, dtype)
    x, weight, residual = draw(width, dtype=dtype), 1 + 0.1 * draw(width, dtype=dtype), draw(width, dtype=dtype)
    chosen = 3 if count else 0
    hidden = poisoned(chosen * inner + shared, dtype=dtype)
    plain_ids = random_ids(1, count, 3).long() if count else None
    ids = None if plain_ids is None else plain_ids[0].int()
    topk_weights = torch.rand(chosen, device=DEVICE)
    routing = dict(topk_ids_K=ids, topk_weights_K=topk_weights) if count else {}
    decode_experts_gemv.gate_up_gemv(x, weight, 1e-6, weights, hidden, ids)
    normed = norm.rms_norm_plain(x[None].float(), weight.float(), 1e-6)
    routed, common = decode_experts.gate_up_plain(normed, wide(weights), plain_ids)
    parts = [part.flatten() for part in (routed, common) if part is not None]
    check(hidden, torch.cat(parts), dtype)

    out = poisoned(width, dtype=dtype)
    decode_experts_gemv.down_gemv(hidden, weights, residual, out, **routing)
    inner_rows = hidden.float()[: chosen * inner].view(1, chosen, inner) if count else None
    common_rows = hidden.float()[None, chosen * inner :] if shared else None
    routed, common = decode_experts.down_plain(inner_rows, common_rows, wide(weights), plain_ids)
    plain = residual.float()
    if routed is not None:
        plain = plain + (routed[0] * topk_weights[:, None]).sum(0)
    if common is not None:
        plain = plain + common[0]
    check(out, plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "count", "inner", "shared"), SHAPES)
def test_experts_of_few_rows(dtype: torch.dtype, rows: int, width: int, count: int, inner: int, shared: int) -> None:
    weights, chosen = layer(width, count, inner, shared, dtype), 3 if count else 0
    x = draw(rows, width, dtype=dtype)
    ids = random_ids(rows, count, chosen) if count else None
    if ids is not None and rows > 16:
        ids[:, 0], ids[:, 1:] = 0, random_ids(rows, count - 1, chosen - 1) + 1  # more than one block of rows
    tokens = None if ids is None else align_plain(ids, count, PLAIN_TILE)
    routed = poisoned(rows, chosen, inner, dtype=dtype) if count else None
    common = poisoned(rows, shared, dtype=dtype) if shared else None
    decode_experts_gemm.gate_up_gemm(x, weights, routed, common, tokens)
    plain = decode_experts.gate_up_plain(x.float(), wide(weights), ids)
    out_routed = poisoned(rows, chosen, width, dtype=dtype) if count else None
    out_common = poisoned(rows, width, dtype=dtype) if shared else None
    for out, want in zip((routed, common), plain, strict=True):
        if out is not None and want is not None:
            check(out, want, dtype)
    decode_experts_gemm.down_gemm(routed, common, weights, out_routed, out_common, tokens)
    inputs = [None if part is None else part.float() for part in (routed, common)]
    plain = decode_experts.down_plain(inputs[0], inputs[1], wide(weights), ids)
    for out, want in zip((out_routed, out_common), plain, strict=True):
        if out is not None and want is not None:
            check(out, want, dtype)


# ---------------------------------------------------------------- experts of a prompt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [24, 1100])
def test_silu_of_gate_times_up(dtype: torch.dtype, inner: int) -> None:
    both = draw(9, 2 * inner, dtype=dtype)
    gated, up = both.float().chunk(2, dim=-1)
    check(prefill_experts.silu_and_mul_packed(both), torch.nn.functional.silu(gated) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 1100])
def test_sum_of_experts(dtype: torch.dtype, width: int) -> None:
    tokens, chosen = 7, 3
    rows, weights = draw(tokens * chosen, width, dtype=dtype), torch.rand(tokens, chosen, device=DEVICE)
    places = torch.randperm(tokens * chosen, device=DEVICE)
    plain = (rows.float()[places].view(tokens, chosen, width) * weights[..., None]).sum(1)
    check(prefill_experts.combine_tokens(rows, places, weights), plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_rows_apart(dtype: torch.dtype) -> None:
    gated, up = (draw(5, 100, dtype=dtype)[:, 3:43] for _ in range(2))
    check(prefill_experts.silu_and_mul(gated, up), torch.nn.functional.silu(gated.float()) * up.float(), dtype)
    with pytest.raises(ValueError, match="differently"):
        prefill_experts.silu_and_mul(gated, up.contiguous())


@pytest.mark.parametrize(("pairs", "count"), [(1, 8), (50, 7), (2500, 64)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pairs_are_placed_as_a_stable_sort_places_them(pairs: int, count: int, dtype: torch.dtype) -> None:
    ids = torch.randint(0, count, (pairs, 1), device=DEVICE, dtype=dtype)
    ids[::5] = count  # no expert's
    ids[ids == 3] = 4  # an expert without pairs
    places, ends = prefill_experts.moe_align(ids, count)
    order = ids.flatten().argsort(stable=True)
    want = torch.empty_like(order).scatter_(0, order, torch.arange(pairs, device=DEVICE))
    want[ids.flatten() == count] = -1
    assert torch.equal(places.long(), want)
    assert ends.tolist() == [int((ids <= expert).sum()) for expert in range(count)]


@pytest.mark.parametrize("width", [40, 2100])
def test_rows_are_spread_to_their_places(width: int) -> None:
    x = draw(5, width)
    places = torch.randperm(15, device=DEVICE).int()
    want = poisoned(15, width)
    want[places.long()] = x.repeat_interleave(3, 0)
    places[4] = -1
    got = prefill_experts.permute_tokens(x, places)
    written = places[places >= 0].long()
    assert torch.equal(got[written], want[written])


@pytest.mark.parametrize("routing", [routing for routing in ROUTERS if not routing.group_limited], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_of_many_rows(routing: RouterConfig, dtype: torch.dtype) -> None:
    rows, width = 35, 144
    x, weight = draw(rows, width, dtype=dtype), draw(routing.num_experts, width, dtype=dtype, scale=width**-0.5)
    bias = 0.1 * draw(routing.num_experts) if routing.method == NOAUX_TC else None
    ids, weights = router.route_tokens(x, weight, bias, routing)
    logits = torch.nn.functional.linear(x.float(), weight.float())
    plain_ids, plain_weights = router.select_topk_plain(logits, bias, routing)
    assert torch.equal(ids[:, -1].long(), plain_ids[:, -1]) and bool((ids[:, :-1].diff(dim=1) > 0).all())
    order, plain_order = ids.argsort(dim=1), plain_ids.argsort(dim=1)
    assert torch.equal(ids.long().gather(1, order), plain_ids.gather(1, plain_order))
    check(weights.gather(1, order), plain_weights.gather(1, plain_order), torch.float32)
    tokens = torch.tensor([4, 7, 1, 6, 3], device=DEVICE)  # of five prompts of seven rows
    last = tokens - 1 + 7 * torch.arange(5, device=DEVICE)
    padded, _ = router.route_tokens(x, weight, bias, routing, last, positions=7)
    padding = (torch.arange(7, device=DEVICE) >= tokens[:, None]).flatten()
    assert torch.equal(padded[~padding], ids[~padding]) and bool((padded[padding] == routing.num_experts).all())
    last[-1] = -1  # the last part, which has fewer rows, is padding
    cut, _ = router.route_tokens(x[:-2], weight, bias, routing, last, positions=7)
    assert torch.equal(cut[:-5], padded[:-7]) and bool((cut[-5:] == routing.num_experts).all())


def test_prompts_that_are_not_the_rows_are_refused() -> None:
    for rows in (3, 7):
        with pytest.raises(ValueError, match=f"2 prompts of 3 rows are not the {rows} rows"):
            router.route_tokens(
                draw(rows, 16), draw(24, 16), None, RouterConfig(24, 4), torch.tensor([1, 4]), positions=3
            )


def test_many_rows_without_groups_left_out() -> None:
    with pytest.raises(ValueError, match="plain form"):
        router.route_tokens(
            draw(2, 16), draw(24, 16), None, RouterConfig(24, 4, method=GROUP_LIMITED, num_groups=6, topk_groups=2)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_a_layer_ends_with_rows_at_their_places(dtype: torch.dtype, shared: bool) -> None:
    rows, chosen, width = 5, 3, 72
    residual, common = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype)
    routed, weights = draw(rows * chosen, width, dtype=dtype), torch.rand(rows, chosen, device=DEVICE)
    scale, places = 1 + 0.1 * draw(width, dtype=dtype), torch.randperm(rows * chosen, device=DEVICE).int()
    taken = routed.float()[places.long()].view(rows, chosen, width)
    taken[2, 1] = 0
    places[2 * chosen + 1] = -1
    none = torch.zeros(rows, width, device=DEVICE)
    want = norm.fused_add_rms_norm_plain(
        residual.float(), taken, weights, common.float() if shared else none, scale.float(), 1e-6
    )
    out, normed = poisoned(rows, width, dtype=dtype), poisoned(rows, width, dtype=dtype)
    given = common if shared else None
    norm.fused_add_rms_norm(residual, routed, weights, given, scale, 1e-6, out, normed, places)
    for got, plain in zip((out, normed), want, strict=True):
        check(got, plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "part"), [(32, 8), (48, 6)])
def test_latents_are_normed_rotated_and_cached(dtype: torch.dtype, rank: int, part: int) -> None:
    tokens, size = 6, 17
    compressed = draw(tokens, rank + part, dtype=dtype)
    scale = 1 + 0.1 * draw(rank, dtype=dtype)
    angles = draw(tokens, part // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    cache, slots = poisoned(size, rank + part, dtype=dtype), torch.randperm(size, device=DEVICE)[:tokens]
    slots[4] = -1  # padding, which has no place in the pool
    latents, rotated = rope.cache_latents(compressed, scale, 1e-6, cos, sin, slots, cache)
    plain = rope.rotate_heads_plain(compressed[:, None, rank:], cos, sin)[:, 0]
    check(latents, norm.rms_norm_plain(compressed[:, :rank].float(), scale.float(), 1e-6), dtype)
    check(rotated, plain, dtype)
    kept = slots >= 0
    assert torch.equal(cache[slots[kept]], torch.cat((latents, rotated), dim=-1)[kept])
    cache[slots[kept]] = float("nan")
    assert bool(cache.isnan().all()), "something else in the pool was written"


def test_latents_need_an_angle_and_a_slot_each() -> None:
    angles, slots = draw(3, 8), torch.arange(3, device=DEVICE)
    with pytest.raises(ValueError, match="as many angles and slots"):
        rope.cache_latents(draw(4, 24), draw(16), 1e-6, angles, angles, slots, draw(9, 24))
    with pytest.raises(ValueError, match="contiguous"):
        rope.cache_latents(draw(3, 24), draw(16), 1e-6, angles, angles, slots, draw(9, 32)[:, :24])


@pytest.mark.parametrize(
    ("counts", "hidden", "inner"),
    [((3, 0, 70), 128, 128), ((200, 1, 0, 129, 128), 256, 128), *([((64,) * 64, 2048, 1408)] if ON_GPU else [])],
    ids=str,
)
def test_products_of_pairs_with_their_experts(counts: tuple[int, ...], hidden: int, inner: int) -> None:
    dtype, experts_, none = torch.bfloat16, len(counts), 5
    rows = draw(sum(counts) + none, hidden, dtype=dtype)
    rows[-none:] = float("nan")  # pairs without an expert are not read
    gate_up = draw(experts_, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5)
    down = draw(experts_, hidden, inner, dtype=dtype, scale=inner**-0.5)
    if ON_GPU and torch.cuda.get_device_capability(DEVICE)[0] != 9:
        pytest.skip("only for GPUs of compute capability 9")
    assert grouped_gemm.is_supported(down, hidden, inner)
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    inner_rows, total = grouped_gemm.grouped_gate_up(rows, gate_up, ends), sum(counts)
    outputs = grouped_gemm.grouped_down(inner_rows, down, ends)
    starts = [0, *ends.tolist()]
    both = [rows[a:b].float() @ gate_up[e].float().T for e, (a, b) in enumerate(pairwise(starts))]
    plain = torch.cat([torch.nn.functional.silu(x[:, :inner]) * x[:, inner:] for x in both])
    check(inner_rows[:total], plain, dtype)
    parts = [inner_rows[a:b].float() @ down[e].float().T for e, (a, b) in enumerate(pairwise(starts))]
    check(outputs[:total], torch.cat(parts), dtype)


def test_sizes_that_the_grouped_kernels_take() -> None:
    weights = draw(2, 128, 128, dtype=torch.bfloat16)
    assert not grouped_gemm.is_supported(weights, 128, 100) and not grouped_gemm.is_supported(weights, 72, 128)
    assert not grouped_gemm.is_supported(weights.to("meta"), 128, 128) or not ON_GPU


@pytest.mark.parametrize("tokens", [1, 37])
@torch.no_grad()
def test_experts_of_a_prompt(tokens: int) -> None:
    dtype = torch.bfloat16
    layer_ = mini_language("small").model.layers[1].mlp.experts.to(DEVICE, dtype)
    ids = random_ids(tokens, layer_.num_experts, 3).long()
    ids[ids == 1] = 2  # one expert has no token, and one may have a token twice
    hidden, weights = draw(tokens, layer_.hidden_size, dtype=dtype), torch.rand(tokens, 3, device=DEVICE)
    assert experts.is_supported(layer_, hidden)
    got = experts.run_experts(layer_, hidden, ids, weights)
    check(got, eager_experts_forward(layer_.float(), hidden.float(), ids, weights), dtype)
    assert not experts.is_supported(layer_, hidden)  # in float32 now


# ---------------------------------------------------------------- attention

POSITIONS = {1: [70], 3: [0, 95, 31], 5: [1, 32, 64, 33, 63]}
# Half precision is of what is read and written, not of how many rows: the interpreter sees it with three.
DTYPES_AND_ROWS = [(dtype, rows) for dtype in DTYPES for rows in POSITIONS if ON_GPU or rows == 3 or dtype == DTYPES[0]]


def tables(capacity: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(capacity, device=DEVICE).float(), 0.3 ** torch.arange(size // 2, device=DEVICE))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def scattered(rows: int, capacity: int) -> tuple[torch.Tensor, int]:
    """Return where the extents of rows start in a pool, in scrambled order and apart from each other, and its size."""
    starts = torch.randperm(rows + 1, device=DEVICE)[:rows] * (capacity + 3) + 2
    return starts, (rows + 1) * (capacity + 3)


def extents(pool: torch.Tensor, starts: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return a copy of each row's tokens, [B, C, ...]."""
    return torch.stack([pool[start : start + capacity] for start in starts.tolist()])


def fill(pool: torch.Tensor, starts: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Draw the cached tokens of each row up to its position, and return the pool: all else in it stays poisoned."""
    for start, position in zip(starts.tolist(), positions, strict=True):
        pool[start : start + position + 1] = draw(position + 1, *pool.shape[1:], dtype=pool.dtype)
    return pool


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", sorted(POSITIONS))
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize(("rank", "unrotated", "rotated", "value"), [(32, 16, 8, 16), (80, 24, 16, 20)])
def test_latent_prepare(
    dtype: torch.dtype, rows: int, absorb: bool, rank: int, unrotated: int, rotated: int, value: int
) -> None:
    heads, capacity = 3, 96
    projected = draw(rows, heads * (unrotated + rotated) + rank + rotated, dtype=dtype)
    kv_b = draw(heads, unrotated + value, rank, dtype=dtype, scale=unrotated**-0.5)
    weight, positions = 1 + 0.1 * draw(rank, dtype=dtype), torch.tensor(POSITIONS[rows], device=DEVICE).int()
    cos, sin = tables(capacity, rotated, dtype)
    query = poisoned(rows, heads, rank + rotated, dtype=dtype)
    starts, tokens = scattered(rows, capacity)
    cache = poisoned(tokens, rank + rotated, dtype=dtype)
    decode_mla.prepare(projected, kv_b, weight, 1e-6, cos, sin, positions, starts, query, cache, absorb)
    split = heads * (unrotated + rotated)
    angles = (cos[positions.long()].float(), sin[positions.long()].float())
    plain_query, plain_token = decode_mla.prepare_plain(
        projected[:, :split].unflatten(1, (heads, -1)).float(), projected[:, split:].float(), kv_b.float(),
        weight.float(), 1e-6, *angles,
    )  # fmt: skip
    if absorb:
        check(query, plain_query, dtype)
    else:
        check(query[..., rank:], plain_query[..., rank:], dtype)
        assert query[..., :rank].isnan().all()
    check(cache[starts + positions], plain_token, dtype)
    cache[starts + positions] = float("nan")
    assert cache.isnan().all(), "something else in the cache was written"


@pytest.mark.parametrize(("dtype", "rows"), DTYPES_AND_ROWS)
@pytest.mark.parametrize("splits", [1, slow(2), 7])
@pytest.mark.parametrize(("heads", "rank", "rotated"), [(4, 32, 8), slow(18, 80, 16)])
def test_latent_attention(dtype: torch.dtype, rows: int, splits: int, heads: int, rank: int, rotated: int) -> None:
    capacity, unrotated, value = 96, 8, 24
    query = draw(rows, heads, rank + rotated, dtype=dtype)
    starts, tokens = scattered(rows, capacity)
    pool = fill(poisoned(tokens, rank + rotated, dtype=dtype), starts, POSITIONS[rows])
    cache, before = extents(pool, starts, capacity), pool.clone()
    positions = torch.tensor(POSITIONS[rows], device=DEVICE).int()
    partial, weight = poisoned(rows, splits, heads, rank), poisoned(rows, splits, heads)
    decode_mla.attend_splits(query, pool, positions, starts, 0.2, partial, weight)
    assert torch.equal(pool.nan_to_num(9.0), before.nan_to_num(9.0))
    mixed = poisoned(rows, heads, rank, dtype=dtype)
    decode_mla.reduce_splits(partial, weight, positions, mixed)
    plain = decode_mla.attend_plain(query.float(), cache.float().nan_to_num(), positions, rank, 0.2)
    check(mixed, plain, dtype)
    kv_b = draw(heads, unrotated + value, rank, dtype=dtype, scale=rank**-0.5)
    out = poisoned(rows, heads, value, dtype=dtype)
    decode_mla.reduce_splits(partial, weight, positions, out, kv_b)
    check(out, torch.einsum("bnr,nvr->bnv", plain, kv_b.float()[:, unrotated:]), dtype)


@pytest.mark.parametrize("positions", [[399], [299, 130, 6]])
@pytest.mark.parametrize("memory", [99_000, 232_448])
def test_latent_attention_over_several_blocks(
    monkeypatch: pytest.MonkeyPatch, positions: list[int], memory: int
) -> None:
    monkeypatch.setattr(decode_mla, "shared_memory", lambda device: memory)
    rows, heads, rank, rotated, capacity, splits, dtype = len(positions), 20, 32, 16, 400, 3, DTYPES[0]
    query, (starts, tokens) = draw(rows, heads, rank + rotated, dtype=dtype), scattered(rows, capacity)
    pool = fill(poisoned(tokens, rank + rotated, dtype=dtype), starts, positions)
    cache = extents(pool, starts, capacity)
    places = torch.tensor(positions, device=DEVICE).int()
    partial, weight = poisoned(rows, splits, heads, rank), poisoned(rows, splits, heads)
    decode_mla.attend_splits(query, pool, places, starts, 0.2, partial, weight)
    mixed = poisoned(rows, heads, rank, dtype=dtype)
    decode_mla.reduce_splits(partial, weight, places, mixed)
    check(mixed, decode_mla.attend_plain(query.float(), cache.float().nan_to_num(), places, rank, 0.2), dtype)


def test_multiprocessors_are_the_devices() -> None:
    assert common.multiprocessors(torch.device("cpu")) == 132
    if ON_GPU:
        assert common.multiprocessors(DEVICE) == torch.cuda.get_device_properties(DEVICE).multi_processor_count


@pytest.mark.parametrize("heads", [16, 20, 32, 128])
def test_a_device_has_room_for_all_splits(heads: int) -> None:
    for rows in range(1, 65):
        splits = decode_mla.num_kv_splits(rows, heads, 132)
        programs = rows * -(-heads // 32) * splits
        assert 1 <= splits <= decode_mla.MAX_SPLITS
        assert programs <= 132 or splits == 1 or rows == 1
        assert programs > 132 / 2 or splits == decode_mla.MAX_SPLITS, "half of the device has nothing to do"
    assert len({decode_mla.num_kv_splits(rows, heads, 132) for rows in range(1, 65)}) <= 10, (
        "kernels are compiled for each"
    )


@pytest.mark.parametrize(("dtype", "rows"), DTYPES_AND_ROWS)
@pytest.mark.parametrize(
    ("splits", "heads", "key_heads", "size"), [(1, 6, 2, 40), (3, 6, 2, 40), (3, 4, 4, 16), slow(16, 6, 2, 40)]
)
def test_multihead_attention(dtype: torch.dtype, rows: int, splits: int, heads: int, key_heads: int, size: int) -> None:
    capacity = 96
    projected = draw(rows, (heads + 2 * key_heads) * size, dtype=dtype)
    positions = torch.tensor(POSITIONS[rows], device=DEVICE).int()
    cos, sin = tables(capacity, size, dtype)
    query = poisoned(rows, heads, size, dtype=dtype)
    starts, tokens = scattered(rows, capacity)
    old = [position - 1 for position in POSITIONS[rows]]
    pools = [fill(poisoned(tokens, key_heads, size, dtype=dtype), starts, old) for _ in range(2)]
    before = [pool.clone() for pool in pools]
    decode_mha.rotate_and_write(projected, cos, sin, positions, starts, query, *pools)
    q, k, v = projected.float().unflatten(1, (-1, size)).split([heads, key_heads, key_heads], dim=1)
    angles = [table[positions.long()].float()[:, None] for table in (cos, sin)]
    check(query, decode_mha.rotate_halves_plain(q, *angles), dtype)
    new = starts + positions
    check(pools[0][new], decode_mha.rotate_halves_plain(k, *angles), dtype)
    assert torch.equal(pools[1][new].float(), v)
    for pool, was in zip(pools, before, strict=True):
        was[new] = pool[new]
        assert torch.equal(pool.nan_to_num(9.0), was.nan_to_num(9.0)), "something else in the pool was written"
    keys, values = (extents(pool, starts, capacity).transpose(1, 2) for pool in pools)

    partial, weight = poisoned(rows, splits, heads, size), poisoned(rows, splits, heads)
    decode_mha.attend_splits(query, *pools, positions, starts, 0.3, partial, weight)
    out = poisoned(rows, heads, size, dtype=dtype)
    decode_mla.reduce_splits(partial, weight, positions, out, step=decode_mha.kv_block(len(positions)))
    plain = decode_mha.attend_plain(
        query.float(), keys.float().nan_to_num(), values.float().nan_to_num(), positions, 0.3
    )
    check(out, plain, dtype)


# ---------------------------------------------------------------- before a prompt's attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("positions", "heads", "size", "part"), [(5, 3, 24, 8), (4, 16, 192, 64), (3, 10, 80, 80)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_are_rotated_in_place(
    dtype: torch.dtype, positions: int, heads: int, size: int, part: int, interleaved: bool
) -> None:
    x, cos, sin = draw(2 * positions, heads, size, dtype=dtype), draw(positions, part), draw(positions, part)
    cos, sin = cos.to(dtype), sin.to(dtype)
    plain = rope.rotate_heads_plain(x.float(), cos.float(), sin.float(), interleaved)
    same = rope.rotate_heads_plain(x, cos, sin, interleaved)
    rope.rotate_heads_(x, cos, sin, interleaved)
    check(x, plain, dtype)
    if ON_GPU:  # the interpreter cuts bfloat16 off
        assert torch.equal(x, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "nope", "value", "part"), [(3, 16, 24, 8), (16, 128, 128, 64), (10, 32, 32, 16)])
def test_keys_of_heads(dtype: torch.dtype, heads: int, nope: int, value: int, part: int) -> None:
    expanded, rotated = draw(7, heads, nope + value, dtype=dtype), draw(7, part, dtype=dtype)
    out = rope.concat_keys(expanded, rotated, nope)
    assert torch.equal(out, rope.concat_keys_plain(expanded, rotated, nope))
