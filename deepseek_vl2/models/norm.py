"""Root mean square layer norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cpu import row_kernels
from .loss import compute_dtype


class DeepseekV2RMSNorm(nn.Module):
    """RMS norm over the last dimension: computed in float32, cast back, then times the weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed tensor, in the dtype of ``x`` (in training under autocast, in autocast's)."""
        if self.training and torch.is_grad_enabled():
            # One kernel instead of eight, and less to keep for the backward pass. It rounds once where the plain form
            # rounds twice, so it is for training only. Under autocast all that follows would cast its output, each
            # for itself.
            normed = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.variance_epsilon)
            return normed.to(compute_dtype(x))
        if (kernels := row_kernels()) is not None:
            out: torch.Tensor | None = kernels.rms_norm(x, self.weight, self.variance_epsilon)
            if out is not None:
                return out
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the norm in one line."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
