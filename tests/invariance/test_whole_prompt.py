"""A prompt by a recorded pass gives what the model's forward pass gives, and falls back where it must.

Without a GPU the recorder of these tests replays the function itself over the same buffers, which are poisoned between
replays; that the function could be recorded is tried on tensors that only pretend to lie on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import GREEDY, MINI_VOCABULARY, mini_inputs, mini_language, mini_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from deepseek_vl2.engine import cuda_graphs, decode, experts, prefill, runtime
from deepseek_vl2.engine.cuda_graphs import CapturedGraph, GraphCache
from deepseek_vl2.engine.decode import new_buffers
from deepseek_vl2.engine.weights import read_weights, rotary_tables
from deepseek_vl2.models import generation, moe
from deepseek_vl2.models.cache import new_cache
from deepseek_vl2.ops.triton import norm, prefill_experts, rope, router

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
KINDS = ("tiny", "small", "base")


class Capture:
    """Records on a GPU; elsewhere keeps the function. Counts records and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.cuda = cuda_graphs.GraphCapture(DEVICE) if ON_GPU else None

    def __call__(self, run: cuda_graphs.Run) -> cuda_graphs.Run:
        self.captures += 1
        replay = run if self.cuda is None else self.cuda(run)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


def add_rms_norm_plainly(
    residual: torch.Tensor,
    routed: torch.Tensor | None,
    weights: torch.Tensor | None,
    shared: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    normed: torch.Tensor,
    **options: Any,
) -> None:
    """Do what `norm.fused_add_rms_norm` does: its kernel is interpreted row by row, and has tests of its own."""
    if routed is not None and weights is not None:
        total = (routed.float() * weights.unsqueeze(-1)).sum(dim=1).to(out.dtype)
        residual = residual + (total if shared is None else total + shared)
    elif shared is not None:
        residual = residual + shared
    out.copy_(residual)
    normed.copy_(norm.rms_norm_plain(out, scale, eps))


