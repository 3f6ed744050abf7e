"""Packed weights and device maps: loaded whole wherever they have room, and refused where some would be on the disk."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from mps_support import MPS, pretended_mps
from support import KINDS, mini_inputs, mini_model
from transformers import BitsAndBytesConfig
from transformers.distributed import DistributedConfig

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, loading
from deepseek_vl2.models.quantizer import WeightOnlyConfig

INPUTS = mini_inputs([5, (1, 1), 30])
WAYS = ["packed while read", "packed file"]
if find_spec("bitsandbytes") is not None:
    WAYS += ["nf4 while read", "nf4 file"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp("files") for name in ("released", "int4", "nf4")}
    mini_model("small").save_pretrained(found["released"])
    for way in WAYS[::2]:
        options = request(way)
        kind = "int4" if way.startswith("packed") else "nf4"
        DeepseekVLV2ForCausalLM.from_pretrained(found["released"], **options).save_pretrained(found[kind])
    return found


def request(way: str) -> dict[str, Any]:
    if way.endswith("file"):
        return {}
    nf4 = way.startswith("nf4")
    wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if nf4 else WeightOnlyConfig("int4")
    return {"quantization_config": wanted}


def load(files: dict[str, Path], way: str, **options: Any) -> Any:
    kind = "released" if not way.endswith("file") else "nf4" if way.startswith("nf4") else "int4"
    return DeepseekVLV2ForCausalLM.from_pretrained(files[kind], **request(way), **options).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**INPUTS).logits


@pytest.mark.parametrize("way", WAYS)
def test_an_automatic_map_beside_a_gpu(way: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """There transformers alone knows which device gets what: nothing is known of the disk before it has begun."""
    expected = logits(load(files, way))
    monkeypatch.setattr(loading.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(loading.torch.accelerator, "current_accelerator", lambda: None)
    assert torch.equal(logits(load(files, way, device_map="auto")), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_map_counts_the_packed_sizes(way: str, files: dict[str, Path]) -> None:
    """A host that could not hold the weights unpacked holds them packed."""
    held = sum(tensor.nbytes for tensor in load(files, way).state_dict().values())
    unpacked = sum(tensor.nbytes for tensor in mini_model("small").state_dict().values())
    most = (2 * held + unpacked) // 3
    assert held < most < unpacked
    model = load(files, way, device_map="auto", max_memory={"cpu": most})
    assert torch.equal(logits(model), logits(load(files, way)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["a layer", "all", "too little memory"])
def test_nothing_packed_is_left_on_the_disk(kind: str, way: str, files: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "a layer": {"device_map": {"": "cpu", "language.model.layers.2": "disk"}},
        "all": {"device_map": {"": "disk"}},
        "too little memory": {"device_map": "auto", "max_memory": {"cpu": 100_000}},
    }[kind]
    with pytest.raises(ValueError, match=r"the disk, and max_memory or the device_map leaves"):
        load(files, way, offload_folder=tmp_path, **options)


@pytest.mark.parametrize("buffers", [False, True])
def test_packed_layers_that_wait_on_the_host_give_the_same(buffers: bool, files: dict[str, Path]) -> None:
    """As where a map puts some on the CPU beside a GPU; here the CPU is both where weights wait and where they run.

    bitsandbytes' layers cannot wait, and its quantizers refuse such maps.
    """
    model = load(files, "packed file")
    expected, tokens = logits(model), model.generate(**INPUTS, max_new_tokens=3, do_sample=False)
    accelerate.cpu_offload(model.language.model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert model.language.model.norm.weight.device.type == "meta"
    # Offloaded layers cannot absorb kv_b_proj into the query: float32 sums in another order.
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert torch.equal(model.generate(**INPUTS, max_new_tokens=3, do_sample=False), tokens)


@pytest.mark.parametrize("way", [way for way in WAYS if way.endswith("file")])
@pytest.mark.parametrize(
    "options",
    [
        {"tp_plan": "auto"},
        {"distributed_config": DistributedConfig(tp_size=2)},
        {"ignore_mismatched_sizes": True},
        {"use_safetensors": False},
        {"variant": "other"},
        {"state_dict": {}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_packed_files_are_not_left_to_transformers(options: dict[str, Any], way: str, files: dict[str, Path]) -> None:
    """It would give the experts, whose packed tensors it does not know, random weights."""
    with pytest.raises(
        ValueError, match=rf"is packed \(.*\) and is read by .*leave {next(iter(options))}(=False)? out"
    ):
        load(files, way, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_packed_layers_on_two_devices(kind: str, weights: str, tmp_path: Path) -> None:
    """The last layers lie on a pretended device, which refuses to meet tensors of the host; hooks are accelerate's."""
    mini_model(kind).save_pretrained(tmp_path)
    model = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, quantization_config=WeightOnlyConfig(weights)).eval()
    expected, tokens = logits(model), model.generate(**INPUTS, max_new_tokens=3, do_sample=False)
    language = model.language.model
    places: dict[Any, torch.device] = dict.fromkeys((language.layers[1], language.layers[2]), MPS)
    host = (language.embed_tokens, language.rotary_emb, language.layers[0], language.norm, model.language.lm_head)
    places |= dict.fromkeys((*host, model.vision, model.projector), torch.device("cpu"))
    with pretended_mps():
        for module, place in places.items():
            hook = AlignDevicesHook()
            add_hook_to_module(module.to(place), hook)
            hook.execution_device = place  # not before: the hook would move tensors by PyTorch's own code
        assert torch.equal(logits(model), expected)
        assert torch.equal(model.generate(**INPUTS, max_new_tokens=3, do_sample=False).cpu(), tokens)
