"""Over which rows whole prompts of a pass attend: their lengths, and the pass's, come again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_vl2.engine import prefill, row_layout
from deepseek_vl2.engine.row_layout import RowLayout
from deepseek_vl2.models.cache import Segment


def arranged(*tokens: int, past: int = 0) -> RowLayout:
    return row_layout.arrange_rows([Segment(64, past if index == 0 else 0, new) for index, new in enumerate(tokens)])


@pytest.fixture(autouse=True)
def steps_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_layout, "STEP", 128)


@pytest.mark.parametrize(
    "tokens", [(1434,), (1434, 1400, 1500), (1434, 1400, 3), (300, 2, 1), (130, 129, 128, 1), (700, 700), (1,), (9, 9)]
)
def test_windows_and_rows_are_whole_steps(tokens: tuple[int, ...]) -> None:
    layout = arranged(*tokens)
    assert layout.windows is not None and layout.rows % 128 == 0
    reach = [start + window for start, window in zip(layout.starts, layout.windows, strict=True)]
    assert max(reach) <= layout.rows < max(reach) + 128  # no window reaches behind the rows
    short = {16, 32, 64} if layout.part else set()
    assert all(window % 128 == 0 or window in short for window in layout.windows)
    assert all(tokens_ <= window for window, tokens_ in zip(layout.windows, tokens, strict=True))
    taken = [set(range(start, start + length)) for start, length in zip(layout.starts, tokens, strict=True)]
    assert len(set().union(*taken)) == sum(tokens) and [max(rows) for rows in taken] == layout.ends
    if not layout.part:
        assert layout.last == layout.ends[-1:]
        assert all(window - 128 < length for window, length in zip(layout.windows, tokens, strict=True))
        return
    assert len(set(layout.windows)) == 1 and layout.starts == [layout.part * i for i in range(len(tokens))]
    parts = -(-layout.rows // layout.part)
    assert layout.last == [*layout.ends, *[-1] * (parts - len(tokens))]


def test_which_prompts_are_padded_to_one_length() -> None:
    assert arranged(1434) == RowLayout([1434], [0], 1536, 1536, [1536])
    assert arranged(1434, 1440) == RowLayout([1434, 1440], [0, 1440], 3072, 1440, [1536] * 2)
    assert arranged(1434, 1400, 1500) == RowLayout([1434, 1400, 1500], [0, 1434, 2834], 4480, 0, [1536, 1408, 1536])
    assert arranged(700, 600, past=64) == RowLayout([700, 600], [0, 700], 1300)  # one has a past, and a mask


@pytest.mark.parametrize("length", [1, 9, 17, 64, 65, 129, 300])
def test_many_prompts_attend_to_no_more_than_twice_their_rows(length: int) -> None:
    layout = arranged(*[length] * 200)
    assert layout.part == length and layout.windows is not None
    assert len(layout.windows) == 200 and sum(layout.windows) <= max(2 * layout.rows, 200 * 16)


def test_rows_are_spread_over_their_places() -> None:
    packed = torch.arange(1, 8)[:, None].float()
    layout = RowLayout([3, 4], [0, 4], 10, 4, [4, 4])
    assert layout.spread(packed)[:, 0].tolist() == [1, 2, 3, 0, 4, 5, 6, 7, 0, 0]
    layout = RowLayout([3, 4], [0, 3], 7)
    assert layout.spread(packed) is packed


class CountedOperators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


# Of one length, of about one, and of several; behind cached tokens, where each has a mask of its own.
@pytest.mark.parametrize(("lengths", "past"), [((9, 9), 0), ((98, 99), 0), ((9, 3), 0), ((9, 3), 4)], ids=str)
def test_many_prompts_are_placed_by_as_many_operators_as_few(
    lengths: tuple[int, ...], past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "causal_mask", lambda *_: None)
    counts, device = [], torch.device("cpu")
    for times in (1, 100):
        tokens = lengths * times
        segments = [Segment(64 + 1000 * i, past, length) for i, length in enumerate(tokens)]
        tables = (torch.arange(200.0)[:, None], torch.arange(200.0)[:, None])
        embeds = torch.arange(1.0, sum(tokens) + 1)[:, None]
        with CountedOperators() as operators:
            layout = row_layout.arrange_rows(segments)
            spread = layout.spread(embeds)
            placed = prefill.place_tokens(segments, layout, device, tables)
        counts.append(operators.count)
        assert len(spread) == layout.rows == len(placed.slots_N)
        free, given = torch.ones(layout.rows, dtype=torch.bool), embeds.split(list(tokens))
        for segment, start, own in zip(segments, layout.starts, given, strict=True):
            rows = slice(start, start + segment.new)
            free[rows] = False
            assert torch.equal(spread[rows], own)
            assert placed.slots_N[rows].tolist() == list(range(segment.start + past, segment.start + segment.end))
            assert placed.cos_NP[rows, 0].tolist() == list(range(past, segment.end))
        assert not spread[free].any() and not placed.slots_N[free].any()
    assert counts[0] == counts[1]


# Windows as long as the prompts, with rows of padding behind them or without, and longer ones.
@pytest.mark.parametrize("tokens", [(16, 16, 16), (128, 128), (9, 9), (40, 41), (130, 129)], ids=str)
def test_prompts_attend_to_their_own_rows(tokens: tuple[int, ...]) -> None:
    segments = [Segment(64 + 200 * index, 0, length) for index, length in enumerate(tokens)]
    layout, tables = row_layout.arrange_rows(segments), (torch.zeros(200, 1), torch.zeros(200, 1))
    placed = prefill.place_tokens(segments, layout, torch.device("cpu"), tables)
    generator = torch.Generator().manual_seed(0)
    query, keys, values = torch.randn(3, layout.rows, 2, 8, generator=generator)
    assert placed.alike
    out = prefill.attend_alike(query, keys, values, placed, 0.3)
    assert out.shape == query.shape and not out[layout.part * len(tokens) :].any()
    for start, length in zip(layout.starts, tokens, strict=True):
        q, k, v = (rows[start : start + length].transpose(0, 1) for rows in (query, keys, values))
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(0, 1)
        torch.testing.assert_close(out[start : start + length], want)
