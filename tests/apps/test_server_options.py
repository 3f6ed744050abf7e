"""The server's command line."""

from __future__ import annotations

import argparse

import pytest
import server_support  # noqa: F401  (skips where the extra is missing)

from deepseek_vl2.cli.main import as_declared
from deepseek_vl2.serve.api import command


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="serve")
    command.add_arguments(parser)
    return parser.parse_args(as_declared(["demo", *words], parser._option_string_actions))


def test_options_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(command.KEY_VARIABLE, "from the environment")
    words = "--slots 3 --max-length 200 --queue 7 --prefill-chunk 33 --tiles-a-step 2 --max-images 5 --api-key one"
    words += " --kv-cache-gib 0.01 --image-cache-mib 3 --no-prefix-cache"
    words += (
        " --max-megapixels 2 --max-image-mib 1 --max-body-mib 3 --request-seconds 9 --body-seconds 8 --max-choices 2"
    )
    words += " --cors-origin http://a --served-model-name me --allow-image-urls --image-seconds 4 --device cpu"
    server = command.build_server(parse(*words.split()))
    options, settings = server.engine.options, server.settings
    assert (options.max_batch, options.max_length, options.queue_size) == (3, 200, 7)
    assert (options.prefill_chunk, options.tiles_a_pass) == (33, 2)
    assert (options.image_cache_bytes, options.share_prefixes) == (3 << 20, False)
    cache = server.engine.kv_cache
    assert cache.bytes_per_token * options.kv_cache_tokens == pytest.approx(0.01 * 2**30, rel=0.01)
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
        (["--kv-cache-gib", "1e9"], "can't allocate memory"),
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
    "words",
    [["--slots", "0"], ["--kv-cache-gib", "0"], ["--queue", "-1"], ["--request-seconds", "0"], ["--dtype", "int8"]],
)
def test_numbers_are_checked(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
