"""The engine over kernels gives what it gives over the model's own modules.

Without a GPU the kernels run in Triton's interpreter, on mini models in float32, as few tokens as take every way; on
one, captured, on released shapes of few layers in bfloat16.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_support import Capture, poison
from packed_support import FEW_ROWS, pack
from support import RELEASES, mini_language

pytest.importorskip("triton")

from deepseek_vl2.engine import (
    captured_prefill,
    decode,
    experts,
    holder,
    placement,
    prefill,
    prefix_cache,
    row_layout,
    scheduler,
    self_check,
    support,
    triton_runner,
)
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.kv_cache import layer_shapes
from deepseek_vl2.engine.request import Delta, Event, Prompt, Request
from deepseek_vl2.engine.rows import Rows
from deepseek_vl2.engine.runner import ModuleRunner, Part
from deepseek_vl2.engine.sampling_params import SamplingParams
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.engine.triton_runner import TritonRunner
from deepseek_vl2.engine.weights import rotary_tables
from deepseek_vl2.models.cache import Segment
from deepseek_vl2.models.modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM
from deepseek_vl2.models.quantizer import WeightOnlyConfig

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Log probabilities in float32: sums of some hundred products in another order, through three layers.
TOLERANCE = 2e-4
# In bfloat16 both are compared with float32: kernels round in fewer places than modules, but in others. A row whose
# experts part by a rounding is far off in either, so it is the median row that must be as good.
AS_GOOD = 1.25
KINDS = ("tiny", "small", "base")
# What the GPU has rows enough for, and the interpreter the time: there three rows are a padded bucket of four.
PACKED: dict[str, dict[str, Any]] = {
    "tiny, int4": {"weights": "int4", "group_size": 32},
    "small, int4": {"weights": "int4", "group_size": 32, "head": "int8"},
    "small, int8": {"weights": "int8", "head": "int8"},
    "base, fp8": {"weights": "fp8", "head": "fp8"},
    "base, fp8 in blocks": {"weights": "fp8", "block": True},
}
CASES = (
    [(kind, batch) for kind in (*KINDS, *PACKED) for batch in (1, 2, 5, 20, 64, 70, 200, 256)]
    if GPU
    else [
        *((kind, 1) for kind in ("tiny", "small", "tiny, int4", "small, int8", "base, fp8")),
        *((kind, 3) for kind in ("tiny, grouped keys", "small, no shared experts", "base, groups")),
        *((kind, 3) for kind in ("small, int4", "base, fp8 in blocks")),
    ]
)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 0.7, "mscale_all_dim": 0.7}
CHANGES: dict[str, dict[str, Any]] = {
    "tiny, grouped keys": {"num_key_value_heads": 2},
    "small, no shared experts": {"n_shared_experts": None, "rope_scaling": YARN},
    "base, groups": {"n_group": 4, "topk_group": 2},
}


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(self_check, "is_packed", lambda weights: False)  # test_packed_engine.py looks at it
        monkeypatch.setattr(support, "unsupported_device", lambda weight: None)
        monkeypatch.setattr(support, "_unsupported_weights", lambda language: None)
        monkeypatch.setattr(decode, "multiprocessors", lambda device: 3)  # run one after the other
        monkeypatch.setattr(triton_runner, "SHORT", 3)
        for module in (captured_prefill, row_layout):
            monkeypatch.setattr(module, "STEP", 4)
        for module in (prefix_cache, scheduler):
            monkeypatch.setattr(module, "BLOCK", 4)


def language_model(kind: str, **changes: Any) -> DeepseekV2ForCausalLM:
    if kind in PACKED:
        return pack(language_model(kind.split(",")[0], **FEW_ROWS), WeightOnlyConfig(**PACKED[kind]))
    if not GPU:
        # One layer is dense, one has experts.
        fields = {"num_hidden_layers": 2, "vocab_size": 64, **CHANGES.get(kind, {}), **changes}
        return mini_language(kind.split(",")[0], **fields)
    fields = json.loads((RELEASES / kind / "config.json").read_text(encoding="utf-8"))["language_config"]
    # All experts are chosen: where some are, roundings decide between two about as good, and answers part.
    config = DeepseekV2Config(
        **{**fields, "num_hidden_layers": 3, "n_routed_experts": 16, "num_experts_per_tok": 16, "n_group": 1}
    )
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=DEVICE).eval()
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            if parameter.dim() == 1:
                parameter.fill_(1.0)
        for name, buffer in model.named_buffers():
            if "inv_freq" not in name:
                buffer.zero_()
    return model


made_model = cache(language_model)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> DeepseekV2ForCausalLM:
    return made_model(request.param)


def prompts_of(model: Any, lengths: Any, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, model.config.vocab_size - 1, (n,), generator=generator).tolist() for n in lengths]


Answered = list[tuple[list[int], list[float]]]


def answers(engine: Engine, prompts: list[list[int]], tokens: int, **settings: Any) -> Answered:
    """Return the tokens of each prompt's answer and their log probabilities."""
    events: list[list[Event]] = [[] for _ in prompts]
    requests = []
    for prompt, got in zip(prompts, events, strict=True):
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=1, **settings)
        requests.append(Request(Prompt(prompt, shared=True), params, got.append))
    engine.submit(requests)
    engine.run_until(lambda: not any(engine.holds(request) for request in requests))
    found = []
    for got in events:
        deltas = [event for event in got if isinstance(event, Delta)]
        assert len(deltas) == len(got), got
        shown = [token for delta in deltas for token in delta.tokens]
        found.append(([t.token_id for t in shown], [t.logprobs.chosen for t in shown if t.logprobs is not None]))
    return found


