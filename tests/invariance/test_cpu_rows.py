"""The compiled kernels for one row on a CPU give what the plain forms give, and are taken only where they may be."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import mini_inputs, mini_model
from torch import nn

from deepseek_vl2 import ops
from deepseek_vl2.engine import backend
from deepseek_vl2.engine.kv_cache import KVCache, layer_shapes
from deepseek_vl2.models import cpu
from deepseek_vl2.models.attention import one_query_attention_forward
from deepseek_vl2.models.cache import CACHE_NAME, PackedCache, Segment
from deepseek_vl2.models.configuration_deepseek import DeepseekV2Config
from deepseek_vl2.models.moe import DeepseekV2Experts, DeepseekV2MLP, one_token_experts_forward
from deepseek_vl2.models.norm import DeepseekV2RMSNorm
from deepseek_vl2.models.rope import apply_rotary
from deepseek_vl2.ops.cpu import bindings
from deepseek_vl2.utils.demo import LANGUAGE

# bfloat16 keeps 8 bits: rounding changes a number by 2^-9 of it at most, and sums in another order now and then fall
# on the other side, 2^-8 away.
ROUNDING = 2**-8
# The same on top of roundings in between, relative to the largest number: each of the two or three of a chain.
CHAIN = {"rtol": ROUNDING, "atol": 3 * ROUNDING}
PROMPT = (20, (2, 1), 9)  # text, an image of two tiles beside its global view, text


@pytest.fixture(scope="module")
def compiler() -> str:
    """Give the compiler; where the machine suits and has it, nothing may keep the kernels from being made."""
    suits = sys.platform == "linux" and platform.machine() == "x86_64" and "avx2" in bindings._cpu_flags().split()
    if not suits or shutil.which("gcc") is None:
        pytest.skip("the kernels are for x86 CPUs with AVX2 under Linux, where gcc is installed")
    return bindings._compilers()[0]


@pytest.fixture(scope="module", params=["native", "haswell"])
def row(compiler: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bindings.RowKernels:
    """Give the kernels, as compiled for this CPU and for those with AVX2 alone, whose vectors are half as wide."""
    flags = [f"-march={request.param}" if flag == "-march=native" else flag for flag in bindings.FLAGS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp(request.param)))
        patch.setattr(bindings, "FLAGS", flags)
        found = bindings.RowKernels()
    return found


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Let new memory be NaN, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Bounds of sums are met by all but one draw in a hundred."""
    torch.manual_seed(0)


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def config_of(**changes: int) -> DeepseekV2Config:
    return DeepseekV2Config(**{**LANGUAGE, **changes})


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("outputs", "width"), [(1, 1), (7, 33), (64, 64), (5, 31), (130, 1280), (3, 4099)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_linear(row: bindings.RowKernels, outputs: int, width: int, biased: bool, offset: int) -> None:
    weight = some(outputs * width + offset)[offset:].view(outputs, width)  # at addresses that suit no vector
    x, bias = some(1, 1, width), some(outputs) if biased else None
    out = row.linear(x, weight, bias)
    assert out is not None and out.shape == (1, 1, outputs) and out.dtype == torch.bfloat16
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(out.double(), want, rtol=ROUNDING, atol=1e-5 * width**0.5)
    logits = row.logits(x[0], weight)
    assert logits is not None and logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.linear(x[0].float(), weight.float()), rtol=1e-5, atol=1e-5 * width**0.5)


