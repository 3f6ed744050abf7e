"""A fine-tuning run: data, model, trainer, and what is saved at the end."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.bnb_layers import count_unpacked
from deepseek_vl2.models.quantizer import WeightOnlyConfig
from deepseek_vl2.utils.io import resolve_model_path
from deepseek_vl2.utils.progress import Progress

from .collator import ConversationCollator
from .data import ConversationDataset
from .processes import idle_gpus, refuse_deepspeed
from .trainer import PARTS, VLTrainer, VLTrainingArguments, last_complete_checkpoint, save_released

LORA_LEARNING_RATE = 1e-4
FULL_LEARNING_RATE = 2e-5  # the paper's, for the base model's third stage
ADAPTER_DIRECTORY = "adapter"


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
        **frozen_weights(args),
    )
    return model


def frozen_weights(args: Namespace) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told of packed weights.

    Raises:
        ValueError: nf4 shall be sharded.
    """
    if args.quantize is None:
        return {}
    if args.quantize != "nf4":
        return {"quantization_config": WeightOnlyConfig(args.quantize)}
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("Weights of bitsandbytes are not sharded: use --quantize int4 with --use_fsdp.")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32,
    )
    # accelerate refuses to move such a model to the device that it is trained on.
    on_gpu = torch.cuda.is_available() and not args.cpu
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
    return {"quantization_config": config, "device_map": {"": place}}


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
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    everything = count_unpacked(trainer.model)
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
    with Progress(f"Loading {args.model} and the data"):
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
