"""Batches to train on: labels, length limits, packing, counts."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import MINI_TILE, image_tokens, mini_conversation, mini_processor
from torch.utils.data import DataLoader, IterableDataset

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.training.collator import ConversationCollator, cut_sample, pack_rows

ONE_TILE, TWO_TILES = image_tokens((1, 1)), image_tokens((2, 1))


@pytest.fixture(scope="module")
def processor() -> DeepseekVLV2Processor:
    return mini_processor()


def learned(processor: DeepseekVLV2Processor, batch: dict[str, torch.Tensor], row: int = 0) -> str:
    """Return the text that a row takes the loss on."""
    labels = batch["labels"][row]
    return processor.decode(labels[labels != -100])


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name one."},
    {"role": "assistant", "content": "An ant."},
    {"role": "user", "content": "Another."},
    {"role": "assistant", "content": "A bee."},
]
EOS = "<｜end▁of▁sentence｜>"


def test_only_answers_and_their_eos_are_learned(processor: DeepseekVLV2Processor) -> None:
    assert processor.mask_prompt is False  # as released: the collator decides, not the file
    batch = ConversationCollator(processor)([CHAT])
    assert learned(processor, batch) == f"An ant.{EOS}A bee.{EOS}"
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def test_all_text_may_be_learned_but_never_images_or_the_first_token(processor: DeepseekVLV2Processor) -> None:
    collator = ConversationCollator(processor, labels="all")
    assert learned(processor, collator([CHAT])).startswith("Be brief.<|User|>: Name one.\n\n<|Assistant|>:An ant.")
    batch = collator([mini_conversation(1)])
    assert bool((batch["labels"][batch["images_seq_mask"]] == -100).all())
    assert batch["labels"][0, 0] == -100
    assert learned(processor, batch) == f"<|User|>: Question 1?\n\n<|Assistant|>:It is 37.{EOS}"


def test_a_batch_pads_on_the_right(processor: DeepseekVLV2Processor) -> None:
    batch = ConversationCollator(processor)([mini_conversation(1), {"messages": CHAT}, mini_conversation(2, images=2)])
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.long,
        "labels": torch.long,
        "attention_mask": torch.bool,
        "images": torch.float32,
        "images_seq_mask": torch.bool,
        "images_spatial_crop": torch.long,
    }
    lengths = batch["attention_mask"].sum(dim=1)
    for row, length in enumerate(lengths.tolist()):
        assert bool(batch["attention_mask"][row, :length].all())
        assert bool((batch["input_ids"][row, length:] == processor.pad_id).all())
        assert bool((batch["labels"][row, length:] == -100).all())
    assert batch["images"].shape == (3, 5, 3, MINI_TILE, MINI_TILE)
    assert batch["images_spatial_crop"].tolist() == [[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [2, 1]]]


@pytest.mark.parametrize("packing", [False, True])
def test_padding_to_a_multiple_adds_nothing_but_padding(processor: DeepseekVLV2Processor, packing: bool) -> None:
    samples = [mini_conversation(1), CHAT]
    options: dict[str, Any] = {"packing": packing, "max_length": 300}
    plain = ConversationCollator(processor, **options)(samples)
    padded = ConversationCollator(processor, **options, pad_to_multiple_of=300)(samples)
    assert plain.keys() == padded.keys()
    length = plain["input_ids"].shape[1]
    assert length < 300
    added = {
        "input_ids": processor.pad_id,
        "labels": processor.ignore_id,
        "attention_mask": 0,
        "images_seq_mask": 0,
        "position_ids": None,
    }
    for name, value in plain.items():
        if name not in added:
            assert torch.equal(padded[name], value)
            continue
        assert padded[name].shape == (value.shape[0], 300) and padded[name].dtype == value.dtype
        assert torch.equal(padded[name][:, :length], value)
        if added[name] is not None:
            assert bool((padded[name][:, length:] == added[name]).all())
    divisor = ConversationCollator(processor, pad_to_multiple_of=length)(samples[:1])
    assert divisor["input_ids"].shape[1] % length == 0


@pytest.mark.parametrize("packing", [False, True])
def test_short_answers_can_count_as_much_as_long_ones(processor: DeepseekVLV2Processor, packing: bool) -> None:
    samples = [CHAT[1:3], [CHAT[1], {"role": "assistant", "content": "An ant, a bee, a wasp and a fly."}]]
    options: dict[str, Any] = {"packing": packing, "max_length": 200}
    batch = ConversationCollator(processor, loss_weighting="sqrt", **options)(samples)
    plain = ConversationCollator(processor, **options)(samples)
    assert "loss_weights" not in plain and torch.equal(batch["labels"], plain["labels"])
    stretches: list[list[float]] = [[]]
    for label, weight in zip(batch["labels"].flatten().tolist(), batch["loss_weights"].flatten().tolist(), strict=True):
        if label != -100:
            stretches[-1].append(weight)
        else:
            assert weight == 0
            stretches += [[]] if stretches[-1] else []
    short, long = sorted((stretch for stretch in stretches if stretch), key=len)
    assert len(short) < len(long) and len(set(short)) == len(set(long)) == 1
    assert short[0] ** 2 * len(short) == pytest.approx(long[0] ** 2 * len(long), rel=1e-5)  # 1 / sqrt(n)
    assert sum(short + long) == pytest.approx(len(short + long), rel=1e-5)


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_overlong_samples_are_dropped_or_cut_and_counted(processor: DeepseekVLV2Processor, overlong: Any) -> None:
    long = mini_conversation(1, answer="z" * 300)
    collator = ConversationCollator(processor, max_length=150, overlong=overlong)
    batch = collator([mini_conversation(2), long, mini_conversation(3)])
    if overlong == "drop":
        assert len(batch["input_ids"]) == 2
        assert collator.counts() == {"samples": 3, "dropped": 1, "cut": 0}
    else:
        assert batch["input_ids"].shape == (3, 150)
        assert set(learned(processor, batch, row=1)) == {"z"}  # and no eos: the answer does not end there
        assert collator.counts() == {"samples": 3, "dropped": 0, "cut": 1}


def test_an_image_is_kept_whole_or_not_at_all(processor: DeepseekVLV2Processor) -> None:
    turns = mini_conversation(1)["conversation"]
    images = mini_conversation(4, images=2)["images"]
    sample = {"conversation": [*turns, {**turns[0], "content": "And <image> now?"}, turns[1]], "images": images}
    whole = ConversationCollator(processor).encode(sample)
    second = int(torch.nonzero(whole["images_seq_mask"]).flatten()[ONE_TILE])
    for limit in (second + 1, second + TWO_TILES - 1):  # inside the second image
        cut = ConversationCollator(processor).encode(sample)
        cut_sample(cut, limit)
        assert len(cut) == second
        assert cut["num_image_tokens"] == [ONE_TILE] and int(cut["images_seq_mask"].sum()) == ONE_TILE
        assert cut["images_spatial_crop"].tolist() == [[1, 1]]
        assert torch.equal(cut["images"], whole["images"][:2])
    for limit in (second + TWO_TILES, second + TWO_TILES + 3):  # after it
        cut = ConversationCollator(processor).encode(sample)
        cut_sample(cut, limit)
        assert len(cut) == limit and torch.equal(cut["images"], whole["images"])
    collator = ConversationCollator(processor, max_length=second + 5, overlong="cut")
    assert learned(processor, collator([sample])) == f"It is 37.{EOS}"


def test_images_side_by_side_are_told_apart(processor: DeepseekVLV2Processor) -> None:
    cut = ConversationCollator(processor).encode(mini_conversation(1, images=2))
    start = int(torch.nonzero(cut["images_seq_mask"])[0])
    cut_sample(cut, start + ONE_TILE + 1)
    assert len(cut) == start + ONE_TILE and cut["num_image_tokens"] == [ONE_TILE]


@pytest.mark.parametrize("packing", [False, True])
def test_what_keeps_no_label_is_dropped_and_an_empty_batch_takes_no_loss(
    processor: DeepseekVLV2Processor, packing: bool
) -> None:
    collator = ConversationCollator(processor, max_length=20, overlong="cut", packing=packing)
    batch = collator([mini_conversation(1), mini_conversation(2)])
    assert collator.counts() == {"samples": 2, "dropped": 2, "cut": 0}
    assert batch["input_ids"].shape == (1, 2) and bool((batch["labels"] == -100).all())
    assert not bool(batch["images_spatial_crop"].any()) and not bool(batch["images_seq_mask"].any())


def test_packed_rows_hold_every_sample_once(processor: DeepseekVLV2Processor) -> None:
    samples = [mini_conversation(i, images=i % 3) for i in range(7)]
    plain, packed = ConversationCollator(processor), ConversationCollator(processor, max_length=200, packing=True)
    alone, batch = [plain([sample]) for sample in samples], packed(samples)
    assert batch["input_ids"].shape[1] <= 200
    assert len(batch["input_ids"]) < len(samples)
    found = []
    for row, positions in enumerate(batch["position_ids"]):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)]
        for start, end in pairwise(starts):
            part = slice(start, end)
            assert torch.equal(positions[part], torch.arange(end - start))
            if bool(batch["attention_mask"][row, start]):
                assert bool(batch["attention_mask"][row, part].all())
                assert batch["labels"][row, start] == -100
                found.append((batch["input_ids"][row, part].tolist(), batch["labels"][row, part].tolist()))
    assert sorted(found) == sorted((one["input_ids"][0].tolist(), one["labels"][0].tolist()) for one in alone)
    grids = [grid for row in batch["images_spatial_crop"].tolist() for grid in row if grid != [0, 0]]
    assert len(grids) == sum(len(sample["images"]) for sample in samples)


@pytest.mark.parametrize("capacity", [10, 13])
def test_rows_are_filled_first_fit(capacity: int) -> None:
    lengths = [3, 10, 4, 6, 1, 5]
    rows = pack_rows(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(6))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert len(rows) == 3
    assert pack_rows([], 5) == []


class Endless(IterableDataset[dict[str, Any]]):
    """Samples made in memory, without an end."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            yield mini_conversation(number, answer="z" * (200 if number % 4 == 0 else 2))
            number += 1


