"""Attention among all tokens of a sequence, read where the projection of queries, keys and values left them.

Tensor cores multiply blocks whose sides are powers of two, so heads of 72 numbers are commonly padded to 128. Here a
head is two parts, of 64 numbers and of the last 8 padded to 16, each with products and a sum of its own.

Shape suffixes: V sequences (tiles), T tokens of each, 3 for query, key and value, N heads, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .primitives import check_rows, dot, let_next_start, two_parts, wait_for_inputs

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # releases of Triton that have none
    TensorDescriptor = None

MAX_HEAD = 128
# Two programs of 128 registers a thread, and of 80 kB, fit on a multiprocessor of an H200.
BLOCKS: dict[str, Any] = {"BLOCK_M": 128, "BLOCK_N": 64, "FETCHED": True, "num_warps": 8, "num_stages": 3}


def attend_plain(qkv_VT3ND: torch.Tensor) -> torch.Tensor:
    """Return what each token gathers from all tokens of its sequence, [V, T, N * D]."""
    q, k, v = qkv_VT3ND.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@triton.jit
def _load_part(
    head_ptr: tl.tensor,
    tokens: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    ROW: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Return SIZE numbers of each token's head from number FIRST on; zeros behind the head and the last token."""
    d = FIRST + tl.arange(0, SIZE)
    places = head_ptr + tokens[:, None] * ROW + d[None, :]
    held = (tokens < T)[:, None]
    if FIRST + SIZE > D:
        held = held & (d < D)[None, :]
    return tl.load(places, mask=held, other=0.0)


@triton.jit
def _attend_to_block(
    q: tl.tensor,
    q_rest: tl.tensor,
    out: tl.tensor,
    out_rest: tl.tensor,
    total: tl.tensor,
    most: tl.tensor,
    start: tl.tensor,
    tile: tl.tensor,
    head: tl.tensor,
    head_ptr: tl.tensor,
    main_desc: tl.tensor,
    rest_desc: tl.tensor,
    scale: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    ROW: tl.constexpr,
    PART: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FETCHED: tl.constexpr,
) -> Any:
    """Take one more block of keys and values into a block of queries' sums."""
    n = start + tl.arange(0, BLOCK_N)
    if FETCHED:
        k = main_desc.load([tile, N + head, start, 0]).reshape(BLOCK_N, MAIN)
        v = main_desc.load([tile, 2 * N + head, start, 0]).reshape(BLOCK_N, MAIN)
    else:
        k = _load_part(head_ptr + PART, n, T, D, ROW, 0, MAIN)
        v = _load_part(head_ptr + 2 * PART, n, T, D, ROW, 0, MAIN)
    k_rest, v_rest = k, v
    if REST > 0:
        if FETCHED:
            k_rest = rest_desc.load([tile, N + head, start, MAIN]).reshape(BLOCK_N, REST)
            v_rest = rest_desc.load([tile, 2 * N + head, start, MAIN]).reshape(BLOCK_N, REST)
        else:
            k_rest = _load_part(head_ptr + PART, n, T, D, ROW, MAIN, REST)
            v_rest = _load_part(head_ptr + 2 * PART, n, T, D, ROW, MAIN, REST)
    scores = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if REST > 0:
        scores = dot(q_rest, k_rest.T, scores)
    if T % BLOCK_N > 0:
        if start + BLOCK_N > T:
            scores = tl.where((n < T)[None, :], scores, float("-inf"))
    new_most = tl.maximum(most, tl.max(scores, axis=1) * scale)
    shares = tl.exp2(scores * scale - new_most[:, None])
    shrink = tl.exp2(most - new_most)
    total = total * shrink + tl.sum(shares, axis=1)
    rounded_shares = shares.to(v.dtype)
    out = dot(rounded_shares, v, out * shrink[:, None])
    if REST > 0:
        out_rest = dot(rounded_shares, v_rest, out_rest * shrink[:, None])
    return out, out_rest, total, new_most


