"""Samples for calibrated packing, read from JSON Lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.calibration import Calibration
from deepseek_vl2.training.data import ConversationDataset, located

MOST_SAMPLES = 128
MOST_TOKENS = 4096


def read_calibration(
    processor: DeepseekVLV2Processor,
    file: str | os.PathLike[str],
    most_samples: int = MOST_SAMPLES,
    done: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Read conversations to pack int4 weights for; pass the result to ``WeightOnlyConfig(calibration=...)``.

    Args:
        processor: of the model that is packed.
        file: JSON Lines in the form that ``deepseek-vl2 finetune`` and ``batch`` take; answers make them better.
        most_samples: of more lines so many are taken, evenly spaced.
        done: called after each decoder layer with its number, from 1, and how many there are.

    Raises:
        FileNotFoundError: the file, or an image that it names, is not there.
        ValueError: a line is no conversation, or longer than 4,096 tokens; file and line are named.
    """
    data = ConversationDataset(Path(file), needs_answers=False)
    step = max(1.0, len(data) / most_samples)
    samples = []
    for place in range(min(len(data), most_samples)):
        item = data[int(place * step)]
        with located(item["source"]):
            samples.append(_prepare(processor, item))
    return Calibration(samples, done)


def _prepare(processor: DeepseekVLV2Processor, item: dict[str, Any]) -> dict[str, torch.Tensor]:
    batch = processor(conversations=item["conversation"], images=item["images"])
    length = batch["input_ids"].shape[1]
    if length > MOST_TOKENS:
        raise ValueError(f"The conversation has {length:,} tokens; calibration takes {MOST_TOKENS:,} at most.")
    return dict(batch)
