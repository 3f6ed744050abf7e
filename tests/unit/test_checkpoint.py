"""Checkpoints: the released layout in, the same names, shapes and values out, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import CASES, CHECKPOINTS, GREEDY, KINDS, mini_inputs, mini_model, model_inputs, shared_mini_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.offloading import without_overlaps

State = dict[str, torch.Tensor]


def stored(directory: Path) -> State:
    """Return all tensors of a directory."""
    state: State = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    return state


@cache
def exact_tensors(kind: str) -> State:
    """Return what `released` rounds, computed once: nobody changes it."""
    return {name: CHECKPOINTS.tensor(name, shape) for name, shape in CHECKPOINTS.shapes(kind).items()}


def released(kind: str, dtype: torch.dtype = torch.float32) -> State:
    """Return the golden checkpoint's tensors, straight from the script that defines it.

    The gate's correction bias stays float32: the steps of its training would vanish in bfloat16.
    """
    exact = "e_score_correction_bias"
    return {n: t if exact in n else t.to(dtype) for n, t in exact_tensors(kind).items()}


def assert_same_state(got: State, want: State) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize(("dtype", "shard"), [(torch.float32, "10MB"), (torch.bfloat16, "50GB")])
@pytest.mark.parametrize("kind", KINDS)
def test_saving_gives_back_the_released_names_shapes_and_values(
    golden_checkpoint: Callable[[str], Path], tmp_path: Path, kind: str, dtype: torch.dtype, shard: str
) -> None:
    model = DeepseekVLV2ForCausalLM.from_pretrained(golden_checkpoint(kind), dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10MB")
    assert_same_state(stored(tmp_path), released(kind, dtype))


def test_what_was_saved_in_shards_loads_again(kind: str, tmp_path: Path) -> None:
    model = shared_mini_model(kind)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    again = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_state(dict(again.state_dict()), dict(model.state_dict()))
    assert again.config.to_dict().keys() == model.config.to_dict().keys()


def test_tied_embeddings_are_saved_once_and_load_tied(tmp_path: Path) -> None:
    model = mini_model("tiny", tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "language.lm_head.weight" not in stored(tmp_path)
    again = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


# ---------------------------------------------------------------- loading


def test_every_tensor_of_a_checkpoint_reaches_the_model(golden_checkpoint: Callable[[str], Path], kind: str) -> None:
    model = DeepseekVLV2ForCausalLM.from_pretrained(golden_checkpoint(kind), dtype=torch.float32)
    state, want = model.state_dict(), released(kind)
    for name, tensor in state.items():
        prefix, is_fused, projection = name.rpartition(".experts.")
        if not is_fused:
            assert torch.equal(tensor, want.pop(name)), name
            continue
        for expert in range(8):
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            rows = [want.pop(f"{prefix}.experts.{expert}.{part}.weight") for part in parts]
            assert torch.equal(tensor[expert], torch.cat(rows)), name
    assert not want


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
@pytest.mark.parametrize("trust", [True, False])
def test_auto_classes_load_a_released_directory(
    golden_checkpoint: Callable[[str], Path], auto: type, trust: bool
) -> None:
    model = auto.from_pretrained(golden_checkpoint("base"), trust_remote_code=trust)
    assert type(model) is DeepseekVLV2ForCausalLM
    assert model.dtype == torch.bfloat16  # what its config.json says
    assert not model.training


def test_auto_config_and_processor_load_a_released_directory(golden_checkpoint: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(golden_checkpoint("small"), trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(golden_checkpoint("small"), trust_remote_code=True)
    assert type(config) is DeepseekVLV2Config
    assert type(processor) is DeepseekVLV2Processor


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype_are_accepted(golden_checkpoint: Callable[[str], Path], name: str) -> None:
    model = DeepseekVLV2ForCausalLM.from_pretrained(golden_checkpoint("tiny"), **{name: torch.float16})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_special_ids_come_from_the_checkpoint(golden_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """No release has a generation_config.json."""
    model = AutoModelForCausalLM.from_pretrained(golden_checkpoint("tiny"), trust_remote_code=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    for config in (model.generation_config, model.language.generation_config, again.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 1)


def write_checkpoint(directory: Path, state: State, kind: str, shards: int = 1, digits: int = 6) -> None:
    """Write a mini checkpoint with shard names of 5 and ``digits`` digits, as the releases have."""
    directory.mkdir(exist_ok=True)
    shared_mini_model(kind).config.save_pretrained(directory)
    names, weight_map = sorted(state), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:0{digits}d}.safetensors"
        part = {name: state[name].contiguous() for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def mini_states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """Return the tensors of a mini checkpoint of each kind in the released layout."""
    states = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp(kind)
        shared_mini_model(kind).save_pretrained(out)
        states[kind] = stored(out)
    return states


@pytest.mark.parametrize("digits", [5, 6])
def test_shards_with_five_and_six_digits_load(
    mini_states: dict[str, State], tmp_path: Path, kind: str, digits: int
) -> None:
    write_checkpoint(tmp_path, mini_states[kind], kind, shards=4, digits=digits)
    model = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_state(dict(model.state_dict()), dict(shared_mini_model(kind).state_dict()))


@pytest.mark.parametrize("keep", ["all", "none"])
def test_the_unused_pooling_head_may_be_there_or_not(
    mini_states: dict[str, State], tmp_path: Path, kind: str, keep: str
) -> None:
    state = {n: t for n, t in mini_states[kind].items() if keep == "all" or not n.startswith("vision.attn_pool.")}
    assert (len(state) == len(mini_states[kind])) == (keep == "all")
    write_checkpoint(tmp_path, state, kind)
    model = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = mini_inputs([3, (1, 1), 2])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, shared_mini_model(kind)(**inputs).logits)


BROKEN = [
    "image_newline",
    "vision.blocks.1.attn.qkv.bias",
    "projector.layers.2.weight",
    "language.model.layers.0.mlp.up_proj.weight",
    "language.model.layers.1.mlp.experts.3.gate_proj.weight",
    "language.model.layers.2.mlp.gate.weight",
    "language.lm_head.weight",
]


@pytest.mark.parametrize("name", BROKEN)
def test_a_missing_tensor_is_named(mini_states: dict[str, State], tmp_path: Path, name: str) -> None:
    state = dict(mini_states["small"])
    del state[name]
    write_checkpoint(tmp_path, state, "small")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", BROKEN)
def test_a_misshaped_tensor_is_named_with_both_shapes(mini_states: dict[str, State], tmp_path: Path, name: str) -> None:
    state = dict(mini_states["small"])
    shape = list(state[name].shape)
    state[name] = torch.zeros(shape[0] + 1, *shape[1:])
    write_checkpoint(tmp_path, state, "small")
    with pytest.raises(ValueError) as error:
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)
    assert name in str(error.value)
    assert str(shape) in str(error.value) and str(list(state[name].shape)) in str(error.value)


@pytest.mark.parametrize(
    "name", ["tile_indicators", "language.model.layers.3.input_layernorm.weight", "vision.head.bias"]
)
def test_an_extra_tensor_is_named(mini_states: dict[str, State], tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, {**mini_states["small"], name: torch.zeros(64)}, "small")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)


def test_all_that_does_not_fit_is_named_at_once(mini_states: dict[str, State], tmp_path: Path) -> None:
    state = dict(mini_states["base"])
    del state["language.model.layers.1.mlp.gate.e_score_correction_bias"], state["view_seperator"]
    write_checkpoint(tmp_path, {**state, "one_more": torch.zeros(1), "image_newline": torch.zeros(3)}, "base")
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    for name in ("layers.1.mlp.gate.e_score_correction_bias", "view_seperator", "one_more", "image_newline"):
        assert name in str(error.value)


def test_a_missing_shard_is_named(mini_states: dict[str, State], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, mini_states["tiny"], "tiny", shards=3)
    (tmp_path / "model-00002-of-000003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-000003\.safetensors"):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)


# ---------------------------------------------------------------- offloading


def device_map(rest: str) -> dict[str, str]:
    """Put layers 1 and 2 of the language model, experts included, somewhere else."""
    whole = dict.fromkeys(("vision", "projector", "image_newline", "view_seperator", "language.lm_head"), "cpu")
    whole |= dict.fromkeys(("language.model.embed_tokens", "language.model.norm", "language.model.layers.0"), "cpu")
    whole |= dict.fromkeys(("language.model.rotary_emb",), "cpu")
    return whole | dict.fromkeys(("language.model.layers.1", "language.model.layers.2"), rest)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_layers_offloaded_to_disk_give_the_same(
    mini_states: dict[str, State], tmp_path: Path, kind: str, attn: str
) -> None:
    write_checkpoint(tmp_path / "model", mini_states[kind], kind, shards=2)
    model = DeepseekVLV2ForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        device_map=device_map("disk"),
        offload_folder=tmp_path / "offload",
        attn_implementation=attn,
    )
    assert model.language.model.layers[2].mlp.gate.weight.device.type == "meta"
    assert_answers_like(model, shared_mini_model(kind, attn))


@pytest.mark.parametrize(
    ("places", "memory"),
    [
        ({"": "disk"}, None),
        ({"": "cpu", "vision": "disk", "language.model.layers.2.mlp.experts": "disk"}, None),
        ({"": "disk", "language.lm_head": "cpu", "language.model.layers.1": "cpu"}, None),
        ("auto", {"cpu": 200_000}),
    ],
)
def test_whatever_is_on_the_disk_answers_the_same(
    places: Any, memory: Any, mini_states: dict[str, State], tmp_path: Path
) -> None:
    """Images are embedded outside the model's own forward pass, before anything has brought its weights."""
    write_checkpoint(tmp_path / "model", mini_states["small"], "small")
    model = DeepseekVLV2ForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        device_map=places,
        max_memory=memory,
        offload_folder=tmp_path / "offload",
    )
    on_disk = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert any("experts" in name for name in on_disk)
    assert_answers_like(model, shared_mini_model("small"))


