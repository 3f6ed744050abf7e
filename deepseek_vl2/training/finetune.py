"""Fine-tune DeepSeek-VL2 on conversations, from the command line.

Examples:
    python -m deepseek_vl2.training.finetune --model deepseek-ai/deepseek-vl2-tiny --data train.jsonl --output tuned
    python -m deepseek_vl2.training.finetune --model CHECKPOINT --data train.jsonl --eval_data held_out.jsonl \\
        --output tuned --lora_rank 32 --epochs 3 --max_length 4096 --tensorboard
    python -m deepseek_vl2.training.finetune --model CHECKPOINT --data train.jsonl --output tuned --resume
    python -m deepseek_vl2.training.finetune --model CHECKPOINT --data train.jsonl --output tuned --method full \\
        --freeze vision --batch_size 8 --packing --gradient_checkpointing
    accelerate launch --num_processes 8 -m deepseek_vl2.training.finetune --model CHECKPOINT --data train.jsonl \\
        --output tuned --method full --stage 1

A line of the data is one conversation, in the form that inference takes:
    [{"role": "<|User|>", "content": "<image>\\nWhat is this?", "images": ["photos/cat.jpg"]},
     {"role": "<|Assistant|>", "content": "A cat."}]
docs/training.md tells the rest.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from deepseek_vl2.cli.main import as_declared
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.quantizer import WeightOnlyConfig
from deepseek_vl2.utils.io import NANO_NAME, resolve_model_path

from .collator import ConversationCollator
from .data import ConversationDataset
from .processes import idle_gpus, refuse_deepspeed
from .trainer import PARTS, VLTrainer, VLTrainingArguments, last_complete_checkpoint, save_released

LORA_LEARNING_RATE = 1e-4
FULL_LEARNING_RATE = 2e-5  # the paper's, for the base model's third stage
ADAPTER_DIRECTORY = "adapter"
LORA_PARTS = ("attention", "mlp", "experts", "projector", "vision")


class UsageError(ValueError):
    """Options that do not go together; the command ends with exit code 2."""


# ---------------------------------------------------------------- command line


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
        choices=("int4", "int8", "fp8"),
        help="hold the frozen weights packed under the adapters (QLoRA); the merged model is unpacked",
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
    group.add_argument("--freeze", nargs="+", choices=tuple(PARTS), default=[], help="parts not to train")
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
    group.add_argument("--attention", default="sdpa", help="sdpa, eager or flash_attention_2 (default: %(default)s)")
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


def build_parser(prog: str | None = None) -> ArgumentParser:
    """Return the command's parser."""
    parser = ArgumentParser(prog=prog, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for add in (_add_data_options, _add_method_options, _add_schedule_options, _add_machine_options):
        add(parser)
    return parser


def check_options(args: Namespace) -> None:
    """Check what options mean together.

    Raises:
        UsageError: they do not go together, or a number is out of range.
    """
    for name in ("max_length", "lora_rank", "batch_size", "accumulation", "save_every", "keep", "log_every"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be positive, not {getattr(args, name)}.")
    if args.epochs <= 0 and args.max_steps < 1:
        raise UsageError(f"--epochs must be positive, not {args.epochs:g}.")
    if args.method == "full" and args.quantize is not None:
        raise UsageError("--quantize packs frozen weights: it needs --method lora.")
    if args.method == "lora" and (args.stage is not None or args.freeze):
        raise UsageError("--stage and --freeze choose weights to train: they need --method full.")
    if args.stage == 1 and "language" not in args.freeze:
        args.freeze = [*args.freeze, "language"]
    if set(args.freeze) == set(PARTS):
        raise UsageError("--freeze names every part: there is nothing left to train.")
    if args.eval_every is not None and args.eval_data is None:
        raise UsageError("--eval_every needs --eval_data.")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError('--tensorboard needs an extra: pip install "deepseek_vl2[train]"')
    if args.method == "lora" and importlib.util.find_spec("peft") is None:
        raise UsageError('--method lora needs an extra: pip install "deepseek_vl2[train]"')


# ---------------------------------------------------------------- pieces of a run


def find_checkpoint(output: Path, resume: bool) -> Path | None:
    """Return the checkpoint to go on from, or ``None`` for a fresh start.

    Raises:
        ValueError: there is something to go on from and ``resume`` is not set, so that it would be mixed up.
    """
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is not None and not resume:
        raise ValueError(f"{output} holds {checkpoint.name}: add --resume to go on from it, or name another --output.")
    return checkpoint


def load_data(files: list[str] | None, args: Namespace) -> ConversationDataset | None:
    """Return the conversations of some files, looked through unless told not to."""
    if files is None:
        return None
    dataset = ConversationDataset(files, image_root=args.image_root)
    if not args.skip_check:
        dataset.check()
    return dataset


def load_base(args: Namespace) -> DeepseekVLV2ForCausalLM:
    """Return the model as it is: in float32, but under adapters in bfloat16 when products are."""
    halved = args.method == "lora" and args.precision == "bf16"
    model: DeepseekVLV2ForCausalLM = DeepseekVLV2ForCausalLM.from_pretrained(
        resolve_model_path(args.model),
        dtype=torch.bfloat16 if halved else torch.float32,
        attn_implementation=args.attention,
        quantization_config=None if args.quantize is None else WeightOnlyConfig(args.quantize),
    )
    return model


def load_model(args: Namespace) -> tuple[DeepseekVLV2Processor, Any]:
    """Return the processor and the model, with adapters where they are asked for."""
    processor = DeepseekVLV2Processor.from_pretrained(resolve_model_path(args.model))
    model = load_base(args)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.method == "full":
        return processor, model
    from .lora import add_lora

    torch.manual_seed(args.seed)
    alpha = 2.0 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    parts = tuple(args.lora_parts)
    return processor, add_lora(model, rank=args.lora_rank, alpha=alpha, dropout=args.lora_dropout, parts=parts)


def training_arguments(args: Namespace) -> VLTrainingArguments:
    """Return the options in the Trainer's terms."""
    full = args.method == "full"
    rate = FULL_LEARNING_RATE if full else LORA_LEARNING_RATE
    bias_rate = 0.001 if args.stage == 2 else 0.0
    return VLTrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=rate if args.learning_rate is None else args.learning_rate,
        vision_lr_factor=args.vision_lr_factor,
        projector_lr_factor=args.projector_lr_factor,
        language_lr_factor=args.language_lr_factor,
        **{f"freeze_{part}": part in args.freeze for part in PARTS},
        routing_bias_rate=bias_rate if args.routing_bias_rate is None else args.routing_bias_rate,
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup,
        weight_decay=args.weight_decay,
        max_grad_norm=args.clip,
        seed=args.seed,
        bf16=args.precision == "bf16",
        use_cpu=args.cpu,
        dataloader_num_workers=args.workers,
        dataloader_pin_memory=torch.cuda.is_available() and not args.cpu,
        logging_steps=args.log_every,
        save_steps=args.save_every,
        save_total_limit=args.keep,
        save_dtype=args.save_dtype,
        eval_strategy="no" if args.eval_data is None else "steps",
        eval_steps=args.eval_every or args.save_every,
        disable_tqdm=args.no_bar,
        log_level="error",
        report_to=[],
    )


def build_trainer(args: Namespace) -> VLTrainer:
    """Load data and model and put the trainer together."""
    data, eval_data = load_data(args.data, args), load_data(args.eval_data, args)
    processor, model = load_model(args)
    trainer_args = training_arguments(args)
    collator = ConversationCollator(
        processor,
        max_length=args.max_length,
        overlong=args.overlong,
        labels=args.labels,
        packing=args.packing,
        loss_weighting=args.loss_weighting,
    )
    trainer = VLTrainer(
        model,
        trainer_args,
        data_collator=collator,
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=processor,
    )
    if args.tensorboard and trainer.is_world_process_zero():
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(Path(args.output) / "tensorboard"))))
    return trainer