def test_rounding_is_pytorchs(row: bindings.RowKernels) -> None:
    """Products of two numbers of bfloat16 have 16 bits: all ways of rounding them, ties, infinities and NaN."""
    x = torch.tensor([1.0078125, -3.140625, 1e-38, 3e38, float("inf"), float("nan"), 0.0]).bfloat16()
    weights = torch.cat((torch.arange(-2000, 2000).float(), torch.randn(4000), torch.tensor([float("inf")]))).bfloat16()
    for number in x:
        out = row.linear(number.view(1), weights.view(-1, 1))
        want = (number.float() * weights.float()).bfloat16()
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [1, 31, 1280])
def test_rms_norm(row: bindings.RowKernels, width: int) -> None:
    norm = DeepseekV2RMSNorm(width).bfloat16()
    norm.weight.copy_(some(width))
    x = 3 * some(1, 1, width)
    out = row.rms_norm(x, norm.weight, norm.variance_epsilon)
    assert out is not None
    together = row.rms_norm(torch.cat((some(1, 2, width), x), dim=1), norm.weight, norm.variance_epsilon)
    assert together is not None and torch.equal(together[:, 2:], out)
    torch.testing.assert_close(out, norm(x), rtol=2 * ROUNDING, atol=0)
    assert error(out, norm.double()(x.double())) < ROUNDING


@pytest.mark.parametrize(("inner", "hidden"), [(1, 1), (33, 7), (32, 64), (100, 90), (896, 1280)])
def test_mlp(row: bindings.RowKernels, inner: int, hidden: int) -> None:
    layer = DeepseekV2MLP(config_of(hidden_size=hidden, intermediate_size=inner)).bfloat16()
    x = some(1, 1, hidden)
    out = row.mlp(x, layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight)
    assert out is not None and out.shape == x.shape
    plain, exact = layer(x), layer.double()(x.double())
    torch.testing.assert_close(out / exact.abs().max(), plain / exact.abs().max(), check_dtype=False, **CHAIN)
    assert error(out, exact) < 1.5 * error(plain, exact) + 1e-3


@pytest.mark.parametrize(("inner", "hidden"), [(33, 7), (32, 64), (100, 90)])
@pytest.mark.parametrize("chosen", [[2], [0, 3], [4, 1, 3]])
def test_experts(row: bindings.RowKernels, inner: int, hidden: int, chosen: list[int]) -> None:
    config = config_of(hidden_size=hidden, moe_intermediate_size=inner, n_routed_experts=5)
    experts = DeepseekV2Experts(config).bfloat16()
    for weight in experts.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5)
    x, ids, weights = some(1, hidden), torch.tensor([chosen]), torch.rand(1, len(chosen))
    out = row.experts(x, experts.gate_up_proj, experts.down_proj, ids, weights)
    assert out is not None and out.shape == x.shape
    plain = one_token_experts_forward(experts, x, ids, weights)
    exact = one_token_experts_forward(experts.double(), x.double(), ids, weights.double())
    torch.testing.assert_close(out / exact.abs().max(), plain / exact.abs().max(), check_dtype=False, **CHAIN)
    assert error(out, exact) < 1.5 * error(plain, exact) + 1e-3


def test_experts_of_several_rows_are_those_of_each_alone(row: bindings.RowKernels) -> None:
    gate_up, down = some(5, 2 * 33, 40), some(5, 40, 33)
    ids, weights = torch.tensor([[4, 1, 3], [1, 0, 4], [3, 1, 0], [1, 4, 3]]), torch.rand(4, 3)
    x = some(4, 40)
    out = row.experts(x, gate_up, down, ids, weights)
    alone = [row.experts(x[n : n + 1], gate_up, down, ids[n : n + 1], weights[n : n + 1]) for n in range(4)]
    assert out is not None and torch.equal(out, torch.cat([one for one in alone if one is not None]))
    most = bindings.MOST_ROWS
    many = some(most + 1, 40), gate_up, down, ids[:1].expand(most + 1, 3), weights[:1].expand(most + 1, 3)
    assert row.experts(*many) is None
    assert row.experts(many[0][:most], gate_up, down, many[3][:most], many[4][:most]) is not None


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("length", "size"), [(1, 16), (9, 80), (100, 64), (33, 128), (50, 7)])
def test_attend(row: bindings.RowKernels, groups: int, length: int, size: int) -> None:
    query = some(1, 2 * groups, 1, size)
    rooms = some(2, 1, 2, length + 5, size)
    key, value = rooms[:, :, :, :length]  # as in a cache with room to spare
    out = row.attend(query, key, value, size**-0.5)
    assert out is not None and out.shape == (1, 1, 2 * groups, size)
    plain = one_query_attention_forward(query, key, value, None, size**-0.5)
    exact = one_query_attention_forward(query.double(), key.double(), value.double(), None, size**-0.5)
    torch.testing.assert_close(out, plain, **CHAIN)
    assert error(out, exact) < 1.5 * error(plain, exact) + 1e-3


