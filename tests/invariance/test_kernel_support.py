"""Which models the kernels run and why not others; what a captured graph may not do, and what happens if it fails."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from capture_support import ON_GPU, NoHost, NoLaunch, pretend
from support import mini_language
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from deepseek_vl2 import ops
from deepseek_vl2.engine import (
    backend,
    captured_prefill,
    cuda_graphs,
    decode,
    decode_buffers,
    experts,
    holder,
    placement,
    support,
    triton_runner,
)
from deepseek_vl2.engine.cuda_graphs import CapturedGraph, GraphCache
from deepseek_vl2.engine.rows import new_rows
from deepseek_vl2.engine.runner import ModuleRunner
from deepseek_vl2.engine.weights import read_weights, rotary_tables
from deepseek_vl2.ops.triton import (
    decode_experts_gemm,
    decode_experts_gemv,
    decode_gemm,
    decode_gemv,
    decode_mha,
    decode_mla,
    norm,
    prefill_experts,
    rope,
    router,
)

KERNELS = (
    decode_experts_gemm, decode_experts_gemv, decode_gemm, decode_gemv, decode_mha, decode_mla, norm, prefill_experts,
    rope, router,
)  # fmt: skip


# ---------------------------------------------------------------- models


def test_models_that_run_by_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(support, "unsupported_device", lambda weight: None)
        monkeypatch.setattr(support, "_unsupported_weights", lambda language: None)
    model = mini_language("small").to("cuda" if ON_GPU else "cpu", torch.bfloat16)
    layer = model.model.layers[1]
    assert backend.unsupported_reason(model) is None
    hook = layer.mlp.register_forward_hook(lambda *args: None)
    assert "hooks" in str(backend.unsupported_reason(model))
    hook.remove()
    layer.mlp.forward = layer.mlp.forward
    assert "replaced" in str(backend.unsupported_reason(model))
    del layer.mlp.forward
    model.train()
    assert "training" in str(backend.unsupported_reason(model))
    model.eval()

    class Adapted(torch.nn.Linear):
        pass

    linear = layer.self_attn.o_proj
    layer.self_attn.o_proj = Adapted(linear.in_features, linear.out_features, bias=False)
    assert "Adapted" in str(backend.unsupported_reason(model))
    layer.self_attn.o_proj = linear
    model.set_attn_implementation("eager")
    assert "eager" in str(backend.unsupported_reason(model))
    model.set_attn_implementation("sdpa")
    assert backend.unsupported_reason(model) is None
    monkeypatch.setenv(ops.SWITCH, "0")
    assert "turns it off" in str(backend.unsupported_reason(model))


def test_weights_that_the_kernels_do_not_take() -> None:
    model = mini_language("small")
    if not ON_GPU:
        assert "not on an NVIDIA GPU" in str(backend.unsupported_reason(model))
    else:
        assert support._unsupported_weights(model.to("cuda")) is None
    model.lm_head.to(torch.float64)
    assert "several dtypes" in str(support._unsupported_weights(model))


def test_a_failing_start_leaves_this_model_to_its_modules(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This one's alone, and it says why."""
    monkeypatch.setattr(placement, "unsupported_reason", lambda language: None)
    broken, model = mini_language("tiny"), mini_language("tiny")
    compiled = triton_runner.TritonRunner.warm_up

    def warm_up(runner: Any) -> None:
        if runner.language() is broken:
            raise RuntimeError("no compiler")
        compiled(runner)

    monkeypatch.setattr(triton_runner.TritonRunner, "warm_up", warm_up)
    engine = holder.engine_of(broken)
    assert isinstance(engine.runner, ModuleRunner) and "no compiler" in caplog.text
    assert "no compiler" in str(backend.unsupported_reason(broken))
    assert isinstance(holder.engine_of(model).runner, triton_runner.TritonRunner)
    assert backend.unsupported_reason(model) is None


# ---------------------------------------------------------------- what a capture forbids


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Let the GPU's branches of the engine run on tensors without numbers, without launching the kernels."""
    for module in KERNELS:
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, NoLaunch())
        if hasattr(module, "multiprocessors"):
            monkeypatch.setattr(module, "multiprocessors", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(experts, "is_supported", lambda module, rows: True)  # but for what these weights are not
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 100)
    monkeypatch.setattr(decode_buffers, "pdl_options", lambda device: {})
    return FakeTensorMode()