@pytest.fixture(autouse=True)
def quick_norms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, take the kernel of norms in one test alone."""
    if not ON_GPU and "one_bucket[base]" not in request.node.name and "experts_and_padding" not in request.node.name:
        monkeypatch.setattr(norm, "fused_add_rms_norm", add_rms_norm_plainly)


def poison(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


@torch.no_grad()
def check_lengths(model: Any, capture: Capture, lengths: tuple[int, ...], capacity: int, error: float) -> None:
    """Compare logits and caches of prompts of one bucket with the forward pass."""
    weights = read_weights(model)
    for rows in (1, 3)[: 2 if capacity <= 64 else 1]:
        buffers = new_buffers(weights, rows, *rotary_tables(model, capacity))
        one = prefill.new_graph(model, buffers, prefill.padded_length(lengths[0], capacity))
        for length in lengths:
            ids = torch.randint(3, MINI_VOCABULARY, (rows, length), device=DEVICE)
            cache = new_cache(model.config)
            plain = model(ids, past_key_values=cache).logits[:, -1]
            poison(buffers.logits, one.buffers.embeds, *(part for layer in buffers.caches for part in layer))
            one.buffers.embeds[:, :length] = model.model.embed_tokens(ids)
            one.buffers.embeds[:, length:] = 0
            one.buffers.last.fill_(length - 1)
            assert one(capture) is None
            assert torch.allclose(buffers.logits, plain, atol=error * float(plain.abs().max()), rtol=0)
            for held, layer in zip(buffers.caches, cache.layers, strict=True):
                parts = (layer.keys, layer.values)
                if len(held) == 1:
                    parts = (torch.cat((layer.values, layer.keys), dim=-1)[:, 0],)
                else:
                    parts = tuple(part.transpose(1, 2) for part in parts)
                held = tuple(buffers.by_row(pool)[:, :length] for pool in held)
                for ours, theirs in zip(held, parts, strict=True):
                    assert torch.allclose(ours, theirs, atol=error * float(theirs.abs().max()), rtol=0)


@pytest.mark.skipif(ON_GPU, reason="only the kernels' experts can be recorded, in bfloat16: see test_on_a_gpu")
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_one_bucket(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "STEP", 16)
    capture = Capture()
    check_lengths(mini_language(kind).to(DEVICE), capture, lengths=(9, 16, 1, 2, 15), capacity=64, error=1e-5)
    assert (capture.captures, capture.replays) == (2, 8)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_with_experts_and_padding(kind: str) -> None:
    """In bfloat16, where experts are run by the kernels and padding has none: each token by itself."""
    model = mini_language(kind)
    model, exact = mini_language(kind).to(DEVICE, torch.bfloat16), model.to(DEVICE).to(torch.bfloat16).float()
    rows, tokens, length = 2, 9, 7
    buffers = new_buffers(read_weights(model), rows, *rotary_tables(model, tokens))
    poison(*(part for layer in buffers.caches for part in layer))
    given = torch.randn(rows, tokens, model.config.hidden_size, device=DEVICE).bfloat16()
    last = torch.tensor([length - 1], device=DEVICE)
    for index in (0, 1):  # a dense layer, and one with experts
        layer, plain = model.model.layers[index], exact.model.layers[index]
        rotation = (buffers.cos[None, :tokens], buffers.sin[None, :tokens])
        hidden, normed = given.clone(), layer.input_layernorm(given)
        prefill.prefill_layer(
            layer, hidden, normed, rotation, prefill.PrefillCache(buffers, tokens), model.model.norm, last
        )
        assert torch.isfinite(hidden).all() and torch.isfinite(normed).all()  # padding's keys stay in the cache
        wide = (rotation[0].float(), rotation[1].float())
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).tril()[None, None]
        want = plain(given.float(), wide, mask)[0][:, :length]
        added = want - given[:, :length].float()
        assert float((hidden[:, :length].float() - want).norm() / added.norm()) < 0.03  # sums of rounded parts
        error = hidden[:, :length].float() - want
        if index == 1 and kind != "tiny":
            assert float(error.norm()) > 0  # or the same arithmetic was run twice
    assert not torch.equal(hidden[:, length:], given[:, length:])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind: str) -> None:
    model, capture = mini_language(kind).to(DEVICE, torch.bfloat16), Capture()
    check_lengths(model, capture, lengths=(5, 128, 77, 1), capacity=128, error=0.05)
    assert (capture.captures, capture.replays) == (1, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_replays_on_a_gpu_answer_the_same(kind: str) -> None:
    """Run as it is, recorded and replayed, with other prompts in between: the same arithmetic, so the same tokens."""
    model, settings = mini_model(kind).to(DEVICE, torch.bfloat16), {**GREEDY, "max_new_tokens": 12}
    prompts = [inputs_of([5, (2, 1), 3]), inputs_of([9], seed=1), inputs_of([60, (1, 1), 9], seed=2)]
    rounds = [[model.generate(**inputs, **settings).tolist() for inputs in prompts] for _ in range(3)]
    assert rounds[0] == rounds[1] == rounds[2]
    (session,) = runtime.ENGINES[model.language].sessions.values()
    (one,) = session.prefill_graphs.held.values()
    assert one.replay is not None
    embeds, logits = one.buffers.embeds, session.buffers.logits
    embeds.normal_()
    results = []
    for run in (one.run, one.replay):
        poison(logits, *(part for layer in session.buffers.caches for part in layer))
        with torch.no_grad():
            run()
        pools = [session.buffers.by_row(pool) for layer in session.buffers.caches for pool in layer]
        held = [part[:, : embeds.shape[1]].clone() for part in pools]
        results.append([logits.clone(), *held])
    assert all(torch.equal(*parts) for parts in zip(*results, strict=True))


def test_lengths_are_rounded_up() -> None:
    padded = [prefill.padded_length(tokens, 1024) for tokens in (1, 127, 128, 129, 1000)]
    assert padded == [128, 128, 128, 256, 1024]
    assert prefill.padded_length(30, 64) == 64


# ---------------------------------------------------------------- passes


def test_the_first_use_runs_the_second_records() -> None:
    log: list[str] = []

    def capture(run: cuda_graphs.Run) -> cuda_graphs.Run:
        log.append("record")
        return lambda: log.append("replay")

    one = CapturedGraph(None, lambda: log.append("run"))
    assert [one(capture) for _ in range(3)] == [None] * 3
    assert log == ["run", "record", "replay", "replay"]
    log.clear()
    alone = CapturedGraph(None, lambda: log.append("run"))
    assert [alone(None) for _ in range(2)] == [None] * 2
    assert log == ["run", "run"]


def test_what_cannot_be_recorded_still_runs(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []

    def capture(run: cuda_graphs.Run) -> cuda_graphs.Run:
        raise RuntimeError("operation not permitted")

    one = CapturedGraph(None, lambda: log.append("run"))
    assert one(capture) is None
    assert "not permitted" in str(one(capture))
    assert log == ["run", "run"] and "not permitted" in caplog.text


def test_few_passes_are_kept() -> None:
    passes = GraphCache(2)
    made = {key: passes.get(key, lambda: CapturedGraph(None, lambda: None)) for key in "ab"}
    assert passes.get("a", lambda: CapturedGraph(None, lambda: None)) is made["a"]
    passes.get("c", lambda: CapturedGraph(None, lambda: None))
    assert list(passes.held) == ["a", "c"]


# ---------------------------------------------------------------- whole answers


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """Let the kernels' generation run wherever the tests do, in float32."""
    made = Capture()
    monkeypatch.setattr(runtime, "unsupported_device", lambda weight: None)
    monkeypatch.setattr(prefill, "unsupported_experts", lambda language: None)
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: None if ON_GPU else made)
    monkeypatch.setattr(generation, "FAST_SAMPLERS", [runtime.sample])
    if not ON_GPU:
        monkeypatch.setattr(
            decode, "multiprocessors", lambda device: 3
        )  # the interpreter runs them one after the other
        monkeypatch.setattr(runtime, "MIN_CAPACITY", 64)
        monkeypatch.setattr(runtime, "FIRST_CAPACITY", 4)
    return made


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note which way prompts went."""
    taken: list[str] = []
    passed, plain = prefill.embeddings, runtime.eager_prefill

    def noted_pass(*args: Any) -> torch.Tensor:
        taken.append("pass")
        return passed(*args)

    def noted_plain(*args: Any) -> tuple[int, bool]:
        taken.append("plain")
        return plain(*args)

    monkeypatch.setattr(prefill, "embeddings", noted_pass)
    monkeypatch.setattr(runtime, "eager_prefill", noted_plain)
    yield taken


def inputs_of(*rows: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in mini_inputs(*rows, seed=seed).items()}


def plain_answer(model: Any, **inputs: Any) -> torch.Tensor:
    samplers, generation.FAST_SAMPLERS = generation.FAST_SAMPLERS, []
    try:
        return model.generate(**inputs)
    finally:
        generation.FAST_SAMPLERS = samplers


@pytest.mark.parametrize("kind", [pytest.param("tiny", marks=pytest.mark.slow), "small"])
def test_answers_agree(kind: str, capture: Capture, ways: list[str]) -> None:
    model, settings = mini_model(kind).to(DEVICE), {**GREEDY, "max_new_tokens": 3}
    for seed, row in enumerate(([5, (2, 1), 3], [9, (1, 1), 2], [7, (1, 1), 9])):
        inputs = inputs_of(row, seed=seed)
        plain = plain_answer(model, **inputs, **settings)
        assert torch.equal(plain, model.generate(**inputs, **settings))
        (session,) = runtime.ENGINES[model.language].sessions.values()
        (one,) = session.prefill_graphs.held.values()
        poison(session.buffers.logits, one.buffers.embeds, *(p for layer in session.buffers.caches for p in layer))
    assert ways == ["pass"] * 3
    if not ON_GPU:
        assert (capture.captures, capture.replays) == (1, 2)


def test_the_language_model_alone(capture: Capture, ways: list[str]) -> None:
    model, settings = mini_model("small").to(DEVICE), {**GREEDY, "max_new_tokens": 2}
    inputs = inputs_of([5, (1, 1), 3])
    embeds = model.prepare_inputs_embeds(**inputs).detach()
    ids = torch.tensor([[5, 6, 7], [9, 8, 7]], device=DEVICE)
    for given in ({"inputs_embeds": embeds}, {"input_ids": ids}):
        plain = plain_answer(model.language, **given, **settings)
        assert torch.equal(plain, model.language.generate(**given, **settings))
    assert ways == ["pass"] * 2


def test_a_prompt_that_cannot_be_recorded(ways: list[str], capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: cuda_graphs.Run) -> cuda_graphs.Run:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: broken)
    model, inputs, settings = mini_model("tiny").to(DEVICE), inputs_of([5]), {**GREEDY, "max_new_tokens": 1}
    plain = plain_answer(model, **inputs, **settings)
    assert all(torch.equal(plain, model.generate(**inputs, **settings)) for _ in range(3))
    assert ways == ["pass", "pass", "plain"]


def test_experts_that_cannot_be_recorded(ways: list[str], capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "unsupported_experts", lambda language: "not these")
    model, settings = mini_model("tiny").to(DEVICE), {**GREEDY, "max_new_tokens": 1}
    for _ in range(2):
        model.generate(**inputs_of([5]), **settings)
    assert ways == ["plain", "plain"]


def add_hook(model: Any) -> None:
    model.register_forward_hook(lambda *args: None)


def replace_forward(model: Any) -> None:
    model.language.forward = model.language.forward


FALLBACKS: dict[str, dict[str, Any]] = {
    "padding": {"rows": ([5], [3])},
    "own cache": {"cache": True},
    "chunks": {"settings": {"prefill_chunk_size": 3}},
    "long": {"rows": ([40],), "most": 32},
    "hook": {"change": add_hook},
    "replaced": {"change": replace_forward},
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_prompts_that_go_the_plain_way(
    name: str, capture: Capture, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FALLBACKS[name]
    model, inputs = mini_model("tiny").to(DEVICE), inputs_of(*case.get("rows", ([5],)))
    monkeypatch.setattr(prefill, "MAX_TOKENS", case.get("most", prefill.MAX_TOKENS))
    case.get("change", lambda model: None)(model)
    settings = {**GREEDY, "max_new_tokens": 2, **case.get("settings", {})}
    caches = [{"past_key_values": new_cache(model.language.config)} if case.get("cache") else {} for _ in range(2)]
    plain = plain_answer(model, **inputs, **settings, **caches[0])
    assert torch.equal(plain, model.generate(**inputs, **settings, **caches[1]))
    assert ways == ["plain"]


def test_images_start_before_the_checks(capture: Capture, ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on; a call that the kernels then do not take is answered all the same, and ends that."""
    model, inputs = mini_model("small").to(DEVICE), inputs_of([5, (2, 1), 3])
    settings = {**GREEDY, "max_new_tokens": 2}
    plain, checked = plain_answer(model, **inputs, **settings), runtime.unsupported_reason

    def noted_check(*args: Any) -> str | None:
        ways.append("check")
        return checked(*args)

    monkeypatch.setattr(runtime, "unsupported_reason", noted_check)
    for _ in range(2):
        assert torch.equal(plain, model.generate(**inputs, **settings))
    assert ways == ["check", "pass", "pass", "check"]
    (session,) = runtime.ENGINES[model.language].sessions.values()
    poison(session.buffers.logits)
    hook = model.language.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    for _ in range(2):
        assert torch.equal(plain, model.generate(**inputs, **settings))
    hook.remove()
    assert ways[4:] == ["pass", "check", "check"]


