"""Configs: every choice checked when built, every default able to build a model, JSON without loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CHECKPOINTS, KINDS, RELEASES, language_fields, mini_config, mini_language

from deepseek_vl2.models.configuration_deepseek import DeepseekV2Config
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM, DeepseekV2Model
from deepseek_vl2.models.modeling_deepseek_vl_v2 import (
    DeepseekVLV2Config,
    DeepseekVLV2ForCausalLM,
    MlpProjector,
    MlpProjectorConfig,
    VisionEncoderConfig,
)
from deepseek_vl2.models.siglip_vit import SigLIP_MODEL_CONFIG, VisionTransformer, create_siglip_vit

EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"scoring_func": "tanh"}, "tanh"),
        ({"topk_method": "best"}, "best"),
        ({"hidden_act": "sillu"}, "sillu"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "spiral"),
        ({"rope_parameters": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": -1.0}}, "-1"),
        ({"rope_scaling": {"type": "dynamic", "factor": "two"}}, "two"),
        ({"ep_size": 2}, "ep_size"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim"),
        ({"v_head_dim": 0}, "v_head_dim"),
        ({"use_mla": False, "hidden_size": 100, "num_attention_heads": 3}, "num_attention_heads"),
        ({"use_mla": False, "num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"n_routed_experts": 8}, "num_experts_per_tok"),
        ({"n_routed_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({**EXPERTS, "n_group": 3}, "n_group"),
        ({**EXPERTS, "n_group": 2, "topk_group": 3}, "topk_group"),
        ({**EXPERTS, "moe_layer_freq": 0}, "moe_layer_freq"),
        ({**EXPERTS, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 1}, "num_experts_per_tok"),
    ],
)
def test_a_wrong_language_choice_is_an_error_that_names_it(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DeepseekV2Config(**fields)


@pytest.mark.parametrize(
    ("config", "fields", "named"),
    [
        (VisionEncoderConfig, {"global_pool": "mop"}, "mop"),
        (VisionEncoderConfig, {"attention_backend": "quick"}, "quick"),
        (VisionEncoderConfig, {"width": 100, "heads": 16}, "heads"),
        (VisionEncoderConfig, {"patch_size": 500}, "patch_size"),
        (MlpProjectorConfig, {"projector_type": "conv"}, "conv"),
        (MlpProjectorConfig, {"depth": 0}, "depth"),
        (MlpProjectorConfig, {"downsample_ratio": 0}, "downsample_ratio"),
        (DeepseekVLV2Config, {"tile_tag": "1D"}, "1D"),
        (DeepseekVLV2Config, {"language_config": {"topk_method": "best"}}, "best"),
        (DeepseekVLV2Config, {"projector_config": {"projector_type": "conv"}}, "conv"),
        (DeepseekVLV2Config, {"vision_config": {"global_pool": "mop"}}, "mop"),
    ],
)
def test_a_wrong_choice_elsewhere_is_an_error_that_names_it(config: type, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(**fields)


def test_an_unknown_siglip_model_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="siglip_huge"):
        create_siglip_vit("siglip_huge")


@pytest.mark.parametrize(("projector", "named"), [({"input_dim": 73}, "input_dim"), ({"n_embed": 65}, "n_embed")])
def test_parts_that_do_not_fit_each_other_are_named(projector: dict[str, int], named: str) -> None:
    fields = CHECKPOINTS.config("tiny")
    fields["projector_config"] = {"input_dim": 72, "n_embed": 64, **projector}
    with torch.device("meta"), pytest.raises(ValueError, match=named):
        DeepseekVLV2ForCausalLM(DeepseekVLV2Config(**fields))


# ---------------------------------------------------------------- defaults


def test_the_defaults_are_the_originals() -> None:
    config = DeepseekV2Config()
    want = {
        "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
        "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32, "n_shared_experts": None,
        "n_routed_experts": None, "ep_size": 1, "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "greedy", "n_group": None,
        "topk_group": None, "num_experts_per_tok": None, "moe_layer_freq": 1, "first_k_dense_replace": 0,
        "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001, "seq_aux": True,
        "hidden_act": "silu", "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
        "use_cache": True, "pad_token_id": None, "bos_token_id": 100000, "eos_token_id": 100001,
        "tie_word_embeddings": False, "rope_theta": 10000.0, "attention_bias": False, "attention_dropout": 0.0,
        "use_mla": True,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in want} == want


def test_the_other_defaults_are_the_originals() -> None:
    vision, projector, whole = VisionEncoderConfig(), MlpProjectorConfig(), DeepseekVLV2Config()
    assert (vision.model_name, vision.image_size, vision.patch_size) == ("siglip_large_patch16_384", 384, 16)
    assert (vision.width, vision.layers, vision.heads, vision.mlp_ratio) == (1024, 24, 16, 4)
    assert (vision.global_pool, vision.ignore_head, vision.class_token, vision.num_classes) == ("map", True, False, 0)
    assert (projector.projector_type, projector.input_dim, projector.n_embed) == ("downsample_mlp_gelu", 1152, 2048)
    assert (projector.depth, projector.mlp_ratio, projector.downsample_ratio) == (2, 1, 2)
    assert projector.token_pooling is False
    assert whole.global_view_pos == "head" and whole.candidate_resolutions == ((384, 384),)
    assert whole.tile_tag == "2D"


def test_the_originals_misspelt_default_is_understood() -> None:
    assert DeepseekV2Config(topk_method="gready").topk_method == "greedy"


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (DeepseekVLV2ForCausalLM, DeepseekVLV2Config),
        (DeepseekV2ForCausalLM, DeepseekV2Config),
        (DeepseekV2Model, DeepseekV2Config),
    ],
)
def test_default_configs_build_a_model(model: type, config: type) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in model(config()).parameters()) > 1e9


def test_the_default_vision_config_builds_a_tower() -> None:
    with torch.device("meta"):
        tower = VisionTransformer.from_config(VisionEncoderConfig())
    assert len(tower.blocks) == 24 and tower.embed_dim == 1024


@pytest.mark.parametrize("name", SigLIP_MODEL_CONFIG)
def test_every_named_siglip_tower_builds(name: str) -> None:
    with torch.device("meta"):
        tower = create_siglip_vit(name, image_size=SigLIP_MODEL_CONFIG[name]["image_size"])
    assert len(tower.blocks) == SigLIP_MODEL_CONFIG[name]["layers"]


@pytest.mark.parametrize(
    ("kind", "pooling", "side"),
    [
        ("identity", False, 5),
        ("linear", False, 5),
        ("mlp_gelu", False, 5),
        ("downsample_mlp_gelu", False, 3),
        ("identity", True, 2),
        ("linear", True, 2),
        ("mlp_gelu", True, 2),
    ],
)
def test_every_projector_builds_and_runs(kind: str, pooling: bool, side: int) -> None:
    config = MlpProjectorConfig(projector_type=kind, input_dim=12, n_embed=20, token_pooling=pooling)
    out = MlpProjector(config)(torch.randn(2, 25, 12))
    assert out.shape == (2, side * side, config.output_dim)


def test_pooling_before_downsampling_is_refused() -> None:
    with pytest.raises(ValueError, match="token_pooling"):
        MlpProjectorConfig(projector_type="downsample_mlp_gelu", token_pooling=True)


@pytest.mark.parametrize(
    "fields", [{"q_lora_rank": 24}, {"attention_bias": True}, {"n_routed_experts": None}, {"n_shared_experts": None}]
)
def test_the_other_ways_to_build_a_language_model_run(kind: str, fields: dict[str, Any]) -> None:
    model = mini_language(kind, **fields)
    assert bool(torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all())


@pytest.mark.parametrize(
    ("first", "freq", "moe"), [(0, 1, [0, 1, 2, 3]), (1, 1, [1, 2, 3]), (0, 2, [0, 2]), (1, 2, [2]), (4, 1, [])]
)
def test_which_layers_are_mixtures_of_experts(first: int, freq: int, moe: list[int]) -> None:
    model = mini_language("tiny", num_hidden_layers=4, first_k_dense_replace=first, moe_layer_freq=freq)
    assert [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")] == moe


# ---------------------------------------------------------------- rope dicts


def test_old_and_new_rope_dicts_mean_the_same() -> None:
    scaling = {"factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.7}
    old = DeepseekV2Config(rope_theta=5e5, rope_scaling={"type": "yarn", **scaling})
    renamed = DeepseekV2Config(rope_theta=5e5, rope_scaling={"rope_type": "yarn", **scaling})
    new = DeepseekV2Config(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **scaling})
    want = {"rope_type": "yarn", "rope_theta": 5e5, **scaling}
    assert old.rope_parameters == renamed.rope_parameters == new.rope_parameters
    assert old.rope_parameters.items() >= want.items()
    assert old.rope_theta == 5e5


@pytest.mark.parametrize("scaling", [None, {}, {"type": "default"}])
def test_no_scaling_is_the_default_rope(scaling: dict[str, Any] | None) -> None:
    config = DeepseekV2Config(rope_theta=123.0, rope_scaling=scaling)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 123.0}


# ---------------------------------------------------------------- JSON


def through_json(config: Any, directory: Path) -> Any:
    config.save_pretrained(directory)
    return type(config).from_pretrained(directory)


def release_fields(kind: str) -> dict[str, Any]:
    return json.loads((RELEASES / kind / "config.json").read_text(encoding="utf-8"))


def assert_holds(config: dict[str, Any], released: dict[str, Any], path: str = "") -> None:
    """Check that every field of a released config is there, with its value."""
    renamed = {"torch_dtype": "dtype", "transformers_version": None}
    for name, value in released.items():
        name = renamed.get(name, name)
        if name is None:
            continue
        if isinstance(value, dict):
            assert_holds(config[name], value, f"{path}{name}.")
        else:
            assert json.loads(json.dumps(config[name])) == value, f"{path}{name}"


@pytest.mark.parametrize("kind", KINDS)
def test_released_configs_survive_a_round_trip(kind: str, tmp_path: Path) -> None:
    config = DeepseekVLV2Config.from_pretrained(RELEASES / kind)
    assert_holds(json.loads(config.to_json_string(use_diff=False)), release_fields(kind))
    again = through_json(config, tmp_path)
    assert again.to_dict() == config.to_dict()
    assert_holds(json.loads((tmp_path / "config.json").read_text()), release_fields(kind))


@pytest.mark.parametrize(
    "config",
    [
        DeepseekV2Config(),
        DeepseekV2Config(rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 40, "mscale_all_dim": 0.7}),
        DeepseekV2Config(eos_token_id=[1, 5], q_lora_rank=None, **EXPERTS, topk_method="noaux_tc"),
        VisionEncoderConfig(heads=8, attention_backend="eager", global_pool=""),
        MlpProjectorConfig(projector_type="mlp_gelu", depth=3, token_pooling=True),
        DeepseekVLV2Config(),
        DeepseekVLV2Config(
            candidate_resolutions=[[384, 384], [768, 384]],
            global_view_pos="tail",
            language_config={"use_mla": False, "tie_word_embeddings": True},
            vision_config={"width": 64, "heads": 2},
            projector_config={"input_dim": 64, "n_embed": 4096},
        ),
    ],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_configs_survive_a_round_trip(config: Any, tmp_path: Path) -> None:
    again = through_json(config, tmp_path)
    assert again.to_dict() == config.to_dict()
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_left_out_projector_widths_follow_the_other_parts() -> None:
    config = DeepseekVLV2Config(vision_config={"width": 64, "heads": 2}, language_config={"hidden_size": 128})
    assert (config.projector_config.input_dim, config.projector_config.n_embed) == (64, 128)


def test_the_language_config_is_the_text_config(kind: str) -> None:
    config = mini_config(kind)
    assert config.text_config is config.language_config is config.get_text_config()
    assert config.language_config.to_dict().items() >= {"vocab_size": 320}.items()
    assert language_fields(kind)["vocab_size"] == 320


@pytest.mark.parametrize("kind", KINDS)
def test_released_models_take_their_sizes_from_the_config(kind: str) -> None:
    fields = release_fields(kind)
    config = DeepseekVLV2Config(**fields)
    assert config.vision_config.image_size == 384 and config.vision_config.heads == 16
    assert config.projector_config.input_dim == 1152
    assert len(config.candidate_resolutions) == 23
    assert config.language_config.use_mla == (kind != "tiny")
