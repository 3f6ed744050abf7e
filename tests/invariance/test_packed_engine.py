"""Models of packed weights run by the kernels, or by their own modules where those fail; and what loading them holds.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from packed_support import FEW_ROWS, pack
from support import mini_language

pytest.importorskip("triton")

from deepseek_vl2.engine import decode, self_check, support
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.runner import ModuleRunner
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.engine.weights import read_weights
from deepseek_vl2.models.quantized_layers import PackedLinear, packed_layers
from deepseek_vl2.models.quantizer import WeightOnlyConfig
from deepseek_vl2.ops.triton import decode_experts_gemv, decode_gemm, packed_grouped_gemm

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "int4": {"weights": "int4", "group_size": 32},
    "int8, head too": {"weights": "int8", "head": "int8"},
    "fp8": {"weights": "fp8"},
}


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(support, "unsupported_device", lambda weight: None)
        monkeypatch.setattr(decode, "multiprocessors", lambda device: 3)


def packed_language(kind: str, name: str, **changes: Any) -> Any:
    changes = {"num_hidden_layers": 2, **FEW_ROWS, **changes}
    model = mini_language(kind, **changes)
    return pack(model.to(DEVICE, torch.bfloat16 if GPU else torch.float32), WeightOnlyConfig(**CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["tiny", "small", "base"])
def test_packed_models_are_for_the_kernels(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_language(kind, name)
    if not GPU:
        monkeypatch.setattr(support, "_unsupported_weights", lambda language: None)
    assert support.unsupported_reason(model) is None


def test_packed_weights_may_have_dtypes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_language("small", "fp8")
    assert len({p.dtype for p in model.parameters()}) > 1
    assert {p.dtype for p in support._unpacked(model)} == {model.dtype}
    model.model.norm.weight.data = model.model.norm.weight.data.half()
    assert len({p.dtype for p in support._unpacked(model)}) == 2


def test_what_of_packed_weights_the_kernels_do_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_unsupported_weights", lambda language: None)
    model = packed_language("small", "int4")
    layer = model.model.layers[1]
    projection = layer.mlp.shared_experts.gate_proj
    for path, name, value, reason in (
        (layer.self_attn.o_proj, "bias", torch.nn.Parameter(torch.zeros(64)), "has a bias"),
        (projection, "formats", {"weight": replace_group(projection, 24)}, "groups of 24 columns"),
        (projection, "formats", {"weight": replace_group(projection, 16)}, "gates and ups are of several formats"),
    ):
        before = getattr(path, name)
        setattr(path, name, value)
        assert reason in str(support.unsupported_reason(model))
        setattr(path, name, before)
    assert support.unsupported_reason(model) is None


def replace_group(layer: PackedLinear, group: int) -> Any:
    from dataclasses import replace

    return replace(layer.format, group_size=group)


def test_nothing_packed_is_copied() -> None:
    """A step reads the tensors where the model holds them; the absorbed matrix is not packed."""
    model = packed_language("small", "int4")
    weights = read_weights(model)
    held = {p.data_ptr() for p in model.parameters()}
    for layer in weights.layers:
        attention, experts = layer.attention, layer.experts
        parts = [*attention.projections, attention.out, experts.gate_up, experts.down]
        parts += [experts.shared_gate, experts.shared_up, experts.shared_down]
        for part in parts:
            assert part is None or {part.packed.data_ptr(), part.scale.data_ptr()} <= held  # type: ignore[union-attr]
        assert attention.kv_b is not None and attention.kv_b.dtype == weights.embedding.dtype
        assert attention.kv_b.data_ptr() in held
    assert sum(isinstance(module, PackedLinear) for _, module in packed_layers(model)) > 8


def wrong_number(*args: Any, **options: Any) -> None:
    raise AssertionError("not reached")


BROKEN = [
    (decode_experts_gemv, "down_gemv", 3, "one row"),
    (decode_gemm, "linear_gemm", 2, "several rows"),
    (packed_grouped_gemm, "grouped_down", None, "a prompt"),
]


@pytest.mark.parametrize(("module", "function", "output", "where"), BROKEN)
def test_a_kernel_that_computes_wrongly_does_not_answer(
    module: Any,
    function: str,
    output: int | None,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The model's own modules do, and one sentence says why."""
    monkeypatch.setattr(support, "_unsupported_weights", lambda language: None)
    real = getattr(module, function)

    def wrong(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        written = out if output is None else args[output]
        written[..., 0] += 10 * written.float().abs().max()
        return out

    monkeypatch.setattr(module, function, wrong)
    with caplog.at_level(logging.WARNING):
        engine = Engine(packed_language("small", "int4"), EngineOptions(kv_cache_tokens=128))
    assert isinstance(engine.runner, ModuleRunner)
    assert "off by" in str(engine.placement.reason) and where in str(engine.placement.reason)
    assert len([r for r in caplog.records if "runs by its own modules" in r.getMessage()]) == 1


def test_a_kernel_that_does_not_compile_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_unsupported_weights", lambda language: None)

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("PTX is refused")

    monkeypatch.setattr(packed_grouped_gemm, "grouped_down", fails)
    engine = Engine(packed_language("tiny", "fp8"), EngineOptions(kv_cache_tokens=128))
    assert isinstance(engine.runner, ModuleRunner) and "PTX is refused" in str(engine.placement.reason)


@pytest.mark.parametrize(("kind", "name"), [("tiny", "int8, head too"), ("base", "fp8")])
def test_kernels_that_are_right_pass(kind: str, name: str) -> None:
    self_check.check_packed(read_weights(packed_language(kind, name)))


def test_plain_models_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "expert_pairs", wrong_number)
    self_check.check_packed(read_weights(mini_language("tiny", num_hidden_layers=2)))
