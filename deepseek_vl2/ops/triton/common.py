"""What the kernels share."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

try:
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    PDL_SUPPORTED = "launch_pdl" in CUDAOptions.__dataclass_fields__
except ImportError:  # releases of Triton that know no dependent launch, or have no part for NVIDIA
    gdc_launch_dependents = gdc_wait = None
    PDL_SUPPORTED = False

# Of a release candidate ("3.10rc1") and a build of one's own ("3.6.0+git") too.
TRITON = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])

# Under TRITON_INTERPRET=1 kernels run on a CPU, in NumPy, which knows no bfloat16: products are of float32 there.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return ``total`` + ``a`` @ ``b``, accumulated in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round float32 to what ``dtype`` holds: by hand, since the compiler drops bfloat16's cast there and back."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def launch_dependents(PDL: tl.constexpr) -> None:
    """Programmatic dependent launch: let the next kernel start once all programs of this one have come here."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def grid_wait(PDL: tl.constexpr) -> None:
    """Wait until the kernel before, and so all before it, have ended and what they wrote can be read.

    Before this a kernel may read weights alone, and may write nothing. Every program must come here. What the kernel
    before the last has written may be read too, if all programs of the last one wait before they `launch_dependents`.
    """
    if PDL:
        gdc_wait()


@triton.jit
def load_rows(
    matrix_ptr: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    K: tl.constexpr,
    READ: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    """Return the first READ columns of some rows of a weight [size, K], as a tuple of blocks, each read once."""
    parts = ()
    for start in tl.static_range(0, READ, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = (rows < size)[:, None] & (columns < K)[None, :]
        offsets = rows.to(tl.int64)[:, None] * K + columns[None, :]
        part = tl.load(matrix_ptr + offsets, mask=mask, other=0, eviction_policy="evict_first")
        parts += (part,)  # type: ignore[assignment]
    return parts


@triton.jit
def load_row(row_ptr: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr) -> Any:
    """Return K numbers as a tuple of blocks."""
    parts = ()
    for start in tl.static_range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        parts += (tl.load(row_ptr + columns, mask=columns < K, other=0.0),)  # type: ignore[assignment]
    return parts


@triton.jit
def prefetch(start_ptr: tl.tensor, numbers: tl.tensor, part: tl.tensor, PARTS: tl.constexpr) -> None:
    """Bring this program's share, one of PARTS, of memory with that many numbers of two bytes into the L2 cache."""
    step = tl.arange(0, 128)
    for line in range(part * 128, (numbers + 63) // 64, PARTS * 128):
        places = start_ptr + tl.minimum((line + step) * 64, numbers - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def load_cos_sin(
    cos_ptr: tl.tensor, sin_ptr: tl.tensor, position: tl.tensor, SIZE: tl.constexpr, HALF_PAD: tl.constexpr
) -> tl.tensor:
    """Return cosines and sines at a position: half a row of each table, whose other half is the same."""
    pair = tl.arange(0, HALF_PAD)
    held = pair < SIZE // 2
    cos = tl.load(cos_ptr + position * SIZE + pair, mask=held, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * SIZE + pair, mask=held, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def live_splits(position: tl.tensor, GRAIN: tl.constexpr, SPLITS: tl.constexpr) -> tl.tensor:
    """Return how many keys each split takes, a multiple of GRAIN, and how many splits have any."""
    tiles = (position + GRAIN) // GRAIN  # of position + 1 keys, rounded up
    tiles_each = (tiles + SPLITS - 1) // SPLITS
    return tiles_each * GRAIN, (tiles + tiles_each - 1) // tiles_each


def pdl_options(device: torch.device) -> dict[str, Any]:
    """Return the launch options of programmatic dependent launch (PDL); none where the device has none.

    It needs compute capability 9.0. A kernel launched so reads its weights
    before it waits for the one before: it must not follow one that writes them.
    """
    if INTERPRETED.value or not PDL_SUPPORTED or device.type != "cuda":
        return {}
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"PDL": True, "launch_pdl": True}


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have; without an NVIDIA GPU, those of an H100."""
    if INTERPRETED.value or device.type != "cuda" or torch.version.hip is not None:
        return 232_448
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; without a CUDA device, that of an H100."""
    if INTERPRETED.value or device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least ``number`` and ``least``."""
    return max(triton.next_power_of_2(number), least)


def check_rows(*tensors: torch.Tensor) -> None:
    """Raise ``ValueError`` for a tensor whose last dimension is not laid out without gaps."""
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            raise ValueError(f"The kernels read rows without gaps; got shape {list(tensor.shape)}, {tensor.stride()}.")


def check_pools(*pools: torch.Tensor) -> None:
    """Raise ``ValueError`` for a pool of cached tokens that is not contiguous."""
    for pool in pools:
        if not pool.is_contiguous():
            raise ValueError(f"A pool of cached tokens must be contiguous; got {list(pool.shape)}, {pool.stride()}.")
