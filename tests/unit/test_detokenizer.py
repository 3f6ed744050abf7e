"""From tokens to text, as they come."""

from __future__ import annotations

import random

import pytest

from deepseek_vl2.engine.detokenizer import Detokenizer, ShownToken, TokenBytes
from deepseek_vl2.engine.request import Answer, Delta, Prompt, Request
from deepseek_vl2.engine.sampling_params import SamplingParams
from deepseek_vl2.models import DeepseekVLV2Processor


@pytest.fixture(scope="module")
def table(processor: DeepseekVLV2Processor) -> TokenBytes:
    """Return the table of the golden tokenizer."""
    return TokenBytes(processor.tokenizer, [0, 1, 2])


def write(table: TokenBytes, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[str], list[int]]:
    stream = Detokenizer(table, stop)
    pieces, tokens = [], []
    for token in ids:
        pieces.append(stream.push(token))
        tokens += [shown.token_id for shown in stream.take_tokens()]
        if stream.stopped:
            break
    pieces.append(stream.finish())
    tokens += [shown.token_id for shown in stream.take_tokens(finished=True)]
    return "".join(pieces), pieces, tokens


def test_noise_reads_as_the_tokenizer_reads_it(table: TokenBytes, processor: DeepseekVLV2Processor) -> None:
    choose = random.Random(0)
    for _ in range(200):
        ids = [choose.randrange(3, 128_822) for _ in range(12)]
        text, _, tokens = write(table, ids)
        assert text == processor.decode(ids)
        assert tokens == ids


@pytest.mark.parametrize(
    "text", ["Grüße, 世界! 🦒👩‍👩‍👧 \u200b", "<|ref|>dog<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>", "a\n\n  b\t"]
)
def test_characters_of_several_tokens_come_whole(
    table: TokenBytes, processor: DeepseekVLV2Processor, text: str
) -> None:
    shown, pieces, _ = write(table, processor.encode(text, bos=False))
    assert shown == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_hidden_and_unknown_tokens_show_nothing(table: TokenBytes, processor: DeepseekVLV2Processor) -> None:
    ids = [0, *processor.encode("Hi", bos=False), 129_279, 1]
    assert write(table, ids)[0] == "Hi"


def test_a_cut_off_character_is_marked(table: TokenBytes, processor: DeepseekVLV2Processor) -> None:
    ids = processor.encode("🦒", bos=False)
    assert len(ids) > 1
    assert write(table, ids[:-1])[0] == "\ufffd"


def test_stop_sequences_at_every_split(table: TokenBytes, processor: DeepseekVLV2Processor) -> None:
    letters = [processor.encode(letter, bos=False)[0] for letter in "one STOP two"]
    for stop, expected in (
        (("STOP",), "one "),
        (("S",), "one "),
        (("P two",), "one STO"),
        (("o",), ""),
        (("STOPPED", "TOP"), "one S"),
        (("nowhere",), "one STOP two"),
        (("twofold",), "one STOP two"),
    ):
        text, pieces, tokens = write(table, letters, stop)
        assert text == expected
        for count in range(len(pieces)):
            assert expected.startswith("".join(pieces[:count]))
        assert "".join(processor.decode([token]) for token in tokens) == expected


def answer(table: TokenBytes, ids: list[int], **params: object) -> tuple[str, list[ShownToken], str | None]:
    """Return what the engine tells of an answer of some tokens: its text, its tokens, why it ended."""
    told: list[Delta] = []
    request = Request(Prompt([5]), SamplingParams(max_tokens=len(ids), **params), told.append, table)  # type: ignore[arg-type]
    written = Answer(request, frozenset([1]))
    for token in ids:
        if not written.finished:
            written.accept(token, None)
    return "".join(delta.text for delta in told), [t for d in told for t in d.tokens], told[-1].finish_reason


def test_tokens_know_where_their_text_begins(table: TokenBytes, processor: DeepseekVLV2Processor) -> None:
    letters = processor.encode("a", bos=False) + processor.encode("猫🦒", bos=False) + processor.encode("b", bos=False)
    text, tokens, _ = answer(table, letters)
    assert [token.token_id for token in tokens] == letters and text == "a猫🦒b"
    assert tokens[0].start == 0 and tokens[1].start == 1 and tokens[-1].start == 3


def test_a_token_that_ends_an_answer_is_not_shown(table: TokenBytes, processor: DeepseekVLV2Processor) -> None:
    letters = [processor.encode(letter, bos=False)[0] for letter in "abcd"]
    text, tokens, reason = answer(table, letters, stop_token_ids=frozenset([letters[2]]))
    assert (text, [token.token_id for token in tokens], reason) == ("ab", letters[:2], "stop")


def test_stop_texts_count_from_the_least_number_of_tokens_on(
    table: TokenBytes, processor: DeepseekVLV2Processor
) -> None:
    letters = [processor.encode(letter, bos=False)[0] for letter in "abcabc"]
    assert answer(table, letters, stop=("b",))[::2] == ("a", "stop")
    assert answer(table, letters, stop=("b",), min_tokens=2)[::2] == ("abca", "stop")
    assert answer(table, letters, stop=("b",), min_tokens=5)[::2] == ("abcabc", "length")


def test_the_longest_token(table: TokenBytes) -> None:
    assert table.longest() >= 64
