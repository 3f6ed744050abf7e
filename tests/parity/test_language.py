"""The language model equals transformers' own DeepSeek-V3, DeepSeek-V2 and Llama where they describe the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import language_fields, mini_language
from torch import nn
from transformers import DeepseekV2Config as StockV2Config
from transformers import DeepseekV2ForCausalLM as StockV2
from transformers import DeepseekV3Config as StockV3Config
from transformers import DeepseekV3ForCausalLM as StockV3
from transformers import LlamaConfig, LlamaForCausalLM

# Float32 sums in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}

SIZES = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
]  # fmt: skip
MLA = ["q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"]
MOE = [
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace",
    "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob",
]  # fmt: skip


def stock_like(ours: nn.Module, config: type, model: type, names: list[str], **fields: Any) -> nn.Module:
    """Build transformers' model with the sizes and the weights of ours."""
    values = {name: getattr(ours.config, name) for name in names}
    values["rope_parameters"] = dict(ours.config.rope_parameters)
    stock = model(config(**{**values, **fields}, attn_implementation="eager")).float().eval()
    stock.load_state_dict(ours.state_dict(), strict=True)
    return stock


def assert_same_logits(ours: nn.Module, stock: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (2, 33), generator=generator)
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[1, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        got = ours(ids, attention_mask=mask).logits[mask.bool()]
        want = stock(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()].float()
    assert want.std() > 0.5  # logits that say something
    torch.testing.assert_close(got, want, **TOLERANCE)


YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.7, "mscale_all_dim": 0.7,
}  # fmt: skip


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 24},
        {"n_group": 4, "topk_group": 2},
        {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
        {"num_experts_per_tok": 5, "n_shared_experts": 1},
        {"rope_theta": 500.0},
        {"max_position_embeddings": 256, "rope_scaling": YARN},
    ],
    ids=lambda changes: ",".join(changes) or "as released",
)
def test_sigmoid_gated_latent_attention_equals_deepseek_v3(attn: str, changes: dict[str, Any]) -> None:
    ours = mini_language("base", attn, **changes)
    stock = stock_like(ours, StockV3Config, StockV3, SIZES + MLA + MOE)
    for layer in stock.model.layers[1:]:
        assert layer.mlp.gate.e_score_correction_bias.abs().max() > 0.05
    assert_same_logits(ours, stock)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 24},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        {"routed_scaling_factor": 1.7},
        {"first_k_dense_replace": 0},
    ],
    ids=lambda changes: ",".join(changes) or "as released",
)
def test_softmax_gated_latent_attention_equals_deepseek_v2(attn: str, changes: dict[str, Any]) -> None:
    ours = mini_language("small", attn, **changes)
    stock = stock_like(ours, StockV2Config, StockV2, [*SIZES, *MLA, *MOE, "topk_method"])
    assert_same_logits(ours, stock)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"attention_bias": True},
        {"rope_theta": 500.0},
        {"rope_scaling": {"type": "linear", "factor": 3.0}},
    ],
    ids=lambda changes: ",".join(changes) or "as released",
)
def test_dense_multi_head_attention_equals_llama(attn: str, changes: dict[str, Any]) -> None:
    ours = mini_language("tiny", attn, n_routed_experts=None, **changes)
    stock = stock_like(ours, LlamaConfig, LlamaForCausalLM, [*SIZES, "attention_bias"])
    assert_same_logits(ours, stock)


def test_the_language_fields_are_those_of_the_golden_checkpoints() -> None:
    assert language_fields("base")["topk_method"] == "noaux_tc"
