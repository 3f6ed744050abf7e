"""A decoding step by kernels against the model's own forward pass, on mini models of all three architectures.

On a CPU the kernels run in Triton's interpreter. float32 agrees to 1e-4 of the largest logit: both sum in float32, in
another order, through three layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import MINI_VOCABULARY, mini_language

pytest.importorskip("triton")

from deepseek_vl2.engine.runtime import fill_caches

from deepseek_vl2.engine import decode
from deepseek_vl2.engine.decode import decode_step, experts_hit, new_buffers
from deepseek_vl2.engine.weights import read_weights, rotary_tables, unsupported_model
from deepseek_vl2.models.cache import new_cache
from deepseek_vl2.models.moe import MoEGate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 2
PROMPT = 9
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny", {}),
    "tiny, grouped keys": ("tiny", {"num_key_value_heads": 2}),
    "small": ("small", {}),
    "small, yarn": (
        "small",
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "mscale": 0.7,
                "mscale_all_dim": 0.7,
            }
        },
    ),
    "small, no shared experts": ("small", {"n_shared_experts": None}),
    "base": ("base", {}),
    "base, groups": ("base", {"n_group": 4, "topk_group": 2}),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(
            decode, "multiprocessors", lambda device: 3
        )  # the interpreter runs them one after the other


def padded_prompt(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, MINI_VOCABULARY, (rows, PROMPT), device=DEVICE)
    mask = torch.ones(rows, PROMPT, dtype=torch.bool, device=DEVICE)
    for row in range(rows):
        mask[row, : row % 4] = False
    return ids, mask


@pytest.mark.parametrize("rows", [1, 3, pytest.param(18, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "variant",
    [name if name in ("tiny", "small", "base") else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
@torch.no_grad()
def test_steps_equal_forward(variant: str, rows: int) -> None:
    kind, changes = VARIANTS[variant]
    model = mini_language(kind, **changes).to(DEVICE)
    assert unsupported_model(model) is None
    ids, mask = padded_prompt(rows)
    cache = new_cache(model.config)
    plain = model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    weights = read_weights(model)
    buffers = new_buffers(weights, rows, *rotary_tables(model, 64))
    fill_caches(weights, buffers, cache, mask)
    assert buffers.positions.tolist() == mask.sum(1).tolist()
    for _ in range(STEPS):
        token = plain.argmax(-1)
        buffers.tokens.copy_(token)
        buffers.logits.fill_(float("nan"))
        mask = torch.cat((mask, mask.new_ones(rows, 1)), dim=1)
        plain = model(token[:, None], attention_mask=mask, past_key_values=cache).logits[:, -1]
        decode_step(weights, buffers)
        assert torch.allclose(buffers.logits, plain, atol=1e-4 * float(plain.abs().max()), rtol=0)
        assert torch.equal(buffers.tokens, plain.argmax(-1))
    assert buffers.positions.tolist() == mask.sum(1).tolist()
    hit = experts_hit(weights, buffers)
    assert len(hit) == 2 and all(3 <= count <= min(8, 3 * rows) for count in hit)


@pytest.mark.parametrize("kind", ["tiny", "small"])
@torch.no_grad()
def test_a_prompt_without_padding_needs_no_mask(kind: str) -> None:
    model = mini_language(kind).to(DEVICE)
    ids = torch.randint(3, MINI_VOCABULARY, (2, PROMPT), device=DEVICE)
    cache = new_cache(model.config)
    model(ids, past_key_values=cache)
    weights, tables = read_weights(model), rotary_tables(model, 64)
    filled = []
    for mask in (torch.ones(2, PROMPT, dtype=torch.bool, device=DEVICE), None):
        buffers = new_buffers(weights, 2, *tables)
        fill_caches(weights, buffers, cache, mask)
        filled.append(buffers)
    assert torch.equal(filled[0].positions, filled[1].positions)
    for masked, whole in zip(filled[0].caches, filled[1].caches, strict=True):
        assert all(torch.equal(*parts) for parts in zip(masked, whole, strict=True))
        assert masked[0].any()


@pytest.mark.parametrize("kind", ["tiny", "small"])
@torch.no_grad()
def test_rows_lie_anywhere_in_a_larger_pool(kind: str) -> None:
    """Extents in another order in a pool that is poisoned elsewhere give the same bits, and no more is touched."""
    model, rows = mini_language(kind).to(DEVICE), 3
    ids, mask = padded_prompt(rows)
    cache = new_cache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    weights, tables = read_weights(model), rotary_tables(model, 16)
    near, far = (new_buffers(weights, rows, *tables) for _ in range(2))
    fill_caches(weights, near, cache, mask)
    far.starts.copy_(torch.tensor([71, 3, 40], device=DEVICE))
    far.positions.copy_(near.positions)
    own = torch.zeros(100, dtype=torch.bool, device=DEVICE)
    for row, start in enumerate(far.starts.tolist()):
        own[start : start + int(near.positions[row]) + STEPS] = True
    for index, pools in enumerate(near.caches):
        moved = tuple(torch.full((100, *pool.shape[1:]), float("nan"), device=DEVICE) for pool in pools)
        for pool, target in zip(pools, moved, strict=True):
            for row, start in enumerate(far.starts.tolist()):
                held = int(near.positions[row])
                target[start : start + held] = near.by_row(pool)[row, :held]
        far.caches[index] = moved
    for buffers in (near, far):
        buffers.tokens.fill_(7)
        for _ in range(STEPS):
            decode_step(weights, buffers)
    assert torch.equal(near.logits, far.logits) and torch.equal(near.tokens, far.tokens)
    for pools in far.caches:
        for pool in pools:
            assert bool(pool[~own].isnan().all()) and bool(pool[own].isfinite().all())


def chosen_experts(model: Any, token: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of one more token, and the experts that each row chose, sorted, [rows, layers * K]."""
    chosen = []
    gates = [module for module in model.modules() if isinstance(module, MoEGate)]
    hooks = [gate.register_forward_hook(lambda _, __, out: chosen.append(out[0].sort(-1).values)) for gate in gates]
    logits = model(token, **settings).logits[:, -1]
    for hook in hooks:
        hook.remove()
    return logits, torch.cat(chosen, dim=1)


