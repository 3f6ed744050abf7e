"""Packed checkpoints in vLLM's own parameters, where vLLM is installed; its CPU build is enough.

vLLM chooses kernels by the platform, so the CPU platform passes for a GPU of compute capability 9.0 while the model is
built. What is loaded is compared before vLLM rearranges it for a kernel, which would need that GPU.

Run as ``VLLM_MLA_DISABLE=1 pytest tests/parity/test_vllm_quantized.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm_support import vllm_checkpoint

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.quantizer import WeightOnlyConfig

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

FORMS: dict[str, dict[str, Any]] = {
    "int4-32": {"weights": "int4", "group_size": 32, "head": "int4"},
    "int4-64": {"weights": "int4", "group_size": 64},
    "int4-128": {"weights": "int4", "group_size": 128, "head": "int8"},
    "int8": {"weights": "int8", "head": "int8"},
    "fp8": {"weights": "fp8", "head": "fp8"},
    "fp8-block": {"weights": "fp8", "block": True},
}
LINEAR = {"int": "CompressedTensorsWNA16", "fp8": "CompressedTensorsW8A8Fp8"}
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
PART = re.compile(r"(.*)\.(weight_packed|weight_scale|weight)")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj")


@pytest.fixture(scope="module", params=["tiny", "small", "base"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint with released head sizes and few layers; 128 does not divide the dense layer's width."""
    fields = vllm_checkpoint().config_fields(request.param)
    sizes = {"vocab_size": 1024, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
    fields["language_config"] = {**fields["language_config"], **sizes, "intermediate_size": 1088}
    fields["vision_config"] = {**fields["vision_config"], "layers": 1}
    fields["image_token_id"] = 1000
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    DeepseekVLV2ForCausalLM(DeepseekVLV2Config(**fields)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpu_passed_for() -> Any:
    """Have vLLM's CPU platform say that it is a GPU of compute capability 9.0, and this process be all of a group."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    from deepseek_vl2.integrations.vllm import register

    register()
    with pytest.MonkeyPatch.context() as patch:
        kind = type(current_platform)

        def pretend() -> None:
            patch.setattr(kind, "_enum", PlatformEnum.CUDA)
            patch.setattr(kind, "get_device_capability", classmethod(lambda cls, device_id=0: DeviceCapability(9, 0)))
            patch.setattr(kind, "get_device_name", classmethod(lambda cls, device_id=0: "NVIDIA H200"))
            for operation in ("fp8", "block_fp8"):  # the CPU build has none of these
                patch.setattr(_custom_ops, f"cutlass_scaled_mm_supports_{operation}", lambda capability: True)

        yield pretend, patch.undo


def load_in_vllm(folder: Path, group: Path, gpu_passed_for: Any) -> Any:
    """Return vLLM's model with a checkpoint's tensors, as they were read."""
    import vllm.model_executor.models.deepseek_v2  # noqa: F401
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    pretend, undo = gpu_passed_for
    options: Any = {"max_model_len": 1024, "enforce_eager": True, "skip_mm_profiling": True}
    config = EngineArgs(model=str(folder), dtype="bfloat16", **options).create_engine_config()
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{group}", 0, "gloo")
            initialize_model_parallel(1, 1)
        pretend()
        try:
            with set_default_torch_dtype(torch.bfloat16):
                model = initialize_model(vllm_config=config)
            loader = DefaultModelLoader(config.load_config)
            model.load_weights(loader.get_all_weights(config.model_config, model))
        finally:
            undo()
    return model


def read_from(parameters: dict[str, torch.Tensor], layer: str, part: str, rows: dict[str, int]) -> torch.Tensor:
    """Return what vLLM has of one stored tensor; ``rows`` says how many rows each stored tensor of that part has."""
    expert = EXPERT.fullmatch(layer)
    if expert:
        prefix, index, name = expert.groups()
        whole = parameters[f"{prefix}.routed_experts.{'w2' if name == 'down' else 'w13'}_{part}"][int(index)]
        if part != "weight" and whole.shape[0] != rows[layer] * (1 if name == "down" else 2):
            whole = whole.T
        return whole if name == "down" else whole.chunk(2)[name == "up"]
    prefix, _, name = layer.rpartition(".")
    if f"{layer}.{part}" in parameters:
        return parameters[f"{layer}.{part}"]
    siblings = [sibling for sibling, fused in FUSED.items() if fused == FUSED[name]]
    sizes = [rows[f"{prefix}.{sibling}"] for sibling in siblings]
    return parameters[f"{prefix}.{FUSED[name]}.{part}"].split(sizes)[siblings.index(name)]


@pytest.mark.parametrize("form", FORMS)
def test_every_packed_tensor_is_in_the_parameters_of_a_quantized_layer(
    form: str, released: Path, tmp_path: Path, gpu_passed_for: Any
) -> None:
    config = WeightOnlyConfig(**FORMS[form])
    packed = DeepseekVLV2ForCausalLM.from_pretrained(released, quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    model = load_in_vllm(tmp_path / "packed", tmp_path / "group", gpu_passed_for)

    methods = {name: type(getattr(module, "quant_method", None)).__name__ for name, module in model.named_modules()}
    plain = {name.rpartition(".")[2] for name, method in methods.items() if method.startswith("Unquantized")}
    assert plain - {"kv_b_proj"} == {"embed_tokens", "gate"} | (set() if FORMS[form].get("head") else {"lm_head"})
    kind = "fp8" if form.startswith("fp8") else "int"
    schemes = {type(module.scheme).__name__ for module in model.modules() if hasattr(module, "scheme")}
    assert schemes == {LINEAR[kind]}
    (experts,) = {method for name, method in methods.items() if name.endswith("routed_experts")}
    assert experts.startswith(LINEAR[kind]) and experts.endswith("MoEMethod")

    stored = load_file(tmp_path / "packed" / "model.safetensors")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = [name for name in stored if PART.fullmatch(name) and f"{name.rpartition('.')[0]}.weight_scale" in stored]
    assert len(names) >= 2 * (3 + 3 + 3 * 5)
    for name in names:
        match = PART.fullmatch(name)
        assert match is not None
        layer, part = match.groups()
        rows = {
            other.rpartition(".")[0]: tensor.shape[0] for other, tensor in stored.items() if other.endswith(f".{part}")
        }
        read = read_from(parameters, layer, part, rows)
        assert read.shape == stored[name].shape, name
        assert torch.equal(read.float(), stored[name].float()), name