SPANS = [2, 9, 30], [5, 17, 1]  # where sequences begin in a pool, and how long they are


def test_sequences_attend_as_each_alone(row: bindings.RowKernels) -> None:
    query, keys, values = some(1, 6, 3, 20), some(31, 2, 20), some(31, 2, 20)
    out = row.attend_rows(query, keys, values, *SPANS, 0.3)
    assert out is not None and out.shape == (1, 3, 6, 20)
    for index, (start, length) in enumerate(zip(*SPANS, strict=True)):
        key, value = (pool[start : start + length].transpose(0, 1)[None] for pool in (keys, values))
        alone = row.attend(query[:, :, index : index + 1], key, value, 0.3)
        assert alone is not None and torch.equal(out[:, index], alone[:, 0])


@pytest.mark.parametrize(("rank", "rope"), [(96, 16), (64, 8), (70, 6), (512, 64)])
def test_sequences_attend_to_latents(row: bindings.RowKernels, rank: int, rope: int) -> None:
    query, rotated, pool, scaling = some(1, 4, 3, rank), some(1, 4, 3, rope), some(31, rank + rope), rank**-0.5
    out = row.attend_latents(query, rotated, pool[:, :rank], pool[:, rank:], *SPANS, scaling)
    assert out is not None and out.shape == (1, 3, 4, rank)
    for index, (start, length) in enumerate(zip(*SPANS, strict=True)):
        held = pool[start : start + length].double()
        scores = torch.cat((query, rotated), dim=-1)[0, :, index].double() @ held.mT * scaling
        exact = scores.softmax(dim=-1) @ held[:, :rank]
        assert error(out[0, index], exact) < 4 * ROUNDING


def test_sequences_outside_of_the_pool_are_refused(row: bindings.RowKernels) -> None:
    query, pool = some(1, 2, 1, 8), some(9, 2, 8)
    for start, length in ((-1, 3), (0, 0), (7, 3)):
        with pytest.raises(IndexError, match="do not lie within 9"):
            row.attend_rows(query, pool, pool, [start], [length], 1.0)


def test_attention_passes_nan_on(row: bindings.RowKernels) -> None:
    query, key, value = some(1, 2, 1, 32), some(1, 2, 4, 32), some(1, 2, 4, 32)
    key[0, 1, 2, 5] = float("nan")
    out = row.attend(query, key, value, 1.0)
    assert out is not None and out[0, 0, 1].isnan().all() and out[0, 0, 0].isfinite().all()