def test_counts_add_up_over_workers_and_iterable_data_works(processor: DeepseekVLV2Processor) -> None:
    collator = ConversationCollator(processor, max_length=150)
    loader = DataLoader(Endless(), batch_size=4, num_workers=2, collate_fn=collator, prefetch_factor=1)
    batches = iter(loader)
    assert all(len(next(batches)["input_ids"]) == 3 for _ in range(4))
    del batches
    counts = collator.counts()
    assert counts["samples"] >= 16 and counts["dropped"] * 4 == counts["samples"]
    twin = collator.with_own_counts()
    twin([mini_conversation(1)])
    assert twin.counts()["samples"] == 1 and collator.counts() == counts


def test_it_can_be_pickled(processor: DeepseekVLV2Processor) -> None:
    batch = pickle.loads(pickle.dumps(ConversationCollator(processor)))([mini_conversation(1)])
    assert batch["input_ids"].shape[0] == 1


def test_images_may_be_handed_over_in_half_the_bytes(processor: DeepseekVLV2Processor) -> None:
    exact = ConversationCollator(processor)([mini_conversation(1)])["images"]
    halved = ConversationCollator(processor, image_dtype=torch.bfloat16)([mini_conversation(1)])["images"]
    assert halved.dtype == torch.bfloat16 and torch.equal(halved, exact.bfloat16())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overlong": "squeeze"}, "Unknown overlong 'squeeze': expected one of drop, cut"),
        ({"labels": "none"}, "Unknown labels 'none'"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"packing": True}, "packing needs max_length"),
        ({"loss_weighting": "mean"}, "loss_weighting"),
        ({"loss_weighting": "sqrt", "skip_logits": True}, "knows nothing of loss_weighting"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be positive"),
    ],
)
def test_unknown_choices_are_errors(processor: DeepseekVLV2Processor, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConversationCollator(processor, **options)


def test_what_the_processor_refuses_is_named_with_its_source(processor: DeepseekVLV2Processor) -> None:
    collator = ConversationCollator(processor)
    with pytest.raises(ValueError, match=r"^here\.jsonl, line 3: .* 1 <image> tags but 0 images"):
        collator([{**mini_conversation(1), "images": [], "source": "here.jsonl, line 3"}])
    with pytest.raises(ValueError, match="A sample needs one of the keys"):
        collator([{"text": "?"}])