def pool_shapes(model: Any) -> list[tuple[int, ...]]:
    config = model.config
    if config.use_mla:
        return [(config.kv_lora_rank + config.qk_rope_head_dim,)]
    return [(config.num_key_value_heads, config.hidden_size // config.num_attention_heads)] * 2


@pytest.mark.skipif(ON_GPU, reason="with a GPU it is captured")
@pytest.mark.parametrize("kind", ["tiny", "small", "base"])
def test_nothing_waits_for_the_device(kind: str, pretended: FakeTensorMode) -> None:
    """In a captured prefill, and in a decoding step of one row, of a small batch and of a large one."""
    model = mini_language(kind, num_hidden_layers=2)
    with pretended, torch.no_grad():
        pretend(model)
        weights, tables, device = read_weights(model), rotary_tables(model, 256), torch.device("cuda")
        pools = [
            tuple(torch.empty(300, *shape, dtype=torch.bfloat16, device=device) for shape in pool_shapes(model))
            for _ in range(2)
        ]
        embeds = torch.empty(128, weights.head.shape[1], dtype=torch.bfloat16, device=device)
        given = captured_prefill.static_inputs(weights, tables, embeds, 2)
        steps = [decode_buffers.new_buffers(weights, new_rows(rows, device), *tables) for rows in (1, 4, 96)]
        assert given.logits_BV.device.type == "cuda" and all(step.logits.device.type == "cuda" for step in steps)
        counts = [step.expert_counts[layer] for step in steps for layer in range(2)]
        # Of other addresses kernels would be compiled a second time.
        assert all(part.storage_offset() * part.itemsize % 16 == 0 for part in counts)
        with NoHost():
            captured_prefill.run_captured(model, pools, given)
            for step in steps:
                decode.decode_stage(weights, step, pools, 0, 2)


@pytest.mark.skipif(ON_GPU, reason="with a GPU it is captured")
def test_the_mode_refuses(pretended: FakeTensorMode) -> None:
    with pretended:
        x = torch.ones(3, device="cuda")
    for waits in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x + torch.ones(3).to("cuda"), lambda: x.tolist()):
        with pretended, pytest.raises(Exception, match=r"waits|host|nonzero|local_scalar"), NoHost():
            waits()


# ---------------------------------------------------------------- graphs


def test_the_first_use_runs_the_second_captures() -> None:
    log: list[str] = []

    def capture(run: cuda_graphs.Run) -> cuda_graphs.Run:
        log.append("capture")
        return lambda: log.append("replay")

    one = CapturedGraph(None, lambda: log.append("run"))
    assert [one(capture) for _ in range(3)] == [None] * 3
    assert log == ["run", "capture", "replay", "replay"]
    log.clear()
    alone = CapturedGraph(None, lambda: log.append("run"))
    assert [alone(None) for _ in range(2)] == [None] * 2
    assert log == ["run", "run"]


def test_what_cannot_be_captured_still_runs(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []

    def capture(run: cuda_graphs.Run) -> cuda_graphs.Run:
        raise RuntimeError("operation not permitted")

    one = CapturedGraph(None, lambda: log.append("run"))
    assert one(capture) is None
    assert "not permitted" in str(one(capture))
    assert log == ["run", "run"] and "not permitted" in caplog.text


def test_few_graphs_are_kept() -> None:
    graphs = GraphCache(2)
    made = {key: graphs.get(key, lambda: CapturedGraph(None, lambda: None)) for key in "ab"}
    assert graphs.get("a", lambda: CapturedGraph(None, lambda: None)) is made["a"]
    graphs.get("c", lambda: CapturedGraph(None, lambda: None))
    assert list(graphs.held) == ["a", "c"]


def test_lengths_are_rounded_up() -> None:
    padded = [captured_prefill.padded_length(tokens, 1024) for tokens in (1, 127, 128, 129, 1000)]
    assert padded == [128, 128, 128, 256, 1024]
    assert captured_prefill.padded_length(30, 64) == 64


def test_prompts_of_about_one_length_form_a_group() -> None:
    def lengths_of(*lengths: int) -> list[list[int]]:
        return [[lengths[i] for i in group] for group in captured_prefill.group_prompts(lengths, 4096)]

    assert lengths_of(1434) == [[1434]]
    assert lengths_of(*[1434] * 3) == [[1434] * 3]
    assert lengths_of(1300, 700, 1434, 720) == [[1434, 1300], [720, 700]]
    assert lengths_of(2000, 1000) == [[2000], [1000]]
    assert lengths_of(*[100] * 9) == [[100] * 8, [100]]
    for group in captured_prefill.group_prompts([100 + 97 * i % 1500 for i in range(60)], 4096):
        assert len(group) <= captured_prefill.MOST_PROMPTS


def test_a_group_takes_little_more_than_its_prompts_alone() -> None:
    lengths = [1 + 389 * i % 4000 for i in range(80)]
    groups = captured_prefill.group_prompts(lengths, 8192)
    assert sorted(i for group in groups for i in group) == list(range(80)) and len(groups) < 40
    for group in groups:
        padded = [captured_prefill.padded_length(lengths[i], 8192) for i in group]
        taken = len(group) * max(padded)
        assert taken <= captured_prefill.MOST_WASTE * sum(padded)
