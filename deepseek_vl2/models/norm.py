"""Root mean square layer norm."""

from __future__ import annotations

import torch
from torch import nn


class DeepseekV2RMSNorm(nn.Module):
    """RMS norm over the last dimension: computed in float32, cast back, then times the weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed tensor, in the dtype of ``x``."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the norm in one line."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
