"""What packing weights costs: error of each matrix, agreement of the next tokens, and the synthetic suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.checkpoint import FusedSlices, StoredTensors, find_files
from deepseek_vl2.models.quantization import PackedWeight, WeightFormat, relative_error
from deepseek_vl2.models.quantized_layers import packed_layers

QUESTIONS = (
    ("receipt.webp", "What does this say?"),
    ("chart.webp", "What does the chart show?"),
    ("kitchen.webp", "Describe this picture."),
    (None, "Explain in a few sentences what a mixture of experts is."),
)
MODEL_INPUTS = ("input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop")


@dataclass(frozen=True)
class MatrixError:
    """One packed matrix: its name, its format, and the norm of its error over its own."""

    name: str
    format: WeightFormat
    error: float


@dataclass(frozen=True)
class Agreement:
    """How near one model's next tokens are to another's.

    Fields:
        same: share of positions with the same likeliest token.
        divergence: mean Kullback-Leibler divergence from the exact model's probabilities, in nats.
        positions: how many were compared.
    """

    same: float
    divergence: float
    positions: int


def _unpacked_parts(source: Any) -> list[torch.Tensor]:
    """Read a matrix, or those of all experts, one by one."""
    if not isinstance(source, FusedSlices):
        return [source[...]]
    return [torch.cat([part[...] for part in parts]) for parts in source.slices]


def matrix_errors(
    model: DeepseekVLV2ForCausalLM, source: str | Path, done: Callable[[], None] = lambda: None
) -> list[MatrixError]:
    """Compare every packed matrix of a model with the checkpoint that it was packed from; one is read at a time.

    Args:
        model: the packed model.
        source: the released checkpoint's directory or hub id.
        done: called after each matrix.
    """
    stored = StoredTensors(find_files(source) or []).fused()
    errors = []
    for name, layer in packed_layers(model):
        for part, fmt in layer.formats.items():
            packed, scale = layer.packed(part)
            exact = stored[f"{name}.{part}"]
            if packed.dim() == 2:
                weights = [PackedWeight(packed.cpu(), scale.cpu())]
            else:
                weights = [PackedWeight(*pair) for pair in zip(packed.cpu(), scale.cpu(), strict=True)]
            found = [relative_error(e, w, fmt) for e, w in zip(_unpacked_parts(exact), weights, strict=True)]
            errors.append(MatrixError(name if part == "weight" else f"{name}.{part}", fmt, fmean(found)))
            done()
    return errors


def example_prompts(processor: DeepseekVLV2Processor) -> list[Any]:
    """Return batches of one question each: about the pictures that ship with the package, and one without."""
    batches = []
    for name, text in QUESTIONS:
        content, images = text, []
        if name is not None:
            with as_file(files("deepseek_vl2") / "assets" / "examples" / name) as path, Image.open(path) as image:
                images = [image.convert("RGB")]
            content = f"<image>\n{text}"
        conversation = [{"role": "<|User|>", "content": content}, {"role": "<|Assistant|>", "content": ""}]
        batches.append(processor(conversations=conversation, images=images))
    return batches


@torch.inference_mode()
def write_answers(model: DeepseekVLV2ForCausalLM, prompts: Sequence[Any], new_tokens: int = 48) -> list[torch.Tensor]:
    """Return a model's greedy answers, ids [1, new tokens]."""
    answers = []
    for prompt in prompts:
        inputs = prompt.to(model.device)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        answers.append(out[:, inputs["input_ids"].shape[1] :].cpu())
    return answers


@torch.inference_mode()
def next_token_logits(
    model: DeepseekVLV2ForCausalLM, prompts: Sequence[Any], answers: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the logits of every token of given answers, [tokens, vocabulary] in float32 on the host."""
    logits = []
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = {name: prompt[name].to(model.device) for name in MODEL_INPUTS}
        ids, mask = inputs["input_ids"], inputs["images_seq_mask"]
        given = answer.to(ids.device)
        inputs["input_ids"] = torch.cat((ids, given), dim=1)
        inputs["images_seq_mask"] = F.pad(mask, (0, given.shape[1]))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        out = model(**inputs).logits[0, ids.shape[1] - 1 : -1]
        logits.append(out.float().cpu())
    return logits


def compare_logits(exact: Sequence[torch.Tensor], packed: Sequence[torch.Tensor]) -> Agreement:
    """Return how near the next tokens of a packed model are to the exact one's."""
    first, second = torch.cat(list(exact)), torch.cat(list(packed))
    same = (first.argmax(dim=-1) == second.argmax(dim=-1)).float().mean()
    divergence = F.kl_div(second.log_softmax(-1), first.log_softmax(-1), reduction="batchmean", log_target=True)
    return Agreement(float(same), float(divergence), len(first))
