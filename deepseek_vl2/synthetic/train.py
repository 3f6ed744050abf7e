"""Train nano on synthetic pictures, from nothing or from another stage's weights.

Examples:
    python -m deepseek_vl2.synthetic.train --recipe --compile --output runs/nano
    python -m deepseek_vl2.synthetic.train --output runs/third --init nano --mixture third --vision_lr_factor 0.3
    python -m deepseek_vl2.synthetic.train --output runs/short --steps 200 --batch_size 8 --workers 1
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import get_scheduler

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.training.collator import ConversationCollator
from deepseek_vl2.training.trainer import LOG_FILE, VLTrainer, VLTrainingArguments
from deepseek_vl2.utils.io import resolve_model_path

from .nano import nano_processor, new_nano
from .samples import MIXTURES, SyntheticConversations
from .tower import LabelledTiles, SeeingTower, TilePool, check_seeds, collate_tiles

DECAY = 0.25  # of the steps, at the end of the schedule "stable"
SCHEDULES = ("cosine", "stable", "level")
PARTS = ("all", "tower")
# The stages of the packaged model, one after another; each starts from the one before.
RECIPE: dict[str, str] = {
    "tower": "--part tower --steps 3600 --schedule stable --learning_rate 0.002 --warmup_steps 200 "
    "--first_picture 1000000",
    "language": "--mixture second --steps 5383 --learning_rate 0.001 --vision_lr_factor 0.3 --first_picture 3000000",
    "pointing": "--mixture third --loss_weighting sqrt --steps 6000 --schedule level --learning_rate 0.001 "
    "--warmup_steps 300 --vision_lr_factor 0.3 --first_picture 8000000",
    "settling": "--mixture third --loss_weighting sqrt --steps 80 --batch_size 32 --learning_rate 0.0002 "
    "--warmup_steps 10 --vision_lr_factor 0.3 --first_picture 12000000",
    "finishing": "--mixture fourth --loss_weighting sqrt --steps 6161 --learning_rate 0.001 --warmup_steps 100 "
    "--vision_lr_factor 0.3 --first_picture 20000000",
}
WITH_RECIPE = ("recipe", "output", "compile", "workers", "seed")
LOGGING_STEPS = 50
# Of the tower's training: pictures drawn for a step, and tiles of a picture, its global view included, about.
PICTURES_A_STEP, TILES_A_PICTURE = 16, 4


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(prog="train", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for checkpoints, log and model")
    parser.add_argument(
        "--recipe",
        action="store_true",
        help="train the packaged model: all its stages, each in a directory of its own in the output; may be joined by "
        "--compile, --workers and --seed alone",
    )
    parser.add_argument("--init", help="nano, or a checkpoint of its kind, to start from (default: random weights)")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="all",
        help="what learns: all, from conversations, or the tower and projector, from labels of what each token shows",
    )
    parser.add_argument("--mixture", choices=MIXTURES, default="first", help="what is drawn and asked (default: first)")
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="cosine",
        help="of the learning rate after the warm-up; stable: level, then down (default: cosine)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the layers: slower to start, faster afterwards")
    parser.add_argument("--steps", type=int, default=12000, help="optimizer steps (default: 12000)")
    parser.add_argument("--batch_size", type=int, default=128, help="pictures a step (default: 128)")
    parser.add_argument(
        "--max_length",
        type=int,
        default=512,
        help="tokens; longer conversations, which would make their batch wait, lose their end (default: 512)",
    )
    parser.add_argument(
        "--loss_weighting",
        choices=("token", "sqrt"),
        default="token",
        help="sqrt: the tokens of short answers, such as numbers, count more than those of long ones",
    )
    parser.add_argument("--learning_rate", type=float, default=1.2e-3, help="highest learning rate (default: 0.0012)")
    parser.add_argument(
        "--vision_lr_factor",
        type=float,
        default=1.0,
        help="the tower's and the projector's learning rate, as a factor of it; 0 freezes them (default: 1)",
    )
    parser.add_argument("--warmup_steps", type=int, default=400, help="steps up to it (default: 400)")
    parser.add_argument(
        "--pool",
        type=int,
        default=60000,
        help="tiles that the tower's training draws its batches from (default: 60000)",
    )
    parser.add_argument("--workers", type=int, default=15, help="processes that draw pictures (default: 15)")
    parser.add_argument("--save_steps", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order (default: 0)")
    parser.add_argument("--first_picture", type=int, default=0, help="seed of the first picture (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, not {getattr(args, name)}")
    others = [
        name for name, value in vars(args).items() if name not in WITH_RECIPE and value != parser.get_default(name)
    ]
    if args.recipe and others:
        parser.error(f"--recipe says itself what --{others[0]} is")
    return args


def schedule(args: Namespace) -> dict[str, Any]:
    """Return the learning rate's course: cosine to a hundredth, level and then straight down to it, or level."""
    if args.schedule == "level":
        return {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}}
    if args.schedule == "cosine":
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.01}}
    decay = {"num_decay_steps": round(DECAY * args.steps), "decay_type": "linear", "min_lr_ratio": 0.01}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}


def starting_point(args: Namespace) -> tuple[DeepseekVLV2Processor, DeepseekVLV2ForCausalLM]:
    """Return the processor and the model, in float32, that training starts from."""
    if args.init is None:
        processor = nano_processor()
        return processor, new_nano(processor, args.seed)
    source = resolve_model_path(args.init)
    processor = DeepseekVLV2Processor.from_pretrained(source)
    return processor, DeepseekVLV2ForCausalLM.from_pretrained(source, dtype=torch.float32)


