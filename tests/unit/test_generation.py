"""Generation, in every way that transformers' users ask for it, gives one and the same answer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from generation_support import SAMPLING, Inputs, greedy_answer, two_prompts
from support import GREEDY, mini_inputs, mini_language, mini_model, new_tokens, shared_mini_model
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


@pytest.fixture
def inputs() -> Inputs:
    """Return the two prompts, to be changed at will."""
    return two_prompts()


@pytest.fixture
def plain(kind: str) -> list[list[int]]:
    """Return the plain greedy answer to the two prompts, prompts included."""
    return [list(row) for row in greedy_answer(kind)]


# ---------------------------------------------------------------- ways to call


def test_generate_returns_the_prompt_and_the_answer(kind: str, inputs: Inputs, plain: list[list[int]]) -> None:
    length = inputs["input_ids"].shape[1]
    assert [row[:length] for row in plain] == inputs["input_ids"].tolist()
    assert {len(row) for row in plain} == {length + 8}
    answers = [row[length:] for row in plain]
    assert answers[0] != answers[1] and all(len(set(answer)) > 5 for answer in answers)  # or equality shows nothing


@torch.no_grad()
def test_greedy_generation_takes_the_best_token_of_each_full_forward(
    kind: str, inputs: Inputs, plain: list[list[int]]
) -> None:
    model = shared_mini_model(kind)
    embeds, mask = model.prepare_inputs_embeds(**inputs), inputs["attention_mask"]
    for step in range(8):
        best = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, -1].argmax(-1)
        assert best.tolist() == [row[inputs["input_ids"].shape[1] + step] for row in plain]
        embeds = torch.cat((embeds, model.get_input_embeddings()(best)[:, None]), dim=1)
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.bool)), dim=1)


def test_ids_may_be_given_by_position(kind: str) -> None:
    model, text = shared_mini_model(kind), mini_inputs([12])
    assert torch.equal(model.generate(text["input_ids"], **GREEDY), model.generate(**text, **GREEDY))


def test_what_the_processor_adds_to_a_batch_is_ignored(kind: str, inputs: Inputs, plain: list[list[int]]) -> None:
    extra: dict[str, Any] = {"sft_format": ["a", "b"], "seq_lens": [1, 2], "labels": inputs["input_ids"]}
    assert shared_mini_model(kind).generate(**inputs, **extra, **GREEDY).tolist() == plain


@pytest.mark.parametrize("part", ["language", "language_model"])
def test_the_language_model_returns_the_new_tokens_for_embeddings(
    kind: str, inputs: Inputs, plain: list[list[int]], part: str
) -> None:
    model = shared_mini_model(kind)
    embeds = model.prepare_inputs_embeds(**inputs)
    out = getattr(model, part).generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        pad_token_id=1,
        bos_token_id=0,
        use_cache=True,
        **GREEDY,
    )
    assert out.tolist() == [row[inputs["input_ids"].shape[1] :] for row in plain]


def test_embeddings_alone_give_the_new_tokens(kind: str, inputs: Inputs, plain: list[list[int]]) -> None:
    model = shared_mini_model(kind)
    embeds = model.prepare_inputs_embeds(**inputs)
    out = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **GREEDY)
    assert out.tolist() == [row[inputs["input_ids"].shape[1] :] for row in plain]


def test_embeddings_with_ids_and_images_give_the_prompt_too(kind: str, inputs: Inputs, plain: list[list[int]]) -> None:
    model = shared_mini_model(kind)
    embeds = model.prepare_inputs_embeds(**inputs)
    assert model.generate(inputs_embeds=embeds, **inputs, **GREEDY).tolist() == plain


def test_text_only_prompts_work_with_and_without_the_zero_image(kind: str) -> None:
    model, text = shared_mini_model(kind), mini_inputs([12])
    assert text["images_spatial_crop"].tolist() == [[[0, 0]]]
    bare = {name: text[name] for name in ("input_ids", "attention_mask")}
    language = model.language.generate(**bare, **GREEDY)
    for given in (text, bare, {"input_ids": text["input_ids"]}):
        assert torch.equal(model.generate(**given, **GREEDY), language)


def test_a_zero_image_does_not_run_the_vision_tower(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_mini_model(kind)
    monkeypatch.setattr(type(model.vision), "forward", lambda *_: pytest.fail("the vision tower ran"))
    model.generate(**mini_inputs([12]), **GREEDY)


# ---------------------------------------------------------------- decoding strategies


def test_generation_without_a_cache_is_the_same(kind: str, inputs: Inputs, plain: list[list[int]]) -> None:
    assert shared_mini_model(kind).generate(**inputs, **GREEDY, use_cache=False).tolist() == plain


@pytest.mark.parametrize("chunk", [None, 16])
def test_beams_are_the_same_with_and_without_a_cache(kind: str, inputs: Inputs, chunk: int | None) -> None:
    model, settings = shared_mini_model(kind), {**GREEDY, "num_beams": 3}
    uncached = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(model.generate(**inputs, **settings, prefill_chunk_size=chunk), uncached)


@torch.no_grad()
def test_beams_find_an_answer_at_least_as_likely_as_greedy(kind: str) -> None:
    model, one = shared_mini_model(kind), mini_inputs([5, (2, 1), 9])
    length = one["input_ids"].shape[1]

    def likelihood(ids: torch.Tensor) -> float:
        answer = ids[:, length:]
        embeds = torch.cat((model.prepare_inputs_embeds(**one), model.get_input_embeddings()(answer)), dim=1)
        scores = model(inputs_embeds=embeds).logits[:, length - 1 : -1].log_softmax(-1)
        return float(scores.gather(-1, answer[..., None]).sum())

    greedy, beams = (model.generate(**one, **GREEDY, num_beams=n) for n in (1, 4))
    assert likelihood(beams) >= likelihood(greedy) - 1e-4  # float32 sums of eight logits


def test_several_beams_may_be_returned(kind: str, inputs: Inputs) -> None:
    out = shared_mini_model(kind).generate(**inputs, **{**GREEDY, "num_beams": 3, "num_return_sequences": 2})
    assert out.shape[0] == 4
    assert out[0].tolist() != out[1].tolist()


@pytest.mark.parametrize("chunk", [None, 16])
def test_sampling_with_a_seed_repeats(kind: str, inputs: Inputs, plain: list[list[int]], chunk: int | None) -> None:
    model, outs = shared_mini_model(kind), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model.generate(**inputs, **SAMPLING, prefill_chunk_size=chunk).tolist())
    assert outs[0] == outs[1] != outs[2]
    assert outs[0] != plain


def test_several_sequences_are_sampled_for_each_prompt(kind: str, inputs: Inputs) -> None:
    torch.manual_seed(0)
    out = shared_mini_model(kind).generate(**inputs, **SAMPLING, num_return_sequences=3)
    length = inputs["input_ids"].shape[1]
    assert out[:, :length].tolist() == inputs["input_ids"].repeat_interleave(3, dim=0).tolist()
    assert len({tuple(row) for row in out.tolist()}) == 6


@pytest.mark.parametrize("chunk", [None, 16])
def test_returned_sequences_sample_what_repeated_prompts_sample(kind: str, inputs: Inputs, chunk: int | None) -> None:
    model = shared_mini_model(kind)
    repeated = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in inputs.items()}
    torch.manual_seed(3)
    want = model.generate(**repeated, **SAMPLING)
    torch.manual_seed(3)
    got = model.generate(**inputs, **SAMPLING, num_return_sequences=2, prefill_chunk_size=chunk)
    assert torch.equal(got, want)


def test_prompt_lookup_decoding_gives_the_greedy_tokens(kind: str) -> None:
    model, one = shared_mini_model(kind), mini_inputs([5, (1, 1), 9])
    one["input_ids"][:, -4:] = one["input_ids"][:, -9:-5]  # something to look up
    plain = model.generate(**one, **GREEDY)
    assert torch.equal(model.generate(**one, **GREEDY, prompt_lookup_num_tokens=3), plain)


def test_an_assistant_model_gives_the_greedy_tokens(kind: str) -> None:
    model, one = shared_mini_model(kind), mini_inputs([5, (1, 1), 9])
    assistant = mini_model("tiny", num_hidden_layers=1)
    plain = model.generate(**one, **GREEDY)
    assert torch.equal(model.generate(**one, **GREEDY, assistant_model=assistant), plain)


def test_an_assistant_language_model_gives_the_greedy_tokens(kind: str) -> None:
    model, text = mini_language(kind), mini_inputs([12])
    plain = model.generate(text["input_ids"], **GREEDY)
    assistant = mini_language("small", num_hidden_layers=1)
    assert torch.equal(model.generate(text["input_ids"], **GREEDY, assistant_model=assistant), plain)


# ---------------------------------------------------------------- watching and stopping


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_streamer_sees_every_token_in_order(kind: str, chunk: int | None) -> None:
    streamer, one = Collector(), mini_inputs([5, (2, 1), 9])
    out = shared_mini_model(kind).generate(**one, **GREEDY, streamer=streamer, prefill_chunk_size=chunk)
    assert streamer.ids == out[0].tolist() and streamer.ended


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_stopping_criteria_see_the_prompt_and_stop(kind: str, inputs: Inputs, plain: list[list[int]]) -> None:
    length = inputs["input_ids"].shape[1] + 3
    criteria = StoppingCriteriaList([StopAt(length)])
    out = shared_mini_model(kind).generate(**inputs, **GREEDY, stopping_criteria=criteria)
    assert out.tolist() == [row[:length] for row in plain]


def test_an_end_token_stops_its_row_and_pads_the_rest(kind: str, inputs: Inputs, plain: list[list[int]]) -> None:
    length = inputs["input_ids"].shape[1]
    end = plain[0][length + 2]
    out = shared_mini_model(kind).generate(**inputs, **{**GREEDY, "eos_token_id": end, "pad_token_id": 2})
    stop = plain[0].index(end, length) + 1
    assert out[0, :stop].tolist() == plain[0][:stop]
    assert set(out[0, stop:].tolist()) <= {2}


@pytest.mark.parametrize("part", ["whole", "language"])
def test_special_ids_come_from_the_checkpoint(kind: str, part: str) -> None:
    whole = mini_model(kind, bos_token_id=7, eos_token_id=8, pad_token_id=9)
    config = (whole if part == "whole" else whole.language).generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, 8, 9)


@pytest.mark.parametrize("part", ["whole", "language"])
def test_the_end_token_pads_where_no_pad_id_is_given(kind: str, part: str) -> None:
    whole = mini_model(kind)
    config = (whole if part == "whole" else whole.language).generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 1)


def test_generation_ends_by_itself_at_the_checkpoints_end_token(kind: str) -> None:
    inputs = mini_inputs([5, (1, 1), 9])
    answer = new_tokens(shared_mini_model(kind).generate(**inputs, **GREEDY), inputs)[0].tolist()
    model = mini_model(kind, eos_token_id=answer[4])
    out = new_tokens(model.generate(**inputs, max_new_tokens=8, do_sample=False), inputs)[0].tolist()
    assert out == answer[: answer.index(answer[4]) + 1]


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("chunk", [None, 16])
def test_only_the_last_positions_logits_are_computed_while_generating(
    kind: str, inputs: Inputs, chunk: int | None
) -> None:
    model, shapes = mini_model(kind), []
    model.get_output_embeddings().register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk)
    # Rows are packed, and a pass that ends no prompt has logits of its last tokens all the same.
    assert all(shape[0] == 1 and shape[1] <= 2 for shape in shapes)


def test_images_are_looked_at_once(kind: str, inputs: Inputs) -> None:
    for settings in ({}, {"num_beams": 3}, {"prefill_chunk_size": 16}):
        model, tiles = mini_model(kind), []
        model.vision.register_forward_hook(lambda _, args, __, seen=tiles: seen.append(len(args[0])))
        model.generate(**inputs, **GREEDY, **settings)
        assert tiles == [3 + 2 + 2]


@pytest.mark.parametrize("keep", [1, 5])
@torch.no_grad()
def test_logits_to_keep_gives_the_last_ones(kind: str, inputs: Inputs, keep: int) -> None:
    model = shared_mini_model(kind)
    whole = model(**inputs).logits
    kept = model(**inputs, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, whole[:, -keep:], rtol=0, atol=1e-5)  # a matrix product of another height


@torch.no_grad()
def test_hidden_states_are_the_embeddings_and_every_layers_output(kind: str, inputs: Inputs) -> None:
    model = shared_mini_model(kind)
    out = model(**inputs, output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(*inputs["input_ids"].shape, 64)] * 4
    assert torch.equal(out.hidden_states[0], model.prepare_inputs_embeds(**inputs))
    assert torch.equal(model.language.lm_head(out.hidden_states[-1]).float(), out.logits)


@torch.no_grad()
def test_attentions_are_causal_distributions(kind: str, inputs: Inputs) -> None:
    out = shared_mini_model(kind, "eager")(**inputs, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, length, length)] * 3
    real = inputs["attention_mask"]
    for weights in out.attentions:
        rows = weights.transpose(1, 2)[real]
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), rtol=0, atol=1e-5)  # float32 softmax
        to_padding = weights * ~real[:, None, None, :]
        later = weights.triu(1)
        for forbidden in (to_padding, later):
            assert not forbidden.transpose(1, 2)[real].any()


def test_attentions_of_another_implementation_are_an_error(inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="eager"):
        shared_mini_model("small", "sdpa")(**inputs, output_attentions=True)


def test_generate_returns_scores_hidden_states_and_attentions(kind: str, inputs: Inputs) -> None:
    out = shared_mini_model(kind, "eager").generate(
        **inputs,
        **GREEDY,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert len(out.scores) == len(out.hidden_states) == len(out.attentions) == 8
    assert out.scores[0].argmax(-1).tolist() == out.sequences[:, inputs["input_ids"].shape[1]].tolist()


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("part", ["whole", "language"])
def test_going_beyond_the_positions_warns_once(kind: str, part: str) -> None:
    whole = mini_model(kind, max_position_embeddings=20)
    model = whole if part == "whole" else whole.language
    text = mini_inputs([15])["input_ids"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            model.generate(text, **GREEDY)
    messages = [str(w.message) for w in caught if "max_position_embeddings" in str(w.message)]
    assert len(messages) == 1 and "20" in messages[0]


@pytest.mark.parametrize("part", ["whole", "language"])
def test_staying_within_the_positions_does_not_warn(kind: str, part: str) -> None:
    whole = mini_model(kind, max_position_embeddings=23)
    model = whole if part == "whole" else whole.language
    text = mini_inputs([15])["input_ids"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_position_embeddings.*")
        model.generate(text, **GREEDY)
        model.generate(text, generation_config=GenerationConfig(**GREEDY))


def test_max_new_tokens_in_a_generation_config_counts_too() -> None:
    model = mini_model("tiny", max_position_embeddings=20)
    with pytest.warns(UserWarning, match="max_position_embeddings"):
        model.generate(mini_inputs([15])["input_ids"], generation_config=GenerationConfig(**GREEDY))


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_a_compiled_forward_pass_gives_the_same(kind: str, attn: str) -> None:
    model, text = mini_language(kind, attn), mini_inputs([40], [30])
    given = {name: text[name] for name in ("input_ids", "attention_mask")}
    want = model(**given, use_cache=False).logits
    got = torch.compile(model, fullgraph=True)(**given, use_cache=False).logits
    real = text["attention_mask"]
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=2e-5)  # fused float32 sums in another order


@pytest.mark.slow
def test_a_compiled_decode_on_a_static_cache_gives_the_same(kind: str) -> None:
    from transformers import CompileConfig

    torch._dynamo.reset()  # compilations of the other kinds count towards one limit
    model, inputs = mini_model(kind), mini_inputs([5, (1, 1), 9])
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True  # transformers compiles on accelerators only, unless told
    plain = shared_mini_model(kind).generate(**inputs, **GREEDY)
    got = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(got, plain)