def by_modules(model: Any, options: EngineOptions, monkeypatch: pytest.MonkeyPatch) -> Engine:
    with monkeypatch.context() as patch:
        patch.setattr(placement, "unsupported_reason", lambda language: "a test")
        engine = Engine(model, options)
    assert isinstance(engine.runner, ModuleRunner)
    return engine


def by_kernels(model: Any, options: EngineOptions) -> Engine:
    engine = Engine(model, options)
    assert isinstance(engine.runner, TritonRunner), engine.placement.reason
    return engine


def check(quick: Answered, plain: Answered) -> None:
    """Compare answers; on a GPU roundings decide between tokens about as likely: there logits are compared."""
    if GPU:
        return
    for (got, got_logprobs), (want, want_logprobs) in zip(quick, plain, strict=True):
        assert got == want
        assert max(abs(a - b) for a, b in zip(got_logprobs, want_logprobs, strict=True)) < TOLERANCE


def forced_logits(
    engine: Engine, prompts: list[list[int]], tokens: list[list[int]], chunk: int = 0
) -> list[torch.Tensor]:
    """Return the logits [B, V] behind the prompts and behind each of some tokens, whatever was likely.

    With ``chunk`` that many tokens of each prompt are read in a pass before the rest.
    """
    extents = [engine.kv_cache.allocate(len(prompt) + len(tokens)) for prompt in prompts]
    order = list(range(len(prompts)))[::-1]  # a pass may take sequences in any order
    parts = [Part(Segment(extents[i].start, chunk, len(prompts[i]) - chunk), prompts[i][chunk:]) for i in order]
    runner, found = engine.runner, []
    with torch.inference_mode():
        if chunk:
            runner.prefill([Part(Segment(extents[i].start, 0, chunk), prompts[i][:chunk]) for i in order])
        found.append(runner.prefill(parts)[order].float().clone())
        rows = Rows(256, engine.device)
        for step, line in enumerate(tokens):
            positions = [len(prompt) + step for prompt in prompts]
            if isinstance(runner, TritonRunner):
                rows.set(line, positions, [extent.start for extent in extents])
                logits, likeliest = runner._run_step(rows, len(prompts))
                assert torch.equal(likeliest, logits.argmax(dim=-1))
                found.append(logits.clone())
                assert rows.positions.tolist() == [p + 1 for p in positions] + [0] * (256 - len(prompts))
                continue
            single = zip(extents, positions, line, strict=True)
            found.append(runner.prefill([Part(Segment(e.start, p, 1), [token]) for e, p, token in single]).float())
    for extent in extents:
        engine.kv_cache.free(extent)
    return found


def errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return each row's relative error, [B]."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


