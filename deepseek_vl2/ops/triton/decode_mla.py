"""Multi-head latent attention of one new token a row, over a cache of latents.

Shape suffixes: B rows, N attention heads, R rank of the latent, P rotated part of a head, D unrotated part, V size of a
head's value, S tokens of the pool, C tokens of a row, W splits of the keys.

The cache is a pool of tokens, [S, R + P]: a latent and its rotated key side by side. Row b's tokens are contiguous,
from starts[b] to starts[b] + positions[b], its new one last; there is no padding among them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import (
    check_pools,
    check_rows,
    dot,
    grid_wait,
    launch_dependents,
    live_splits,
    load_cos_sin,
    power_of_two,
    prefetch,
    shared_memory,
)
from .rope import rotate_interleaved_plain

MAX_SPLITS = 32


def split_options(rows: int, heads: int, device: torch.device) -> dict[str, int]:
    """Return the block sizes of `attend_splits`; a split takes a multiple of GRAIN keys.

    Measured on an H100. Two blocks of 64 keys take 164 kB of shared memory, so one program is all that a multiprocessor
    runs; where there is less of it, blocks are of 32. A single row's split of up to 2,048 keys is one block.
    """
    block = 64 if shared_memory(device) >= 200_000 else 32
    if rows == 1:
        return {
            "GRAIN": block,
            "BLOCK_C": block,
            "BLOCK_N": 16,
            "STAGES": 2,
            "num_warps": 4,
            "LAUNCH_LATE": heads <= 16,
        }
    heads_each = min(power_of_two(heads, 16), 32)
    return {"GRAIN": 16, "BLOCK_C": block, "BLOCK_N": heads_each, "STAGES": 2, "num_warps": 4, "LAUNCH_LATE": False}


def num_kv_splits(rows: int, heads: int, programs: int) -> int:
    """Return the number of KV splits of each row, for a device that runs that many programs at a time.

    A single row's keys are cut further: its programs have one block of them each. Few different numbers are returned:
    kernels are compiled for each.
    """
    if rows == 1:
        return min(power_of_two(2 * programs // triton.cdiv(heads, 16)), MAX_SPLITS)
    most = programs // (rows * triton.cdiv(heads, 32))
    return max(number for number in (1, 2, 3, 4, 6, 8, 12, 16, 24, MAX_SPLITS) if number <= max(most, 1))


def prepare_plain(
    query_BNQ: torch.Tensor,
    compressed_BL: torch.Tensor,
    kv_b_NER: torch.Tensor,
    norm_R: torch.Tensor,
    eps: float,
    cos_BP: torch.Tensor,
    sin_BP: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the queries in the latent's space, [B, N, R + P], and what is cached of the new token, [B, R + P].

    Args:
        query_BNQ: projected queries, Q = D + P.
        compressed_BL: the projected latent and rope key, L = R + P.
        kv_b_NER: kv_b_proj's weight, E = D + V rows a head.
        norm_R: the latent's norm.
        eps: its epsilon.
        cos_BP: cosines at each row's position.
        sin_BP: sines.
    """
    rank, rotated = norm_R.shape[0], cos_BP.shape[-1]
    nope, rope = query_BNQ.split([query_BNQ.shape[-1] - rotated, rotated], dim=-1)
    absorbed = torch.einsum("bnd,ndr->bnr", nope, kv_b_NER[:, : nope.shape[-1]])
    query = torch.cat((absorbed, rotate_interleaved_plain(rope, cos_BP[:, None], sin_BP[:, None])), dim=-1)
    wide = compressed_BL[:, :rank].float()
    latent = norm_R * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(compressed_BL.dtype)
    return query, torch.cat((latent, rotate_interleaved_plain(compressed_BL[:, rank:], cos_BP, sin_BP)), dim=-1)


def attend_plain(
    query_BNL: torch.Tensor, cache_BCL: torch.Tensor, positions_B: torch.Tensor, rank: int, scaling: float
) -> torch.Tensor:
    """Return each head's mixture of latents, [B, N, R], over the tokens up to each row's position."""
    scores = torch.einsum("bnl,bcl->bnc", query_BNL, cache_BCL).float() * scaling
    beyond = torch.arange(cache_BCL.shape[1], device=scores.device) > positions_B[:, None]
    weights = scores.masked_fill(beyond[:, None], float("-inf")).softmax(dim=-1).to(query_BNL.dtype)
    held = cache_BCL[..., :rank].masked_fill(beyond[..., None], 0)
    return torch.einsum("bnc,bcr->bnr", weights, held)


