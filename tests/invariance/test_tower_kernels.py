"""The vision tower's kernel against the plain function beside it, and the whole tower against its modules.

On a GPU, or on a CPU through Triton's interpreter. Outputs are poisoned before. float32 agrees but for the order of
sums. Half precision differs by roundings, 2^-8 of bfloat16 and 2^-11 of float16: the interpreter cuts bfloat16 off
where a GPU rounds it, which is twice the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import PatchEmbed
from torch import nn

pytest.importorskip("triton")

from deepseek_vl2.engine import vision, vision_kernels
from deepseek_vl2.engine.attached import attached
from deepseek_vl2.models.siglip_vit import VisionTransformer
from deepseek_vl2.ops.triton import norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16] if ON_GPU else DTYPES
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3 if ON_GPU else 1.6e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def relative(out: torch.Tensor, plain: torch.Tensor) -> float:
    assert out.shape == plain.shape
    assert torch.isfinite(out).all(), "a result was not written, or not finite"
    return float((out.double() - plain.double()).norm() / plain.double().norm())


# ---------------------------------------------------------------- sum and norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 40), (7, 144), (5, 1152), (2, 2100)])
def test_add_layer_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    hidden, new = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype) + 3
    weight, bias = 1 + draw(width, dtype=dtype, scale=0.2), draw(width, dtype=dtype)
    for blocks in ({}, {"BLOCK_B": 2, "BLOCK_H": 128, "num_warps": 2}, {"BLOCK_B": 1, "BLOCK_H": 4096, "num_warps": 8}):
        out, normed = (torch.full_like(hidden, float("nan")) for _ in range(2))
        norm.add_layer_norm(hidden, new, weight, bias, 1e-6, out, normed, **blocks)
        assert torch.equal(out, hidden + new)
        wide = (weight.float(), bias.float())
        assert relative(normed, norm.add_layer_norm_plain(out.float(), 0 * out, *wide, 1e-6)[1]) < TOLERANCE[dtype]
    in_place = hidden.clone()
    norm.add_layer_norm(in_place, new, weight, bias, 1e-6, in_place, normed, **blocks)
    assert torch.equal(in_place, out)
    with pytest.raises(ValueError, match="contiguous"):
        norm.add_layer_norm(hidden, new[:, : width // 2], weight, bias, 1e-6, out, normed)


# ---------------------------------------------------------------- the whole tower


def small_tower(dtype: torch.dtype = torch.float32, **changes: Any) -> VisionTransformer:
    fields = {"img_size": 42, "patch_size": 14, "embed_dim": 144, "depth": 2, "num_heads": 2, "mlp_ratio": 2.1}
    vision = VisionTransformer(**{**fields, **changes}).eval()
    for name, weight in vision.named_parameters():
        noise = torch.randn_like(weight) * (weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.2)
        weight.data.copy_(noise + ("norm" in name and name.endswith("weight")))
    return vision.to(DEVICE, dtype)


TOWERS: dict[str, dict[str, Any]] = {
    "two blocks": {},
    "a width that is a power of two": {"embed_dim": 64, "depth": 1},
    "a class token": {"class_token": True, "depth": 1},
    "tiles that patches do not fill": {"img_size": 48, "depth": 1},
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_tower_agrees_with_its_modules(name: str) -> None:
    """In half precision the kernel rounds where the modules do: both are as far from what numbers of 64 bits give.

    But for chance, 1.15 times; and in the interpreter, which cuts bfloat16 off, 1.3 times and some chance.
    """
    exact = small_tower(**TOWERS[name]).double()
    for dtype in HALVES:
        vision = small_tower(**TOWERS[name])
        vision.load_state_dict(exact.to(dtype).state_dict())
        vision, wide = vision.to(dtype), exact.to(dtype).double()
        side = TOWERS[name].get("img_size", 42)
        given = draw(2, 3, side, side, dtype=dtype)
        assert vision_kernels.unsupported_tower(vision) is None
        ours, theirs, want = vision_kernels.encode(vision, given), vision(given), wide(given.double())
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert relative(ours, want) < 1e-5
        else:
            capacity = 1.6 if dtype == torch.bfloat16 and not ON_GPU else 1.15
            assert relative(ours, want) < capacity * relative(theirs, want)


class ForeignPatches(PatchEmbed):
    pass


# 588 and 75 numbers of a patch are padded, 48 are not.
@pytest.mark.parametrize(("patch", "bias"), [(14, True), (5, True), (4, False)], ids=str)
@torch.no_grad()
def test_patches_are_embedded_by_a_matrix_product(patch: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = PatchEmbed(img_size=(29, 44), patch_size=patch, embed_dim=24, bias=bias).to(DEVICE).double()
    given = draw(2, 3, 29, 44).double()  # a GPU's convolution rounds float32 to TF32
    want = module(given)
    monkeypatch.setattr(PatchEmbed, "forward", lambda *_: pytest.fail("the module ran"))
    assert vision_kernels.is_matrix_product(module)
    assert relative(vision_kernels.embed_patches(module, given), want) < 1e-12


PATCHES: dict[str, Callable[[], nn.Module]] = {
    "another class": lambda: ForeignPatches(img_size=28, patch_size=14, embed_dim=8),
    "channels first": lambda: PatchEmbed(img_size=28, patch_size=14, embed_dim=8, flatten=False),
    "a norm": lambda: PatchEmbed(img_size=28, patch_size=14, embed_dim=8, norm_layer=nn.LayerNorm),
    "padded tiles": lambda: PatchEmbed(img_size=28, patch_size=14, embed_dim=8, dynamic_img_pad=True),
    "no size": lambda: PatchEmbed(img_size=None, patch_size=14, embed_dim=8),
    **{
        f"a convolution with {field}": lambda field=field, value=value: with_convolution(field, value)
        for field, value in (("stride", 7), ("padding", 7), ("dilation", 2), ("groups", 3))
    },
}


def with_convolution(field: str, value: int) -> nn.Module:
    module = PatchEmbed(img_size=28, patch_size=14, embed_dim=9)
    module.proj = nn.Conv2d(3, 9, 14, **{"stride": 14, field: value})
    return module


@pytest.mark.parametrize("name", PATCHES)
@torch.no_grad()
def test_other_patches_run_as_their_module(name: str) -> None:
    module, given = PATCHES[name]().to(DEVICE), draw(1, 3, 28, 28)
    assert torch.equal(vision_kernels.embed_patches(module, given), module(given))


def foreign_parts() -> dict[str, Any]:
    """Return changes of a tower that its modules alone know."""

    class Norm(nn.LayerNorm):
        pass

    class Heads(VisionTransformer):
        pass

    def scaled(vision: Any) -> None:
        from timm.layers import LayerScale

        vision.blocks[1].ls2 = LayerScale(144).to(DEVICE)

    def assign(path: str, value: Any) -> Any:
        *parents, name = path.split(".")

        def change(vision: Any) -> None:
            setattr(vision.get_submodule(".".join(parents)), name, value)

        return change

    return {
        "another tower": lambda vision: setattr(vision, "__class__", Heads),
        "a head": assign("ignore_head", False),
        "no blocks": assign("blocks", nn.Sequential()),
        "a list of blocks": lambda vision: setattr(vision, "blocks", nn.ModuleList(vision.blocks)),
        "another block": assign("blocks.1", nn.Identity()),
        "a layer scale": scaled,
        "another norm": assign("blocks.0.norm2", Norm(144, eps=1e-6)),
        "no bias": assign("blocks.1.norm1", nn.LayerNorm(144, bias=False)),
        "no last norm": assign("norm", nn.Identity()),
    }


@pytest.mark.parametrize("name", foreign_parts())
def test_foreign_towers_run_as_modules(name: str) -> None:
    vision = small_tower()
    assert vision_kernels.unsupported_tower(vision) is None
    foreign_parts()[name](vision)
    assert vision_kernels.unsupported_tower(vision)


def test_what_the_kernel_is_not_for() -> None:
    assert "not on" in str(vision_kernels.unsupported_pixels(torch.zeros(1, 3, 42, 42)))

    class Pixels:
        device, dtype = torch.device("cuda"), torch.float32

    pixels: Any = Pixels()
    assert "float32" in str(vision_kernels.unsupported_pixels(pixels))
    pixels.dtype = torch.bfloat16
    assert vision_kernels.unsupported_pixels(pixels) is None


@torch.no_grad()
def test_a_kernel_that_fails_leaves_tiles_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_kernels, "unsupported_reason", lambda vision, pixels: None)

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(vision_kernels, "encode", broken)
    tower, given = small_tower(), draw(1, 3, 42, 42)
    for _ in range(2):
        assert torch.equal(vision.features_of(tower, given), tower(given))
    assert attached(tower).values["reason"] == "RuntimeError: no such instruction"


@torch.no_grad()
def test_tiles_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    monkeypatch.setattr(
        vision_kernels, "unsupported_reason", lambda vision, pixels: vision_kernels.unsupported_tower(vision)
    )
    monkeypatch.setattr(vision_kernels, "encode", lambda vision, pixels: ways.append("kernels") or vision(pixels))
    tower, given = small_tower(depth=1), draw(1, 3, 42, 42)
    vision.features_of(tower, given)
    tower.blocks[0].ls1 = nn.Dropout()
    vision.features_of(tower, given)
    assert ways == ["kernels"]
