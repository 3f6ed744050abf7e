"""Tiles by a recorded pass give what the modules give, and go through them where it is not for them.

Without a GPU the recorder keeps the function, and the buffers are poisoned between replays.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import GREEDY, mini_inputs, mini_model
from test_whole_prompt import DEVICE, ON_GPU, Capture, NoHost, poison, pretend
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_vl2.engine import cuda_graphs, vision, vision_kernels
from deepseek_vl2.models import modeling_deepseek_vl_v2
from deepseek_vl2.ops.triton import norm

SIDE = 70


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    made = Capture()
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: made)
    return made


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, device=DEVICE)


def plain(model: Any, tiles_V3SS: torch.Tensor) -> torch.Tensor:
    return model.projector(model.vision(tiles_V3SS))


@torch.no_grad()
def test_embeddings_agree(capture: Capture) -> None:
    model = mini_model("small").to(DEVICE)
    kept = []
    for count in (3, 2, 3, 3, 2):
        given = pixels(count)
        embeddings = vision.encode_tiles(model, given)
        assert embeddings is not None
        kept.append((embeddings, plain(model, given)))
        for one in vision.ENCODERS[model].graphs.held.values():
            poison(one.buffers.pixels, one.buffers.embeddings)
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in kept)  # results are the caller's own
    assert (capture.captures, capture.replays) == (2, 3)
    vision.release(model)
    assert model not in vision.ENCODERS


@pytest.mark.skipif(ON_GPU, reason="see test_on_a_gpu")
@torch.no_grad()
def test_the_towers_kernels_in_a_pass(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which is slow: elsewhere in these tests tiles on the host go through the modules."""
    monkeypatch.setattr(vision_kernels, "unsupported_pixels", lambda pixels: None)
    monkeypatch.setattr(vision, "FAILED", [])
    ways, encode = [], vision_kernels.encode
    monkeypatch.setattr(vision_kernels, "encode", lambda *given: ways.append("kernels") or encode(*given))
    model = mini_model("small")
    for _ in range(2):
        given = pixels(1)
        embeddings = vision.encode_tiles(model, given)
        assert embeddings is not None and torch.allclose(embeddings, plain(model, given), atol=1e-5)
    assert ways == ["kernels"] * 2 and capture.captures == 1 and not vision.FAILED


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu(capture: Capture) -> None:
    model = mini_model("small").to(DEVICE, torch.bfloat16)
    for count in (3, 3, 2, 3, 2, 2):
        given = pixels(count).bfloat16()
        embeddings, expected = model.encode_tiles(given), plain(model, given)
        assert torch.allclose(embeddings, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    assert (capture.captures, capture.replays) == (2, 4)


@torch.no_grad()
def test_weights_that_moved_are_recorded_anew(capture: Capture) -> None:
    model, given = mini_model("tiny").to(DEVICE), pixels(1)
    before = [vision.encode_tiles(model, given) for _ in range(2)]
    weight = model.vision.patch_embed.proj.weight
    model.vision.patch_embed.proj.weight = torch.nn.Parameter(weight * 2)
    after = vision.encode_tiles(model, given)
    assert before[0] is not None and before[1] is not None and after is not None
    assert torch.equal(*before) and not torch.equal(before[0], after)
    assert torch.allclose(after, plain(model, given), atol=1e-6)


@torch.no_grad()
def test_a_tower_that_was_replaced(capture: Capture) -> None:
    model, other, given = mini_model("tiny").to(DEVICE), mini_model("tiny").to(DEVICE), pixels(2)
    other.vision.patch_embed.proj.bias.data += 1
    before = vision.encode_tiles(model, given)
    model.vision = other.vision
    after = vision.encode_tiles(model, given)
    assert before is not None and after is not None and not torch.equal(before, after)
    assert torch.allclose(after, plain(model, given), atol=1e-6)
    hook = model.vision.blocks[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
    assert vision.encode_tiles(model, given) is None
    hook.remove()
    assert vision.encode_tiles(model, given) is not None


@torch.no_grad()
def test_tiles_that_go_through_the_modules() -> None:
    model, given = mini_model("tiny").to(DEVICE), pixels(1)
    assert vision.unsupported_tiles(model, given) is None
    with torch.enable_grad():
        assert "gradients" in str(vision.unsupported_tiles(model, given))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert "autocast" in str(vision.unsupported_tiles(model, given))
    assert "more than" in str(vision.unsupported_tiles(model, pixels(1).expand(vision.MAX_TILES + 1, -1, -1, -1)))
    assert "another dtype" in str(vision.unsupported_tiles(model, given.double()))
    model.vision.norm.double()
    assert "several dtypes" in str(vision.unsupported_tiles(model, given))
    model.vision.norm.float()
    hook = model.vision.blocks[0].register_forward_pre_hook(lambda *args: None)
    assert "hooks" in str(vision.unsupported_tiles(model, given))
    assert vision.encode_tiles(model, given) is None
    hook.remove()
    model.vision.set_attention_backend("eager")
    assert "eager" in str(vision.unsupported_tiles(model, given))
    model.vision.set_attention_backend("sdpa")

    class Adapted(torch.nn.Linear):
        pass

    linear = model.vision.blocks[0].mlp.fc1
    model.vision.blocks[0].mlp.fc1 = Adapted(linear.in_features, linear.out_features).to(DEVICE).eval()
    assert "Adapted" in str(vision.unsupported_tiles(model, given))
    model.vision.blocks[0].mlp.fc1 = linear
    model.vision.train()
    assert "training" in str(vision.unsupported_tiles(model, given))
    model.train()
    assert "training" in str(vision.unsupported_tiles(model, given))


@torch.no_grad()
def test_a_busy_encoder_leaves_the_call_alone(capture: Capture) -> None:
    model, given = mini_model("tiny").to(DEVICE), pixels(1)
    encoder = vision.encoder_of(model)
    assert encoder is not None
    with encoder.lock:
        assert vision.encode_tiles(model, given) is None
    assert vision.encode_tiles(model, given) is not None


@torch.no_grad()
def test_a_broken_recorder_leaves_later_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: cuda_graphs.Run) -> cuda_graphs.Run:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: broken)
    model, given = mini_model("tiny").to(DEVICE), pixels(1)
    answers = [vision.encode_tiles(model, given) for _ in range(3)]
    assert answers[0] is not None and answers[1] is not None and torch.equal(answers[0], answers[1])
    assert answers[2] is None


