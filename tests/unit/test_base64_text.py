"""Base64 of pictures is decoded as Python's own module does, and refused where it is none."""

from __future__ import annotations

import base64
import random

import pytest

from deepseek_vl2.models import base64_text
from deepseek_vl2.models.base64_text import decode_base64, payload_end


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64_text, "BLOCK", 7)


def decoded(text: str) -> bytes:
    return decode_base64("front," + text, 6, 6 + len(text))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 20, 255, 1000])
def test_any_number_of_bytes_comes_back_over_any_blocks(size: int, small_blocks: None) -> None:
    data = random.Random(size).randbytes(size)
    assert decoded(base64.b64encode(data).decode().rstrip("=")) == data
    assert decoded(base64.urlsafe_b64encode(data).decode().rstrip("=")) == data
    assert decoded(base64.encodebytes(data).decode().replace("\n", " \r\n\t").rstrip("=\t\r\n ")) == data


def test_every_value_of_every_symbol_is_read() -> None:
    data = bytes(range(256)) * 3
    assert decoded(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize(
    "wrong", ["QUJD*UJD", "QUJ\u00e9", "QUJDQ", "Q", "QU=JD", "QUJD\x00UJD", "QUJDQ?", "\ud800UJD"]
)
def test_what_is_no_base64_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"^(it has a|its last|there is padding)"):
        decoded(wrong)


@pytest.mark.parametrize("padding", ["", "=", "==", " =\n= ", "=" * 20, "\r\n" * 9])
def test_padding_may_stand_or_not_and_have_line_breaks(padding: str, small_blocks: None) -> None:
    text = "front,UXVpdGUgYSBsb25nIHRleHQ" + padding
    assert decode_base64(text, 6, payload_end(text, 6)) == b"Quite a long text"
    assert payload_end("front," + padding, 6) == 6