@pytest.mark.parametrize(("kind", "batch"), CASES)
def test_logits_of_a_batch(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = made_model(kind), EngineOptions(kv_cache_tokens=batch * 160 + 512)
    prompts = prompts_of(model, [70 + (7 * i) % 60 if GPU else 4 + i for i in range(batch)])
    forced = [list(line) for line in zip(*prompts_of(model, [3 if GPU else 1] * batch, seed=1), strict=True)]
    quick = forced_logits(by_kernels(model, options), prompts, forced)
    plain = forced_logits(by_modules(model, options, monkeypatch), prompts, forced)
    if not GPU:
        for got, want in zip(quick, plain, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * float(want.abs().max()))
        return
    wide = copy.deepcopy(model).float()
    as_good(quick, plain, forced_logits(by_modules(wide, options, monkeypatch), prompts, forced))


def as_good(quick: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Compare the kernels' logits and the modules' with those of float32."""
    for step, (got, want, true) in enumerate(zip(quick, plain, exact, strict=True)):
        kernels, modules = float(errors(got, true).median()), float(errors(want, true).median())
        assert kernels <= AS_GOOD * modules + 1e-3, f"step {step}: {kernels:.4f}, modules {modules:.4f}"


@pytest.mark.parametrize("kind", KINDS if GPU else ("tiny", "small"))
def test_prompts_in_chunks_and_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks a prompt is packed with others, behind what is cached of it; on a GPU a prompt alone is captured."""
    model = made_model(kind)
    lengths, chunk = ((300, 900, 131, 170), 100) if GPU else ((9, 6), 4)
    prompts, options = prompts_of(model, lengths), EngineOptions(kv_cache_tokens=4096 if GPU else 256)
    nothing: list[list[int]] = []
    plain = forced_logits(by_modules(model, options, monkeypatch), prompts, nothing)
    wide = copy.deepcopy(model).float()
    exact = forced_logits(by_modules(wide, options, monkeypatch), prompts, nothing)
    engine = by_kernels(model, options)
    found = [forced_logits(engine, prompts, nothing, chunk)]
    for _ in range(3 if GPU else 1):  # launched, captured, replayed
        found.append([torch.cat([forced_logits(engine, [prompt], nothing)[0] for prompt in prompts])])
    for quick in found:
        if GPU:
            as_good(quick, plain, exact)
        else:
            torch.testing.assert_close(quick[0], plain[0], rtol=0, atol=TOLERANCE * float(plain[0].abs().max()))


GROUPED = (
    (*KINDS, *PACKED)
    if GPU
    else ("tiny, grouped keys", "small", "base, groups", pytest.param("tiny, int4", marks=pytest.mark.slow))
)


@pytest.mark.parametrize("kind", GROUPED)
def test_prompts_of_about_one_length_are_replayed_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to one length, in one pass, with what the pool and the buffers held of others."""
    model = made_model(kind)
    lengths = (300, 900, 880, 384) if GPU else (3, 8, 7, 4)
    prompts, options = prompts_of(model, lengths), EngineOptions(kv_cache_tokens=4096 if GPU else 256)
    plain = forced_logits(by_modules(model, options, monkeypatch), prompts, [])
    wide = copy.deepcopy(model).float() if GPU else model
    exact = forced_logits(by_modules(wide, options, monkeypatch), prompts, []) if GPU else plain
    engine = by_kernels(model, options)
    runner, capture = engine.runner, Capture()
    assert isinstance(runner, TritonRunner)
    runner.capture = {engine.device: capture}
    runner.pool_changed()
    # Launched; captured, the groups in another order than the prompts; replayed over what other prompts left.
    for times in range(3):
        if times == 2:
            runner.prompts.embeds_NH.fill_(float("nan"))
        quick = forced_logits(engine, prompts, [])
        if GPU:
            as_good(quick, plain, exact)
        else:
            torch.testing.assert_close(quick[0], plain[0], rtol=0, atol=TOLERANCE * float(plain[0].abs().max()))
        assert capture.replays == times * len(runner.prompts.graphs.held)
    shapes = sorted(key[:2] for key in runner.prompts.graphs.held if isinstance(key, tuple))
    assert shapes == ([(2, 384), (2, 1024)] if GPU else [(2, 4), (2, 8)])


ATTENTION = F.scaled_dot_product_attention


# Of about one length, of one, of several, and behind cached tokens: how many calls a layer's attention takes.
@pytest.mark.parametrize(
    ("lengths", "chunk", "calls"),
    [((35, 34, 36), 0, 1), ((17, 17), 0, 1), ((7,) * 9, 0, 1), ((21,), 0, 1), ((9, 30, 5), 0, 3), ((12, 12, 12), 4, 3)],
    ids=str,
)
def test_prompts_that_attend_together(
    lengths: tuple[int, ...], chunk: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of about one length are padded to it: padding lies between them, and windows reach over it."""
    if GPU:  # as many tokens as a decoding step has rows would be rows
        lengths, chunk = tuple(10 * length for length in lengths), 10 * chunk
    for kind in ("small", "tiny, grouped keys") if not GPU else ("small", "tiny"):
        model, options = made_model(kind), EngineOptions(kv_cache_tokens=4096 if GPU else 512)
        prompts = prompts_of(model, lengths)
        plain = forced_logits(by_modules(model, options, monkeypatch), prompts, [], chunk)
        engine, queries = by_kernels(model, options), list[torch.Size]()

        def count(query: torch.Tensor, *args: Any, queries: list[Any] = queries, **named: Any) -> torch.Tensor:
            queries.append(query.shape)
            return ATTENTION(query, *args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", count)
            quick = forced_logits(engine, prompts, [], chunk)
        before = int(chunk > 0)  # chunks of one length attend together
        assert len(queries) == (before + calls) * len(model.model.layers)
        if GPU:
            wide = copy.deepcopy(model).float()
            as_good(quick, plain, forced_logits(by_modules(wide, options, monkeypatch), prompts, [], chunk))
        else:
            torch.testing.assert_close(quick[0], plain[0], rtol=0, atol=TOLERANCE * float(plain[0].abs().max()))


# Of one length, of about one, of several, and where a window reaches over several prompts.
# Heads of a latent cache attend on a CPU by plain products and an added mask, in which keys that are NaN stay NaN.
@pytest.mark.parametrize("kind", ("tiny", "small") if GPU else ("tiny",))
@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 6, 5), (6, 3, 9), (2, 2, 2)], ids=str)
def test_a_broken_prompt_breaks_no_other(kind: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no number in rows that others' windows reach over is in its own prompt's logits alone."""
    monkeypatch.setattr(row_layout, "MOST_PADDED", 1.2)
    if GPU:
        lengths = tuple(30 * length + 1 for length in lengths)
    model = made_model(kind)
    engine = by_kernels(model, EngineOptions(kv_cache_tokens=sum(lengths) + 64))
    table = model.model.embed_tokens.weight.detach()
    embeds = [table[torch.tensor(prompt, device=DEVICE)] for prompt in prompts_of(model, lengths)]
    extents = [engine.kv_cache.allocate(length) for length in lengths]

    def read() -> torch.Tensor:
        given = zip(extents, embeds, strict=True)
        with torch.inference_mode():
            return engine.runner.prefill([Part(Segment(e.start, 0, len(own)), embeds_TH=own) for e, own in given])

    whole = read()
    embeds[1][0] = float("inf")
    embeds[1][1] = float("nan")
    found = read()
    assert found[1].isnan().all()
    scale = float(whole.abs().max())
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]], rtol=0, atol=TOLERANCE * scale)


def test_which_prompts_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kind met before, few tokens in few groups, all of them whole prompts."""
    monkeypatch.setattr(row_layout, "STEP", 128)
    engine = by_kernels(made_model("small"), EngineOptions(kv_cache_tokens=256))
    runner = engine.runner
    assert isinstance(runner, TritonRunner)
    graphs = runner.prompts

    def groups(*tokens: int, past: int = 0, alone: bool = True) -> list[list[int]]:
        return graphs.groups([Part(Segment(64, 0 if i else past, new)) for i, new in enumerate(tokens)], alone)

    assert GPU or groups(70, 70) == groups(70, 70) == []  # nothing captures here
    graphs.capture = Capture()
    graphs.tables = (graphs.tables[0].new_zeros(8192, 4),) * 2
    assert groups(700, 700, 700, 200) == []  # met for the first time
    assert groups(700, 200, 690, 660) == [[0, 2, 3], [1]]
    assert groups(700, 200, 690, 660, alone=False) == []  # not captured yet, and others would wait
    assert groups(200) == [[0]] and groups(700, 700, 700, 1100) == []  # one of its groups is new
    for _ in range(2):
        assert groups(200, 700, 700, 700, past=64) == []  # the first has a past
        assert groups(10, 250, 510, 770) == []  # four groups
        assert groups(2400, 2300) == []  # the device takes longer than launching
    assert len(graphs.graphs.held) == 3 and graphs.embeds_NH.shape[0] == 3 * 768


def test_kinds_of_prompts_stay_known_when_the_pool_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was captured reads the old pool; what comes again is captured at once, not launched once more before."""
    model = made_model("small")
    prompts = prompts_of(model, (300, 280) if GPU else (8, 7))
    engine = by_kernels(model, EngineOptions(kv_cache_tokens=4096 if GPU else 256))
    runner, capture = engine.runner, Capture()
    assert isinstance(runner, TritonRunner)
    runner.capture = {engine.device: capture}
    runner.pool_changed()
    first, second = (forced_logits(engine, prompts, [])[0] for _ in range(2))
    assert (capture.captures, capture.replays) == (1, 1)  # launched, then captured
    engine.kv_cache.grow(2 * engine.kv_cache.tokens)
    for pool in engine.kv_cache.pools:
        poison(*pool)
    runner.pool_changed()
    for expected in (2, 3):
        third = forced_logits(engine, prompts, [])[0]
        assert (capture.captures, capture.replays) == (2, expected)
        limit = (0.05 if GPU else TOLERANCE) * float(first.abs().max())
        torch.testing.assert_close(third, second, rtol=0, atol=limit)
    assert runner.prompts.met == {key for key in runner.prompts.graphs.held}


def test_a_capture_that_fails_leaves_prompts_launched(caplog: pytest.LogCaptureFixture) -> None:
    def broken(run: Callable[[], None], before: Callable[[], None] | None = None) -> Callable[[], None]:
        raise RuntimeError("operation not permitted")

    engine = by_kernels(made_model("small"), EngineOptions(kv_cache_tokens=512))
    runner, prompts = engine.runner, prompts_of(made_model("small"), [90] if GPU else [5])
    assert isinstance(runner, TritonRunner)
    runner.capture = {engine.device: broken}
    runner.pool_changed()
    first, second, third = (forced_logits(engine, prompts, [])[0] for _ in range(3))
    assert "launched, not replayed" in caplog.text and runner.prompts.capture is None
    limit = (0.05 if GPU else TOLERANCE) * float(first.abs().max())
    torch.testing.assert_close(second, first, rtol=0, atol=limit)
    torch.testing.assert_close(third, first, rtol=0, atol=limit)


@pytest.mark.parametrize("kind", KINDS if GPU else ("small",))
def test_what_follows_a_held_prefix(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its few tokens run as rows of a step; the answer is that of the whole prompt."""
    model = made_model(kind)
    first, question, other = prompts_of(model, (200, 9, 5) if GPU else (8, 2, 1))
    plain = answers(by_modules(model, EngineOptions(), monkeypatch), [first + question, first + other], 3)
    engine = by_kernels(model, EngineOptions(share_prefixes=True))
    answers(engine, [first], 2 if GPU else 1)
    check(answers(engine, [first + question, first + other], 3), plain)
    assert engine.scheduler.prefixes.hits == 2
    assert engine.scheduler.prefixes.tokens_saved >= 2 * (64 if GPU else 8)


@pytest.mark.parametrize("kind", KINDS if GPU else ("tiny",))
def test_padding_of_a_bucket_leaves_everything_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that nobody has write to the pool's scratch tokens, however many steps go by."""
    model = made_model(kind)
    engine = by_kernels(model, EngineOptions(kv_cache_tokens=2048))
    first = 512 if GPU else 128
    for pool in engine.kv_cache.pools:
        for part in pool:
            part[first:] = float("nan")
    batch, tokens = (5, 70) if GPU else (3, 3)
    prompts = prompts_of(model, [8] * batch)
    given = answers(engine, prompts, tokens)
    used = 64 + batch * (8 + tokens)
    for pool in engine.kv_cache.pools:
        for part in pool:
            assert bool(part[max(used, first) :].isnan().all())
    check(given, [] if GPU else answers(by_modules(model, EngineOptions(), monkeypatch), prompts, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKED if GPU else ("tiny, int4",))
def test_served_answers_of_packed_weights_are_those_of_generate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked together of the kernels: each prompt gets what `generate` gives it alone, by the modules and by kernels."""
    model, tokens = made_model(kind), 8 if GPU else 2
    prompts, options = prompts_of(model, (2, 3)), EngineOptions(kv_cache_tokens=256)
    plain = answers(by_modules(model, options, monkeypatch), prompts, tokens)
    together = answers(by_kernels(model, options), prompts, tokens)
    check(together, plain)
    ids = torch.tensor([prompts[1]], device=DEVICE)
    alone = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    engine = holder.existing_engine(model)
    assert engine is not None and isinstance(engine.runner, TritonRunner)
    assert GPU or alone[0, 3:].tolist() == together[1][0] == plain[1][0]
    holder.release_model(model)


@pytest.mark.skipif(GPU, reason="a GPU has rows enough")
def test_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are PyTorch's, and its experts those of a prefill."""
    monkeypatch.setattr(decode, "MAX_SMALL_BATCH", 2)
    model = made_model("small")
    prompts, options = prompts_of(model, (3, 4, 2)), EngineOptions(kv_cache_tokens=256)
    (forced,) = zip(*prompts_of(model, [1] * 3, seed=1), strict=True)
    quick = forced_logits(by_kernels(model, options), prompts, [list(forced)])
    plain = forced_logits(by_modules(model, options, monkeypatch), prompts, [list(forced)])
    for got, want in zip(quick, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * float(want.abs().max()))


@torch.no_grad()
def test_a_layer_with_experts_and_padding() -> None:
    """In bfloat16, where experts are run by the kernels and padding has none: each token by itself."""
    model = mini_language("small", num_hidden_layers=2).to(DEVICE, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    tokens, length = 9, 7
    layer, plain = model.model.layers[1], exact.model.layers[1]
    if not experts.is_supported(layer.mlp.experts, model.model.norm.weight):
        pytest.skip("these experts are not for the kernels")
    cos, sin = rotary_tables(model, tokens)
    (shape,) = {(pool.rank, pool.size) for pool in layer_shapes(model)}
    pool = torch.full((32, sum(map(int, shape))), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    given = torch.randn(tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(2)).to(pool)
    slots = torch.tensor([8 + i if i < length else 0 for i in range(tokens)], device=DEVICE)
    last = torch.tensor([length - 1], device=DEVICE)
    packed = prefill.PackedTokens([Segment(8, 0, tokens)], slots, cos[:tokens], sin[:tokens], last)
    hidden, normed = given.clone(), layer.input_layernorm(given)
    prefill.prefill_layer(layer, hidden, normed, packed, (pool,), model.model.norm)
    assert torch.isfinite(hidden).all() and torch.isfinite(normed).all()
    assert torch.isfinite(pool[8 : 8 + length]).all() and pool[8 + length :].isnan().all()
    rotation = (cos[None, :tokens].float(), sin[None, :tokens].float())
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).tril()[None, None]
    want = plain(given[None].float(), rotation, mask)[0][0, :length]
    error = hidden[:length].float() - want
    assert 0 < float(error.norm() / (want - given[:length].float()).norm()) < 0.03  # sums of rounded parts


@pytest.mark.parametrize("batch", [1, 3])
def test_what_runs_before_a_capture_is_nobodys_step(batch: int) -> None:
    """A GPU runs a function once before it captures it: rows must not advance twice in the first step of a bucket."""
    engine = by_kernels(language_model("small", num_hidden_layers=1), EngineOptions(kv_cache_tokens=512))
    runner, runs = engine.runner, list[str]()
    assert isinstance(runner, TritonRunner)
    if not GPU:

        def capture(run: Callable[[], None], before: Callable[[], None] | None = None) -> Callable[[], None]:
            runs.append("before")
            (before or run)()
            return run

        runner.capture = {engine.device: capture}
    rows = Rows(4, engine.device)
    extents = [engine.kv_cache.allocate(8) for _ in range(batch)]
    rows.set([5] * batch, [0] * batch, [extent.start for extent in extents])
    with torch.inference_mode():
        runner._run_step(rows, batch)
        first = rows.tokens[:batch].tolist()
        assert rows.positions.tolist() == [1] * batch + [0] * (4 - batch) and (GPU or runs == ["before"])
        rows.set([5] * batch, [0] * batch, [extent.start for extent in extents])
        runner._run_step(rows, batch)
    assert rows.tokens[:batch].tolist() == first


def test_a_warm_engine_has_captured_every_batch_size() -> None:
    model = language_model("small", num_hidden_layers=1)  # which the engine does not keep alive
    engine = by_kernels(model, EngineOptions(kv_cache_tokens=512, max_batch=96))
    runner = engine.runner
    assert isinstance(runner, TritonRunner) and not runner.steps
    engine.warm_up()
    captured = {(rows, bucket) for rows, bucket, _ in runner.steps}
    sizes = [size for size in triton_runner.BUCKETS if size <= runner.max_batch]
    assert captured == {(id(engine.rows), size) for size in sizes} | {
        (id(runner.short), size) for size in sizes if size <= triton_runner.SHORT
    }
    before = dict(runner.steps)
    answers(engine, prompts_of(model, [5]), 2)
    assert runner.steps == before
