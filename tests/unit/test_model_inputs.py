"""What a model is given: every disagreement between ids, mask and images is an error before anything runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import GREEDY, MINI_IMAGE_ID, mini_inputs, shared_mini_model

from deepseek_vl2.models.modeling_deepseek_vl_v2 import DeepSeekVLV2CausalLMOutputWithPast

Inputs = dict[str, torch.Tensor]


def without(name: str) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {n: t for n, t in inputs.items() if n != name}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name].clone())}


def put(tensor: torch.Tensor, index: tuple[int, ...], value: object) -> torch.Tensor:
    tensor[index] = value
    return tensor


BREAK = {
    "no mask": (without("images_seq_mask"), "images_seq_mask"),
    "no images": (without("images"), "images"),
    "no crops": (without("images_spatial_crop"), "images"),
    "a shorter mask": (changed("images_seq_mask", lambda t: t[:, 1:]), "images_seq_mask"),
    "a mask of another batch": (changed("images_seq_mask", lambda t: t[:1]), "images_seq_mask"),
    "a token too few": (changed("images_seq_mask", lambda t: put(t, (0, -3), False)), "34"),
    "a token too many": (changed("images_seq_mask", lambda t: put(t, (0, -1), True)), "35"),
    "another crop": (changed("images_spatial_crop", lambda t: put(t, (0, 0), torch.tensor([2, 2]))), "Row 0"),
    "one image more": (changed("images_spatial_crop", lambda t: put(t, (1, 1), torch.tensor([1, 1]))), "Row 1"),
    "one image less": (changed("images_spatial_crop", lambda t: put(t, (0, 1), 0)), "Row 0"),
    "tiles cut off": (changed("images", lambda t: t[:, :3]), "Row 0"),
    "tiles of another size": (changed("images", lambda t: t[..., :56]), "70"),
    "images without a batch": (changed("images", lambda t: t[0]), "images"),
    "images of another batch": (changed("images", lambda t: t[:1]), "images"),
    "an image id outside the mask": (changed("input_ids", lambda t: put(t, (0, -1), MINI_IMAGE_ID)), "disagree"),
    "a text id inside the mask": (changed("input_ids", lambda t: put(t, (0, -3), 5)), "disagree"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAK)
def test_ids_mask_and_images_that_disagree_are_an_error(name: str) -> None:
    # Row 0: 25 + 4 + 34 image tokens, and its last two are text.
    model, inputs = shared_mini_model("tiny"), mini_inputs([3, (1, 1), 4, (2, 1), 2], [5, (1, 1), 2])
    broken, says = BREAK[name][0](inputs), BREAK[name][1]
    says = {"34": "58", "35": "60"}.get(says, says)
    for call in (model, lambda **kw: model.generate(**kw, **GREEDY), lambda **kw: model.incremental_prefilling(**kw)):
        with pytest.raises(ValueError, match=says):
            call(**broken)


def test_ids_or_embeddings_are_needed() -> None:
    model = shared_mini_model("tiny")
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6]]))
    for call in (model, model.language, model.language.model, model.incremental_prefilling):
        with pytest.raises(ValueError, match="inputs_embeds"):
            call()
    for part in (model.language, model.language.model):
        with pytest.raises(ValueError, match="inputs_embeds"):
            part(input_ids=torch.tensor([[5, 6]]), inputs_embeds=embeds)


def test_the_output_has_its_class_and_unpacks() -> None:
    model, text = shared_mini_model("tiny"), torch.tensor([[5, 6, 7]])
    out = model(text, labels=text)
    assert type(out) is DeepSeekVLV2CausalLMOutputWithPast
    assert out.rope_deltas is None and out.loss.dim() == 0
    loss, logits = model(text, labels=text, return_dict=False)[:2]
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    model, text = shared_mini_model("small"), torch.tensor([[5, 6, 7, 8, 9]])
    labels = torch.tensor([[5, 6, -100, 8, -100]])
    with torch.no_grad():
        out = model(text, labels=labels)
    scores = out.logits[0].log_softmax(-1)
    want = -(scores[0, 6] + scores[2, 8]) / 2
    torch.testing.assert_close(out.loss, want, rtol=0, atol=1e-5)  # float32 sums in another order


def test_parts_have_their_public_names() -> None:
    model = shared_mini_model("base")
    assert model.language_model is model.language
    for name in ("vision", "projector", "image_newline", "view_seperator"):
        assert hasattr(model, name)
    assert model.get_input_embeddings() is model.language.model.embed_tokens
    assert model.get_output_embeddings() is model.language.lm_head
    assert model.get_decoder() is model.language.model
