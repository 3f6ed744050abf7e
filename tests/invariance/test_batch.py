"""A sample in a batch gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from support import GOLDEN, GREEDY, mini_inputs, mini_row, model_inputs, new_tokens, shared_mini_model
from support import collate as collate_rows

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

# The contract: float32 within 1e-5.
TOLERANCE = {"rtol": 0, "atol": 1e-5}

# No image; one image of 2 x 1 tiles; three images: lengths and numbers of tiles all differ.
ROWS = [[11], [4, (2, 1), 7], [3, (1, 1), 5, (1, 1), 2, (1, 1), 6]]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_of_each_row_equal_those_alone(kind: str, attn: str) -> None:
    model = shared_mini_model(kind, attn)
    rows = [mini_row(items, seed) for seed, items in enumerate(ROWS)]
    together = model(**collate_rows(rows)).logits
    for index, row in enumerate(rows):
        alone = model(**collate_rows([row])).logits[0]
        torch.testing.assert_close(together[index, -len(alone) :], alone, **TOLERANCE)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_greedy_tokens_of_each_row_equal_those_alone(kind: str, attn: str, chunk: int | None) -> None:
    model = shared_mini_model(kind, attn)
    rows = [mini_row(items, seed) for seed, items in enumerate(ROWS)]
    batch = collate_rows(rows)
    together = new_tokens(model.generate(**batch, **GREEDY, prefill_chunk_size=chunk), batch)
    for index, row in enumerate(rows):
        alone = collate_rows([row])
        assert together[index].tolist() == new_tokens(model.generate(**alone, **GREEDY), alone)[0].tolist()


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(kind: str) -> None:
    model = shared_mini_model(kind)
    batch = mini_inputs(*ROWS)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["input_ids"][~batch["attention_mask"]] = 77
    other["images"][0] = 9.0  # the row without images
    real = batch["attention_mask"]
    torch.testing.assert_close(model(**other).logits[real], model(**batch).logits[real], **TOLERANCE)


def conversation(*names: str) -> list[dict[str, object]]:
    tags = "".join(f"<image>\n{name} " for name in names)
    images = [str(GOLDEN / "images" / name) for name in names]
    return [{"role": "<|User|>", "content": f"{tags}What is it?", "images": images}]


@pytest.fixture(scope="module")
def real_samples(processor: DeepseekVLV2Processor) -> list[list[dict[str, object]]]:
    return [conversation(), conversation("square.png"), conversation("photo.png", "gray.png", "tiny.png")]


@pytest.mark.parametrize(("kind", "attn"), [("tiny", "sdpa"), ("small", "eager"), ("base", "sdpa")])
@torch.no_grad()
def test_the_processors_batch_with_0_1_and_3_images_equals_its_rows(
    golden_model: Callable[..., DeepseekVLV2ForCausalLM],
    processor: DeepseekVLV2Processor,
    real_samples: list[list[dict[str, object]]],
    kind: str,
    attn: str,
) -> None:
    model = golden_model(kind, attn)
    batch = processor(conversations=real_samples)
    assert batch.seq_lens[0] < batch.seq_lens[1] < batch.seq_lens[2]
    logits = model(**model_inputs(batch), logits_to_keep=1).logits[:, 0]
    settings = {**GREEDY, "max_new_tokens": 5}
    together = new_tokens(model.generate(**batch, **settings), batch)
    chunked = new_tokens(model.generate(**batch, **settings, prefill_chunk_size=300), batch)
    assert chunked.tolist() == together.tolist()
    for index, sample in enumerate(real_samples):
        alone = processor(conversations=sample)
        last = model(**model_inputs(alone), logits_to_keep=1).logits[0, 0]
        torch.testing.assert_close(last, logits[index], **TOLERANCE)
        assert new_tokens(model.generate(**alone, **settings), alone)[0].tolist() == together[index].tolist()


def test_a_flat_list_of_images_serves_the_batch_in_order(
    processor: DeepseekVLV2Processor, real_samples: list[list[dict[str, object]]]
) -> None:
    flat = [Image.open(path) for sample in real_samples for path in sample[0]["images"]]  # type: ignore[attr-defined]
    got, want = processor(conversations=real_samples, images=flat), processor(conversations=real_samples)
    assert torch.equal(got.images, want.images) and torch.equal(got.input_ids, want.input_ids)
