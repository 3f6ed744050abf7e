"""Over which rows whole prompts of a pass attend: their lengths, and the pass's, come again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from deepseek_vl2.engine import prefill
from deepseek_vl2.models.cache import Segment


def padded(*tokens: int, past: int = 0) -> tuple[Sequence[int] | None, int]:
    return prefill.pad_attention([Segment(64, past if index == 0 else 0, new) for index, new in enumerate(tokens)])


def test_windows_and_rows_are_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "STEP", 128)
    assert padded(1434) == ([1536], 102)
    assert padded(1434, 1400, 1500) == ([1536, 1408, 1536], 4480 - 4334)
    for tokens in ((1434, 1400, 3), (300, 2, 1), (130, 129, 128, 1)):
        windows, padding = padded(*tokens)
        assert windows is not None and (sum(tokens) + padding) % 128 == 0
        starts = [sum(tokens[:index]) for index in range(len(tokens))]
        ends = [start + window for start, window in zip(starts, windows, strict=True)]
        assert max(ends) <= sum(tokens) + padding < max(ends) + 128  # no window reaches behind the rows
        assert all(
            window % 128 == 0 and window - 128 < new <= window for window, new in zip(windows, tokens, strict=True)
        )


def test_what_is_not_padded() -> None:
    assert padded(700, 700) == (None, 0)  # attend in one call
    assert padded(700, 600, past=64) == (None, 0)  # one has a past, and a mask
