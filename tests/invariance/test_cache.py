"""However a sequence is cut up, it gives the same: prefill = decode steps, chunked = whole, absorbed = expanded."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from support import GREEDY, mini_inputs, mini_language, shared_mini_model

from deepseek_vl2.models.attention import DeepseekV2Attention

# Float32 sums in another order: a few units in the last place of logits of size 10.
TOLERANCE = {"rtol": 0, "atol": 1e-5}

PROMPT = [5, (2, 1), 9, (1, 1), 4]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_decode_steps_equal_one_forward_pass(kind: str, attn: str) -> None:
    model = shared_mini_model(kind, attn)
    inputs = mini_inputs(PROMPT, [3])
    whole = model(**inputs).logits
    embeds = model.prepare_inputs_embeds(**inputs)
    cache, steps = None, []
    for end in range(1, embeds.shape[1] + 1):
        out = model(
            inputs_embeds=embeds[:, end - 1 : end],
            attention_mask=inputs["attention_mask"][:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        steps.append(out.logits)
    real = inputs["attention_mask"]
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], whole[real], **TOLERANCE)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
@torch.no_grad()
def test_a_prompt_in_chunks_equals_the_whole(kind: str, attn: str, chunk: int) -> None:
    model = shared_mini_model(kind, attn)
    inputs = mini_inputs(PROMPT, [(1, 1), 8], [4])
    whole = model(**inputs, logits_to_keep=1).logits
    embeds, cache = model.incremental_prefilling(**inputs, chunk_size=chunk)
    assert cache.get_seq_length() == embeds.shape[1] - 1
    last = model(
        inputs_embeds=embeds[:, -1:], attention_mask=inputs["attention_mask"], past_key_values=cache, use_cache=True
    ).logits
    torch.testing.assert_close(last, whole, **TOLERANCE)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["small", "base"])
@pytest.mark.parametrize("past", [0, 6])
@torch.no_grad()
def test_absorbed_attention_equals_expanded(kind: str, attn: str, past: int) -> None:
    model = mini_language(kind, attn)
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :4] = False
    outputs = {}
    for absorbed in (True, False):
        with patch.object(DeepseekV2Attention, "prefers_absorbed", lambda *_, form=absorbed: form):
            cache = None
            if past:
                cache = model(ids[:, :past], attention_mask=mask[:, :past], use_cache=True).past_key_values
            out = model(ids[:, past:], attention_mask=mask, past_key_values=cache)
            outputs[absorbed] = out.logits[mask[:, past:]]
    torch.testing.assert_close(outputs[True], outputs[False], **TOLERANCE)


@pytest.mark.parametrize("kind", ["small", "base"])
@torch.no_grad()
def test_both_forms_are_used(kind: str) -> None:
    """A long prompt is expanded and a decoded token absorbed; otherwise the test above compares nothing that runs."""
    model = shared_mini_model(kind)
    inputs = mini_inputs([300])
    forms: list[str] = []
    with (
        patch.object(DeepseekV2Attention, "attend_absorbed", _noted(forms, "attend_absorbed")),
        patch.object(DeepseekV2Attention, "attend_expanded", _noted(forms, "attend_expanded")),
    ):
        model.generate(**inputs, **{**GREEDY, "max_new_tokens": 2})
    layers = model.config.language_config.num_hidden_layers
    assert forms == ["attend_expanded"] * layers + ["attend_absorbed"] * layers


def _noted(forms: list[str], name: str):  # type: ignore[no-untyped-def]
    original = getattr(DeepseekV2Attention, name)

    def noted(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        forms.append(name)
        return original(self, *args, **kwargs)

    return noted


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_the_cache_holds_the_latent_and_the_rope_key_only(kind: str, attn: str) -> None:
    model = shared_mini_model(kind, attn)
    config = model.config.language_config
    inputs = mini_inputs([5, (1, 1), 3])
    cache = model(**inputs, use_cache=True).past_key_values
    tokens = inputs["input_ids"].shape[1]
    head = config.hidden_size // config.num_attention_heads
    numbers = config.kv_lora_rank + config.qk_rope_head_dim if config.use_mla else 2 * config.num_key_value_heads * head
    assert len(cache.layers) == config.num_hidden_layers
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == tokens * numbers
        assert layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() == 4 * tokens * numbers
