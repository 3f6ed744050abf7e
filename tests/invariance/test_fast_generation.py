"""``generate`` with the kernels gives what it gives without them; without a GPU, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import GREEDY, mini_inputs, mini_model
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("triton")

from deepseek_vl2 import ops
from deepseek_vl2.engine import backend, decode, runtime
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, generation
from deepseek_vl2.models.cache import new_cache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Fast:
    """The kernels' loop, which counts the calls that it took."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, call: generation.SampleCall) -> torch.Tensor | None:
        ids = runtime.sample(call)
        self.taken += ids is not None
        return ids


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Fast:
    """Let the kernels run wherever the tests do, in float32."""
    sampler = Fast()
    monkeypatch.setattr(runtime, "unsupported_device", lambda weight: None)
    monkeypatch.setattr(generation, "FAST_SAMPLERS", [sampler])
    if DEVICE.type == "cpu":
        monkeypatch.setattr(
            decode, "multiprocessors", lambda device: 3
        )  # the interpreter runs them one after the other
        monkeypatch.setattr(runtime, "MIN_CAPACITY", 64)
        monkeypatch.setattr(runtime, "FIRST_CAPACITY", 4)
    return sampler


@pytest.fixture(scope="module")
def models() -> dict[str, DeepseekVLV2ForCausalLM]:
    return {kind: mini_model(kind).to(DEVICE) for kind in ("tiny", "small", "base")}


def inputs_of(*rows: Any) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in mini_inputs(*rows).items()}


def both(model: Any, fast: Fast, inputs: dict[str, Any], **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate without and with the kernels."""
    samplers, generation.FAST_SAMPLERS = generation.FAST_SAMPLERS, []
    try:
        torch.manual_seed(5)
        plain = model.generate(**inputs, **settings)
    finally:
        generation.FAST_SAMPLERS = samplers
    torch.manual_seed(5)
    return plain, model.generate(**inputs, **settings)


@pytest.mark.parametrize("kind", ["tiny", "small", "base"])
@pytest.mark.parametrize("rows", [([5, (2, 1), 3], [7]), pytest.param(([4, (1, 1), 3],), marks=pytest.mark.slow)])
def test_greedy_tokens_agree(models: Any, fast: Fast, kind: str, rows: Any) -> None:
    plain, quick = both(models[kind], fast, inputs_of(*rows), **{**GREEDY, "max_new_tokens": 5})
    assert fast.taken == 1
    assert torch.equal(plain, quick)


SLOW_SETTING = pytest.param({"repetition_penalty": 1.3, "temperature": 0.7}, marks=pytest.mark.slow)


@pytest.mark.parametrize("settings", [{"top_p": 0.8, "top_k": 5}, SLOW_SETTING])
def test_sampling_draws_the_same(models: Any, fast: Fast, settings: dict[str, Any]) -> None:
    inputs = inputs_of([9], [6])
    plain, quick = both(models["small"], fast, inputs, do_sample=True, eos_token_id=None, max_new_tokens=4, **settings)
    assert fast.taken == 1
    assert torch.equal(plain, quick)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_rows_end_at_their_end_token(models: Any, fast: Fast) -> None:
    model, inputs = models["tiny"], inputs_of([9], [6])
    answer = model.generate(**inputs, do_sample=False, eos_token_id=None, max_new_tokens=6)[:, 9:]
    ends = [int(answer[0, 1]), int(answer[1, 3])]
    streamer = Collector()
    alone = {name: value[:1] for name, value in inputs.items()}
    settings = {"do_sample": False, "eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": 6}
    plain, quick = both(model, fast, inputs, **settings)
    assert torch.equal(plain, quick)
    assert plain.shape[1] < 9 + 6
    got = model.generate(**alone, **settings, streamer=streamer)
    assert streamer.ended and streamer.tokens == got[0].tolist()
    assert fast.taken == 3


def test_a_row_that_ended_is_padded() -> None:
    criteria = StoppingCriteriaList([EosTokenCriteria(5)])
    config = GenerationConfig()
    config._pad_token_tensor = torch.tensor(1)
    call = generation.SampleCall(None, torch.zeros(2, 0), [], criteria, config, False, None, {})
    answers = runtime.TokenFetcher(call, DEVICE, rows=2)
    ended = []
    for line in ([5, 9], [7, 9], [8, 5]):
        answers.send(torch.tensor(line, device=DEVICE))
        ended.append(answers.receive())
    assert answers.lines == [[5, 9], [1, 9], [1, 5]]
    assert ended == [False, False, True]


class EndAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


class Forbid(LogitsProcessor):
    """Forbids what was said before: needs the ids so far."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids, float("-inf"))


def test_criteria_and_processors_of_any_kind(models: Any, fast: Fast) -> None:
    settings = {
        "stopping_criteria": StoppingCriteriaList([EndAfter(12)]),
        "logits_processor": LogitsProcessorList([Forbid()]),
    }
    plain, quick = both(models["base"], fast, inputs_of([9], [6]), **{**GREEDY, "max_new_tokens": 8}, **settings)
    assert fast.taken == 1
    assert plain.shape[1] == 12
    assert torch.equal(plain, quick)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "small"])
