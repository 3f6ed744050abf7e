"""The options of fine-tuning, and what they mean together; read without PyTorch, so that ``--help`` answers at once."""

from __future__ import annotations

import importlib.util
import os
from argparse import ArgumentParser, Namespace

from deepseek_vl2.utils.errors import UsageError
from deepseek_vl2.utils.places import NANO_NAME

LARGEST = 1e30  # of a number that has no other bound: infinity is none
# The least and the most that an option may be.
RANGES = {
    "max_length": (1, 2**31 - 1),
    "workers": (0, 256),  # as many as the collator counts for
    "lora_rank": (1, 65_536),
    "lora_alpha": (0, LARGEST),
    "lora_dropout": (0, 1),
    "learning_rate": (0, LARGEST),
    "vision_lr_factor": (0, LARGEST),
    "projector_lr_factor": (0, LARGEST),
    "language_lr_factor": (0, LARGEST),
    "epochs": (0, 1e9),
    "max_steps": (-1, 2**31 - 1),
    "batch_size": (1, 1_000_000),
    "accumulation": (1, 1_000_000),
    "warmup": (0, 1e9),
    "weight_decay": (0, LARGEST),
    "clip": (0, LARGEST),
    "seed": (0, 2**32 - 1),  # as NumPy takes it
    "save_every": (1, 2**31 - 1),
    "keep": (1, 2**31 - 1),
    "eval_every": (1, 2**31 - 1),
    "log_every": (1, 2**31 - 1),
    "routing_bias_rate": (0, LARGEST),
}
LORA_PARTS = ("attention", "mlp", "experts", "projector", "vision")
FROZEN_PARTS = ("vision", "projector", "language")


def _add_data_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model", default=NANO_NAME, help="directory or hub id of a checkpoint, nano or demo (default: %(default)s)"
    )
    group.add_argument("--data", required=True, nargs="+", help="JSON Lines files of conversations to train on")
    group.add_argument("--eval_data", nargs="+", help="JSON Lines files to measure the loss on, and not to train on")
    group.add_argument("--image_root", help="where relative image paths start; default: each data file's directory")
    group.add_argument("--output", required=True, help="directory for checkpoints, the log and the finished model")
    group.add_argument("--max_length", type=int, default=4096, help="most tokens of a sample (default: %(default)s)")
    group.add_argument(
        "--overlong",
        choices=("drop", "cut"),
        default="drop",
        help="what becomes of longer samples; an image is never cut",
    )
    group.add_argument(
        "--labels",
        choices=("assistant", "all"),
        default="assistant",
        help="learn the answers only, or the questions too",
    )
    group.add_argument(
        "--loss_weighting",
        choices=("token", "sqrt"),
        default="token",
        help="sqrt: tokens of an answer of n count in proportion to 1 / sqrt(n), so that short ones are heard",
    )
    group.add_argument(
        "--packing", action="store_true", help="put the samples of a batch into as few rows of --max_length as they fit"
    )
    group.add_argument("--skip_check", action="store_true", help="do not look through the data before training")
    group.add_argument("--workers", type=int, default=2, help="processes that prepare batches (default: %(default)s)")


def _add_method_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--method", choices=("lora", "full"), default="lora", help="adapters, or the weights themselves (default: lora)"
    )
    group.add_argument(
        "--quantize",
        choices=("int4", "int8", "fp8", "nf4"),
        help="hold the frozen weights packed under the adapters (QLoRA; nf4 needs bitsandbytes); the merged model is "
        "unpacked",
    )
    group.add_argument("--lora_rank", type=int, default=16, help="rank of the adapters (default: %(default)s)")
    group.add_argument("--lora_alpha", type=float, help="scale of the adapters; default: twice the rank")
    group.add_argument(
        "--lora_dropout",
        type=float,
        default=0.0,
        help="dropout of the adapters (default: 0); those of experts have none",
    )
    group.add_argument(
        "--lora_parts",
        nargs="+",
        choices=LORA_PARTS,
        default=["attention", "mlp", "experts"],
        help="what gets adapters (default: attention, dense and shared mlp, routed experts)",
    )
    group.add_argument(
        "--stage",
        type=int,
        choices=(1, 2, 3),
        help="freeze as in the paper's stage, with --method full: 1 trains vision and projector; 2 and 3 everything",
    )
    group.add_argument("--freeze", nargs="+", choices=FROZEN_PARTS, default=[], help="parts not to train")
    group.add_argument(
        "--routing_bias_rate",
        type=float,
        help="step of the gate's correction bias (base model); default: 0.001 with --stage 2, else 0, as in the paper",
    )


