"""What tests of generation share: two prompts, and the plain greedy answer to them."""

from __future__ import annotations

from functools import cache

import torch
from support import GREEDY, mini_inputs, shared_mini_model

Inputs = dict[str, torch.Tensor]

SAMPLING = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "max_new_tokens": 8, "eos_token_id": None}


def two_prompts() -> Inputs:
    """Return two prompts of unequal length with one and two images."""
    return mini_inputs([5, (2, 1), 9], [3, (1, 1), 4, (1, 1), 6], seed=12)  # a seed with varied answers


@cache
def greedy_answer(kind: str) -> tuple[tuple[int, ...], ...]:
    """Return the plain greedy answer to the two prompts, prompts included."""
    return tuple(map(tuple, shared_mini_model(kind).generate(**two_prompts(), **GREEDY).tolist()))