@triton.jit
def _rotate_interleaved(
    x_ptr: tl.tensor, out_ptr: tl.tensor, angles: tl.tensor, P: tl.constexpr, HALF_PAD: tl.constexpr
) -> None:
    pair = tl.arange(0, HALF_PAD)
    held = pair < P // 2
    even = tl.load(x_ptr + 2 * pair, mask=held, other=0.0).to(tl.float32)
    odd = tl.load(x_ptr + 2 * pair + 1, mask=held, other=0.0).to(tl.float32)
    cos, sin = angles
    tl.store(out_ptr + pair, (even * cos - odd * sin).to(out_ptr.dtype.element_ty), mask=held)
    tl.store(out_ptr + P // 2 + pair, (odd * cos + even * sin).to(out_ptr.dtype.element_ty), mask=held)


@triton.jit
def _prepare_kernel(
    projected_ptr: tl.tensor,
    kv_b_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    query_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    P: tl.constexpr,
    HALF_PAD: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ABSORB: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    row = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    width: tl.constexpr = N * (D + P) + R + P
    query_row = query_ptr + (row * N + head) * (R + P)
    position = tl.load(positions_ptr + row)
    extent_ptr = cache_ptr + tl.load(starts_ptr + row) * (R + P)
    if PDL:
        # Before the weights of the kernels launched ahead have filled the queue: attention waits for these.
        prefetch(extent_ptr, position * (R + P), head * PARTS + part, (N + 1) * PARTS)
    angles = load_cos_sin(cos_ptr, sin_ptr, position, P, HALF_PAD)
    if head == N:  # behind the heads: the latent
        place = tl.arange(0, R_PAD)
        norm = tl.load(norm_ptr + place, mask=place < R, other=0.0)
        grid_wait(PDL)
        if part == 0:
            compressed = projected_ptr + row * width + N * (D + P)
            out_ptr = extent_ptr + position.to(tl.int64) * (R + P)
            x = tl.load(compressed + place, mask=place < R, other=0.0).to(tl.float32)
            x *= tl.rsqrt(tl.sum(x * x, axis=0) / R + eps)
            dtype = cache_ptr.dtype.element_ty
            tl.store(out_ptr + place, (x.to(dtype).to(tl.float32) * norm.to(tl.float32)).to(dtype), mask=place < R)
            _rotate_interleaved(compressed + R, out_ptr + R, angles, P, HALF_PAD)
    else:
        query = projected_ptr + row * width + head * (D + P)
        if ABSORB:
            d = tl.arange(0, D_PAD)
            r = part * BLOCK_R + tl.arange(0, BLOCK_R)
            matrix = kv_b_ptr + head * ((D + V) * R)
            mask = (d < D)[:, None] & (r < R)[None, :]
            weight = tl.load(matrix + d[:, None] * R + r[None, :], mask=mask, other=0.0)
            grid_wait(PDL)
            x = tl.load(query + d, mask=d < D, other=0.0).to(tl.float32)
            out = tl.sum(weight.to(tl.float32) * x[:, None], axis=0)
            tl.store(query_row + r, out.to(query_ptr.dtype.element_ty), mask=r < R)
        else:
            grid_wait(PDL)
        if part == 0:
            _rotate_interleaved(query + D, query_row + R, angles, P, HALF_PAD)


def prepare(
    projected_BX: torch.Tensor,
    kv_b_NER: torch.Tensor,
    norm_R: torch.Tensor,
    eps: float,
    cos_CP: torch.Tensor,
    sin_CP: torch.Tensor,
    positions_B: torch.Tensor,
    starts_B: torch.Tensor,
    query_BNL: torch.Tensor,
    cache_SL: torch.Tensor,
    absorb: bool = True,
    **options: Any,
) -> None:
    """Write `prepare_plain`: the new token into the cache, and its queries.

    Args:
        projected_BX: queries of all heads, then the compressed latent and rope key: N * (D + P) + R + P numbers.
        kv_b_NER: kv_b_proj's weight, contiguous.
        norm_R: the latent's norm.
        eps: its epsilon.
        cos_CP: table of cosines for all positions, contiguous.
        sin_CP: of sines.
        positions_B: each row's position, int32.
        starts_B: index in the pool of each row's token 0, int64.
        query_BNL: written, [B, N, R + P], contiguous; only the rotated part without ``absorb``.
        cache_SL: the pool, contiguous; written at each row's start + position.
        absorb: take the unrotated part through kv_b_proj here, which reads that weight once for each row.
        options: of the launch, see `common.pdl_options`.
    """
    check_rows(projected_BX, kv_b_NER)
    check_pools(cache_SL)
    rows, heads = query_BNL.shape[:2]
    rank, rotated = norm_R.shape[0], cos_CP.shape[-1]
    unrotated = (projected_BX.shape[1] - rank - rotated) // heads - rotated
    block = min(power_of_two(rank, 16), 64)
    parts = triton.cdiv(rank, block) if absorb else 1
    _prepare_kernel[(rows, heads + 1, parts)](
        projected_BX,
        kv_b_NER,
        norm_R,
        cos_CP,
        sin_CP,
        positions_B,
        starts_B,
        query_BNL,
        cache_SL,
        eps,
        N=heads,
        D=unrotated,
        D_PAD=power_of_two(unrotated, 16),
        P=rotated,
        HALF_PAD=power_of_two(rotated // 2, 8),
        V=kv_b_NER.shape[1] - unrotated,
        R=rank,
        R_PAD=power_of_two(rank, 16),
        BLOCK_R=block,
        ABSORB=absorb,
        PARTS=parts,
        num_warps=4,
        **options,
    )


@triton.jit
def _attend_split_kernel(
    query_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scaling: tl.tensor,
    N: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    LAUNCH_LATE: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL and not LAUNCH_LATE)
    row = tl.program_id(0)
    split = tl.program_id(2)
    head = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = tl.load(positions_ptr + row)  # which only a step's last kernel changes
    keys_each, live = live_splits(position, GRAIN, SPLITS)
    first = split * keys_each
    last = tl.minimum(first + keys_each, position + 1)
    r = tl.arange(0, R_PAD)
    p = tl.arange(0, P_PAD)
    base = cache_ptr + tl.load(starts_ptr + row) * (R + P)
    grid_wait(PDL)
    if split < live:
        query_rows = query_ptr + (row * N + head)[:, None] * (R + P)
        in_heads = (head < N)[:, None]
        query = tl.load(query_rows + r[None, :], mask=in_heads & (r < R)[None, :], other=0.0)
        query_rope = tl.load(query_rows + R + p[None, :], mask=in_heads & (p < P)[None, :], other=0.0)
        total = tl.zeros([R_PAD, BLOCK_N], tl.float32)
        highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_N], tl.float32)
        for start in tl.range(first, last, BLOCK_C, num_stages=STAGES):
            c = start + tl.arange(0, BLOCK_C)
            held = (c < last)[:, None]
            keys = base + c[:, None] * (R + P)
            latent = tl.load(keys + r[None, :], mask=held & (r < R)[None, :], other=0.0)
            rope = tl.load(keys + R + p[None, :], mask=held & (p < P)[None, :], other=0.0)
            # Keys stand on the left of all products: they are the many rows that a matrix unit wants, heads are few.
            scores = dot(latent, tl.trans(query), tl.zeros([BLOCK_C, BLOCK_N], tl.float32))
            scores = dot(rope, tl.trans(query_rope), scores)
            scores = tl.where(held, scores * (scaling * 1.4426950408889634), float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=0))
            shrink = tl.exp2(highest - new_highest)
            power = tl.exp2(scores - new_highest[None, :])
            weight = weight * shrink + tl.sum(power, axis=0)
            total = dot(tl.trans(latent), power.to(latent.dtype), total * shrink[None, :])
            highest = new_highest
        launch_dependents(PDL and LAUNCH_LATE)  # whose weights would come before the keys
        place = (row * SPLITS + split) * N + head
        mask = (head < N)[None, :] & (r < R)[:, None]
        tl.store(partial_ptr + place[None, :] * R + r[:, None], total / weight[None, :], mask=mask)
        tl.store(lse_ptr + place, highest + tl.log2(weight), mask=head < N)


