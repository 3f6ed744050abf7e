"""The models give what the original's give: embeddings, hidden states, logits and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import CASES, GOLDEN, KINDS, MODEL_CASES, case_inputs, model_inputs

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

# What float32 allows between two orders of the same sums: golden/README.md states it for logits.
TOLERANCE = {"rtol": 0, "atol": 2e-4}

# The model comes last, so that each is loaded once and all its cases follow.
for_each = pytest.mark.parametrize(
    ("kind", "attn", "case"), [(k, a, c) for k in KINDS for a in ("sdpa", "eager") for c in MODEL_CASES]
)


@pytest.fixture(scope="module")
def batch_of(processor: DeepseekVLV2Processor) -> Callable[[str], Any]:
    """Return what the processor makes of a case, once for all models; change nothing in it."""
    return cache(lambda case: processor(**case_inputs(CASES[case])))


def expected(kind: str, case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected" / kind / f"{case}.safetensors")


@for_each
@torch.no_grad()
def test_embeddings_hidden_states_and_logits_equal_the_original(
    golden_model: Callable[..., DeepseekVLV2ForCausalLM],
    batch_of: Callable[[str], Any],
    kind: str,
    attn: str,
    case: str,
) -> None:
    want, model = expected(kind, case), golden_model(kind, attn)
    inputs = model_inputs(batch_of(case))
    length = inputs["input_ids"].shape[1]
    # Of long prompts only the positions that were recorded: all 129,280 logits of each would take most of the time.
    recorded = torch.tensor([*range(0, length, 11), length - 1]) if length > 600 else None
    got = model(**inputs, output_hidden_states=True, logits_to_keep=0 if recorded is None else recorded)
    torch.testing.assert_close(got.hidden_states[0][0, ::7], want["inputs_embeds_stride"], **TOLERANCE)
    for index, hidden in enumerate(got.hidden_states):
        torch.testing.assert_close(hidden[0, -4:], want[f"hidden_{index}_tail"], **TOLERANCE)
    assert got.logits.dtype == torch.float32
    strided = got.logits[0, ::11] if recorded is None else got.logits[0, :-1]
    torch.testing.assert_close(strided[:, ::997], want["logits_stride"], **TOLERANCE)
    last = got.logits[0, -1]
    torch.testing.assert_close(last[::97], want["logits_last_stride"], **TOLERANCE)
    torch.testing.assert_close(last[want["logits_last_top_indices"]], want["logits_last_top_values"], **TOLERANCE)
    check_top(last, want)


def check_top(last: torch.Tensor, want: dict[str, torch.Tensor]) -> None:
    """Check that the best 64 are the same; two that lie within the tolerance of each other may change places."""
    values, indices = last.topk(64)
    torch.testing.assert_close(values, want["logits_last_top_values"], **TOLERANCE)
    swapped = indices != want["logits_last_top_indices"]
    gaps = (last[indices] - last[want["logits_last_top_indices"]])[swapped].abs()
    assert not swapped.any() or gaps.max() < TOLERANCE["atol"]


# Many tiles cost eager attention most, and add nothing to what it gave above: of pictures it has one case here.
LARGE = {"single_grounding", "two_images", "three_images"}


@pytest.mark.parametrize(
    ("kind", "attn", "case"),
    [(k, a, c) for k in KINDS for a in ("sdpa", "eager") for c in MODEL_CASES if a == "sdpa" or c not in LARGE],
)
def test_greedy_tokens_equal_the_original(
    golden_model: Callable[..., DeepseekVLV2ForCausalLM],
    batch_of: Callable[[str], Any],
    kind: str,
    attn: str,
    case: str,
) -> None:
    batch = batch_of(case)
    want = expected(kind, case)["greedy_ids"].tolist()
    out = golden_model(kind, attn).generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert out[0].tolist() == batch.input_ids[0].tolist() + want