def test_a_long_answer_moves_to_more_room(models: Any, fast: Fast, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MIN_CAPACITY", 8)
    monkeypatch.setattr(runtime, "FIRST_CAPACITY", 2)
    plain, quick = both(models[kind], fast, inputs_of([5], [3]), **{**GREEDY, "max_new_tokens": 7})
    assert torch.equal(plain, quick)
    rooms = {capacity for _, capacity in runtime.ENGINES[models[kind].language].sessions}
    assert {8, 16} <= rooms
    backend.release(models[kind])
    assert models[kind].language not in runtime.ENGINES


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "small"])
def test_a_prompt_prefilled_before(models: Any, fast: Fast, kind: str) -> None:
    model, inputs = models[kind], inputs_of([4, (1, 1), 3], [6])
    samplers, answers = generation.FAST_SAMPLERS, []
    for chosen in ([], samplers):
        generation.FAST_SAMPLERS = chosen
        embeds, cache = model.incremental_prefilling(**inputs, chunk_size=9)
        given = {**inputs, "inputs_embeds": embeds, "past_key_values": cache}
        answers.append(model.generate(**given, **{**GREEDY, "max_new_tokens": 3}))
    assert fast.taken == 1
    assert torch.equal(*answers)


def test_the_callers_cache_holds_the_answer(models: Any, fast: Fast) -> None:
    model, inputs = models["small"], inputs_of([5], [8])
    cache, plain_cache = (new_cache(model.language.config) for _ in range(2))
    quick = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 4}, past_key_values=cache)
    assert fast.taken == 1
    generation.FAST_SAMPLERS.clear()
    plain = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 4}, past_key_values=plain_cache)
    assert torch.equal(plain, quick)
    assert cache.get_seq_length() == plain_cache.get_seq_length() == 8 + 3
    for ours, theirs in zip(cache.layers, plain_cache.layers, strict=True):
        assert torch.allclose(ours.keys[:, :, 8:], theirs.keys[:, :, 8:], atol=1e-4)
        assert torch.allclose(ours.values[:, :, 8:], theirs.values[:, :, 8:], atol=1e-4)


FALLBACKS: dict[str, dict[str, Any]] = {
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_calls_that_go_the_plain_way(models: Any, fast: Fast, name: str) -> None:
    models["small"].generate(**inputs_of([4]), **{**GREEDY, "max_new_tokens": 2}, **FALLBACKS[name])
    assert fast.taken == 0


def test_models_that_go_the_plain_way(fast: Fast) -> None:
    model = mini_model("small").to(DEVICE)
    language = model.language
    assert runtime.unsupported_reason(language) is None
    hook = language.model.layers[1].mlp.register_forward_hook(lambda *args: None)
    assert "hooks" in str(runtime.unsupported_reason(language))
    hook.remove()
    language.train()
    assert "training" in str(runtime.unsupported_reason(language))
    language.eval()
    linear = language.model.layers[0].self_attn.o_proj

    class Adapted(torch.nn.Linear):
        pass

    language.model.layers[0].self_attn.o_proj = Adapted(linear.in_features, linear.out_features, bias=False)
    assert "Adapted" in str(runtime.unsupported_reason(language))
    language.model.layers[0].self_attn.o_proj = linear
    language.lm_head.to(torch.float64)
    assert "several dtypes" in str(runtime.unsupported_reason(language))
    language.lm_head.to(torch.float32)
    model.set_attn_implementation("eager")
    assert "eager" in str(runtime.unsupported_reason(language))


def test_weights_that_moved_are_read_anew(fast: Fast) -> None:
    model, inputs = mini_model("tiny").to(DEVICE), inputs_of([5])
    settings = {**GREEDY, "max_new_tokens": 2}
    model.generate(**inputs, **settings)
    first = runtime.ENGINES[model.language]
    model.generate(**inputs, **settings)
    assert runtime.ENGINES[model.language] is first
    with torch.no_grad():
        model.language.lm_head.weight = torch.nn.Parameter(model.language.lm_head.weight.roll(1, dims=0))
    plain, quick = both(model, fast, inputs, **settings)
    assert torch.equal(plain, quick)
    assert runtime.ENGINES[model.language] is not first


def test_a_failing_start_goes_the_plain_way(
    fast: Fast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(runtime, "DecodeState", broken)
    model, inputs = mini_model("tiny").to(DEVICE), inputs_of([5])
    out = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 3})
    assert out.shape[1] == 8 and fast.taken == 0
    assert "no compiler" in caplog.text
    assert "no compiler" in str(runtime.unsupported_reason(model.language))


def test_a_busy_engine_leaves_the_call_alone(models: Any, fast: Fast) -> None:
    model, inputs = models["tiny"], inputs_of([5])
    with runtime.engine_of(model.language).lock:
        model.generate(**inputs, **{**GREEDY, "max_new_tokens": 2})
    assert fast.taken == 0


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.SWITCH, "0")
    assert "turns it off" in str(backend.unsupported_reason(mini_model("tiny")))
    monkeypatch.delenv(ops.SWITCH)
    if DEVICE.type == "cpu":
        assert "not on an NVIDIA GPU" in str(backend.unsupported_reason(mini_model("tiny")))