def attend_splits(
    query_BNL: torch.Tensor,
    cache_SL: torch.Tensor,
    positions_B: torch.Tensor,
    starts_B: torch.Tensor,
    scaling: float,
    partial_BWNR: torch.Tensor,
    lse_BWN: torch.Tensor,
    **options: Any,
) -> None:
    """Split-KV attention: `attend_plain` of each split of the keys, and its log-sum-exp, base 2.

    The keys up to a row's position are cut evenly into at most W splits; those without keys are left unwritten.
    All tensors are contiguous; the results are float32. Options: of the launch, see `common.pdl_options`.
    """
    check_rows(query_BNL)
    check_pools(cache_SL)
    rows, heads, width = query_BNL.shape
    splits, rank = partial_BWNR.shape[1], partial_BWNR.shape[3]
    rotated = width - rank
    sizes = {**split_options(rows, heads, query_BNL.device), **options}
    _attend_split_kernel[(rows, triton.cdiv(heads, sizes["BLOCK_N"]), splits)](
        query_BNL,
        cache_SL,
        positions_B,
        starts_B,
        partial_BWNR,
        lse_BWN,
        scaling,
        N=heads,
        R=rank,
        R_PAD=power_of_two(rank, 16),
        P=rotated,
        P_PAD=power_of_two(rotated, 16),
        SPLITS=splits,
        **sizes,
    )


