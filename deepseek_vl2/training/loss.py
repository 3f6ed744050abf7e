"""The loss of causal language modelling without the logits of the whole sequence.

The functions live beside the model, which uses them in training and also runs as remote code.
"""

from __future__ import annotations

from deepseek_vl2.models.loss import OutputHead, Targets, find_targets, linear_cross_entropy

__all__ = ["OutputHead", "Targets", "find_targets", "linear_cross_entropy"]
