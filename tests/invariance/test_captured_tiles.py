"""Tiles by a captured graph give what the modules give, and go through them where it is not for them.

Without a GPU the capture keeps the function, and the buffers are poisoned between replays.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_support import DEVICE, ON_GPU, Capture, NoHost, NoLaunch, poison, pretend
from support import GREEDY, mini_inputs, mini_model
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_vl2.engine import backend, cuda_graphs, vision, vision_kernels
from deepseek_vl2.engine.attached import attached
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


def encoder_of(model: Any) -> vision.Encoder:
    found: vision.Encoder = attached(model).values["encoder"]
    return found


def failure(model: Any) -> str | None:
    return attached(model.vision).values.get("reason")


@torch.no_grad()
def test_embeddings_agree(capture: Capture) -> None:
    model = mini_model("small").to(DEVICE)
    kept = []
    for count in (3, 2, 3, 3, 2):
        given = pixels(count)
        embeddings = vision.encode_tiles(model, given)
        assert embeddings is not None
        kept.append((embeddings, plain(model, given)))
        for one in encoder_of(model).graphs.held.values():
            poison(one.buffers.pixels, one.buffers.embeddings)
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in kept)  # results are the caller's own
    assert (capture.captures, capture.replays) == (2, 3)
    held = [one.buffers for one in encoder_of(model).graphs.held.values()]
    for name in ("pixels", "embeddings"):  # graphs share their memory
        assert len({getattr(one, name).untyped_storage().data_ptr() for one in held}) == 1
    backend.release(model)
    assert "encoder" not in attached(model).values


@torch.no_grad()
def test_more_tiles_than_before_leave_earlier_graphs_alone(capture: Capture) -> None:
    model = mini_model("small").to(DEVICE)
    for count in (1, 1, 4, 4, 2, 2, 1, 4):
        given = pixels(count)
        embeddings = vision.encode_tiles(model, given)
        assert embeddings is not None and torch.allclose(embeddings, plain(model, given), atol=1e-6)
    assert (capture.captures, capture.replays) == (3, 5)
    storages = {one.buffers.pixels.untyped_storage().data_ptr() for one in encoder_of(model).graphs.held.values()}
    assert len(storages) == 2  # of one tile, and of four


def test_tiles_are_cut_into_numbers_that_are_captured() -> None:
    """Each new number would cost the host a plan of attention."""
    assert vision.cut(1) == [1] and vision.cut(16) == [16] and vision.cut(32) == [32]
    assert vision.cut(17) == [16, 1] and vision.cut(35) == [32, 3] and vision.cut(95) == [32, 32, 16, 15]
    sizes = {size for tiles in range(1, 200) for size in vision.cut(tiles)}
    assert all(sum(vision.cut(tiles)) == tiles for tiles in range(1, 200)) and len(sizes) <= vision.MAX_GRAPHS


@pytest.mark.skipif(ON_GPU, reason="see test_on_a_gpu")
@torch.no_grad()
def test_the_towers_kernels_in_a_graph(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which is slow: elsewhere in these tests tiles on the host go through the modules."""
    monkeypatch.setattr(vision_kernels, "unsupported_pixels", lambda pixels: None)
    ways, encode = [], vision_kernels.encode
    monkeypatch.setattr(vision_kernels, "encode", lambda *given: ways.append("kernels") or encode(*given))
    model = mini_model("small")
    for _ in range(2):
        given = pixels(1)
        embeddings = vision.encode_tiles(model, given)
        assert embeddings is not None and torch.allclose(embeddings, plain(model, given), atol=1e-5)
    assert ways == ["kernels"] * 2 and capture.captures == 1 and failure(model) is None


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
def test_weights_that_moved_are_captured_anew(capture: Capture) -> None:
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
    assert "no tiles" in str(vision.unsupported_tiles(model, given[:0]))
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
def test_many_tiles_replay_several_graphs(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "MAX_TILES", 2)
    monkeypatch.setattr(vision, "FULL_PASS", 4)
    # A GPU's convolution would round float32 to TF32, by another algorithm for each number of tiles.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, given = mini_model("tiny").to(DEVICE), pixels(7)  # as 4, 2 and 1
    for _ in range(3):
        encoded = vision.encode_tiles(model, given)
        assert encoded is not None and torch.allclose(encoded, plain(model, given), atol=1e-6)
    assert (capture.captures, capture.replays) == (3, 6)


@torch.no_grad()
def test_a_busy_encoder_leaves_tiles_uncaptured(capture: Capture) -> None:
    model, given = mini_model("tiny").to(DEVICE), pixels(1)
    assert vision.encode_tiles(model, given) is not None and len(encoder_of(model).graphs.held) == 1
    with encoder_of(model).lock:
        busy = vision.encode_tiles(model, given)
        assert busy is not None and torch.allclose(busy, plain(model, given), atol=1e-6)
    assert capture.captures == 0 and len(encoder_of(model).graphs.held) == 1


