"""The vision tower equals plain timm, the projector the formulas of `F.unfold`."""

from __future__ import annotations

from functools import partial

import pytest
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from support import seed_weights
from torch import nn

from deepseek_vl2.models.modeling_deepseek_vl_v2 import MlpProjector, MlpProjectorConfig
from deepseek_vl2.models.siglip_vit import VisionTransformer

# Float32 sums in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("size", "patch"), [(384, 14), (70, 14), (76, 14), (64, 16)])
@torch.no_grad()
def test_the_tower_equals_plain_timm(size: int, patch: int, backend: str) -> None:
    sizes = {"img_size": size, "patch_size": patch, "embed_dim": 72, "num_heads": 2, "mlp_ratio": 3.7362, "depth": 2}
    ours = VisionTransformer(**sizes, attention_backend=backend).eval()
    stock = timm_vit.VisionTransformer(
        **sizes,
        class_token=False,
        global_pool="map",
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        act_layer=partial(nn.GELU, approximate="tanh"),
    ).eval()
    seed_weights(ours, "vision.")
    stock.load_state_dict(ours.state_dict())
    tiles = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    got = ours(tiles)
    assert got.shape == (2, (size // patch) ** 2, 72)
    torch.testing.assert_close(got, stock.forward_features(tiles), **TOLERANCE)


def test_384_pixels_are_729_patches() -> None:
    with torch.device("meta"):
        assert VisionTransformer().pos_embed.shape == (1, 729, 1152)


def projector(kind: str, **fields: int | bool) -> MlpProjector:
    model = MlpProjector(MlpProjectorConfig(projector_type=kind, input_dim=12, n_embed=20, **fields))
    seed_weights(model, "projector.")
    return model


def features(side: int) -> torch.Tensor:
    return torch.randn(3, side * side, 12, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("side", [4, 5, 27])
@torch.no_grad()
def test_downsampling_equals_unfold_on_the_padded_grid(side: int, ratio: int) -> None:
    model, x = projector("downsample_mlp_gelu", downsample_ratio=ratio), features(side)
    grid = F.pad(x.view(3, side, side, 12), (0, 0, 0, -side % ratio, 0, -side % ratio))
    merged = F.unfold(grid.permute(0, 3, 1, 2), kernel_size=ratio, stride=ratio).mT
    first, second = model.layers[0], model.layers[2]
    want = F.linear(F.gelu(F.linear(merged, first.weight, first.bias)), second.weight, second.bias)
    assert want.shape[1] == (-(-side // ratio)) ** 2
    torch.testing.assert_close(model(x), want, **TOLERANCE)


@torch.no_grad()
def test_the_depth_and_ratio_of_the_mlp_are_those_of_the_config() -> None:
    model = projector("downsample_mlp_gelu", depth=3, mlp_ratio=2)
    sizes = [(layer.in_features, layer.out_features) for layer in model.layers if isinstance(layer, nn.Linear)]
    assert sizes == [(48, 40), (40, 40), (40, 20)]
    assert [type(layer) for layer in model.layers] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert model.layers[1].approximate == "none"


@torch.no_grad()
def test_the_plain_projectors_do_what_their_names_say() -> None:
    x = features(5)
    assert torch.equal(projector("identity")(x), x)
    linear, mlp = projector("linear"), projector("mlp_gelu")
    torch.testing.assert_close(linear(x), F.linear(x, linear.layers.weight, linear.layers.bias), **TOLERANCE)
    hidden = F.gelu(F.linear(x, mlp.layers[0].weight, mlp.layers[0].bias))
    torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.layers[2].weight, mlp.layers[2].bias), **TOLERANCE)


@pytest.mark.parametrize("side", [4, 5])
@torch.no_grad()
def test_token_pooling_equals_unfolded_patches(side: int) -> None:
    model, x = projector("linear", token_pooling=True), features(side)
    patches = x.view(3, side, side, 12).permute(0, 3, 1, 2).unfold(2, 2, 2).unfold(3, 2, 2)
    half = side // 2
    patches = patches.contiguous().view(3, 12, half * half, -1).permute(0, 2, 1, 3).reshape(3, half * half, 48)
    torch.testing.assert_close(model(x), model.layers(model.token_pooling_layer(patches)), **TOLERANCE)
