"""Attention of a step, and what comes before a prompt's: each kernel against the plain function beside it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernel_support import DEVICE, DTYPES, ON_GPU, check, draw, poisoned, slow

from deepseek_vl2.ops.triton import common, decode_mha, decode_mla, rope

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
