"""The engine over kernels gives what it gives over the model's own modules.

Without a GPU the kernels run in Triton's interpreter, on mini models in float32; on one, captured, on released shapes of
few layers in bfloat16.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support import RELEASES, mini_language

pytest.importorskip("triton")

from deepseek_vl2.engine import decode, placement, support
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.request import Delta, Event, Prompt, Request
from deepseek_vl2.engine.runner import ModuleRunner
from deepseek_vl2.engine.sampling_params import SamplingParams
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.engine.triton_runner import TritonRunner
from deepseek_vl2.models.modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Log probabilities. float32: sums of some hundred products in another order, through three layers. bfloat16: roundings
# of eight bits in other places, through three layers; logits are of size 1.
TOLERANCE = 0.15 if GPU else 2e-4
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
    config = DeepseekV2Config(**{**fields, "num_hidden_layers": 3})
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
    """Compare answers up to the first token at which two were about as likely."""
    for (got, got_logprobs), (want, want_logprobs) in zip(quick, plain, strict=True):
        for token, other, chosen, wanted in zip(got, want, got_logprobs, want_logprobs, strict=True):
            assert abs(chosen - wanted) < TOLERANCE
            if token != other:
                assert GPU, "in float32 the same tokens are the likeliest"
                break


@pytest.mark.parametrize("batch", BATCHES)
def test_rows_of_a_batch(model: Any, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(kv_cache_tokens=batch * 160 + 512)
    prompts = prompts_of(model, [70 + (7 * i) % 60 if GPU else 6 + 3 * i for i in range(batch)])
    quick = answers(by_kernels(model, options), prompts, 6 if GPU else 3)
    check(quick, answers(by_modules(model, options, monkeypatch), prompts, 6 if GPU else 3))


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