def compile_layers(model: DeepseekVLV2ForCausalLM, backend: Any = "inductor") -> None:
    """Compile vision tower and projector as one, for any number of tiles, and each decoder layer.

    Decoder layers share their graphs: one of those with a dense MLP, one of those with a mixture of experts. Give them
    batches of one length, and each is compiled once.
    """
    encode_tiles = torch.compile(model.encode_tiles, backend=backend)

    def encode_any_number(tiles_V3SS: torch.Tensor) -> torch.Tensor:
        torch._dynamo.maybe_mark_dynamic(tiles_V3SS, 0)
        return encode_tiles(tiles_V3SS)

    model.encode_tiles = encode_any_number  # type: ignore[method-assign]
    for layer in model.language.model.layers:
        layer.compile(backend=backend)


def settings_of(args: Namespace) -> VLTrainingArguments:
    """Return the trainer's settings."""
    return VLTrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        **schedule(args),
        vision_lr_factor=args.vision_lr_factor,
        projector_lr_factor=args.vision_lr_factor,
        freeze_vision=args.vision_lr_factor == 0,
        freeze_projector=args.vision_lr_factor == 0,
        adam_beta2=0.98,
        weight_decay=0.05,
        optim="adamw_torch_fused",
        bf16=torch.cuda.is_available(),
        dataloader_num_workers=args.workers,
        dataloader_persistent_workers=args.workers > 0,
        dataloader_prefetch_factor=4 if args.workers else None,
        logging_steps=LOGGING_STEPS,
        save_steps=args.save_steps,
        save_total_limit=2,
        save_dtype="bfloat16",
        seed=args.seed,
        report_to="none",
    )


def train_tower(args: Namespace) -> None:
    """Train the tower and the projector alone, and save the whole model."""
    if args.resume:
        raise ValueError("The tower's training is short and keeps no checkpoints: there is nothing to resume.")
    check_seeds(args.first_picture, args.steps * PICTURES_A_STEP)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    processor, model = starting_point(args)
    seeing = SeeingTower(model).to(device).train()
    step = torch.compile(seeing) if args.compile else seeing
    decayed = [p for p in seeing.parameters() if p.ndim > 1 and p.requires_grad]
    plain = [p for p in seeing.parameters() if p.ndim <= 1 and p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    name, options = schedule(args).values()
    course = get_scheduler(name, optimizer, args.warmup_steps, args.steps, options)
    pictures = LabelledTiles(args.steps * PICTURES_A_STEP, args.first_picture, processor)
    loader = DataLoader(
        pictures, PICTURES_A_STEP, collate_fn=collate_tiles, num_workers=args.workers, pin_memory=device.type == "cuda"
    )
    pool = TilePool(args.pool, device)
    args.output.mkdir(parents=True, exist_ok=True)
    sums: dict[str, torch.Tensor] = {}
    with open(args.output / LOG_FILE, "a", encoding="utf-8") as log:
        for done, batch in enumerate(loader, start=1):
            pool.add(batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                outputs = step(**pool.sample(args.batch_size * TILES_A_PICTURE))
            outputs["loss"].backward()
            sums["grad_norm"] = sums.get("grad_norm", 0) + torch.nn.utils.clip_grad_norm_(seeing.parameters(), 1.0)
            optimizer.step()
            course.step()
            optimizer.zero_grad()
            for part, value in outputs.items():
                sums[part] = sums.get(part, 0) + value.detach()
            if done % LOGGING_STEPS == 0:
                figures = {part: round(float(value) / LOGGING_STEPS, 5) for part, value in sums.items()}
                sums = {}
                record = {"step": done, **figures, "learning_rate": course.get_last_lr()[0], "tiles": pool.filled}
                log.write(json.dumps(record) + "\n")
                log.flush()
                sys.stderr.write(" ".join(f"{part} {value:.4g}" for part, value in record.items()) + "\n")
    model.to("cpu", torch.bfloat16).save_pretrained(args.output)
    processor.save_pretrained(args.output)


def train_all(args: Namespace) -> None:
    """Train the whole model on conversations, and save it."""
    processor, model = starting_point(args)
    if args.compile:
        compile_layers(model)
    settings = settings_of(args)
    image_dtype = torch.bfloat16 if settings.bf16 else torch.float32
    collator = ConversationCollator(
        processor,
        max_length=args.max_length,
        overlong="cut",
        image_dtype=image_dtype,
        loss_weighting=args.loss_weighting,
        pad_to_multiple_of=args.max_length if args.compile else None,
    )
    pictures = SyntheticConversations(args.steps * args.batch_size, args.first_picture, args.mixture)
    trainer = VLTrainer(model, settings, collator, processing_class=processor, train_dataset=pictures)
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model()


def follow_recipe(args: Namespace) -> None:
    """Train all stages of the packaged model."""
    before: Path | None = None
    for name, options in RECIPE.items():
        stage = ["--output", str(args.output / name), "--workers", str(args.workers), "--seed", str(args.seed)]
        stage += ["--init", str(before)] if before else []
        stage += ["--compile"] if args.compile else []
        train(parse_args([*stage, *options.split()]))
        before = args.output / name


def train(args: Namespace) -> None:
    """Train one stage."""
    {"all": train_all, "tower": train_tower}[args.part](args)


def main(argv: list[str] | None = None) -> int:
    """Train and save; the exit code is 1 for a user's mistake."""
    args = parse_args(argv)
    try:
        (follow_recipe if args.recipe else train)(args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
