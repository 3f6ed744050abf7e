"""From tokens to text, as they come."""

from __future__ import annotations

import random

import pytest

from deepseek_vl2.engine.detokenizer import Detokenizer, TokenBytes
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


def test_the_longest_token(table: TokenBytes) -> None:
    assert table.longest() >= 64
