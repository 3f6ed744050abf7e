"""Images reach the answer, and change only what comes after them."""

from __future__ import annotations

import pytest
import torch
from support import MINI_SIDE, image_tokens, mini_inputs, mini_model, seed_weights, shared_mini_model

from deepseek_vl2.models.siglip_vit import VisionTransformer

# Equal sums, but other tokens in an expert's matrix product may block it in another way.
TOLERANCE = {"rtol": 0, "atol": 1e-5}

PROMPT = [5, (1, 1), 6, (2, 1), 7]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_changing_an_image_changes_all_tokens_after_it_and_none_before(kind: str, attn: str) -> None:
    model = shared_mini_model(kind, attn)
    inputs = mini_inputs(PROMPT)
    changed = {**inputs, "images": inputs["images"].clone()}
    changed["images"][0, 2:] *= -1  # the second image: its global view and two tiles
    before, after = model(**inputs).logits[0], model(**changed).logits[0]
    start = 5 + image_tokens((1, 1)) + 6
    torch.testing.assert_close(before[:start], after[:start], **TOLERANCE)
    differs = (before - after).abs().amax(dim=1)
    assert differs[start] > 1e-3 and differs[-7:].min() > 1e-3


@pytest.mark.parametrize("view", [0, 1, 2])
@torch.no_grad()
def test_one_pixel_of_any_view_changes_the_answers_logits(kind: str, view: int) -> None:
    model = shared_mini_model(kind)
    inputs = mini_inputs([3, (2, 1), 5])
    changed = {**inputs, "images": inputs["images"].clone()}
    changed["images"][0, view, :, 30, 40] += 1.0
    before, after = (model(**batch, logits_to_keep=1).logits for batch in (inputs, changed))
    assert (before - after).abs().max() > 1e-5  # far above the 0 of an image that is not looked at


@torch.no_grad()
def test_pixels_that_the_patches_leave_over_are_not_seen() -> None:
    """384 pixels are 27 patches and 6 pixels: those are dropped, never padded or resampled into a 28th patch."""
    tower = VisionTransformer(img_size=76, embed_dim=72, depth=1, num_heads=2)
    seed_weights(tower, "vision.")
    tile = torch.randn(1, 3, 76, 76, generator=torch.Generator().manual_seed(0))
    changed = tile.clone()
    changed[..., 70:, :] = 5.0
    changed[..., :, 70:] = -5.0
    assert tower.patch_embed.grid_size == (5, 5)
    assert torch.equal(tower(changed), tower(tile))


@torch.no_grad()
def test_image_tokens_come_as_global_view_separator_and_stitched_tiles(kind: str) -> None:
    """Against a layout built row by row."""
    model = shared_mini_model(kind)
    across, down = 3, 2
    inputs = mini_inputs([2, (across, down), 1])
    side = MINI_SIDE
    views = model.projector(model.vision(inputs["images"][0])).view(-1, side, side, 64)
    want = []
    for y in range(side):
        want += [*views[0, y], model.image_newline]
    want.append(model.view_seperator)
    for y in range(down * side):
        for x in range(across * side):
            want.append(views[1 + (y // side) * across + x // side, y % side, x % side])
        want.append(model.image_newline)
    got = model.prepare_inputs_embeds(**inputs)[0, 2:-1]
    torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=1e-5)  # tiles in batches of another size


@torch.no_grad()
def test_another_global_view_position_puts_the_tiles_first(kind: str) -> None:
    head = mini_model(kind)
    tail = mini_model(kind)
    tail.config.global_view_pos = tail.global_view_pos = "tail"
    inputs = mini_inputs([(2, 1)])
    local = MINI_SIDE * (2 * MINI_SIDE + 1)
    first, last = (model.prepare_inputs_embeds(**inputs)[0] for model in (head, tail))
    torch.testing.assert_close(
        torch.cat((first[-local:], first[-local - 1 : -local], first[: -local - 1])), last, **TOLERANCE
    )


@torch.no_grad()
def test_text_around_images_keeps_its_own_embeddings(kind: str) -> None:
    model = shared_mini_model(kind)
    inputs = mini_inputs(PROMPT, [4])
    embeds = model.prepare_inputs_embeds(**inputs)
    text = ~inputs["images_seq_mask"]
    assert torch.equal(embeds[text], model.get_input_embeddings()(inputs["input_ids"])[text])
