"""Time a step of nano's training on one GPU, layers compiled and not; about a minute on an H200.

    python benchmarks/train_step.py [--variants layers attention] [--markdown FILE]
    python benchmarks/train_step.py --device cpu --rows 2 --steps 2 --variants eager     # tries the program anywhere

The step is the Trainer's own, with the settings of `deepseek_vl2.synthetic.train`: forward under bfloat16 autocast,
backward, gradients clipped, AdamW, the routing bias. Batches are made up beforehand at the sizes of the training set
(128 conversations, about 530 tiles) and copied to the device in each step; drawing pictures is not timed.
Variants: "layers", all decoder layers, and tower and projector as one, as ``--compile`` does; "attention", the tower's
blocks and the attention alone; "eager", nothing. What compiling took is the time of the first steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.tiling import TileGrid, count_image_tokens
from deepseek_vl2.synthetic.nano import LANGUAGE, PROJECTOR, VISION, look_around
from deepseek_vl2.synthetic.scene import CANDIDATES, TILE
from deepseek_vl2.synthetic.train import compile_layers, parse_args, settings_of
from deepseek_vl2.training.trainer import VLTrainer

VOCABULARY, IMAGE_ID, PAD_ID, SIDE = 1536, 1500, 2, 6
GRIDS = [TileGrid(width // TILE, height // TILE) for width, height in CANDIDATES] + 3 * [TileGrid(2, 2)]
IMAGE_DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
LENGTH = 512
TEXT = (150, 300)  # tokens of a conversation beside its image
WARMUP, PROFILED = 6, 5


def made_up_batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Return a batch as the collator gives it, padded to `LENGTH`, with random ids and pixels."""
    random = torch.Generator().manual_seed(seed)
    grids = [GRIDS[i] for i in torch.randint(len(GRIDS), (rows,), generator=random).tolist()]
    texts = torch.randint(*TEXT, (rows,), generator=random).tolist()
    ids = torch.randint(3, IMAGE_ID, (rows, LENGTH), generator=random)
    shown = torch.zeros(rows, LENGTH, dtype=torch.bool)
    real = torch.zeros_like(shown)
    for row, (grid, text) in enumerate(zip(grids, texts, strict=True)):
        tokens = count_image_tokens(grid, SIDE)
        shown[row, 4 : 4 + tokens] = True
        real[row, : min(LENGTH, 4 + tokens + text)] = True
    labelled = real & ~shown & (torch.rand(rows, LENGTH, generator=random) < 0.4)
    shape = (rows, max(grid.views for grid in grids), 3, TILE, TILE)
    batch = {
        "input_ids": ids.masked_fill(shown, IMAGE_ID).masked_fill(~real, PAD_ID),
        "labels": ids.masked_fill(~labelled, -100),
        "attention_mask": real,
        "images": torch.randn(shape, generator=random).to(IMAGE_DTYPE),
        "images_seq_mask": shown,
        "images_spatial_crop": torch.tensor([[list(grid)] for grid in grids]),
    }
    # As the loader's thread does: a step itself does not wait for it.
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch


