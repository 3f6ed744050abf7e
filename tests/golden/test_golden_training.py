"""Losses and gradients are those of the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import CASES, GOLDEN, KINDS, TRAIN_CASES, case_inputs, model_inputs

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

# The contract: losses within 1e-4, gradient norms within 0.1 %, in float32.
LOSS_TOLERANCE = {"rtol": 0, "atol": 1e-4}
GRADIENT_TOLERANCE = {"rtol": 1e-3, "atol": 0}

for_each = pytest.mark.parametrize(("kind", "case"), [(k, c) for k in KINDS for c in TRAIN_CASES])


@pytest.fixture(scope="module")
def own_model(golden_checkpoint: Callable[[str], Path]) -> Callable[[str], DeepseekVLV2ForCausalLM]:
    """Return a kind's model, to be trained with; one at a time stays in memory."""
    loaded: dict[str, DeepseekVLV2ForCausalLM] = {}

    def model(kind: str) -> DeepseekVLV2ForCausalLM:
        if kind not in loaded:
            loaded.clear()
            loaded[kind] = DeepseekVLV2ForCausalLM.from_pretrained(golden_checkpoint(kind), dtype=torch.float32)
        loaded[kind].zero_grad()
        return loaded[kind]

    return model


def expected(kind: str, case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected" / kind / f"{case}.safetensors")


def language_loss(model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, case: str) -> torch.Tensor:
    """Return the loss over a conversation with its last eos, no prompt masked; the embeddings take no gradient."""
    assert processor.mask_prompt is False
    sample = processor(**case_inputs(CASES[case]), inference_mode=False)
    embeds = model.prepare_inputs_embeds(**sample).detach()
    return model(inputs_embeds=embeds, attention_mask=sample.attention_mask, labels=sample.labels).loss


def released_gradients(model: DeepseekVLV2ForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter's gradient under its name in a checkpoint, the experts taken apart."""
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        prefix, is_fused, projection = name.rpartition(".experts.")
        if not is_fused:
            yield name, parameter.grad
            continue
        for expert, grad in enumerate(parameter.grad):
            if projection == "gate_up_proj":
                gate, up = grad.chunk(2)
                yield f"{prefix}.experts.{expert}.gate_proj.weight", gate
                yield f"{prefix}.experts.{expert}.up_proj.weight", up
            else:
                yield f"{prefix}.experts.{expert}.down_proj.weight", grad


@for_each
@torch.no_grad()
def test_evaluation_loss_equals_the_original(own_model, processor, kind: str, case: str) -> None:  # type: ignore[no-untyped-def]
    model = own_model(kind).eval()
    torch.testing.assert_close(
        language_loss(model, processor, case)[None], expected(kind, case)["loss_eval"], **LOSS_TOLERANCE
    )


@for_each
@torch.no_grad()
def test_the_whole_model_gives_that_loss_from_ids_and_images(own_model, processor, kind: str, case: str) -> None:  # type: ignore[no-untyped-def]
    sample = processor(**case_inputs(CASES[case]), inference_mode=False)
    loss = own_model(kind).eval()(**model_inputs(sample), labels=sample.labels).loss
    torch.testing.assert_close(loss[None], expected(kind, case)["loss_eval"], **LOSS_TOLERANCE)


@pytest.mark.parametrize(("kind", "case"), [(k, c) for k in ("tiny", "small") for c in TRAIN_CASES])
def test_training_loss_and_gradient_norms_equal_the_original(own_model, processor, kind: str, case: str) -> None:  # type: ignore[no-untyped-def]
    model, want = own_model(kind).train(), expected(kind, case)
    loss = language_loss(model, processor, case)
    loss.backward()
    torch.testing.assert_close(loss[None].detach(), want["loss_train"], **LOSS_TOLERANCE)
    norms = {f"grad_norm/{name}": grad.norm()[None] for name, grad in released_gradients(model)}
    names = [name for name in want if name.startswith("grad_norm/")]
    assert len(names) >= 20
    for name in names:
        torch.testing.assert_close(norms[name], want[name], **GRADIENT_TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", TRAIN_CASES)
def test_base_trains_and_its_correction_bias_takes_no_gradient(own_model, processor, case: str) -> None:  # type: ignore[no-untyped-def]
    model = own_model("base").train()
    loss = language_loss(model, processor, case)
    loss.backward()
    assert bool(torch.isfinite(loss))
    # The auxiliary loss joins the gradient, not the printed loss.
    torch.testing.assert_close(loss[None].detach(), expected("base", case)["loss_eval"], **LOSS_TOLERANCE)
    for layer in model.language.model.layers[1:]:
        gate = layer.mlp.gate
        assert gate.weight.grad is not None and bool(torch.isfinite(gate.weight.grad).all())
        assert gate.e_score_correction_bias.grad is None and not gate.e_score_correction_bias.requires_grad
