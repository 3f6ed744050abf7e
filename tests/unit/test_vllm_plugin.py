"""The plugin for vLLM without vLLM: what it registers, the config that vLLM gets, prompts, tiles and the tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from support import KINDS, RELEASES, mini_processor, noise_image

from deepseek_vl2.integrations import vllm as plugin
from deepseek_vl2.integrations.vllm.configuration import DeepseekVL2ReleasedConfig, LanguageConfig
from deepseek_vl2.integrations.vllm.inputs import (
    decode_odd_image,
    encode_images,
    is_tiled,
    largest_resolution,
    prompt_ids,
    tokens_of_image,
)
from deepseek_vl2.integrations.vllm.settings import PluginSettings
from deepseek_vl2.integrations.vllm.tokenizer import DeepseekVL2Tokenizer, prepare_tokenizer
from deepseek_vl2.models import DeepseekVLV2Config
from deepseek_vl2.models.tiling import TileGrid

REGISTRATION = """
import sys, types
def module(name, **names):
    sys.modules[name] = made = types.ModuleType(name)
    made.__dict__.update(names)
    return made
registered = {}
class Registry:
    register_model = staticmethod(registered.__setitem__)
maps, tokenizers, renderers, classes, configs = {}, {}, {}, {}, {}
module("vllm", ModelRegistry=Registry)
for name in ("model_executor", "model_executor.models", "renderers", "tokenizers"):
    module(f"vllm.{name}")
module("vllm.model_executor.models.config", MODELS_CONFIG_MAP=maps)
module("vllm.renderers.registry", RENDERER_REGISTRY=types.SimpleNamespace(renderers=renderers))
module("vllm.tokenizers.registry", TokenizerRegistry=types.SimpleNamespace(tokenizers=tokenizers))
their = module("vllm.transformers_utils.configs", _CLASS_TO_MODULE=classes)
module("vllm.transformers_utils", configs=their)
module("vllm.transformers_utils.config", _CONFIG_REGISTRY=configs)
from deepseek_vl2.integrations.vllm import register
register(); register()
heavy = sorted(name for name in ("torch", "transformers", "triton", "deepseek_vl2.models") if name in sys.modules)
import json
print(json.dumps([registered, configs, classes, tokenizers, renderers, sorted(maps), heavy]))
"""


def released_config(kind: str, **changes: Any) -> dict[str, Any]:
    """Return the content of a release's config.json; ``changes`` go to its language part."""
    fields = json.loads((RELEASES / kind / "config.json").read_text(encoding="utf-8"))
    fields["language_config"].update(changes)
    return fields


def test_registration_is_lazy_and_may_be_repeated() -> None:
    done = subprocess.run([sys.executable, "-c", REGISTRATION], capture_output=True, text=True, timeout=60, check=True)
    registered, configs, classes, tokenizers, renderers, settings, heavy = json.loads(done.stdout)
    room = "deepseek_vl2.integrations.vllm"
    assert registered == {"DeepseekVLV2ForCausalLM": f"{room}.model:DeepseekVLV2ForCausalLM"}
    assert configs == {"deepseek_vl_v2": "DeepseekVL2ReleasedConfig"}
    assert classes == {"DeepseekVL2ReleasedConfig": f"{room}.configuration"}
    assert tokenizers == {"deepseek_vl2": [f"{room}.tokenizer", "DeepseekVL2Tokenizer"]}
    assert renderers == {"deepseek_vl2": [f"{room}.renderer", "DeepseekVL2Renderer"]}
    assert settings == ["DeepseekVLV2ForCausalLM"]
    assert heavy == []


def test_a_vllm_that_has_moved_its_parts_still_starts(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    registered: dict[str, str] = {}
    made = types.ModuleType("vllm")
    made.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("vllm.")]:  # other tests may have brought the real one
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", made)
    plugin.register()
    assert list(registered) == ["DeepseekVLV2ForCausalLM"]
    assert "cannot run DeepSeek-VL2" in caplog.text


def test_the_entry_point_names_the_function() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split('[project.entry-points."vllm.general_plugins"]')[1].split("\n\n")[0]
    assert section.strip() == f'deepseek_vl2 = "{plugin.__name__}:register"'
    assert callable(plugin.register)


@pytest.mark.parametrize("mode", ["auto", "hf", "slow", "mistral"])
def test_tokenizers_that_lose_spaces_are_not_used(mode: str) -> None:
    model_config = SimpleNamespace(tokenizer_mode=mode)
    PluginSettings.verify_and_update_model_config(model_config)
    assert model_config.tokenizer_mode == ("mistral" if mode == "mistral" else "deepseek_vl2")


