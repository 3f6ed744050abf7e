"""Importing the package has no side effects but its registration with transformers' Auto classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WATCH = """
import collections, sys, socket, warnings
def refuse(*args, **kwargs):
    raise RuntimeError("the network was touched")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = refuse
import torch, timm, PIL.Image, transformers
from transformers import LlamaTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast, PreTrainedModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.generation import GenerationMixin
from transformers.cache_utils import DynamicCache, Cache
import timm.models.vision_transformer as timm_vit

WATCHED = [collections, collections.abc, LlamaTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast, PreTrainedModel,
           AutoTokenizer, GenerationMixin, DynamicCache, Cache, timm_vit, timm_vit.VisionTransformer,
           timm_vit.Attention,
           torch.nn.Linear, torch.nn.Module, PIL.Image, PIL.Image.Image, warnings, torch.nn.functional]
def state():
    kept = [{n: v for n, v in vars(o).items() if n not in ("__warningregistry__", "_filters_version")} for o in WATCHED]
    deepseek = {n: CONFIG_MAPPING[n] for n in CONFIG_MAPPING if "deepseek" in n and n != "deepseek_vl_v2"}
    pixels = PIL.Image.MAX_IMAGE_PIXELS
    return kept, deepseek, pixels, torch.get_default_dtype(), torch.get_num_threads(), warnings.filters[:]
before = state()
"""


BUILD = """
from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
DeepseekVLV2Processor.from_pretrained(sys.argv[1])
with torch.device("meta"):
    DeepseekVLV2ForCausalLM(DeepseekVLV2Config())
"""


# All of this package anew, in a process that has imported what it builds on already: that takes seconds.
WITHOUT_TRITON = """
import importlib.abc

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
for name in [name for name in sys.modules if name.partition(".")[0] in ("triton", "deepseek_vl2")]:
    del sys.modules[name]
import deepseek_vl2.serve.api.app, deepseek_vl2.engine.holder, deepseek_vl2.engine.backend
print("served without triton")
"""


@pytest.fixture(scope="module")
def imported(tokenizer_dir: Path) -> subprocess.CompletedProcess[str]:
    """Import everything that the contract names with the network cut off, then build a processor and a model."""
    code = (
        WATCH
        + """
import deepseek_vl2.models
import deepseek_vl2.models.processing_deepseek_vl_v2
import deepseek_vl2.models.modeling_deepseek_vl_v2
import deepseek_vl2.models.siglip_vit
after = state()
"""
        + BUILD
        + """
print("END OF WHAT WAS PRINTED")
for index, (old, new) in enumerate(zip(before[0], after[0])):
    changed = [n for n in {**old, **new} if old.get(n, "absent") is not new.get(n, "absent")]
    print("changed", WATCHED[index], changed) if changed else None
print("rest", before[1:] == after[1:])
print("class", CONFIG_MAPPING["deepseek_v2"].__module__, flush=True)
"""
        + WITHOUT_TRITON
    )
    arguments = [sys.executable, "-c", code, str(tokenizer_dir)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)


def test_importing_works_without_a_network(imported: subprocess.CompletedProcess[str]) -> None:
    assert imported.returncode == 0, imported.stderr


def test_importing_and_building_print_nothing(imported: subprocess.CompletedProcess[str]) -> None:
    assert imported.stderr == ""
    assert imported.stdout.startswith("END OF WHAT WAS PRINTED"), imported.stdout


def test_importing_patches_nothing(imported: subprocess.CompletedProcess[str]) -> None:
    assert "changed" not in imported.stdout, imported.stdout
    assert "rest True" in imported.stdout


def test_transformers_keeps_its_own_deepseek_v2(imported: subprocess.CompletedProcess[str]) -> None:
    assert "class transformers.models.deepseek_v2." in imported.stdout


NAMES = {
    "deepseek_vl2.models": "DeepseekVLV2Processor DeepseekVLV2ForCausalLM",
    "deepseek_vl2.models.processing_deepseek_vl_v2": "DeepseekVLV2Processor select_best_resolution"
    " VLChatProcessorOutput BatchCollateOutput ImageTransform",
    "deepseek_vl2.models.modeling_deepseek_vl_v2": "DeepseekVLV2ForCausalLM DeepseekVLV2Config VisionEncoderConfig"
    " MlpProjectorConfig MlpProjector DeepSeekVLV2CausalLMOutputWithPast DeepseekVLV2PreTrainedModel",
    "deepseek_vl2.models.configuration_deepseek": "DeepseekV2Config",
    "deepseek_vl2.models.modeling_deepseek": "DeepseekV2Config DeepseekV2Model DeepseekV2ForCausalLM",
    "deepseek_vl2.models.siglip_vit": "create_siglip_vit SigLIP_MODEL_CONFIG VisionTransformer",
    "deepseek_vl2.models.conversation": "Conversation SeparatorStyle get_conv_template register_conv_template"
    " conv_templates",
    "deepseek_vl2.utils.io": "load_pretrained_model load_pil_images load_json",
    "deepseek_vl2.serve.inference": "load_model convert_conversation_to_prompts deepseek_generate generate",
    "deepseek_vl2.serve.app_modules.utils": "parse_ref_bbox",
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_have_their_import_paths(module: str) -> None:
    imported = __import__(module, fromlist=["*"])
    assert [name for name in NAMES[module].split() if not hasattr(imported, name)] == []


def test_the_server_is_imported_where_there_is_no_triton(imported: subprocess.CompletedProcess[str]) -> None:
    """As on a Mac."""
    assert imported.stdout.endswith("served without triton\n"), imported.stderr
