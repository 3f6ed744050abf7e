"""VLTrainer: parts and their rates, checkpoints, the log; and other trainers with the same model and collator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import mini_conversation, mini_model, mini_processor
from torch.utils.data import IterableDataset
from training_support import trainer_settings
from transformers import Trainer, TrainerCallback, TrainingArguments

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.training.collator import ConversationCollator
from deepseek_vl2.training.trainer import (
    VLTrainer,
    VLTrainingArguments,
    last_complete_checkpoint,
    load_weights,
    part_of,
    readable,
)

DATA = [mini_conversation(i, images=1 + i % 2) for i in range(6)]


def arguments(output: Path, **changes: Any) -> VLTrainingArguments:
    """Return arguments for a run of a few steps on the CPU."""
    fields: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return VLTrainingArguments(**{**fields, **changes})


def trainer(output: Path, kind: str = "base", **changes: Any) -> VLTrainer:
    """Return a trainer of a mini model, whose config names its tokenizer's ids, as a release's does."""
    model, processor = mini_model(kind), mini_processor()
    language, tokenizer = model.config.language_config, processor.tokenizer
    language.bos_token_id, language.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return VLTrainer(model, arguments(output, **changes), train_dataset=DATA, processing_class=processor)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Return the parts of which some weight has moved."""
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------- parts


def test_each_part_has_its_rate_and_gains_do_not_decay(tmp_path: Path) -> None:
    run = trainer(tmp_path, language_lr_factor=0.5, weight_decay=0.2)
    groups = run.create_optimizer().param_groups
    assert {group["part"]: group["lr"] for group in groups} == {
        "language": pytest.approx(5e-4),
        "projector": pytest.approx(1e-3),
        "vision": pytest.approx(1e-4),
    }
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    seen = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(name for name, p in run.model.named_parameters() if p.requires_grad)
    for group in groups:
        assert {part_of(names[parameter]) for parameter in group["params"]} == {group["part"]}
        for parameter in group["params"]:
            is_gain = "norm" in names[parameter] or names[parameter].endswith("bias")
            assert group["weight_decay"] == (0.0 if is_gain else 0.2), names[parameter]


@pytest.mark.parametrize("frozen", ["vision", "projector", "language"])
def test_a_frozen_part_stays_as_it_is(tmp_path: Path, frozen: str) -> None:
    run = trainer(tmp_path, max_steps=1, routing_bias_rate=0.0, **{f"freeze_{frozen}": True})
    before = weights(run.model)
    run.train()
    assert moved(before, weights(run.model)) == {"vision", "projector", "language"} - {frozen}


def test_parameters_are_known_under_any_wrapper() -> None:
    assert part_of("base_model.model.language.model.layers.0.mlp.gate.weight") == "language"
    assert part_of("_fsdp_wrapped_module.module.vision.blocks.0.attn.qkv.weight") == "vision"
    assert part_of("image_newline") == part_of("projector.layers.0.weight") == "projector"
    with pytest.raises(ValueError, match="'head' belongs to no part"):
        part_of("head.weight"[:4])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze_vision": True, "freeze_projector": True, "freeze_language": True}, "All parts are frozen"),
        ({"vision_lr_factor": -1.0}, "vision_lr_factor must not be negative"),
        ({"save_dtype": "int8"}, "Unknown save_dtype 'int8'"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **changes)


def test_a_collator_or_a_processor_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the processor"):
        VLTrainer(mini_model("tiny"), arguments(tmp_path), train_dataset=DATA)


# ---------------------------------------------------------------- training


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    # The balance loss is a mean over rows and batches differ in theirs: without it the sums are the same.
    losses, gradients = [], []
    for batch, steps in ((4, 1), (1, 4)):
        run = VLTrainer(
            mini_model("base", aux_loss_alpha=0.0),
            arguments(
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
                max_grad_norm=0.0,
                learning_rate=0.0,
            ),
            train_dataset=[mini_conversation(i, answer="z" * (1 + 9 * i)) for i in range(4)],
            processing_class=mini_processor(),
        )
        kept: dict[str, torch.Tensor] = {}
        run.model.zero_grad = lambda *_, m=run.model, k=kept: k.update(  # the Trainer's next call would clear them
            {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}
        )
        run.train()
        losses.append(run.state.log_history[0]["loss"])
        gradients.append(kept)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=2e-6)  # float32, another order


def test_gradient_checkpointing_changes_no_weight(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, max_steps=2, gradient_checkpointing=on) for on in (False, True)]
    for run in runs:
        run.train()
    plain, checkpointed = (weights(run.model) for run in runs)
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=0, atol=0)  # the same products, run twice


def test_under_autocast_the_weights_stay_float32(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=8, bf16=True, learning_rate=3e-3)
    run.train()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


class Stream(IterableDataset[dict[str, Any]]):
    """The data, as a stream."""

    def __iter__(self) -> Any:
        return iter(DATA * 10)


