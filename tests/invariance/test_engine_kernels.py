"""The engine over kernels gives what it gives over the model's own modules.

Without a GPU the kernels run in Triton's interpreter, on mini models in float32; on one, captured, on released shapes
of few layers in bfloat16.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from support import RELEASES, mini_language

pytest.importorskip("triton")

from deepseek_vl2.engine import decode, placement, support
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.request import Delta, Event, Prompt, Request
from deepseek_vl2.engine.rows import Rows
from deepseek_vl2.engine.runner import ModuleRunner, Part
from deepseek_vl2.engine.sampling_params import SamplingParams
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.engine.triton_runner import TritonRunner
from deepseek_vl2.models.cache import Segment
from deepseek_vl2.models.modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Log probabilities in float32: sums of some hundred products in another order, through three layers.
TOLERANCE = 2e-4
# In bfloat16 both are compared with float32: kernels round in fewer places than modules, but in others. A row whose
# experts part by a rounding is far off in either, so it is the median row that must be as good.
AS_GOOD = 1.25
# What the GPU has rows enough for, and the interpreter the time.
BATCHES = (1, 2, 5, 20, 64, 70, 200, 256) if GPU else (1, 3)


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(support, "unsupported_device", lambda weight: None)
        monkeypatch.setattr(support, "_unsupported_weights", lambda language: None)
        monkeypatch.setattr(decode, "multiprocessors", lambda device: 3)  # run one after the other


def language_model(kind: str) -> DeepseekV2ForCausalLM:
    if not GPU:
        return mini_language(kind)
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


@pytest.fixture(scope="module", params=["tiny", "small", "base"])
def model(request: pytest.FixtureRequest) -> DeepseekV2ForCausalLM:
    return language_model(request.param)


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
    """Compare answers; on a GPU, where roundings decide between two about as likely, by how many begin alike."""
    if GPU:
        alike = [got[0] == want[0] for (got, _), (want, _) in zip(quick, plain, strict=True)]
        assert sum(alike) >= len(alike) / 2, (quick, plain)
        return
    for (got, got_logprobs), (want, want_logprobs) in zip(quick, plain, strict=True):
        assert got == want
        assert max(abs(a - b) for a, b in zip(got_logprobs, want_logprobs, strict=True)) < TOLERANCE


def forced_logits(engine: Engine, prompts: list[list[int]], tokens: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits [B, V] behind the prompts and behind each of some tokens, whatever was likely."""
    extents = [engine.kv_cache.allocate(len(prompt) + len(tokens)) for prompt in prompts]
    order = list(range(len(prompts)))[::-1]  # a pass may take sequences in any order
    parts = [Part(Segment(extents[i].start, 0, len(prompts[i])), prompts[i]) for i in order]
    runner, found = engine.runner, []
    with torch.inference_mode():
        found.append(runner.prefill(parts)[order].float().clone())
        rows = Rows(256, engine.device)
        for step, line in enumerate(tokens):
            positions = [len(prompt) + step for prompt in prompts]
            if isinstance(runner, TritonRunner):
                rows.set(line, positions, [extent.start for extent in extents])
                logits, likeliest = runner._run_step(rows, len(prompts))
                assert torch.equal(likeliest, logits.argmax(dim=-1))
                found.append(logits.clone())
                continue
            single = zip(extents, positions, line, strict=True)
            found.append(runner.prefill([Part(Segment(e.start, p, 1), [token]) for e, p, token in single]).float())
    for extent in extents:
        engine.kv_cache.free(extent)
    return found


def errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return each row's relative error, [B]."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


@pytest.mark.parametrize("batch", BATCHES)
def test_logits_of_a_batch(model: Any, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(kv_cache_tokens=batch * 160 + 512)
    prompts = prompts_of(model, [70 + (7 * i) % 60 if GPU else 6 + 3 * i for i in range(batch)])
    forced = [list(line) for line in zip(*prompts_of(model, [3] * batch, seed=1), strict=True)]
    quick = forced_logits(by_kernels(model, options), prompts, forced)
    plain = forced_logits(by_modules(model, options, monkeypatch), prompts, forced)
    if not GPU:
        for got, want in zip(quick, plain, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * float(want.abs().max()))
        return
    exact = forced_logits(by_modules(copy.deepcopy(model).float(), options, monkeypatch), prompts, forced)
    for step, (got, want, true) in enumerate(zip(quick, plain, exact, strict=True)):
        kernels, modules = float(errors(got, true).median()), float(errors(want, true).median())
        assert kernels <= AS_GOOD * modules + 1e-3, f"batch {batch}, step {step}: {kernels:.4f}, modules {modules:.4f}"


def test_prompts_in_chunks_and_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt alone is captured; in chunks it is packed with others, behind what is cached of it."""
    lengths = (300, 900, 131, 70) if GPU else (150, 12)
    prompts, options = prompts_of(model, lengths), EngineOptions(prefill_tokens=256 if GPU else 80)
    plain = answers(by_modules(model, EngineOptions(), monkeypatch), prompts, 3)
    check(answers(by_kernels(model, options), prompts, 3), plain)
    alone = by_kernels(model, EngineOptions())
    for turn in range(3 if GPU else 1):  # launched, captured, replayed
        for prompt, want in zip(prompts, plain, strict=True):
            check(answers(alone, [prompt], 3), [want])
        assert turn < 3


def test_what_follows_a_held_prefix(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its few tokens run as rows of a step; the answer is that of the whole prompt."""
    first, question, other = prompts_of(model, (200 if GPU else 70, 9, 5))
    plain = answers(by_modules(model, EngineOptions(), monkeypatch), [first + question, first + other], 3)
    engine = by_kernels(model, EngineOptions(share_prefixes=True))
    answers(engine, [first], 2)
    check(answers(engine, [first + question, first + other], 3), plain)
    assert engine.scheduler.prefixes.hits == 2 and engine.scheduler.prefixes.tokens_saved >= 2 * 64


def test_padding_of_a_bucket_leaves_everything_alone(model: Any) -> None:
    """Rows that nobody has write to the pool's scratch tokens, however many steps go by."""
    engine = by_kernels(model, EngineOptions(kv_cache_tokens=2048))
    for pool in engine.kv_cache.pools:
        for part in pool:
            part[512:] = float("nan")
    batch = 5 if GPU else 3
    prompts = prompts_of(model, [8] * batch)
    answers(engine, prompts, 70 if GPU else 4)
    used = 64 + batch * (8 + (70 if GPU else 4))
    for pool in engine.kv_cache.pools:
        for part in pool:
            assert bool(part[max(used, 512) :].isnan().all())