@pytest.mark.parametrize(("heads", "kv_heads", "size", "width"), [(4, 4, 16, 64), (6, 2, 10, 33)])
def test_queries_keys_values(row: bindings.RowKernels, heads: int, kv_heads: int, size: int, width: int) -> None:
    x = some(1, 1, width)
    weights = [some(count * size, width) for count in (heads, kv_heads, kv_heads)]
    angles = torch.randn(1, 1, size // 2).repeat(1, 1, 2)
    rotation = angles.cos().bfloat16(), angles.sin().bfloat16()
    out = row.queries_keys_values(x, *weights, *rotation)
    assert out is not None
    projected = [F.linear(x, weight).unflatten(-1, (-1, size)).transpose(1, 2) for weight in weights]
    want = [apply_rotary(projected[0], *rotation), apply_rotary(projected[1], *rotation), projected[2]]
    for got, expected in zip(out, want, strict=True):
        assert got.shape == expected.shape and got.is_contiguous()
        torch.testing.assert_close(got, expected, rtol=ROUNDING, atol=ROUNDING * float(expected.abs().max()))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(row: bindings.RowKernels, count: int, threads: None) -> None:
    x, weight = some(1, 96), some(50, 96)
    want = row.linear(x, weight)
    torch.set_num_threads(count)
    assert torch.equal(row.linear(x, weight), want)  # type: ignore[arg-type]


def test_what_is_not_taken(row: bindings.RowKernels) -> None:
    x, weight = some(1, 8), some(6, 8)
    assert row.linear(x, weight) is not None
    assert row.linear(x.float(), weight) is None
    assert row.linear(x, weight.float()) is None
    assert row.linear(x.half(), weight.half()) is None
    assert row.linear(some(2, 8), weight) is None
    assert row.linear(x, some(8, 6).T) is None
    assert row.linear(some(1, 16)[:, ::2], weight) is None
    assert row.linear(x, weight.to("meta")) is None
    assert row.linear(x, weight, torch.randn(6)) is None
    assert row.rms_norm(some(65, 8), some(8), 1e-6) is None
    assert row.logits(some(2, 8), weight) is None
    assert row.mlp(some(2, 8), weight, weight, weight.T.contiguous()) is None
    assert row.attend(some(2, 2, 1, 8), some(2, 2, 3, 8), some(2, 2, 3, 8), 1.0) is None
    assert row.attend(some(1, 2, 1, 8), some(1, 2, 8, 3).mT, some(1, 2, 3, 8), 1.0) is None


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_weights_are_not_taken(row: bindings.RowKernels) -> None:
    assert row.linear(some(1, 8), some(6, 8).to_sparse_csr()) is None


def test_shapes_that_do_not_fit_are_not_taken(row: bindings.RowKernels) -> None:
    x, matrix = some(1, 8), some(6, 8)
    assert row.linear(some(2, 4), matrix) is None
    assert row.linear(x, matrix, some(5)) is None
    assert row.rms_norm(some(2, 4), some(8), 1e-6) is None
    assert row.mlp(x, matrix, some(5, 8), some(8, 6)) is None
    assert row.mlp(x, matrix, matrix, some(6, 8)) is None
    gate_up, down, weights = some(3, 12, 8), some(3, 8, 6), torch.rand(1, 2)
    assert row.experts(x, gate_up, down, torch.tensor([[0, 2]]), weights) is not None
    for ids in ([[0, 3]], [[-1, 0]], [[0, 1, 2]], [[0, 1], [1, 2]]):
        assert row.experts(x, gate_up, down, torch.tensor(ids), weights) is None
    assert row.experts(x, some(3, 10, 8), down, torch.tensor([[0, 2]]), weights) is None
    cos = some(1, 1, 4)
    given = some(1, 1, 8), some(8, 8), some(4, 8), some(4, 8)
    assert row.queries_keys_values(*given, cos, cos) is not None
    assert row.queries_keys_values(*given[:3], some(8, 8), cos, cos) is None
    assert row.queries_keys_values(given[0], some(6, 8), *given[2:], cos, cos) is None
    assert row.queries_keys_values(*given, some(1, 1, 5), some(1, 1, 5)) is None
    assert row.queries_keys_values(*given, cos, some(1, 1, 2)) is None
    assert row.attend(some(1, 3, 1, 8), some(1, 2, 3, 8), some(1, 2, 3, 8), 1.0) is None
    assert row.attend(some(1, 1, 1, 8), some(1, 2, 3, 8), some(1, 2, 3, 8), 1.0) is None
    assert row.attend(some(1, 2, 1, 8), some(1, 2, 3, 8), some(1, 2, 4, 8), 1.0) is None


class Counted:
    """Kernels that count their calls."""

    def __init__(self, inner: bindings.RowKernels) -> None:
        self.inner = inner
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            out = getattr(self.inner, name)(*args)
            if out is not None:
                self.calls.append(name)
            return out

        return call


@pytest.fixture
def counted(row: bindings.RowKernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let models use these kernels; gives the names of those that ran."""
    found = Counted(row)
    monkeypatch.setattr(cpu, "backend", lambda: SimpleNamespace(find_row_kernels=lambda: found))
    return found.calls


@pytest.mark.parametrize("kind", ["tiny", "small", "base"])
def test_a_model_decodes_alike(kind: str, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are off float32 by roundings, of which chance may make one's larger than the other's: by half, at most."""
    torch.use_deterministic_algorithms(False)
    model, inputs = mini_model(kind), mini_inputs(PROMPT)
    step = {"input_ids": torch.tensor([[5]]), "attention_mask": None}

    def logits() -> torch.Tensor:
        cache = model(**inputs, use_cache=True).past_key_values
        return model(**step, past_key_values=cache).logits

    exact = logits()
    assert counted == []
    model = model.to(torch.bfloat16)
    got = logits()
    assert {"linear", "rms_norm", "experts", "mlp", "logits"} <= set(counted)
    assert ("attend" in counted) == ("queries_keys_values" in counted) == (kind == "tiny")
    monkeypatch.setattr(cpu, "backend", lambda: None)
    assert error(got, exact) < 1.5 * error(logits(), exact)


@pytest.mark.parametrize("kind", ["tiny", "small"])
def test_rows_of_a_step_attend_in_one_call(kind: str, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)
    language = mini_model(kind).to(torch.bfloat16).language
    kv_cache = KVCache(layer_shapes(language), 64)
    pools = [tuple(part.normal_() for part in kv_cache.keys_and_values(layer)) for layer in range(len(kv_cache.pools))]
    held = [[part.clone() for part in pool] for pool in pools]
    segments = [Segment(3, 6, 1), Segment(20, 11, 1), Segment(40, 0, 1)]
    positions = torch.tensor([[segment.past for segment in segments]])

    def step() -> torch.Tensor:
        for pool, parts in zip(pools, held, strict=True):
            for part, kept in zip(pool, parts, strict=True):
                part.copy_(kept)
        cache = {CACHE_NAME: PackedCache(pools, segments)}
        logits: torch.Tensor = language(
            torch.tensor([[5, 6, 7]]), position_ids=positions, use_cache=True, **cache
        ).logits
        return logits

    got = step()
    written = [part.clone() for pool in pools for part in pool]
    name = "attend_rows" if kind == "tiny" else "attend_latents"
    assert counted.count(name) == len(pools) and "experts" in counted
    monkeypatch.setattr(cpu, "backend", lambda: None)
    plain = step()
    assert error(got, plain) < 0.02
    for one, other in zip(written, (part for pool in pools for part in pool), strict=True):
        assert error(one, other) < 0.01


def test_only_single_rows_without_gradients_are_taken(counted: list[str]) -> None:
    torch.use_deterministic_algorithms(False)
    model = mini_model("tiny").to(torch.bfloat16)
    model(**mini_inputs(PROMPT, PROMPT))
    assert counted == []
    with torch.enable_grad():
        model(input_ids=torch.tensor([[5]])).logits.sum().backward()
    assert counted == []
    model.language.set_attn_implementation("eager")
    model(input_ids=torch.tensor([[5]]))
    assert counted == []


def test_layers_with_something_in_their_place_are_called(counted: list[str]) -> None:
    model = mini_model("tiny").to(torch.bfloat16)
    layer = model.language.model.layers[1]
    called = []

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append("adapted")
            return super().forward(x)

    adapted = Adapted(*layer.self_attn.k_proj.weight.T.shape, bias=False, dtype=torch.bfloat16)
    layer.self_attn.k_proj = adapted
    layer.self_attn.o_proj.register_forward_hook(lambda *_: called.append("hook"))
    layer.mlp.shared_experts.up_proj.register_forward_pre_hook(lambda *_: called.append("pre-hook"))
    head, forward = model.language.lm_head, model.language.lm_head.forward

    def replaced(x: torch.Tensor) -> torch.Tensor:
        called.append("replaced")
        return forward(x)

    head.forward = replaced
    layer.mlp.experts.act_fn.register_forward_hook(lambda *_: called.append("activation"))
    model(input_ids=torch.tensor([[5]]))
    assert sorted(called) == ["activation", "adapted", "hook", "pre-hook", "replaced"]


def test_hooks_of_all_modules_are_called(counted: list[str]) -> None:
    layer, called = nn.Linear(8, 8).bfloat16(), []
    with cpu.row_products():
        cpu.project(layer, some(1, 8))
        handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append("hook"))
        try:
            cpu.project(layer, some(1, 8))
        finally:
            handle.remove()
    assert called == ["hook"] and counted == ["linear"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_what_is_traced_transformed_or_cast_is_pytorchs(counted: list[str]) -> None:
    layer, x = nn.Linear(8, 8).bfloat16().requires_grad_(False), some(1, 8)

    def product(x: torch.Tensor) -> torch.Tensor:
        with cpu.row_products():
            return cpu.project(layer, x)

    want = product(x)
    assert counted == ["linear"]
    torch.testing.assert_close(torch.jit.trace(product, x, check_trace=False)(x), want, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(torch.vmap(product)(x[None])[0], want, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(torch.compile(product, backend="eager")(x), want, rtol=ROUNDING, atol=ROUNDING)
    with torch.autocast("cpu", torch.float16):
        assert product(x).dtype == torch.float16
    assert counted == ["linear"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings.shutil, "which", lambda name: None)
    bindings.row_kernels.cache_clear()
    try:
        assert bindings.row_kernels() is None and backend.find_row_kernels() is None
        assert bindings.unsupported_reason() == "there is no C compiler"
        with cpu.row_products():
            assert cpu.row_kernels() is None
            assert cpu.project(nn.Linear(3, 2).bfloat16(), some(1, 3)).shape == (1, 2)
    finally:
        bindings.row_kernels.cache_clear()


def test_a_compiler_that_fails(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(bindings.Unavailable, match="broken failed: cannot"):
        bindings.build(str(broken))
    assert list(bindings.cache_folder().iterdir()) == []
    bindings.load()  # by the next one
    monkeypatch.setattr(bindings, "_compilers", lambda: [str(broken)])
    with pytest.raises(bindings.Unavailable, match="broken failed: cannot"):
        bindings.load()


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bindings.platform, "machine", lambda: "aarch64")
        with pytest.raises(bindings.Unavailable, match="x86"):
            bindings.load()
    monkeypatch.setattr(bindings, "_cpu_flags", lambda: "flags : fpu sse2 avx")
    with pytest.raises(bindings.Unavailable, match="AVX2"):
        bindings.load()


def test_the_library_is_kept(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []
    run = bindings._run
    monkeypatch.setattr(bindings, "_run", lambda command: (compiled.append(command), run(command))[1])
    path = bindings.build(compiler)
    assert path.parent == tmp_path / "deepseek_vl2" and list(path.parent.iterdir()) == [path]
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert bindings.build(compiler) == path and len(compiled) == 2  # once: to compile and to link
    monkeypatch.setattr(bindings, "_cpu_flags", lambda: "flags: others")
    assert bindings.build(compiler) != path and len(compiled) == 4


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path not in bindings.build(compiler).parents


def test_a_folder_of_another_user(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bindings.os, "getuid", lambda: -1)
    assert tmp_path not in bindings.build(compiler).parents


def test_a_folder_that_others_may_write(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bindings.cache_folder().mkdir()
    bindings.cache_folder().chmod(0o777)
    assert tmp_path not in bindings.build(compiler).parents


def test_no_home(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(bindings, "cache_folder", homeless)
    assert bindings.build(compiler).exists()


@pytest.mark.parametrize(("switch", "taken"), [("0", False), ("1", True)])
def test_the_switch(compiler: str, switch: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.SWITCH, switch)
    assert (backend.find_row_kernels() is not None) == taken
    assert (bindings.unsupported_reason() is None) == taken


def test_threads_are_pytorchs(compiler: str) -> None:
    """A second OpenMP library would bring threads of its own, which wait for work on the same cores."""
    code = (
        "from deepseek_vl2.ops.cpu import bindings; import torch; torch.set_num_threads(2); bindings.row_kernels()\n"
        "print(sorted({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l}))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count("omp") == 1, out