@pytest.mark.parametrize("packing", [False, True])
def test_iterable_data_packing_dropping_and_the_log(tmp_path: Path, packing: bool) -> None:
    collator = ConversationCollator(mini_processor(), max_length=80, packing=packing)
    run = VLTrainer(
        mini_model("base"),
        arguments(tmp_path, dataloader_num_workers=1),
        data_collator=collator,
        train_dataset=Stream(),
        eval_dataset=DATA,
    )
    before = weights(run.model)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    lines = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    logs = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logs] == [1, 2, 3, 4]
    assert all(line["tokens_per_second"] > 0 for line in logs)
    assert logs[-1]["samples_dropped"] >= 4  # every second sample has two images and is too long
    assert logs[0]["lr_vision"] == pytest.approx(0.1 * logs[0]["lr_language"])
    assert "eval_loss" in lines[-1]
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        steps = (run.model.state_dict()[name] - before[name]) / 0.001
        assert bool((steps.abs() > 0.5).any())
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)  # float32, beside a bias of up to 1


def test_a_step_whose_samples_are_all_dropped_moves_nothing_to_nan(tmp_path: Path) -> None:
    collator = ConversationCollator(mini_processor(), max_length=20)
    run = VLTrainer(mini_model("base"), arguments(tmp_path, max_steps=2), data_collator=collator, train_dataset=DATA)
    run.train()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.model.state_dict().values())
    assert [entry["loss"] for entry in run.state.log_history if "loss" in entry] == [0.0, 0.0]


def test_a_line_of_the_log_is_for_a_person() -> None:
    logs = {"loss": 1.23456, "learning_rate": 1e-4, "tokens_per_second": 12345.6, "samples_dropped": 0, "epoch": 1.0}
    assert readable(logs, 10, 500) == "step 10/500  loss 1.235  lr 0.0001  tokens/s 12,346"
    assert readable({"eval_loss": 0.5, "samples_cut": 3}, 10, 500) == "step 10/500  evaluation loss 0.5  cut 3"


# ---------------------------------------------------------------- checkpoints


def test_the_finished_model_loads_as_it_is_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, save_dtype="bfloat16")
    run.train()
    run.save_model()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert run.model.dtype == torch.float32
    loaded = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert DeepseekVLV2Processor.from_pretrained(tmp_path).candidate_resolutions
    for name, tensor in run.model.state_dict().items():
        exact = name.endswith("e_score_correction_bias")
        assert torch.equal(loaded.state_dict()[name], tensor if exact else tensor.bfloat16().float()), name


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"global_'), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        load_weights(mini_model("tiny"), tmp_path)
    mini_model("base").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(mini_model("tiny"), tmp_path)


@pytest.mark.parametrize("shard", ["5GB", "700KB"])
def test_trainers_of_transformers_resume_the_experts_too(tmp_path: Path, shard: str) -> None:
    # They hand the released names, shard by shard, to load_state_dict(strict=False).
    from transformers.trainer_utils import load_sharded_checkpoint

    trained, fresh = mini_model("base"), mini_model("base", initializer_range=0.5)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    trained.save_pretrained(tmp_path, max_shard_size=shard)
    if shard == "5GB":
        from safetensors.torch import load_file

        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    else:
        load_sharded_checkpoint(fresh, str(tmp_path), strict=False)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


class Killed(BaseException):
    """Nothing handles it, so that nothing more is written: as after SIGKILL, without another process."""


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed


RESUMED = {
    "max_steps": 7,  # the data are passed twice, in two orders, and the kill is in the second pass
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
}


def test_after_a_kill_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", **RESUMED)
    whole.train()
    killed = trainer(tmp_path / "killed", **RESUMED)
    killed.add_callback(Kill())
    with pytest.raises(Killed):
        killed.train()
    checkpoint = last_complete_checkpoint(tmp_path / "killed")
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    resumed = trainer(tmp_path / "killed", **RESUMED)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 7
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name  # bit for bit
    want = {e["step"]: (e["loss"], e["grad_norm"]) for e in whole.state.log_history if "loss" in e}
    got = {e["step"]: (e["loss"], e["grad_norm"]) for e in resumed.state.log_history if "loss" in e}
    assert got == want


# ---------------------------------------------------------------- other trainers


def test_transformers_trainer_works(tmp_path: Path) -> None:
    fields = arguments(tmp_path, max_steps=12, learning_rate=3e-3).to_dict()
    own = {f.name for f in TrainingArguments.__dataclass_fields__.values()}
    args = TrainingArguments(**{name: value for name, value in fields.items() if name in own})
    collator = ConversationCollator(mini_processor())
    run = Trainer(mini_model("small"), args, data_collator=collator, train_dataset=DATA, eval_dataset=DATA)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.5 * before


def test_trl_sft_trainer_works(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    conversations = [{"messages": sample["conversation"], "images": sample["images"]} for sample in DATA]
    args = trainer_settings(
        trl.SFTConfig,
        tmp_path,
        max_steps=12,
        learning_rate=3e-3,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    processor = mini_processor()
    run = trl.SFTTrainer(
        mini_model("base"),
        args,
        data_collator=ConversationCollator(processor, skip_logits=True),
        train_dataset=datasets.Dataset.from_list(conversations),
        processing_class=processor,
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_a_plain_loop_works() -> None:
    model = mini_model("tiny").train()
    collator = ConversationCollator(mini_processor())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**collator(DATA[:3])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