def new_model() -> DeepseekVLV2ForCausalLM:
    """Return nano with random weights and a vocabulary of about its size."""
    torch.manual_seed(0)
    language = {**LANGUAGE, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": PAD_ID}
    config = DeepseekVLV2Config(
        vision_config=VISION,
        projector_config=PROJECTOR,
        language_config=language,
        candidate_resolutions=CANDIDATES,
        dtype="float32",
    )
    model = DeepseekVLV2ForCausalLM(config)
    with torch.no_grad():
        look_around(model.vision)
    return model


def compile_attention(model: DeepseekVLV2ForCausalLM) -> None:
    """Compile the tower's blocks and the attention alone."""
    for module in [*model.vision.blocks, *(layer.self_attn for layer in model.language.model.layers)]:
        module.compile(dynamic=True)


VARIANTS = {"layers": compile_layers, "attention": compile_attention, "eager": lambda model: None}


class Ready(torch.utils.data.Dataset[int]):
    """As many samples as asked for; the collator knows the batches."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> int:
        return index


class Clock(TrainerCallback):
    """Times the steps after the first ones, and profiles the last."""

    def __init__(self, steps: int) -> None:
        self.timed = steps
        self.marks: dict[str, float] = {}
        self.profile: Any = None

    def _mark(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks[name] = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._mark("begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock where a part of the run ends."""
        if state.global_step == WARMUP:
            self._mark("warm")
        elif state.global_step == WARMUP + self.timed:
            self._mark("timed")
            if torch.cuda.is_available():
                self.profile = profile(activities=[ProfilerActivity.CUDA])
                self.profile.start()
            self._mark("profiling")
        elif state.global_step == WARMUP + self.timed + PROFILED:
            self._mark("end")
            if self.profile is not None:
                self.profile.stop()

    def row(self) -> list[str]:
        """Return seconds of the first steps, ms a step, kernels a step, and the share of time that the GPU is busy."""
        first = self.marks["warm"] - self.marks["begin"]
        step = (self.marks["timed"] - self.marks["warm"]) / self.timed
        if self.profile is None:
            return [f"{first:.1f}", f"{1000 * step:.1f}", "-", "-", "-"]
        kernels = [event for event in self.profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1000 / PROFILED
        count = len(kernels) / PROFILED
        return [f"{first:.1f}", f"{1000 * step:.1f}", f"{count:.0f}", f"{busy:.1f}", f"{busy / step / 10:.0f} %"]


def run(name: str, batches: Sequence[dict[str, torch.Tensor]], rows: int, steps: int) -> list[str]:
    """Train a new model for the asked number of steps; return its row of the table."""
    torch._dynamo.reset()
    model = new_model()
    VARIANTS[name](model)
    total = WARMUP + steps + PROFILED
    turn = iter(range(total + 1))
    with tempfile.TemporaryDirectory() as directory:
        words = ["--output", directory, "--steps", str(total), "--batch_size", str(rows), "--workers", "0"]
        settings = settings_of(parse_args([*words, "--save_steps", str(10 * total)]))
        settings.disable_tqdm, settings.save_strategy = True, SaveStrategy.NO
        clock = Clock(steps)
        trainer = VLTrainer(
            model,
            settings,
            lambda samples: dict(batches[next(turn) % len(batches)]),
            train_dataset=Ready(total * rows),
            callbacks=[clock],
        )
        loss = trainer.train().training_loss
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return [name, *clock.row(), f"{loss:.4f}", f"{peak:.1f}"]


def main() -> None:
    """Print a line for each variant, and the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["layers", "attention"])
    parser.add_argument("--rows", type=int, default=128, help="conversations a step (default: 128)")
    parser.add_argument("--steps", type=int, default=60, help="steps that are timed (default: 60)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu tries the program")
    batches = [made_up_batch(args.rows, seed) for seed in range(8)]
    tiles = sum(int((1 + b["images_spatial_crop"].prod(dim=-1)).sum()) for b in batches) / len(batches)
    tokens = sum(int(b["attention_mask"].sum()) for b in batches) / len(batches)
    head = ["variant", "first steps, s", "ms a step", "kernels", "GPU ms", "GPU busy", "mean loss", "peak, GB"]
    lines = [
        f"torch {torch.__version__}; {args.rows} rows of {LENGTH}, {tokens:,.0f} tokens, {tiles:.0f} tiles a step.",
        "",
        f"| {' | '.join(head)} |",
        "|" + " --- |" * len(head),
    ]
    for name in args.variants:
        row = run(name, batches, args.rows, args.steps)
        lines.append(f"| {' | '.join(row)} |")
        print(" ".join(row), flush=True)
    print("\n".join(lines))
    if args.markdown is not None:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
