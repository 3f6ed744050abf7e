"""What the kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Under TRITON_INTERPRET=1 kernels run on a CPU, in NumPy, which knows no bfloat16: products are of float32 there.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return ``total`` + ``a`` @ ``b``, accumulated in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


def power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least ``number`` and ``least``."""
    return max(triton.next_power_of_2(number), least)


def check_rows(*tensors: torch.Tensor) -> None:
    """Raise ``ValueError`` for a tensor whose last dimension is not laid out without gaps."""
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            raise ValueError(f"The kernels read rows without gaps; got shape {list(tensor.shape)}, {tensor.stride()}.")