# ---------------------------------------------------------------- what a recording forbids


class NoHost(TorchDispatchMode):
    """Refuses what waits for the device, or copies from the host or to it."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        masks = name.startswith("index") and isinstance(args[1], (list, tuple))
        if name in self.WAITING or (masks and any(x is not None and x.dtype == torch.bool for x in args[1])):
            raise AssertionError(f"{name} waits for the device")
        tensors = [x for x in (*args, *(kwargs or {}).values(), out) if isinstance(x, torch.Tensor)]
        if any(x.device.type != "cuda" for x in tensors if x.dim() > 0 or name in ("_to_copy", "copy_")):
            raise AssertionError(f"{name} has a tensor on the host")
        return out


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Let the GPU's branches of the model run on tensors without numbers, without launching the kernels."""

    class NoLaunch:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: None

    for module in (router, norm, prefill_experts, rope):
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, NoLaunch())
    monkeypatch.setattr(moe, "FAST_EXPERTS", [experts.run_experts])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return FakeTensorMode()


def pretend(model: torch.nn.Module) -> None:
    """Put bfloat16 weights without numbers in the place of a model's, on a GPU that need not exist."""
    for module in model.modules():
        for name, held in list(module._parameters.items()):
            if held is not None:
                weight = torch.empty(held.shape, dtype=torch.bfloat16, device="cuda")
                module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
        for name, held in list(module._buffers.items()):
            if held is not None:
                module._buffers[name] = torch.empty(held.shape, dtype=held.dtype, device="cuda")


@pytest.mark.skipif(ON_GPU, reason="with a GPU it is recorded")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str, pretended: FakeTensorMode) -> None:
    model = mini_language(kind)
    with pretended, torch.no_grad():
        pretend(model)
        buffers = new_buffers(read_weights(model), 2, *rotary_tables(model, 256))
        one = prefill.new_graph(model, buffers, 128)
        assert buffers.logits.device.type == "cuda"
        with NoHost():
            one.run()


@pytest.mark.skipif(ON_GPU, reason="with a GPU it is recorded")
def test_the_mode_refuses(pretended: FakeTensorMode) -> None:
    with pretended:
        x = torch.ones(3, device="cuda")
    for waits in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x + torch.ones(3).to("cuda"), lambda: x.tolist()):
        with pretended, pytest.raises(Exception, match=r"waits|host|nonzero|local_scalar"), NoHost():
            waits()
