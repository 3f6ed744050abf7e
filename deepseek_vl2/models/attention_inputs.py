"""Masks and positions of a batch, as attention and routing take them.

Shape suffixes: B rows, S tokens that a mask covers, T tokens of a pass.
"""

from __future__ import annotations

import torch

from .router import RoutingContext


def positions_from_mask(attention_mask_BS: torch.Tensor, length: int) -> torch.Tensor:
    """Return the positions, [B, length], of the last ``length`` tokens, counted from each row's first real token."""
    positions = attention_mask_BS.long().cumsum(-1) - 1
    return positions.clamp_(min=0)[:, -length:]


def is_right_padded(attention_mask_BT: torch.Tensor) -> bool:
    """Whether padding follows the tokens in every row: then causality alone hides it. Synchronises with the device."""
    return bool((attention_mask_BT[:, 1:] <= attention_mask_BT[:, :-1]).all())


def split_training_mask(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> tuple[torch.Tensor | None, RoutingContext]:
    """Return what attention needs of a mask in training, and what routing needs of it.

    Attention needs no mask for padding on the right, and is several times faster without one. Where positions are
    given, they then say which samples share a row: each starts anew.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return attention_mask, RoutingContext()
    routing = RoutingContext(token_mask=attention_mask.bool())
    return (None if is_right_padded(attention_mask.bool()) else attention_mask), routing


def flash_options(implementation: str, position_ids_BT: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return what flash attention needs beside a mask to keep packed samples apart: their positions.

    Raises:
        ValueError: several rows hold packed samples, which it would not keep apart.
    """
    if "flash" not in implementation or position_ids_BT is None:
        return {}
    if position_ids_BT.shape[0] > 1 and bool((position_ids_BT.diff(dim=1) != 1).any()):
        raise ValueError(
            f"With attn_implementation={implementation!r} packed samples must share one row: pack all of a batch into "
            "one, or choose 'sdpa'."
        )
    return {"position_ids": position_ids_BT}
