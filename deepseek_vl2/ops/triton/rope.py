"""What precedes the attention of a prefill: rotary embedding, latents normed and cached, keys concatenated.

Rotations and keys have the bits of the plain forms.

Shape suffixes: R rows of all prompts together, T positions, N heads (tokens, in `cache_latents`), D head size, P
rotated part of a head, L latent, S tokens of the pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_pools, check_rows, power_of_two, rounded


def rotate_interleaved_plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [..., P] of interleaved pairs; even members go to the first half of the result, odd ones to the second."""
    even, odd = x[..., 0::2], x[..., 1::2]
    half = even.shape[-1]
    first = even * cos[..., :half] - odd * sin[..., :half]
    return torch.cat((first, odd * cos[..., half:] + even * sin[..., half:]), dim=-1)


def rotate_heads_plain(
    x_RND: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, interleaved: bool = True
) -> torch.Tensor:
    """Return the heads with their last P numbers rotated; row r stands at position r modulo T."""
    kept, rotated = x_RND.split([x_RND.shape[-1] - cos_TP.shape[-1], cos_TP.shape[-1]], dim=-1)
    rotated = rotated.unflatten(0, (-1, len(cos_TP))).transpose(1, 2)
    if interleaved:
        rotated = rotated.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    first, second = rotated.chunk(2, dim=-1)
    out = rotated * cos_TP + torch.cat((-second, first), dim=-1) * sin_TP
    return torch.cat((kept, out.transpose(1, 2).flatten(0, 1)), dim=-1)


@triton.jit
def _rotate_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    f = tl.arange(0, BLOCK_F)[None, :]
    held = (n < N) & (f < HALF)
    start = x_ptr + row * N * D + n * D + D - 2 * HALF
    if INTERLEAVED:
        first = tl.load(start + 2 * f, mask=held, other=0.0).to(tl.float32)
        second = tl.load(start + 2 * f + 1, mask=held, other=0.0).to(tl.float32)
    else:
        first = tl.load(start + f, mask=held, other=0.0).to(tl.float32)
        second = tl.load(start + HALF + f, mask=held, other=0.0).to(tl.float32)
    angles = (row % T) * 2 * HALF + f
    cos_first = tl.load(cos_ptr + angles, mask=f < HALF, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + angles + HALF, mask=f < HALF, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + angles, mask=f < HALF, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + angles + HALF, mask=f < HALF, other=0.0).to(tl.float32)
    # Each product is rounded before the sum, as in the plain form.
    new_first = rounded(first * cos_first, dtype) - rounded(second * sin_first, dtype)
    new_second = rounded(second * cos_second, dtype) + rounded(first * sin_second, dtype)
    tl.debug_barrier()  # what one thread reads another overwrites
    tl.store(start + f, new_first.to(dtype), mask=held)
    tl.store(start + HALF + f, new_second.to(dtype), mask=held)