def _add_schedule_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("schedule")
    group.add_argument("--learning_rate", type=float, help="default: 1e-4 for adapters, 2e-5 for --method full")
    group.add_argument("--vision_lr_factor", type=float, default=0.1, help="vision tower's share of it (default: 0.1)")
    group.add_argument("--projector_lr_factor", type=float, default=1.0, help="projector's share (default: 1)")
    group.add_argument("--language_lr_factor", type=float, default=1.0, help="language model's share (default: 1)")
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the data (default: 1)")
    group.add_argument("--max_steps", type=int, default=-1, help="stop after this many steps, whatever --epochs says")
    group.add_argument("--batch_size", type=int, default=1, help="samples of a step on each device (default: 1)")
    group.add_argument("--accumulation", type=int, default=8, help="batches before the weights move (default: 8)")
    group.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine", help="of the rate")
    group.add_argument("--warmup", type=float, default=0.03, help="steps of warm-up; below 1: that share of all steps")
    group.add_argument("--weight_decay", type=float, default=0.1, help="default: 0.1, the paper's")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients (default: 1)")
    group.add_argument("--seed", type=int, default=0, help="of the order of the data, of adapters and of dropout")


def _add_machine_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="bf16: products in bfloat16, weights that are trained in float32; default: bf16 on a GPU, else fp32",
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more work")
    group.add_argument(
        "--attention",
        choices=("sdpa", "eager", "flash_attention_2"),
        default="sdpa",
        help="how the language model attends (default: %(default)s)",
    )
    group.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    group = parser.add_argument_group("saving and looking")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    group.add_argument("--save_every", type=int, default=500, help="steps between checkpoints (default: %(default)s)")
    group.add_argument("--keep", type=int, default=2, help="how many checkpoints to keep (default: %(default)s)")
    group.add_argument(
        "--save_dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the finished model"
    )
    group.add_argument("--eval_every", type=int, help="steps between evaluations; default: --save_every")
    group.add_argument("--log_every", type=int, default=10, help="steps between lines of the log (default: 10)")
    group.add_argument("--tensorboard", action="store_true", help="write curves to OUTPUT/tensorboard too")
    group.add_argument("--no_bar", action="store_true", help="no progress bar, only the log's lines")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    for add in (_add_data_options, _add_method_options, _add_schedule_options, _add_machine_options):
        add(parser)


def check_numbers(args: Namespace) -> None:
    """Raise ``UsageError`` for a number that is out of its range; NaN is out of all."""
    for name in ("max_length", "lora_rank", "batch_size", "accumulation", "save_every", "keep", "log_every"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be positive, not {getattr(args, name)}.")
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            bounds = f" and at most {most:g}" if most < LARGEST else ", and finite"
            raise UsageError(f"--{name} must be at least {least:g}{bounds}, not {value:g}.")
    if args.max_length < 2:
        raise UsageError("--max_length must be at least 2: the first token takes no loss.")
    if args.lora_dropout == 1:
        raise UsageError("--lora_dropout must be below 1: nothing would be left of the adapters.")
    if args.lora_alpha == 0:
        raise UsageError("--lora_alpha must not be 0: the adapters would do nothing.")
    if args.max_steps != -1 and args.max_steps < 1:
        raise UsageError(f"--max_steps must be positive, or -1 for none, not {args.max_steps}.")
    if args.epochs == 0 and args.max_steps < 1:
        raise UsageError("--epochs must be positive, not 0.")


def check_output(output: str) -> None:
    """Raise ``UsageError`` for a directory that cannot be written into, which shows only after hours of training."""
    there = os.path.abspath(output)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise UsageError(f"--output: {there} is a file, and no directory {output} can be made.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--output: {there} is not yours to write, so nothing can be saved in {output}.")


def check_options(args: Namespace) -> None:
    """Check what options mean together.

    Raises:
        UsageError: they do not go together, or a number is out of range.
    """
    check_numbers(args)
    if args.method == "full" and args.quantize is not None:
        raise UsageError("--quantize packs frozen weights: it needs --method lora.")
    if args.quantize == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--quantize nf4 needs the package bitsandbytes: pip install bitsandbytes, or use int4.")
    if args.method == "lora" and (args.stage is not None or args.freeze):
        raise UsageError("--stage and --freeze choose weights to train: they need --method full.")
    if args.stage == 1 and "language" not in args.freeze:
        args.freeze = [*args.freeze, "language"]
    if set(args.freeze) == set(FROZEN_PARTS):
        raise UsageError("--freeze names every part: there is nothing left to train.")
    if not args.output.strip():
        raise UsageError("--output is empty: name a directory.")
    if args.image_root is not None and not os.path.isdir(args.image_root):
        raise UsageError(f"--image_root: there is no directory {args.image_root!r}.")
    check_output(args.output)
    if args.eval_every is not None and args.eval_data is None:
        raise UsageError("--eval_every needs --eval_data.")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError('--tensorboard needs an extra: pip install "deepseek_vl2[train]"')
    if args.method == "lora" and importlib.util.find_spec("peft") is None:
        raise UsageError('--method lora needs an extra: pip install "deepseek_vl2[train]"')