@torch.no_grad()
def test_a_broken_capture_leaves_later_calls_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(run: cuda_graphs.Run) -> cuda_graphs.Run:
        tried.append(run)
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: broken)
    model, given = mini_model("tiny").to(DEVICE), pixels(1)
    answers = [vision.encode_tiles(model, given) for _ in range(4)]
    assert len(tried) == 1 and "not permitted" in str(encoder_of(model).broken)
    assert all(one is not None and torch.allclose(one, plain(model, given), atol=1e-6) for one in answers)
    assert vision.begin(model, given[None], torch.tensor([[[1, 1]]])) is None


@torch.no_grad()
def test_a_failing_kernel_leaves_the_tower_to_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """This tower's alone: another model's goes on by kernels."""

    def broken(*given: Any) -> torch.Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(vision_kernels, "unsupported_reason", lambda tower, tiles: None)
    monkeypatch.setattr(vision_kernels, "encode", broken)
    model, other, given = mini_model("tiny").to(DEVICE), mini_model("tiny").to(DEVICE), pixels(1)
    assert torch.equal(vision.features_of(model.vision, given), model.vision(given))
    assert "no compiler" in str(failure(model)) and failure(other) is None
    monkeypatch.setattr(vision_kernels, "encode", lambda tower, tiles: tiles)
    assert vision.features_of(other.vision, given) is given
    assert torch.equal(vision.features_of(model.vision, given), model.vision(given))


@pytest.mark.skipif(ON_GPU, reason="with a GPU it is captured")
@pytest.mark.parametrize("reason", [None, "the modules are wanted"])
def test_nothing_waits_for_the_device(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_kernels, "unsupported_pixels", lambda pixels: reason)
    monkeypatch.setattr(vision_kernels, "pdl_options", lambda device: {})
    monkeypatch.setattr(norm, "_add_layer_norm_kernel", NoLaunch())
    model = mini_model("small")
    with FakeTensorMode(), torch.no_grad():
        pretend(model)
        given = vision.VisionBuffers(torch.empty(2, 3, SIDE, SIDE, dtype=torch.bfloat16, device="cuda"))
        with NoHost():
            vision.encode_into(model, given)
        assert given.embeddings is not None and given.embeddings.device.type == "cuda" and failure(model) is None


# ---------------------------------------------------------------- begun before generate prepares its call


@pytest.fixture
def early(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Encode by graphs, begun early where they are captured; what happened, in order."""
    events: list[str] = []

    def begin(*given: Any) -> Any:
        wait = vision.begin(*given)
        events.append("not begun" if wait is None else "begun")
        return wait and (lambda: events.append("taken") or wait())

    monkeypatch.setattr(backend, "begin_tiles", begin)
    monkeypatch.setattr(backend, "encode_tiles", vision.encode_tiles)
    return events


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


@pytest.mark.parametrize("rows", [[[5, (2, 1), 9]], [[5, (2, 1), 9], [3, (1, 1), 4, (1, 1), 6], [7]]])
def test_answers_are_the_same_when_tiles_begin_early(early: list[str], capture: Capture, rows: list[Any]) -> None:
    model = mini_model("small").to(DEVICE)
    calls = [on_device(mini_inputs(*rows, seed=seed)) for seed in (1, 2, 3, 1, 2, 3)]
    answers = [model.generate(**inputs, **GREEDY).tolist() for inputs in calls]
    shown = sum(any(isinstance(part, tuple) for part in row) for row in rows)  # each prompt takes its own
    assert early == ["not begun"] * 2 + ["begun", *["taken"] * shown] * 4
    assert capture.captures == 1 and capture.replays == 5  # each prompt's tiles ran once
    assert answers[3:] == answers[:3] and answers[0] != answers[1]
    events = len(early)
    model.generate(**calls[0], **GREEDY, num_beams=2)  # embeds the images before
    assert len(early) == events


def test_what_was_begun_is_for_that_call_alone(early: list[str]) -> None:
    """A call that fails before it takes the tiles leaves nothing behind for the next, whose images are others."""
    model, inputs = mini_model("tiny").to(DEVICE), on_device(mini_inputs([5, (2, 1), 9], seed=4))
    answers = [model.generate(**inputs, **GREEDY).tolist() for _ in range(3)]
    assert early == ["not begun"] * 2 + ["begun", "taken"] and answers[0] == answers[2]
    with pytest.raises(ValueError):
        model.generate(**{**inputs, "attention_mask": inputs["input_ids"][:, :3]}, **GREEDY)
    images = inputs["images"].clone()
    inputs["images"].add_(1)
    changed = model.generate(**inputs, **GREEDY).tolist()
    assert early[-2:] == ["begun", "taken"]
    backend.release(model)
    assert model.generate(**inputs, **GREEDY).tolist() == changed
    assert model.generate(**{**inputs, "images": images}, **GREEDY).tolist() == answers[0]


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