def rotate_heads_(x_RND: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor, interleaved: bool = True) -> None:
    """Rotate the last P numbers of each head in place; see `rotate_heads_plain`.

    Args:
        x_RND: heads, contiguous.
        cos_TP: cosines, in the dtype of the heads.
        sin_TP: sines.
        interleaved: numbers of a pair lie side by side, as latent attention has them; else half of P apart. They
            come out half of P apart.
    """
    check_rows(x_RND, cos_TP, sin_TP)
    (rows, heads, size), (positions, part) = x_RND.shape, cos_TP.shape
    block = min(power_of_two(heads), 16)
    _rotate_kernel[(rows, triton.cdiv(heads, block))](
        x_RND, cos_TP, sin_TP, positions,
        N=heads, D=size, HALF=part // 2, INTERLEAVED=interleaved, BLOCK_N=block, BLOCK_F=power_of_two(part // 2),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def concat_keys_plain(expanded_RNE: torch.Tensor, rotated_RP: torch.Tensor, nope: int) -> torch.Tensor:
    """Return each head's own part of the key, the first ``nope`` numbers, with the part that all heads share behind."""
    shared = rotated_RP[:, None].expand(-1, expanded_RNE.shape[1], -1)
    return torch.cat((expanded_RNE[..., :nope], shared), dim=-1)


@triton.jit
def _concat_keys_kernel(
    expanded_ptr: tl.tensor,
    rotated_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    E: tl.constexpr,
    NOPE: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    own = tl.load(expanded_ptr + (row * N + n) * E + d, mask=(n < N) & (d < NOPE), other=0.0)
    shared = tl.load(rotated_ptr + row * P + d - NOPE, mask=(d >= NOPE) & (d < NOPE + P), other=0.0)
    tl.store(out_ptr + (row * N + n) * (NOPE + P) + d, tl.where(d < NOPE, own, shared), mask=(n < N) & (d < NOPE + P))


def concat_keys(expanded_RNE: torch.Tensor, rotated_RP: torch.Tensor, nope: int) -> torch.Tensor:
    """Return the keys of all heads, [R, N, nope + P]; see `concat_keys_plain`.

    Args:
        expanded_RNE: what latents expand to, contiguous: of each head ``nope`` numbers of its key, then its value.
        rotated_RP: the rotated part of the key, which all heads share.
        nope: size of the part of a head's own.
    """
    check_rows(expanded_RNE, rotated_RP)
    (rows, heads, width), part = expanded_RNE.shape, rotated_RP.shape[1]
    out = expanded_RNE.new_empty(rows, heads, nope + part)
    block = min(power_of_two(heads), 8)
    _concat_keys_kernel[(rows, triton.cdiv(heads, block))](
        expanded_RNE, rotated_RP, out,
        N=heads, E=width, NOPE=nope, P=part, BLOCK_N=block, BLOCK_D=power_of_two(nope + part), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _latent_kernel(
    compressed_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    latent_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    eps: tl.tensor,
    L: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    dtype = latent_ptr.dtype.element_ty
    source = compressed_ptr + row * (L + 2 * HALF)
    slot = tl.load(slots_ptr + row)
    cached = cache_ptr + slot * (L + 2 * HALF)
    i = tl.arange(0, BLOCK_L)
    x = tl.load(source + i, mask=i < L, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + i, mask=i < L, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / L + eps)
    latent = (rounded(x * inverse, dtype) * norm).to(dtype)
    tl.store(cached + i, latent, mask=(i < L) & (slot >= 0))
    tl.store(latent_ptr + row * L + i, latent, mask=i < L)
    f = tl.arange(0, BLOCK_F)
    held = f < HALF
    first = tl.load(source + L + 2 * f, mask=held, other=0.0).to(tl.float32)
    second = tl.load(source + L + 2 * f + 1, mask=held, other=0.0).to(tl.float32)
    angles = row * 2 * HALF + f
    cos_first = tl.load(cos_ptr + angles, mask=held, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + angles + HALF, mask=held, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + angles, mask=held, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + angles + HALF, mask=held, other=0.0).to(tl.float32)
    new_first = (rounded(first * cos_first, dtype) - rounded(second * sin_first, dtype)).to(dtype)
    new_second = (rounded(second * cos_second, dtype) + rounded(first * sin_second, dtype)).to(dtype)
    tl.store(rope_ptr + row * 2 * HALF + f, new_first, mask=held)
    tl.store(rope_ptr + row * 2 * HALF + HALF + f, new_second, mask=held)
    tl.store(cached + L + f, new_first, mask=held & (slot >= 0))
    tl.store(cached + L + HALF + f, new_second, mask=held & (slot >= 0))


def cache_latents(
    compressed_NC: torch.Tensor,
    norm_L: torch.Tensor,
    eps: float,
    cos_NP: torch.Tensor,
    sin_NP: torch.Tensor,
    slots_N: torch.Tensor,
    cache_SC: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm the latents and rotate the keys' shared part, and write both into a pool of cached tokens, [S, C].

    Args:
        compressed_NC: latents of N tokens, and behind each the part that is rotated, C = L + P numbers, contiguous.
        norm_L: the norm's weight.
        eps: the norm's epsilon.
        cos_NP: cosines at each token's position, in the dtype of the latents.
        sin_NP: sines.
        slots_N: index in the pool for each token, int64; a token whose index is below 0 is not written there.
        cache_SC: the pool, contiguous.

    Returns:
        What was written: the latents, [N, L], and the rotated parts, [N, P].
    """
    check_rows(compressed_NC, cos_NP, sin_NP)
    check_pools(cache_SC)
    (rows, width), part = compressed_NC.shape, cos_NP.shape[1]
    if len(cos_NP) != rows or len(slots_N) != rows:
        raise ValueError(f"{rows} tokens need as many angles and slots; got {len(cos_NP)} and {len(slots_N)}.")
    rank = width - part
    latent, rope = compressed_NC.new_empty(rows, rank), compressed_NC.new_empty(rows, part)
    _latent_kernel[(rows,)](
        compressed_NC, norm_L, cos_NP, sin_NP, cache_SC, slots_N, latent, rope, eps,
        L=rank, HALF=part // 2, BLOCK_L=power_of_two(rank), BLOCK_F=power_of_two(part // 2), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return latent, rope
