"""What tests of training share: a batch with pictures and labels, a few steps on it, and settings of TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support import mini_inputs


def batch() -> dict[str, torch.Tensor]:
    """Return two rows for the mini models, with pictures; padding and image tokens have no label."""
    inputs = mini_inputs([5, (1, 1), 30], [(2, 1), 12])
    ignored = inputs["images_seq_mask"] | ~inputs["attention_mask"]
    return {**inputs, "labels": inputs["input_ids"].masked_fill(ignored, -100)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return what a model says of the batch."""
    inputs = batch()
    inputs.pop("labels")
    return model(**inputs).logits


def train(model: Any, steps: int = 3) -> list[float]:
    """Take a few steps on the batch with what takes a gradient; returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def trainer_settings(kind: Any, directory: Path, **options: Any) -> Any:
    """Return the settings of one of TRL's trainers for one step on a CPU, unless told otherwise."""
    usual: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return kind(**{**usual, **options})
