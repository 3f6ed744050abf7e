"""transformers' Trainer for DeepSeek-VL2: learning rates by part, the routing-bias step, and a log that can be read."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, logging

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.checkpoint import StoredTensors, check_shapes, find_files, released_shapes

from .collator import ConversationCollator
from .processes import hidden_buffers, keep_sums_exact, refuse_deepspeed, shard_as_it_is
from .routing import RoutingBiasUpdater

logger = logging.get_logger(__name__)

# Which parameters make up each part, by the first component of their names; in the order of the optimizer's groups.
PARTS = {
    "language": ("language",),
    "projector": ("projector", "image_newline", "view_seperator"),
    "vision": ("vision",),
}
PART_OF = {component: part for part, components in PARTS.items() for component in components}

ROUTING_FILE = "routing.pt"
LOG_FILE = "training_log.jsonl"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def part_of(name: str) -> str:
    """Return which part a parameter belongs to: "language", "projector" or "vision".

    Wrappers (PEFT, DDP, FSDP, compilation) put components of their own in front of the name.

    Raises:
        ValueError: the parameter is none of this model's.
    """
    for component in name.split("."):
        if component in PART_OF:
            return PART_OF[component]
    raise ValueError(f"The parameter {name!r} belongs to no part of DeepSeek-VL2.")


def freeze_parts(model: nn.Module, frozen: dict[str, bool]) -> None:
    """Take the gradient from the parameters of the parts that ``frozen`` says, and from those that never run.

    The other parts are left as they are: what an adapter or the caller froze stays frozen.
    """
    for name, parameter in model.named_parameters():
        if frozen.get(part_of(name), False) or ".attn_pool." in f".{name}":
            parameter.requires_grad_(False)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the latest checkpoint that was written to its end; a kill may have left half of one behind it."""
    found = []
    for directory in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", directory.name)
        if match is None or not directory.is_dir():
            continue
        try:  # the state is the last file that transformers writes
            json.loads((directory / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning(f"{directory} is incomplete and is passed over.")
            continue
        found.append((int(match.group(1)), directory))
    return max(found)[1] if found else None


@dataclass
class VLTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with what DeepSeek-VL2 needs beside, and the paper's choices as defaults.

    The paper's: AdamW with betas 0.9 and 0.95, weight decay 0.1, gradients clipped at 1, a tenth of the learning rate
    for the vision tower, a bias step of 0.001 for the base model's gate (in its second stage; 0 in the others).

    Source: table 2 of the DeepSeek-VL2 paper.
    """

    vision_lr_factor: float = field(
        default=0.1, metadata={"help": "learning rate of the vision tower, as a factor of learning_rate"}
    )
    projector_lr_factor: float = field(default=1.0, metadata={"help": "the same for the projector"})
    language_lr_factor: float = field(default=1.0, metadata={"help": "the same for the language model"})
    freeze_vision: bool = field(default=False, metadata={"help": "do not train the vision tower"})
    freeze_projector: bool = field(default=False, metadata={"help": "do not train the projector"})
    freeze_language: bool = field(
        default=False, metadata={"help": "do not train the language model: the paper's first stage"}
    )
    routing_bias_rate: float = field(
        default=0.001,
        metadata={"help": "step of the noaux_tc gate's correction bias after each optimizer step; 0: none"},
    )
    save_dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of the finished model's files; checkpoints to resume from keep the weights' own"},
    )
    use_cache: bool = field(
        default=True, metadata={"help": "what the saved config says; training itself keeps no cache either way"}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "beta2 of AdamW"})
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be false: samples are conversations"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide losses that are not finite"})

    accelerator_config: Any = None

    def __post_init__(self) -> None:
        refuse_deepspeed(self.deepspeed)
        if self.accelerator_config is None:
            # Batches of an iterable dataset differ in their number of tiles and cannot be joined in one process.
            # On a GPU batches are pinned, so nothing has to wait until they are there.
            pinned = self.dataloader_pin_memory and torch.cuda.is_available()
            self.accelerator_config = {"dispatch_batches": False, "non_blocking": pinned}
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the collator needs the conversations.")
        if self.save_dtype is not None and self.save_dtype not in DTYPES:
            raise ValueError(f"Unknown save_dtype {self.save_dtype!r}: expected one of {', '.join(DTYPES)}.")
        for part in PARTS:
            if getattr(self, f"{part}_lr_factor") < 0:
                raise ValueError(f"{part}_lr_factor must not be negative.")
        if all(getattr(self, f"freeze_{part}") for part in PARTS):
            raise ValueError("All parts are frozen: there is nothing to train.")
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """How many GPUs this process uses: one at most, where the Trainer would take all by DataParallel."""
        return min(1, super().n_gpu)


class RoutingCallback(TrainerCallback):
    """Step the gates' correction bias after each optimizer step; for any Trainer of transformers or TRL.

    Args:
        updater: what does the step, and keeps figures of how evenly experts are used.
    """

    def __init__(self, updater: RoutingBiasUpdater) -> None:
        self.updater = updater

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add one step to the bias, from the tokens seen since the last one."""
        self.updater.step()


LOG_NAMES = {
    "loss": "loss",
    "eval_loss": "evaluation loss",
    "balance_loss": "balance",
    "grad_norm": "gradient",
    "learning_rate": "lr",
    "tokens_per_second": "tokens/s",
    "load_max": "busiest expert",
    "samples_dropped": "dropped",
    "samples_cut": "cut",
}


def readable(logs: dict[str, Any], step: int, steps: int) -> str:
    """Return one line of a log: the step, and the figures that a person follows, in a fixed order."""
    shown = []
    for name, title in LOG_NAMES.items():
        value = logs.get(name)
        if value is None or (name.startswith("samples_") and not value):
            continue
        text = f"{value:,.0f}" if name in ("tokens_per_second", "samples_dropped", "samples_cut") else f"{value:.4g}"
        shown.append(f"{title} {text}")
    return f"step {step}/{steps}  " + "  ".join(shown)


class LogCallback(ProgressCallback):
    """A progress bar, a readable line for each log, and all figures as JSON Lines beside the checkpoints."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a log's line above the bar, and append its figures to the file."""
        if not state.is_world_process_zero or logs is None:
            return
        with open(Path(args.output_dir) / LOG_FILE, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if not ("loss" in logs or "eval_loss" in logs):
            return
        tqdm.write(readable(logs, state.global_step, state.max_steps))  # above the bar, where there is one


class BarlessLogCallback(LogCallback):
    """The same without a bar, for ``disable_tqdm``."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Open no bar."""

    on_step_end = on_prediction_step = on_evaluate = on_predict = on_train_end = on_train_begin


class VLTrainer(Trainer):
    """transformers' Trainer that knows DeepSeek-VL2's parts, gates and checkpoints.

    Beside what the Trainer does: learning rates and freezing by part; the gates' bias step; checkpoints in the released
    layout, processor included, that `from_pretrained` loads and that training resumes from; tokens a second, dropped
    samples and the gates' figures in the log; the log as text above a progress bar, as ``training_log.jsonl`` in the
    output directory, and where ``report_to`` says.

    Args:
        model: the model, or a PEFT model around it.
        args: `VLTrainingArguments`.
        data_collator: by default `ConversationCollator` without a length limit.
        processing_class: the processor; it is saved beside the model.
        **kwargs: as for transformers' Trainer.

    Raises:
        ValueError: no processor and no collator are given, or nothing is left to train.
    """

    args: VLTrainingArguments
    optimizer: Any
    data_collator: Any

    def __init__(
        self,
        model: Any,
        args: VLTrainingArguments,
        data_collator: Callable[..., Any] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if data_collator is None:
            if processing_class is None:
                raise ValueError("VLTrainer needs the processor, as processing_class, or a data_collator.")
            data_collator = ConversationCollator(processing_class)
        if processing_class is None:
            processing_class = getattr(data_collator, "processor", None)
        freeze_parts(model, {part: getattr(args, f"freeze_{part}") for part in PARTS})
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("Nothing is left to train: every parameter is frozen.")
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )
        self._autocasts = False
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 2:
            self._set_up_sharding(self.accelerator.state.fsdp_plugin)
        self.routing = RoutingBiasUpdater(self.base_model(), rate=args.routing_bias_rate)
        self.add_callback(RoutingCallback(self.routing))
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(BarlessLogCallback() if args.disable_tqdm else LogCallback())
        self._tokens = torch.zeros((), dtype=torch.long, device=args.device)
        self._token_clock = time.perf_counter()

    def _set_up_sharding(self, plugin: Any) -> None:
        if hasattr(self.model, "peft_config"):
            self._autocasts = plugin.mixed_precision_policy is not None
            shard_as_it_is(plugin, self.model)
        else:
            keep_sums_exact(plugin)
        self._prepare_with_buffers()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Return autocast where accelerate leaves it out: around models that FSDP 2 shards in their own dtypes."""
        if not self._autocasts:
            return super().autocast_smart_context_manager(cache_enabled)
        return self.accelerator.autocast()

    def _prepare_with_buffers(self) -> None:
        """Let the accelerator shard models that have buffers."""
        prepare = self.accelerator.prepare

        def prepare_models(*args: Any, **kwargs: Any) -> Any:
            models = nn.ModuleList(arg for arg in args if isinstance(arg, nn.Module))
            with hidden_buffers(models, self.accelerator.device):
                return prepare(*args, **kwargs)

        self.accelerator.prepare = prepare_models

    def base_model(self) -> DeepseekVLV2ForCausalLM:
        """Return the model itself, out of the wrappers of accelerate and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # ---------------------------------------------------------------- optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Set up the optimizer with a learning rate for each part; gains and biases take no weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        members: dict[tuple[str, bool], list[nn.Parameter]] = {(p, d): [] for p in PARTS for d in (True, False)}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                members[part_of(name), name in decayed].append(parameter)
        groups = [
            {
                "params": parameters,
                "lr": self.args.learning_rate * getattr(self.args, f"{part}_lr_factor"),
                "weight_decay": self.args.weight_decay if decay else 0.0,
                "part": part,
            }
            for (part, decay), parameters in members.items()
            if parameters
        ]
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # ---------------------------------------------------------------- batches and logs

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the evaluation's batches; what they drop is not counted as the training's."""
        collator = self.data_collator
        if isinstance(collator, ConversationCollator):
            self.data_collator = collator.with_own_counts()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        number = super()._get_num_items_in_batch(batch_samples, device)
        # Where every sample was dropped the loss is zero over one token, rather than over none.
        return number.clamp(min=1) if isinstance(number, torch.Tensor) else number

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one forward and backward pass, and count its tokens."""
        mask = inputs.get("attention_mask")
        tokens = mask.sum() if mask is not None else torch.tensor(inputs["input_ids"].numel())
        self._tokens += tokens.to(self._tokens.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the loss, and the outputs where they are wanted; of a batch that teaches nothing, one without effect.

        Texts alone meet neither the vision tower nor the projector: where only these are trained, the loss depends on
        nothing that is.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if torch.is_grad_enabled() and not loss.requires_grad:
            trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            loss = loss + 0.0 * trained.flatten()[:1].sum()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of data, speed and gates to a training log."""
        if "loss" in logs:
            logs.update(self._figures())
        super().log(logs, start_time)

    def _figures(self) -> dict[str, float]:
        now = time.perf_counter()
        tokens = int(self.accelerator.reduce(self._tokens, reduction="sum"))
        figures: dict[str, float] = {"tokens_per_second": tokens / max(now - self._token_clock, 1e-9)}
        self._tokens.zero_()
        self._token_clock = now
        if isinstance(self.data_collator, ConversationCollator):
            counts = self.data_collator.counts()
            figures.update(samples_dropped=counts["dropped"], samples_cut=counts["cut"])
        figures.update({f"lr_{g['part']}": g["lr"] for g in self.optimizer.param_groups if "part" in g})
        figures.update(self.routing.statistics())
        return figures

    # ---------------------------------------------------------------- saving and resuming

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        finished = directory == Path(self.args.output_dir)
        dtype = self.args.save_dtype if finished and isinstance(self.base_model(), DeepseekVLV2ForCausalLM) else None
        if dtype is not None:
            state_dict = cast_state(self.model.state_dict() if state_dict is None else state_dict, DTYPES[dtype])
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if dtype is not None:
            name_dtype(directory / CONFIG_NAME, dtype)
        if not finished:
            torch.save(self.routing.state_dict(), directory / ROUTING_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        target = self.model if model is None else model
        if isinstance(target, DeepseekVLV2ForCausalLM) and not self.is_fsdp_enabled:
            load_weights(target, directory)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (directory / ROUTING_FILE).is_file():
            self.routing.load_state_dict(torch.load(directory / ROUTING_FILE, weights_only=True))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and isinstance(self.model, DeepseekVLV2ForCausalLM) and not self.is_fsdp_enabled:
            load_weights(self.model, Path(best))
        else:
            super()._load_best_model()


def cast_state(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a state dict with its floating-point weights in ``dtype``; the gates' bias keeps its own, being added up
    in steps that bfloat16 would round away."""
    return {
        name: tensor if not tensor.is_floating_point() or name.endswith("e_score_correction_bias") else tensor.to(dtype)
        for name, tensor in state.items()
    }


def name_dtype(config_file: Path, dtype: str) -> None:
    """Write into a saved config the dtype that the weights beside it have."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_released(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, directory: str | Path, dtype: str
) -> None:
    """Save a model in the released layout, its weights in ``dtype``, and its processor beside it."""
    model.save_pretrained(directory, state_dict=cast_state(model.state_dict(), DTYPES[dtype]))
    name_dtype(Path(directory) / CONFIG_NAME, dtype)
    processor.save_pretrained(directory)


def load_weights(model: DeepseekVLV2ForCausalLM, directory: Path) -> None:
    """Copy the weights of a checkpoint in the released layout into a model that is there already.

    transformers' Trainer would look for the fused names, and leave the experts as they are without a word.

    Raises:
        ValueError: tensors are missing, extra or of another shape; each is named.
        FileNotFoundError: there are no weights.
    """
    files = find_files(str(directory))
    if files is None:
        raise FileNotFoundError(f"There are no safetensors files in {directory} to resume from.")
    stored = StoredTensors(files)
    check_shapes(released_shapes(model, model.config), stored.shapes, directory)
    state = stored.fused()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in state:
                tensor.copy_(state[name][...])