@triton.jit
def _reduce_splits_kernel(
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    kv_b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PROJECT: tl.constexpr,
    PDL: tl.constexpr = False,
) -> None:
    launch_dependents(PDL)
    row = tl.program_id(0)
    head = tl.program_id(1)
    r = tl.arange(0, R_PAD)
    if PROJECT:
        v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        matrix = kv_b_ptr + (head * (D + V) + D) * R
        mask = (v < V)[:, None] & (r < R)[None, :]
        weight = tl.load(matrix + v[:, None] * R + r[None, :], mask=mask, other=0.0)
    _, live = live_splits(tl.load(positions_ptr + row), GRAIN, SPLITS)
    grid_wait(PDL)
    mixed = tl.zeros([R_PAD], tl.float32)
    highest = float("-inf")
    total = 0.0
    for start in range(0, live, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        place = (row * SPLITS + w) * N + head
        lse = tl.load(lse_ptr + place, mask=w < live, other=float("-inf"))
        mask_part = (w < live)[:, None] & (r < R)[None, :]
        part = tl.load(partial_ptr + place[:, None] * R + r[None, :], mask=mask_part, other=0.0)
        new_highest = tl.maximum(highest, tl.max(lse, axis=0))
        shrink = tl.exp2(highest - new_highest)
        power = tl.exp2(lse - new_highest)
        mixed = mixed * shrink + tl.sum(part * power[:, None], axis=0)
        total = total * shrink + tl.sum(power, axis=0)
        highest = new_highest
    mixed = mixed / total
    dtype = out_ptr.dtype.element_ty
    if PROJECT:
        out = tl.sum(weight.to(tl.float32) * mixed[None, :], axis=1)
        tl.store(out_ptr + (row * N + head) * V + v, out.to(dtype), mask=v < V)
    else:
        tl.store(out_ptr + (row * N + head) * R + r, mixed.to(dtype), mask=r < R)


def reduce_splits(
    partial_BWNR: torch.Tensor,
    lse_BWN: torch.Tensor,
    positions_B: torch.Tensor,
    out_BNV: torch.Tensor,
    kv_b_NER: torch.Tensor | None = None,
    step: int | None = None,
    **options: Any,
) -> None:
    """Reduce the splits of `attend_splits`, and project by the value rows of kv_b_proj where that is given.

    Without it ``out_BNV`` is the mixture of latents itself, [B, N, R]. All tensors are contiguous. ``step`` is the
    number of keys of which splits took multiples, that of `split_options` unless it is given. Options: of the
    launch, see `common.pdl_options`.
    """
    rows, splits, heads, rank = partial_BWNR.shape
    value = out_BNV.shape[-1]
    projects = kv_b_NER is not None
    block = min(power_of_two(value, 16), 16)
    warps = 8 if projects or rank > 128 else 2 if rows == 1 else 4
    _reduce_splits_kernel[(rows, heads, triton.cdiv(value, block) if projects else 1)](
        partial_BWNR,
        lse_BWN,
        positions_B,
        out_BNV if kv_b_NER is None else kv_b_NER,
        out_BNV,
        N=heads,
        R=rank,
        R_PAD=power_of_two(rank, 16),
        D=kv_b_NER.shape[1] - value if kv_b_NER is not None else 0,
        V=value,
        SPLITS=splits,
        BLOCK_W=min(power_of_two(splits), 32),
        GRAIN=step or split_options(rows, heads, out_BNV.device)["GRAIN"],
        BLOCK_V=block,
        PROJECT=projects,
        num_warps=warps,
        **options,
    )
