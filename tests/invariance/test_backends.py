"""Different ways to compute one thing agree: attention, experts, the vision tower's backends, dtypes."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import mini_inputs, mini_language, mini_model, shared_mini_model

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.configuration_deepseek import DeepseekV2Config
from deepseek_vl2.models.rope import RotaryEmbedding

# Float32 sums in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}
# bfloat16 has 8 bits: logits of size 10 are rounded by 0.03, and three layers add up such roundings.
BFLOAT16_TOLERANCE = 0.3
FLOAT16_TOLERANCE = 0.05  # 11 bits

PROMPT = [5, (2, 1), 9]
HAS_XFORMERS = importlib.util.find_spec("xformers") is not None


@torch.no_grad()
def test_sdpa_equals_eager(kind: str) -> None:
    inputs = mini_inputs(PROMPT, [6])
    real = inputs["attention_mask"]
    sdpa, eager = (shared_mini_model(kind, attn)(**inputs).logits[real] for attn in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, **TOLERANCE)


@pytest.mark.parametrize("implementation", ["deepseek_vl2", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_fused_experts_equal_the_plain_definition(kind: str, implementation: str) -> None:
    inputs = mini_inputs(PROMPT, [6])
    real = inputs["attention_mask"]
    eager, fused = (mini_model(kind, experts=name)(**inputs).logits[real] for name in ("eager", implementation))
    torch.testing.assert_close(fused, eager, **TOLERANCE)


def test_fused_experts_are_what_runs_by_default(kind: str) -> None:
    assert mini_model(kind).language.config._experts_implementation == "deepseek_vl2"


@torch.no_grad()
def test_experts_equal_a_loop_over_tokens(kind: str) -> None:
    """Against an independent formula: each token's experts one by one."""
    experts = mini_language(kind).model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 64, generator=generator)
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(7)])
    weights = torch.rand(7, 3, generator=generator)
    want = torch.zeros_like(hidden)
    for token in range(7):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            want[token] += weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(experts(hidden, ids, weights), want, **TOLERANCE)


# ---------------------------------------------------------------- the vision tower


def with_vision_backend(model: DeepseekVLV2ForCausalLM, backend: str) -> DeepseekVLV2ForCausalLM:
    model = copy.deepcopy(model)
    model.vision.set_attention_backend(backend)
    return model


@torch.no_grad()
def test_vision_sdpa_equals_eager() -> None:
    tiles = mini_inputs([(2, 2)])["images"][0]
    model = shared_mini_model("tiny")
    sdpa, eager = (with_vision_backend(model, backend).vision(tiles) for backend in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, **TOLERANCE)


@pytest.mark.skipif(not HAS_XFORMERS, reason="xformers is not installed")
@torch.no_grad()
def test_vision_xformers_equals_eager() -> None:
    pytest.importorskip("xformers.ops")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        pytest.skip("xformers has no attention kernel for the CPU")
    tiles = mini_inputs([(2, 2)])["images"][0].to(device)
    model = copy.deepcopy(shared_mini_model("tiny")).to(device)
    xformers, eager = (with_vision_backend(model, backend).vision(tiles) for backend in ("xformers", "eager"))
    torch.testing.assert_close(xformers, eager, rtol=0, atol=1e-4)  # CUDA matrix products in another order


@pytest.mark.skipif(HAS_XFORMERS, reason="xformers is installed")
def test_xformers_that_is_not_installed_is_named_with_what_to_do() -> None:
    fields = shared_mini_model("tiny").config.to_dict()
    fields["vision_config"]["attention_backend"] = "xformers"
    with pytest.raises(ImportError, match=r"xformers.*pip install"):
        DeepseekVLV2ForCausalLM(DeepseekVLV2Config.from_dict(fields))
    with pytest.raises(ImportError, match=r"xformers.*pip install"):
        copy.deepcopy(shared_mini_model("tiny")).vision.set_attention_backend("xformers")


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_from_pretrained_takes_the_vision_backend(golden_checkpoint: Callable[[str], Path], backend: str) -> None:
    model = DeepseekVLV2ForCausalLM.from_pretrained(golden_checkpoint("tiny"), vision_attention_backend=backend)
    assert {block.attn.backend for block in model.vision.blocks} == {backend}


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize(("kind", "attn"), [("tiny", "sdpa"), ("small", "eager"), ("base", "sdpa")])
@torch.no_grad()
def test_casting_after_loading_equals_loading_in_bfloat16(
    golden_checkpoint: Callable[[str], Path], kind: str, attn: str
) -> None:
    """The original's positions beyond 256 collide after such a cast."""
    path = golden_checkpoint(kind)
    loaded = DeepseekVLV2ForCausalLM.from_pretrained(path, torch_dtype=torch.bfloat16, attn_implementation=attn)
    cast = DeepseekVLV2ForCausalLM.from_pretrained(path, torch_dtype=torch.float32, attn_implementation=attn)
    cast = cast.to(torch.bfloat16)
    ids = torch.randint(3, 128000, (1, 700), generator=torch.Generator().manual_seed(0))
    got, want = (model(ids, output_hidden_states=True, logits_to_keep=20) for model in (cast, loaded))
    assert got.hidden_states[-1].dtype == torch.bfloat16
    assert torch.equal(got.hidden_states[-1], want.hidden_states[-1])
    assert torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("how", ["cast", "built"])
