"""Let the original DeepSeek-VL2 package import and run on a CPU, without editing its checkout.

The original needs two packages that this comparison cannot use: `attrdict` (imported, never used, and broken since
Python 3.10) and `xformers` (whose `memory_efficient_attention` has no CPU operator). `install` puts small stand-ins of
our own in `sys.modules`; call it before the original is imported. Everything else is the original's own code.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
import torch.nn.functional as F


class AttrDict(dict[str, object]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention in xformers' layout: (batch, sequence, heads, head_dim) in and out."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, dropout_p=p, scale=scale)
    return out.transpose(1, 2)


def install() -> None:
    """Register the stand-ins, in place of the real packages should those be installed."""
    attrdict = ModuleType("attrdict")
    vars(attrdict)["AttrDict"] = AttrDict
    xformers, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    vars(ops)["memory_efficient_attention"] = memory_efficient_attention
    vars(xformers)["ops"] = ops
    sys.modules.update({"attrdict": attrdict, "xformers": xformers, "xformers.ops": ops})
