"""The router against the plain function beside it, and its lists of each expert's rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernel_support import DEVICE, ROUTERS, check, draw, layer, poisoned, random_ids, with_widths

from deepseek_vl2.ops.triton import decode_experts, decode_experts_gemm, norm, router
from deepseek_vl2.ops.triton.decode_align import PACKED_TILE, PLAIN_TILE, ExpertTokens, align_plain, max_further
from deepseek_vl2.ops.triton.router import NOAUX_TC, RouterConfig


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
