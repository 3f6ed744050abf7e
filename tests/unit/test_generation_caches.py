"""Caches of every kind, prompts in chunks and later turns give the answer that is given without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_support import SAMPLING, Inputs, greedy_answer, two_prompts
from support import GREEDY, mini_inputs, mini_language, mini_model, mini_row, new_tokens, shared_mini_model
from support import collate as collate_rows
from transformers import DynamicCache, GenerationConfig, StaticCache

from deepseek_vl2.models.cache import CACHE_NAME


@pytest.fixture
def inputs() -> Inputs:
    """Return the two prompts, to be changed at will."""
    return two_prompts()


@pytest.fixture
def plain(kind: str) -> list[list[int]]:
    """Return the plain greedy answer to the two prompts, prompts included."""
    return [list(row) for row in greedy_answer(kind)]


# ---------------------------------------------------------------- caches


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_static_cache_gives_the_same(kind: str, inputs: Inputs, plain: list[list[int]], chunk: int | None) -> None:
    out = shared_mini_model(kind).generate(**inputs, **GREEDY, cache_implementation="static", prefill_chunk_size=chunk)
    assert out.tolist() == plain


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_static_cache_named_in_the_models_config_gives_the_same(
    kind: str, inputs: Inputs, plain: list[list[int]], chunk: int | None
) -> None:
    model = mini_model(kind)
    model.generation_config.cache_implementation = "static"
    assert model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk).tolist() == plain


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_static_cache_that_the_caller_made_gives_the_same(
    kind: str, inputs: Inputs, plain: list[list[int]], chunk: int | None
) -> None:
    model = shared_mini_model(kind)
    cache = StaticCache(config=model.config, max_cache_len=inputs["input_ids"].shape[1] + 8)
    out = model.generate(**inputs, **GREEDY, past_key_values=cache, prefill_chunk_size=chunk)
    assert out.tolist() == plain


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_on_a_static_cache_in_chunks_give_the_same(kind: str, inputs: Inputs, settings: dict[str, int]) -> None:
    model = shared_mini_model(kind)
    want = model.generate(**inputs, **{**GREEDY, **settings})
    got = model.generate(**inputs, **{**GREEDY, **settings}, cache_implementation="static", prefill_chunk_size=16)
    assert torch.equal(got, want)


def as_tuples(cache: DynamicCache) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)


@pytest.mark.parametrize("container", [tuple, list])
@torch.no_grad()
def test_forward_takes_a_tuple_cache(kind: str, inputs: Inputs, container: type) -> None:
    model, mask = shared_mini_model(kind), inputs["attention_mask"]
    embeds = model.prepare_inputs_embeds(**inputs)
    cache = model(inputs_embeds=embeds[:, :-3], attention_mask=mask[:, :-3], use_cache=True).past_key_values
    legacy = container(as_tuples(cache))
    want = model(inputs_embeds=embeds, attention_mask=mask).logits[:, -3:]
    for target in (model, model.language):
        got = target(inputs_embeds=embeds[:, -3:], attention_mask=mask, past_key_values=legacy).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("container", [tuple, list])
def test_generate_takes_a_tuple_cache(kind: str, inputs: Inputs, plain: list[list[int]], container: type) -> None:
    model = shared_mini_model(kind)
    embeds, cache = model.incremental_prefilling(**inputs, chunk_size=32)
    legacy = container(as_tuples(cache))
    assert model.generate(inputs_embeds=embeds, **inputs, past_key_values=legacy, **GREEDY).tolist() == plain
    alone = model.language.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], past_key_values=legacy, **GREEDY
    )
    assert alone.tolist() == [row[inputs["input_ids"].shape[1] :] for row in plain]


# ---------------------------------------------------------------- long prompts in chunks


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_incremental_prefilling_then_generate_equals_plain(
    kind: str, inputs: Inputs, plain: list[list[int]], chunk: int
) -> None:
    """The original README's way; its output starts with the prompt's ids."""
    model = shared_mini_model(kind)
    embeds, cache = model.incremental_prefilling(**inputs, chunk_size=chunk)
    out = model.generate(
        inputs_embeds=embeds,
        input_ids=inputs["input_ids"],
        images=inputs["images"],
        images_seq_mask=inputs["images_seq_mask"],
        images_spatial_crop=inputs["images_spatial_crop"],
        attention_mask=inputs["attention_mask"],
        past_key_values=cache,
        pad_token_id=1,
        bos_token_id=0,
        use_cache=True,
        **GREEDY,
    )
    assert out.tolist() == plain


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_after_incremental_prefilling_equal_plain_beams(
    kind: str, inputs: Inputs, settings: dict[str, int]
) -> None:
    model = shared_mini_model(kind)
    want = model.generate(**inputs, **GREEDY, **settings)
    embeds, cache = model.incremental_prefilling(**inputs, chunk_size=16)
    for _ in range(2):  # the caller's cache serves again
        got = model.generate(inputs_embeds=embeds, **inputs, past_key_values=cache, **GREEDY, **settings)
        assert torch.equal(got, want)


def test_sampling_several_sequences_after_incremental_prefilling_equals_plain(kind: str, inputs: Inputs) -> None:
    model, settings = shared_mini_model(kind), {**SAMPLING, "num_return_sequences": 2}
    torch.manual_seed(3)
    want = model.generate(**inputs, **settings)
    embeds, cache = model.incremental_prefilling(**inputs, chunk_size=16)
    torch.manual_seed(3)
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, past_key_values=cache, **settings), want)


def test_incremental_prefilling_takes_embeddings_and_no_mask(kind: str) -> None:
    model, one = shared_mini_model(kind), mini_inputs([5, (2, 1), 9])
    given = model.prepare_inputs_embeds(**one)
    embeds, cache = model.incremental_prefilling(inputs_embeds=given, chunk_size=16)
    assert embeds is given
    out = model.generate(inputs_embeds=embeds, past_key_values=cache, **GREEDY)
    assert torch.equal(out, new_tokens(model.generate(**one, **GREEDY), one))


@pytest.mark.parametrize(
    ("chunk", "where"),
    [(1, "keyword"), (7, "call config"), (64, "keyword"), (64, "model config"), (512, "keyword")],
)
def test_prefill_chunk_size_is_heard_wherever_it_is_set(
    kind: str, inputs: Inputs, plain: list[list[int]], chunk: int, where: str
) -> None:
    model, widths = mini_model(kind), []
    model.language.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    if where == "keyword":
        out = model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk)
    elif where == "call config":
        out = model.generate(**inputs, generation_config=GenerationConfig(**GREEDY, prefill_chunk_size=chunk))
    else:
        model.generation_config.prefill_chunk_size = chunk
        out = model.generate(**inputs, **GREEDY)
        assert model.generation_config.prefill_chunk_size == chunk
    assert out.tolist() == plain
    # Prompts that fit a later pass whole are not split.
    first = 0
    for length in inputs["attention_mask"].sum(dim=1).tolist():
        tokens = min(length, chunk - first)
        if tokens < length <= chunk:
            break
        first += tokens
    assert widths[0] == first


@pytest.mark.parametrize("chunk", [7, 64])
def test_the_language_model_prefills_embeddings_in_chunks(
    kind: str, inputs: Inputs, plain: list[list[int]], chunk: int
) -> None:
    model = shared_mini_model(kind)
    given = {"inputs_embeds": model.prepare_inputs_embeds(**inputs), "attention_mask": inputs["attention_mask"]}
    out = model.language.generate(**given, **GREEDY, prefill_chunk_size=chunk)
    assert out.tolist() == [row[inputs["input_ids"].shape[1] :] for row in plain]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_language_model_prefills_ids_in_chunks(kind: str, chunk: int) -> None:
    model, text = mini_language(kind), mini_inputs([20], [13])
    given = {name: text[name] for name in ("input_ids", "attention_mask")}
    want = model.generate(**given, **GREEDY)
    assert torch.equal(model.generate(**given, **GREEDY, prefill_chunk_size=chunk), want)


def test_no_forward_pass_sees_more_than_a_chunk(kind: str, inputs: Inputs) -> None:
    model, widths = mini_model(kind), []
    model.language.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    model.generate(**inputs, **GREEDY, prefill_chunk_size=16)
    assert max(widths) == 16


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_without_tokens_is_an_error(inputs: Inputs, chunk: int) -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        shared_mini_model("tiny").incremental_prefilling(**inputs, chunk_size=chunk)
    with pytest.raises(ValueError, match="chunk_size"):
        shared_mini_model("tiny").generate(**inputs, **GREEDY, prefill_chunk_size=chunk)


# ---------------------------------------------------------------- several turns


def second_turn(first: Inputs, sequences: torch.Tensor, items: list[Any]) -> Inputs:
    """Return the whole conversation: the first prompt, its answer, and a second prompt with images of its own."""
    answer = sequences[0, first["input_ids"].shape[1] :]
    more = mini_row(items, seed=9)
    row = {
        "input_ids": torch.cat((sequences[0], more["input_ids"])),
        "images_seq_mask": torch.cat(
            (first["images_seq_mask"][0], torch.zeros(len(answer), dtype=torch.bool), more["images_seq_mask"])
        ),
        "images": torch.cat((first["images"][0], more["images"])),
        "images_spatial_crop": torch.cat((first["images_spatial_crop"][0], more["images_spatial_crop"])),
    }
    return collate_rows([row])


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_second_turn_with_a_new_image_continues_from_the_cache(kind: str, attn: str, chunk: int | None) -> None:
    model, first = shared_mini_model(kind, attn), mini_inputs([5, (2, 1), 6])
    out = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    second = second_turn(first, out.sequences, [4, (1, 1), 5])
    want = model.generate(**second, **GREEDY)
    got = model.generate(**second, **GREEDY, past_key_values=out.past_key_values, prefill_chunk_size=chunk)
    assert torch.equal(got, want)


@pytest.mark.parametrize("chunk", [None, 16])
def test_three_turns_continue_from_the_cache(kind: str, chunk: int | None) -> None:
    model, turn = shared_mini_model(kind), mini_inputs([5, (1, 1), 6])
    cache = None
    for _ in range(3):
        want = model.generate(**turn, **GREEDY)
        out = model.generate(
            **turn, **GREEDY, past_key_values=cache, prefill_chunk_size=chunk, return_dict_in_generate=True
        )
        assert torch.equal(out.sequences, want)
        cache = out.past_key_values
        turn = second_turn(turn, out.sequences, [3, (1, 1), 2])


def test_a_text_only_second_turn_continues_from_the_cache(kind: str) -> None:
    model, first = shared_mini_model(kind), mini_inputs([5, (2, 1), 6])
    out = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    more = torch.randint(3, 300, (1, 5), generator=torch.Generator().manual_seed(1))
    second = {
        "input_ids": torch.cat((out.sequences, more), dim=1),
        "images": first["images"],
        "images_spatial_crop": first["images_spatial_crop"],
    }
    zeros = torch.zeros(1, 13, dtype=torch.bool)
    second["images_seq_mask"] = torch.cat((first["images_seq_mask"], zeros), dim=1)
    second["attention_mask"] = torch.ones_like(second["images_seq_mask"])
    want = model.generate(**second, **GREEDY)
    assert torch.equal(model.generate(**second, **GREEDY, past_key_values=out.past_key_values), want)


# ---------------------------------------------------------------- a cache by either of its names


@pytest.mark.parametrize("part", ["whole", "language", "decoder"])
def test_a_cache_goes_by_both_names(kind: str, inputs: Inputs, part: str) -> None:
    """transformers 5.24 renamed it; a script written for one name runs with either version."""
    whole = shared_mini_model(kind)
    model = {"whole": whole, "language": whole.language, "decoder": whole.language.model}[part]
    embeds, mask = whole.prepare_inputs_embeds(**inputs).detach(), inputs["attention_mask"]
    given, last = {"attention_mask": mask, "use_cache": True}, embeds[:, -1:]

    def filled() -> Any:
        return model(inputs_embeds=embeds[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values

    by_old, by_new = (model(inputs_embeds=last, **{name: filled()}, **given) for name in ("past_key_values", "cache"))
    assert isinstance(by_old.past_key_values, DynamicCache) and by_new.past_key_values.get_seq_length() == mask.shape[1]
    assert torch.equal(by_old[0], by_new[0])
    with pytest.raises(ValueError, match="not both"):
        model(inputs_embeds=last, past_key_values=filled(), cache=filled(), **given)
    with torch.no_grad():
        assert CACHE_NAME in model(inputs_embeds=embeds, **given)


def test_generate_takes_a_cache_by_both_names(kind: str, inputs: Inputs, plain: list[list[int]]) -> None:
    model = shared_mini_model(kind)
    for name in ("past_key_values", "cache"):
        cache = DynamicCache()
        assert model.generate(**inputs, **GREEDY, **{name: cache}).tolist() == plain
        assert cache.get_seq_length() == len(plain[0]) - 1
    with pytest.raises(ValueError, match="not both"):
        model.generate(**inputs, **GREEDY, past_key_values=DynamicCache(), cache=DynamicCache())