def test_places_that_hold_one_another_are_taken_apart() -> None:
    model = shared_mini_model("small")
    layers = "language.model.layers"
    spread = without_overlaps(model, {"": "cpu", "language": 0, f"{layers}.1.mlp.experts": "disk", "vision": 1})
    for outer in spread:
        assert not any(inner.startswith(f"{outer}.") for inner in spread)

    def place(name: str) -> Any:
        (found,) = (where for key, where in spread.items() if name == key or name.startswith(f"{key}."))
        return found

    wanted = {f"{layers}.1.mlp.experts": "disk", "language": 0, "vision": 1, "": "cpu"}
    for name, _ in model.named_parameters():
        assert place(name) == next(where for key, where in wanted.items() if name.startswith(key))
    assert without_overlaps(model, {"vision": 0, "language": 1}) == {"vision": 0, "language": 1}
    assert without_overlaps(model, {"": "cuda:0"}) == {"": "cuda:0"}


def test_a_model_of_which_a_part_is_nowhere_is_refused(mini_states: dict[str, State], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, mini_states["tiny"], "tiny")
    with pytest.raises(ValueError, match='"meta" beside other places'):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu", "language.lm_head": "meta"})


def test_layers_offloaded_to_the_cpu_give_the_same(kind: str) -> None:
    """On a machine without accelerators the CPU is both where weights wait and where they run."""
    accelerate = pytest.importorskip("accelerate")
    model = mini_model(kind)
    accelerate.cpu_offload(model.language.model, execution_device=torch.device("cpu"))
    assert model.language.model.layers[1].self_attn.o_proj.weight.device.type == "meta"
    assert_answers_like(model, shared_mini_model(kind))