@pytest.mark.parametrize("kind", KINDS)
def test_released_config_files_keep_the_originals_defaults(kind: str) -> None:
    config = DeepseekVL2ReleasedConfig.from_dict(released_config(kind))
    ours = DeepseekVLV2Config.from_dict(released_config(kind))
    assert type(config) is DeepseekVLV2Config
    assert config.architectures == ["DeepseekVLV2ForCausalLM"]
    assert config.get_text_config() is config.language_config
    language = config.language_config
    assert isinstance(language, LanguageConfig) and language.architectures == ["DeepseekV2ForCausalLM"]
    rewritten = {"architectures", "n_group", "topk_group", "kv_lora_rank", "q_lora_rank"}
    rewritten |= {"qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
    theirs, mine = language.to_dict(), ours.language_config.to_dict()
    assert {k: v for k, v in theirs.items() if k not in rewritten} == {
        k: v for k, v in mine.items() if k not in rewritten
    }
    assert (language.n_group, language.topk_group) == (1, 1)
    # What vLLM makes the KV cache's heads from; a zero there is a floating point exception in FlashAttention.
    assert getattr(language, "head_dim", None) is None
    if kind == "tiny":
        assert (language.kv_lora_rank, language.qk_nope_head_dim, language.qk_rope_head_dim) == (None, 0, 0)
        assert language.hidden_size // language.num_attention_heads == 128
    else:
        assert (language.kv_lora_rank, language.qk_nope_head_dim, language.qk_rope_head_dim) == (512, 128, 64)


def test_the_rope_base_can_be_written_back() -> None:
    language = LanguageConfig(**released_config("small")["language_config"])
    language.rope_theta = 5e4
    assert language.rope_theta == language.rope_parameters["rope_theta"] == 5e4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_routed_experts": None}, "dense model"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
    ],
)
def test_what_vllm_would_compute_otherwise_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DeepseekVL2ReleasedConfig.from_dict(released_config("small", **changes))


def test_deepseek_ocr_keeps_its_own_config(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm.transformers_utils.configs.deepseek_vl2")
    module.DeepseekVLV2Config = SimpleNamespace(from_dict=lambda fields, **kwargs: "theirs")  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.transformers_utils", "vllm.transformers_utils.configs"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fields = {"model_type": "deepseek_vl_v2", "architectures": ["DeepseekOCRForCausalLM"]}
    assert DeepseekVL2ReleasedConfig.from_dict(fields) == "theirs"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiles_are_the_processors(count: int) -> None:
    processor = mini_processor()
    images = [noise_image(seed, width=70 * (1 + seed), height=90) for seed in range(count)]
    encoded = encode_images(processor, images, cropping=is_tiled(count))
    expected = processor(prompt="<image>" * count, images=images)
    assert encoded.tiles_VSSC.dtype == torch.uint8
    assert [list(grid) for grid in encoded.grids] == expected["images_spatial_crop"][0].tolist()
    numbers = encoded.values[torch.arange(3), encoded.tiles_VSSC.long()].permute(0, 3, 1, 2)
    assert torch.equal(numbers, expected["images"][0])
    marked = int(expected["images_seq_mask"].sum())
    assert sum(tokens_of_image(processor, grid) for grid in encoded.grids) == marked


def test_the_largest_image() -> None:
    processor = mini_processor()
    resolution, tokens = largest_resolution(processor)
    assert tokens == max(
        tokens_of_image(processor, TileGrid(width // 70, height // 70))
        for width, height in processor.candidate_resolutions
    )
    assert largest_resolution(processor, [[70, 70]]) == ((70, 70), tokens_of_image(processor, TileGrid(1, 1)))
    assert resolution in processor.candidate_resolutions


def test_conversations_have_one_token_an_image() -> None:
    processor = mini_processor()
    image = noise_image(1, width=140)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]},
        {"role": "assistant", "content": ":) Alike."},
        {"role": "user", "content": "Sure?"},
    ]
    ids = prompt_ids(processor, messages)
    shown = [dict(message) for message in messages]
    shown[1]["content"] = [{"type": "image", "image": image}] * 2 + [{"type": "text", "text": "Compare."}]
    expected = processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=True)[0].tolist()
    image_id = processor.image_token_id
    assert ids.count(image_id) == 2
    assert [id_ for id_ in ids if id_ != image_id] == [id_ for id_ in expected if id_ != image_id]
    open_end = [*messages[:1], {"role": "user", "content": "Say"}, {"role": "assistant", "content": "It"}]
    assert prompt_ids(processor, open_end, False, True)[-1] != processor.eos_id
    with pytest.raises(ValueError, match="system message must come first"):
        prompt_ids(processor, [messages[1], messages[0]])


def test_files_that_other_decoders_change_are_decoded_here(tmp_path: Path) -> None:
    def file(image: Image.Image) -> bytes:
        image.save(tmp_path / "image.png")
        return (tmp_path / "image.png").read_bytes()

    for mode in ("RGB", "L"):
        assert decode_odd_image(file(Image.new(mode, (4, 4)))) is None
    for mode in ("RGBA", "I;16", "P"):
        data = file(Image.new(mode, (4, 4)))
        assert decode_odd_image(data) == data
    assert decode_odd_image(b"no image") is None
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    data = (tmp_path / "turned.png").read_bytes()
    assert decode_odd_image(data) == data  # of which others may have the size as it is stored


def test_a_text_gets_one_bos() -> None:
    plain = mini_processor().tokenizer
    tokenizer = prepare_tokenizer(mini_processor().tokenizer)
    tokenizer.__class__ = DeepseekVL2Tokenizer
    text = "<|User|>: <image>\nHello  you\n\n<|Assistant|>:"
    body = plain.encode(text, add_special_tokens=False)
    bos = plain.bos_token_id
    assert tokenizer.encode(text) == tokenizer.encode(plain.bos_token + text) == [bos, *body]
    assert tokenizer(text)["input_ids"] == [bos, *body]
    assert tokenizer([text, plain.bos_token + text])["input_ids"] == [[bos, *body]] * 2
    assert tokenizer.encode(text, add_special_tokens=False) == body
    assert tokenizer.encode(text, truncation=True, max_length=5)[0] == bos