class NoLaunch:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


@pytest.mark.skipif(ON_GPU, reason="with a GPU it is recorded")
@pytest.mark.parametrize("reason", [None, "the modules are wanted"])
def test_nothing_waits_for_the_device(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_kernels, "unsupported_pixels", lambda pixels: reason)
    monkeypatch.setattr(vision_kernels, "pdl_options", lambda device: {})
    monkeypatch.setattr(norm, "_add_layer_norm_kernel", NoLaunch())
    monkeypatch.setattr(vision, "FAILED", [])
    model = mini_model("small")
    with FakeTensorMode(), torch.no_grad():
        pretend(model)
        given = vision.VisionBuffers(torch.empty(2, 3, SIDE, SIDE, dtype=torch.bfloat16, device="cuda"))
        with NoHost():
            vision.encode_into(model, given)
        assert given.embeddings is not None and given.embeddings.device.type == "cuda" and not vision.FAILED


# ---------------------------------------------------------------- begun before generate prepares its call


@pytest.fixture
def early(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Encode by passes, begun early where they are recorded; what happened, in order."""
    events: list[str] = []

    def begin(*given: Any) -> Any:
        wait = vision.begin(*given)
        events.append("not begun" if wait is None else "begun")
        return wait and (lambda: events.append("taken") or wait())

    monkeypatch.setattr(modeling_deepseek_vl_v2, "EARLY_ENCODERS", [begin])
    monkeypatch.setattr(modeling_deepseek_vl_v2, "FAST_ENCODERS", [vision.encode_tiles])
    return events


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


@pytest.mark.parametrize("rows", [[[5, (2, 1), 9]], [[5, (2, 1), 9], [3, (1, 1), 4, (1, 1), 6], [7]]])
def test_answers_are_the_same_when_tiles_begin_early(early: list[str], capture: Capture, rows: list[Any]) -> None:
    model = mini_model("small").to(DEVICE)
    calls = [on_device(mini_inputs(*rows, seed=seed)) for seed in (1, 2, 3, 1, 2, 3)]
    answers = [model.generate(**inputs, **GREEDY).tolist() for inputs in calls]
    assert early == ["not begun"] * 2 + ["begun", "taken"] * 4
    assert capture.captures == 1 and capture.replays == 5  # each prompt's tiles ran once
    assert answers[3:] == answers[:3] and answers[0] != answers[1]
    model.generate(**calls[0], **GREEDY, num_beams=2)  # embeds the images before
    assert early[10:] == []


def test_what_was_begun_is_for_those_images_alone(early: list[str]) -> None:
    model, inputs = mini_model("tiny").to(DEVICE), on_device(mini_inputs([5, (2, 1), 9], seed=4))
    images, crops = inputs["images"], inputs["images_spatial_crop"]
    with torch.no_grad():
        for _ in range(2):
            model.prepare_inputs_embeds(**inputs)
        want = model.prepare_inputs_embeds(**inputs)
        with modeling_deepseek_vl_v2.images_begun(model, images, crops):
            other = model.prepare_inputs_embeds(**{**inputs, "images": images + 1})
            assert early == ["begun"] and not torch.equal(other, want)
            assert torch.equal(model.prepare_inputs_embeds(**inputs), want) and early == ["begun", "taken"]
            assert torch.equal(model.prepare_inputs_embeds(**inputs), want) and early == ["begun", "taken"]
        with modeling_deepseek_vl_v2.images_begun(model, images, crops):
            images.add_(1)
            assert torch.allclose(model.prepare_inputs_embeds(**inputs), other) and early[2:] == ["begun"]
        with modeling_deepseek_vl_v2.images_begun(model, images, crops):
            pass
        assert torch.allclose(model.prepare_inputs_embeds(**inputs), other) and early[3:] == ["begun"]


@pytest.mark.parametrize("wrong", ["crops", "more tiles", "shape", "rows"])
def test_what_is_wrong_is_said_as_ever(early: list[str], wrong: str) -> None:
    model, inputs = mini_model("tiny").to(DEVICE), on_device(mini_inputs([5, (2, 1), 9], seed=4))
    for _ in range(2):
        model.generate(**inputs, **GREEDY)
    crops = inputs["images_spatial_crop"]
    changed = {
        "crops": {"images_spatial_crop": torch.ones_like(crops)},
        "more tiles": {"images_spatial_crop": crops * 9},
        "shape": {"images": inputs["images"][0]},
        "rows": {"images_spatial_crop": crops.repeat(2, 1, 1)},
    }[wrong]
    with pytest.raises(ValueError):
        model.generate(**{**inputs, **changed}, **GREEDY)
    assert early[:2] == ["not begun"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_begun_on_a_stream_of_its_own(early: list[str]) -> None:
    model = mini_model("small").to(DEVICE, torch.bfloat16)
    calls = [on_device(mini_inputs([5, (2, 1), 9], seed=seed)) for seed in range(4)]
    want = [model.generate(**inputs, **GREEDY).tolist() for inputs in calls[:2]]
    for _ in range(5):
        got = [model.generate(**inputs, **GREEDY).tolist() for inputs in calls]
        assert got[:2] == want
    assert early.count("taken") == 20