@triton.jit
def _attend_kernel(
    qkv_ptr: tl.tensor,
    main_desc: tl.tensor,
    rest_desc: tl.tensor,
    out_ptr: tl.tensor,
    tile_stride: tl.tensor,
    scale: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    ROW: tl.constexpr,
    PART: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FETCHED: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    first, tile, head = tl.program_id(0) * BLOCK_M, tl.program_id(1) // N, tl.program_id(1) % N
    head_ptr = qkv_ptr + tile.to(tl.int64) * tile_stride + head * HEAD
    m = first + tl.arange(0, BLOCK_M)
    q = _load_part(head_ptr, m, T, D, ROW, 0, MAIN)
    q_rest = q
    if REST > 0:
        q_rest = _load_part(head_ptr, m, T, D, ROW, MAIN, REST)
    out = tl.zeros([BLOCK_M, MAIN], tl.float32)
    out_rest = tl.zeros([BLOCK_M, REST if REST > 0 else 1], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(0, T, BLOCK_N):
        out, out_rest, total, most = _attend_to_block(
            q, q_rest, out, out_rest, total, most, start, tile, head, head_ptr, main_desc, rest_desc, scale,
            T, N, D, ROW, PART, MAIN, REST, BLOCK_M, BLOCK_N, FETCHED,
        )  # fmt: skip
    inverse = 1.0 / total[:, None]
    d = tl.arange(0, MAIN)
    places = out_ptr + (tile * T + m).to(tl.int64)[:, None] * (N * D) + head * D
    dtype = out_ptr.dtype.element_ty
    tl.store(places + d[None, :], (out * inverse).to(dtype), mask=(m < T)[:, None] & (d < D)[None, :])
    if REST > 0:
        d_rest = MAIN + tl.arange(0, REST)
        held = (m < T)[:, None] & (d_rest < D)[None, :]
        tl.store(places + d_rest[None, :], (out_rest * inverse).to(dtype), mask=held)


def may_fetch(qkv_VT3ND: torch.Tensor) -> bool:
    """Whether blocks can be fetched by descriptors: every distance in memory must be a multiple of 16 bytes."""
    step = 16 // qkv_VT3ND.element_size()
    strides, heads = qkv_VT3ND.stride(), qkv_VT3ND.shape[3]
    return (
        TensorDescriptor is not None
        and strides[2] == heads * strides[3]
        and all(stride % step == 0 for stride in strides[:4])
        and qkv_VT3ND.data_ptr() % 16 == 0
    )


def attend(qkv_VT3ND: torch.Tensor, **blocks: Any) -> torch.Tensor:
    """Return `attend_plain`: of half precision, with shares rounded to it and sums in float32.

    Args:
        qkv_VT3ND: queries, keys and values, without gaps within a head.
        **blocks: BLOCK_M, BLOCK_N: queries and keys of a block; FETCHED: keys and values come by tensor descriptors;
            num_warps, num_stages; and options of the launch, see `primitives.early_start`.

    Heads of more than 128 numbers are left to PyTorch. Sizes up to 64 and of 128 are one part, others two.
    """
    tiles, tokens, _, heads, size = qkv_VT3ND.shape
    if size > MAX_HEAD:
        return attend_plain(qkv_VT3ND)
    check_rows(qkv_VT3ND)
    options = {**BLOCKS, **blocks}
    out = qkv_VT3ND.new_empty(tiles, tokens, heads * size)
    main, rest = two_parts(size, 16)
    strides = qkv_VT3ND.stride()
    main_desc = rest_desc = qkv_VT3ND
    options["FETCHED"] = options["FETCHED"] and may_fetch(qkv_VT3ND)
    if options["FETCHED"]:
        shape, steps = [tiles, 3 * heads, tokens, size], [strides[0], strides[3], strides[1], 1]
        main_desc, rest_desc = (
            TensorDescriptor(qkv_VT3ND, shape, steps, [1, 1, options["BLOCK_N"], width])
            for width in (main, rest or main)
        )
    _attend_kernel[(triton.cdiv(tokens, options["BLOCK_M"]), tiles * heads)](
        qkv_VT3ND, main_desc, rest_desc, out, strides[0], size**-0.5 * math.log2(math.e),
        T=tokens, N=heads, D=size, ROW=strides[1], PART=strides[2], HEAD=strides[3], MAIN=main, REST=rest, **options,
    )  # fmt: skip
    return out
