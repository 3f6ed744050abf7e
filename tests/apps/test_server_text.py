"""From tokens to text, and the command line."""

from __future__ import annotations

import argparse
import random

import pytest
import server_support  # noqa: F401  (skips where the extra is missing)

from deepseek_vl2.cli.main import as_declared
from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.serve.api import command
from deepseek_vl2.serve.api.text import AnswerText
from deepseek_vl2.serve.api.token_bytes import TokenBytes


@pytest.fixture(scope="module")
def table(processor: DeepseekVLV2Processor) -> TokenBytes:
    """Return the table of the golden tokenizer."""
    return TokenBytes(processor.tokenizer, [0, 1, 2])


def write(table: TokenBytes, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[str], list[int]]:
    stream = AnswerText(table, stop)
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


def test_stop_words_at_every_split(table: TokenBytes, processor: DeepseekVLV2Processor) -> None:
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


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="serve")
    command.add_arguments(parser)
    return parser.parse_args(as_declared(["demo", *words], parser._option_string_actions))


def test_options_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(command.KEY_VARIABLE, "from the environment")
    words = "--slots 3 --max-length 200 --queue 7 --prefill-chunk 33 --tiles-a-step 2 --max-images 5 --api-key one"
    words += (
        " --max-megapixels 2 --max-image-mib 1 --max-body-mib 3 --request-seconds 9 --body-seconds 8 --max-choices 2"
    )
    words += " --cors-origin http://a --served-model-name me --allow-image-urls --image-seconds 4 --device cpu"
    server = command.build_server(parse(*words.split()))
    options, settings = server.engine.options, server.settings
    assert (options.slots, options.max_length, options.queue_size) == (3, 200, 7)
    assert (options.prefill_chunk, options.tiles_a_step) == (33, 2)
    assert settings.api_keys == ("one", "from the environment") and settings.cors_origins == ("http://a",)
    assert (settings.model_name, settings.max_choices) == ("me", 2)
    assert (settings.max_body_bytes, settings.body_seconds, settings.request_seconds) == (3 << 20, 8, 9)
    images = settings.images
    assert (images.max_images, images.max_bytes, images.max_pixels) == (5, 1 << 20, 2_000_000)
    assert (images.allow_urls, images.allow_private, images.seconds) == (True, False, 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-length", "100000"], "exceeds the 4096 positions"),
        (["--device", "nonsense"], "device"),
    ],
)
def test_mistakes_end_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(parse(*words)) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_missing_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse()
    args.model = "/no/such/checkpoint"
    assert command.main(args) == 1
    assert "error:" in capsys.readouterr().err


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main(parse()) == 1
    assert 'pip install "deepseek_vl2[serve]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--slots", "0"], ["--queue", "-1"], ["--request-seconds", "0"], ["--dtype", "int8"]]
)
def test_numbers_are_checked(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