def test_every_position_has_its_own_rotation_in_bfloat16(kind: str, how: str) -> None:
    model = mini_language(kind)
    rotary = model.to(torch.bfloat16).model.rotary_emb if how == "cast" else RotaryEmbedding(model.config).bfloat16()
    positions = torch.arange(4096)[None]
    cos, sin = rotary(positions, torch.float32)
    exact_cos, exact_sin = RotaryEmbedding(model.config)(positions, torch.float32)
    assert torch.equal(cos, exact_cos) and torch.equal(sin, exact_sin)
    assert len(torch.cat((cos, sin), dim=-1)[0].unique(dim=0)) == 4096


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, BFLOAT16_TOLERANCE), (torch.float16, FLOAT16_TOLERANCE)]
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_half_precision_stays_near_float32(kind: str, attn: str, dtype: torch.dtype, tolerance: float) -> None:
    model = shared_mini_model(kind, attn)
    inputs = mini_inputs([400, (2, 1), 20], [30])
    want = model(**inputs, logits_to_keep=1).logits
    got = copy.deepcopy(model).to(dtype)(**inputs, logits_to_keep=1).logits
    assert got.dtype == torch.float32
    assert bool(torch.isfinite(got).all())
    # A rounding may tip a token into another expert, so the mean is held to the tolerance, and not the largest.
    assert (got - want).abs().mean() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_float32_images_serve_a_model_of_another_dtype(kind: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(shared_mini_model(kind)).to(dtype)
    inputs = mini_inputs(PROMPT)
    embeds = model.prepare_inputs_embeds(**inputs)
    cast = model.prepare_inputs_embeds(**{**inputs, "images": inputs["images"].to(dtype)})
    assert embeds.dtype == dtype and torch.equal(embeds, cast)


# ---------------------------------------------------------------- rotary positions


@torch.no_grad()
def test_each_row_of_a_batch_has_its_own_dynamic_rope(kind: str) -> None:
    """A row beyond the trained length rotates by a larger base; a shorter row in its batch must not."""
    model = mini_language(kind, max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": 2.0})
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(3, 300, (1, n), generator=generator) for n in (40, 10))
    ids = torch.cat((long, torch.cat((torch.full((1, 30), 2), short), dim=1)))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :30] = False
    together = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(together[:1], model(long).logits, **TOLERANCE)
    torch.testing.assert_close(together[1:, 30:], model(short).logits, **TOLERANCE)


def test_dynamic_rope_is_the_default_one_within_the_trained_length() -> None:
    fields = {"n_routed_experts": None, "max_position_embeddings": 32}
    dynamic = RotaryEmbedding(DeepseekV2Config(**fields, rope_scaling={"type": "dynamic", "factor": 4.0}))
    plain = RotaryEmbedding(DeepseekV2Config(**fields))
    positions = torch.arange(32)[None]
    torch.testing.assert_close(dynamic(positions, torch.float32), plain(positions, torch.float32), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- training


def gradients(model: DeepseekVLV2ForCausalLM) -> dict[str, torch.Tensor]:
    inputs = mini_inputs(PROMPT, [6], seed=3)
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_every_part_but_the_unused_head(kind: str) -> None:
    model = mini_model(kind).train()
    got = set(gradients(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert got == trained
    assert not any(name.startswith("vision.attn_pool") for name in trained)
    assert {"image_newline", "view_seperator", "vision.pos_embed", "projector.layers.0.weight"} <= trained


def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    model = mini_model(kind).train()
    want = gradients(model)
    model.gradient_checkpointing_enable()
    got = gradients(model)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")  # recomputed


@pytest.mark.parametrize("implementation", ["deepseek_vl2", "grouped_mm", "batched_mm"])
def test_fused_experts_give_the_same_gradients(kind: str, implementation: str) -> None:
    want, got = (gradients(mini_model(kind, experts=name).train()) for name in ("eager", implementation))
    for name, grad in want.items():
        # Float32 sums in another order, of gradients up to 1.
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
