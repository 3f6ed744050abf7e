"""Experts of a row, of a few and of a prompt: each kernel against the plain function beside it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from kernel_support import DEVICE, DTYPES, ON_GPU, ROUTERS, ROWS, check, draw, layer, poisoned, random_ids, slow, wide
from support import mini_language

from deepseek_vl2.engine import experts
from deepseek_vl2.models.moe import eager_experts_forward
from deepseek_vl2.ops.triton import (
    decode_experts,
    decode_experts_gemm,
    decode_experts_gemv,
    grouped_gemm,
    norm,
    prefill_experts,
    rope,
    router,
)
from deepseek_vl2.ops.triton.decode_align import PLAIN_TILE, align_plain
from deepseek_vl2.ops.triton.router import GROUP_LIMITED, NOAUX_TC, RouterConfig

# ---------------------------------------------------------------- experts


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