def test_an_automatic_device_map_gives_the_same(mini_states: dict[str, State], tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, mini_states[kind], kind)
    model = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="auto").cpu()
    assert_answers_like(model, shared_mini_model(kind))


@torch.no_grad()
def assert_answers_like(model: DeepseekVLV2ForCausalLM, reference: DeepseekVLV2ForCausalLM) -> None:
    inputs = mini_inputs([4, (2, 1), 6], [7])
    real = inputs["attention_mask"]
    # Offloaded layers cannot absorb kv_b_proj into the query: float32 sums in another order.
    torch.testing.assert_close(model(**inputs).logits[real], reference(**inputs).logits[real], rtol=0, atol=1e-5)
    assert model.generate(**inputs, **GREEDY).tolist() == reference.generate(**inputs, **GREEDY).tolist()


# ---------------------------------------------------------------- code beside the weights


def test_a_directory_without_processor_config_still_names_no_stray_template(
    golden_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """One release ships the chat template of another model; the prompt must not follow it."""
    for name in ("tokenizer.json", "processor_config.json", "config.json"):
        shutil.copy(golden_checkpoint("small") / name, tmp_path)
    stray = "{% for m in messages %}### Instruction:\n{{ m['content'] }}\n### Response:\n{% endfor %}"
    fields = json.loads((golden_checkpoint("small") / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": stray}))
    (tmp_path / "chat_template.jinja").write_text(stray)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": stray}))
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    messages = CASES["text_only"]["conversation"]
    for renderer in (processor, processor.tokenizer):
        text = renderer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert "###" not in text and "<|Assistant|>:" in text


@torch.no_grad()
def test_real_tokens_survive_a_round_trip_through_disk(
    golden_checkpoint: Callable[[str], Path], processor: DeepseekVLV2Processor, tmp_path: Path
) -> None:
    model = DeepseekVLV2ForCausalLM.from_pretrained(golden_checkpoint("base"), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.dtype == torch.float32
    batch = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)(
        conversations=CASES["text_only"]["conversation"]
    )
    assert torch.equal(again(**model_inputs(batch)).logits, model(**model_inputs(batch)).logits)
