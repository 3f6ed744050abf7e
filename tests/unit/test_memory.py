"""What a model needs, and the refusal of one that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import mini_config, mini_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, quantized_checkpoint
from deepseek_vl2.models.quantized_layers import packed_layers
from deepseek_vl2.models.quantizer import WeightOnlyConfig
from deepseek_vl2.utils import memory
from deepseek_vl2.utils.demo import write_demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model
from deepseek_vl2.utils.memory import Sizes, check_fits, model_sizes, parse_size, stored_sizes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_demo_checkpoint(tmp_path_factory.mktemp("memory")))


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16e9), ("12.5 GiB", 12.5 * 2**30), ("800mb", 8e8), ("7", 7), (123, 123)]
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: float) -> None:
    assert parse_size(text) == int(size)


@pytest.mark.parametrize("text", ["", "GB", "16 bananas", "-1GB", "0GB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"16GB or 12\.5GiB"):
        parse_size(text)


@pytest.mark.parametrize("kind", ["tiny", "small", "base"])
@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_planned_bytes_are_those_of_the_loaded_model(kind: str, weights: Any, tmp_path: Path) -> None:
    mini_model(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    config = WeightOnlyConfig(weights, head="int8")
    model = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    state = model.state_dict()
    exact = {name: 2 for name in state if name.endswith("e_score_correction_bias")}  # float32, two bytes more
    held = sum(t.numel() * t.element_size() for t in state.values()) - sum(2 * state[name].numel() for name in exact)
    assert model_sizes(mini_config(kind), config).weights[weights] == held
    model.save_pretrained(tmp_path / "packed")
    stored = stored_sizes(model.config, tmp_path / "packed").weights["stored"]
    assert held < stored < held + 200_000  # names and shapes of the tensors


class BytesAlive(TorchDispatchMode):
    """Counts the bytes of all memory that operations read or write, as long as something holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def now(self) -> int:
        """Return the bytes alive."""
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        return sum(size for _, size in self.held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.now())
        return out


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_loading_holds_the_packed_model_and_one_layer(
    weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nowhere on the way is there a second matrix in 16 bits, let alone the model."""
    experts = {"n_routed_experts": 8, "moe_intermediate_size": 512, "num_hidden_layers": 4}
    plain = mini_model("small", **experts).to(torch.bfloat16)
    matrices = [p for p in plain.language.parameters() if p.dim() > 1]
    layer = 2 * max(p.numel() for layer in plain.language.model.layers for p in layer.parameters())
    plain.save_pretrained(tmp_path)
    counter, pack = BytesAlive(), quantized_checkpoint._pack_slice

    def counting(*args: Any) -> Any:
        with counter:
            return pack(*args)

    monkeypatch.setattr(quantized_checkpoint, "_pack_slice", counting)
    monkeypatch.setattr("deepseek_vl2.models.quantization.CHUNK", 1 << 14)  # numbers in float32 at a time: a few
    config = WeightOnlyConfig(weights, group_size=32 if weights == "int4" else None)
    model = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    packed = sum(t.numel() * t.element_size() for _, held in packed_layers(model) for t in held.parameters())
    assert counter.now() >= 0.9 * packed  # what was counted is the model
    assert counter.most <= packed + layer, (counter.most, packed, layer)
    assert counter.most < 0.8 * 2 * sum(p.numel() for p in matrices)


def test_a_refusal_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes({"bfloat16": int(33e9), "int8": int(17e9), "int4": int(10e9), "fp8": int(17e9)}, cache=31_104)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(24e9))
    with pytest.raises(
        ValueError, match=r"about 34\.4 GB in bfloat16.*24\.0 GB free.*fits: quantize int8 \(18\.4 GB\)"
    ):
        check_fits(sizes, "bfloat16", CPU, "small")
    check_fits(sizes, "int8", CPU, "small")
    with pytest.raises(ValueError, match=r"12.0 GB allowed. What fits: quantize int4 \(11.4 GB\)\.$"):
        check_fits(sizes, "int8", CPU, "small", limit=int(12e9))
    with pytest.raises(ValueError, match="fits in no precision there"):
        check_fits(sizes, "int4", CPU, "small", limit=int(8e9))
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    check_fits(sizes, "bfloat16", CPU, "small")


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr(DeepseekVLV2ForCausalLM, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"100,?000|0.0 GB allowed"):
        load_pretrained_model(directory, device="cpu", max_memory="0.1MB")
    with pytest.raises(AssertionError, match="being loaded"):
        load_pretrained_model(directory, device="cpu", max_memory="8GB")


def test_a_name_of_a_kind_is_enough(directory: Path, tmp_path: Path) -> None:
    _, processor, model = load_pretrained_model(directory, device="cpu", quantize="int4")
    assert model.config.quantization_config.weights == "int4"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="as it is stored"):
        load_pretrained_model(tmp_path, device="cpu", max_memory="1kB")
    _, _, again = load_pretrained_model(tmp_path, device="cpu")
    assert again.config.quantization_config.weights == "int4"
    with pytest.raises(ValueError, match="not to 'int2'"):
        load_pretrained_model(directory, quantize="int2")  # type: ignore[arg-type]