@pytest.mark.parametrize("kind", ["tiny", "small", "base"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_half_precision_stays_near(kind: str, rows: int) -> None:
    """In bfloat16 the step is about as far from float32 as the plain form is; the interpreter rounds worse.

    Of rows that go to the same experts in all three: rounding may exchange two experts of nearly one score.
    """
    model = mini_language(kind).to(DEVICE)
    ids, mask = padded_prompt(rows)
    token = torch.full((rows, 1), 7, device=DEVICE)
    longer = torch.cat((mask, mask.new_ones(rows, 1)), dim=1)
    cache = new_cache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    exact, exact_experts = chosen_experts(model, token, attention_mask=longer, past_key_values=cache)

    model = model.to(torch.bfloat16)
    cache = new_cache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    weights = read_weights(model)
    buffers = new_buffers(weights, rows, *rotary_tables(model, 32))
    fill_caches(weights, buffers, cache, mask)
    buffers.tokens.copy_(token[:, 0])
    plain, plain_experts = chosen_experts(model, token, attention_mask=longer, past_key_values=cache)
    decode_step(weights, buffers)
    layers = [layer for layer in weights.layers if layer.routing is not None]
    ours = [
        buffers.take(f"ids {id(x)}", rows, x.routing.top_k, dtype=torch.int32).long().sort(-1).values for x in layers
    ]
    same = (exact_experts == plain_experts).all(1) & (exact_experts == torch.cat(ours, dim=1)).all(1)
    distance = (buffers.logits - exact)[same].norm()
    plain_distance, size = (plain - exact)[same].norm(), exact[same].norm()
    assert distance <= (1.2 if DEVICE.type == "cuda" else 3) * plain_distance + 2e-3 * size


@pytest.mark.skipif(DEVICE.type == "cpu", reason="only a GPU starts kernels early")
@pytest.mark.parametrize("kind", ["tiny", "small", "base"])
@pytest.mark.parametrize("rows", [1, 3, 18])
@torch.no_grad()
def test_an_early_start_changes_no_bit(kind: str, rows: int) -> None:
    model = mini_language(kind).to(DEVICE, torch.bfloat16)
    weights, tables = read_weights(model), rotary_tables(model, 64)
    both = [new_buffers(weights, rows, *tables, pdl=pdl) for pdl in (True, False)]
    for buffers in both:
        buffers.tokens.fill_(7)
        for _ in range(40):
            decode_step(weights, buffers)
    assert torch.equal(both[0].logits, both[1].logits)
    assert all(torch.equal(*pair) for pair in zip(*(sum(b.caches, ()) for b in both), strict=True))