def save_result(trainer: VLTrainer, args: Namespace) -> None:
    """Write the finished model into the output directory, in the released layout; adapters merged, and beside it."""
    if args.method == "full":
        trainer.save_model()
        return
    from .lora import load_lora, merge_lora

    sharded = trainer.is_fsdp_enabled
    state = trainer.accelerator.get_state_dict(trainer.model) if sharded else None  # all processes give their shards
    if not trainer.is_world_process_zero():
        return
    model, adapter = trainer.accelerator.unwrap_model(trainer.model), Path(args.output) / ADAPTER_DIRECTORY
    model.save_pretrained(adapter, state_dict=state)
    whole = load_lora(load_base(args), adapter) if sharded else model
    save_released(merge_lora(whole), trainer.processing_class, args.output, args.save_dtype)


def describe(trainer: VLTrainer, args: Namespace, checkpoint: Path | None) -> str:
    """Return what is about to happen, for a person."""
    parameters = list(trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in parameters)
    batch = args.batch_size * args.accumulation * trainer.args.world_size
    lines = [
        f"{args.model}: {trained:,} of {everything:,} parameters are trained ({args.method}, {args.precision}).",
        f"{len(trainer.train_dataset):,} conversations, {batch} a step, at a learning rate of "
        f"{trainer.args.learning_rate:g}.",
    ]
    hint = idle_gpus(trainer.args.world_size, trainer.args.device)
    if hint is not None:
        lines.append(hint)
    if checkpoint is not None:
        lines.append(f"Going on from {checkpoint.name}.")
    return "\n".join(lines)


def run(args: Namespace) -> None:
    """Train, and save what was trained."""
    refuse_deepspeed()
    output = Path(args.output)
    checkpoint = find_checkpoint(output, args.resume)
    if args.precision is None:
        on_gpu = torch.cuda.is_available() and not args.cpu
        args.precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    trainer = build_trainer(args)
    main_process = trainer.is_world_process_zero()
    if main_process:
        print(describe(trainer, args, checkpoint), flush=True)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    save_result(trainer, args)
    if main_process:
        counts = trainer.data_collator.counts()
        if counts["dropped"] or counts["cut"]:
            print(
                f"Of {counts['samples']:,} samples {counts['dropped']:,} were dropped and {counts['cut']:,} cut "
                f"(longer than {args.max_length} tokens)."
            )
        print(f"The model is in {output}: python inference.py --model_path {output}")


def one_line(error: BaseException) -> str:
    """Return an error's own words; one from a worker process comes with the worker's stack trace in front."""
    text = str(error).strip()
    if text.startswith("Caught ") and "\n" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return text


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command; a user's mistake ends with one line that says what is wrong.

    Args:
        argv: the options, by default the process's.
        prog: the command's name in messages, where it is part of another one.

    Returns:
        0; 1 when something went wrong, 2 when options do not go together, 130 when interrupted.
    """
    parser = build_parser(prog)
    args = parser.parse_args(as_declared(sys.argv[1:] if argv is None else argv, parser._option_string_actions))
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # what the libraries plan is not the user's concern
    logging.disable_progress_bar()  # those of loading and saving; the training's own stays
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are processes already
    try:
        check_options(args)
        run(args)
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"{parser.prog}: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; --resume goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
