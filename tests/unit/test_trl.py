"""TRL's own trainers and collators with this model and its processor: each trains, on a CPU, with nothing adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from PIL import Image
from training_support import trainer_settings

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.utils.io import resolve_model_path

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PICTURES = [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")]  # of one tile each
QUESTIONS = ["What is it?", "Which colour has the picture?"]
ANSWERS = ["a red shape", "It is blue."]


@pytest.fixture(scope="module")
def processor() -> DeepseekVLV2Processor:
    return DeepseekVLV2Processor.from_pretrained("nano")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of nano's kind, of fewer layers: a dense one and one of experts; some trainers load it again."""
    config = DeepseekVLV2Config.from_pretrained(resolve_model_path("nano"))
    config.language_config.num_hidden_layers = config.vision_config.layers = 2
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("nano")
    DeepseekVLV2ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def model(checkpoint: Path) -> DeepseekVLV2ForCausalLM:
    return DeepseekVLV2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversations(pictures: bool = True) -> Any:
    rows = [{"messages": [user(q), assistant(a)]} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    return with_pictures(rows) if pictures else datasets.Dataset.from_list(rows)


def with_pictures(rows: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list([{**row, "images": [p]} for row, p in zip(rows, PICTURES, strict=True)])


def trains(trainer: Any) -> list[dict[str, float]]:
    """Train, and return what was logged; the weights of the language model and of what images run through change."""
    model = trainer.model
    names = ("language.model.layers.1.self_attn.o_proj.weight", "image_newline")
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log and all(entry["loss"] == entry["loss"] for entry in log)
    for name, old in before.items():
        changed = not torch.equal(old, model.get_parameter(name))
        assert changed == (name != "image_newline" or trainer.train_dataset.column_names.count("images") == 1), name
    return log


def row_of(processor: DeepseekVLV2Processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False)


# ---------------------------------------------------------------- SFTTrainer


SFT_DATA = {
    "messages": lambda: conversations(),
    "text": lambda: with_pictures(
        [{"text": f"<image>\n{q} {a}<｜end▁of▁sentence｜>"} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    ),
    "prompt and completion": lambda: with_pictures(
        [{"prompt": [user(q)], "completion": [assistant(a)]} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    ),
    "messages without pictures": lambda: conversations(pictures=False),
    "text without pictures": lambda: datasets.Dataset.from_list([{"text": "one two"}, {"text": "three"}]),
    "prompt and completion without pictures": lambda: datasets.Dataset.from_list(
        [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    ),
}


@pytest.mark.parametrize("kind", SFT_DATA)
def test_sft_trains(
    kind: str, model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path
) -> None:
    data = SFT_DATA[kind]()
    # TRL drops the column of texts beside images, unless it is told to keep all.
    args = trainer_settings(trl.SFTConfig, tmp_path, remove_unused_columns=kind != "text")
    log = trains(trl.SFTTrainer(model, args, train_dataset=data, processing_class=processor))
    assert 0 < log[0]["loss"] < 20  # with messages and text, TRL takes the loss on image tokens too


@pytest.mark.parametrize("pictures", [True, False])
def test_sft_learns_answers_alone(
    pictures: bool, model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path
) -> None:
    if pictures and version.parse(trl.__version__) < version.parse("1.15"):
        pytest.skip("TRL before 1.15, the last for Python 3.10, refuses this for images")
    if pictures and version.parse(transformers.__version__) < version.parse("5.18"):
        pytest.skip("TRL asks for transformers 5.18 here")
    args = trainer_settings(trl.SFTConfig, tmp_path, assistant_only_loss=True)
    trainer = trl.SFTTrainer(model, args, train_dataset=conversations(pictures), processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = {tuple(row[row != -100].tolist()) for row in batch["labels"]}
    assert learned == {(*row_of(processor, answer), processor.eos_id) for answer in ANSWERS}
    trains(trainer)


def test_sft_packs_texts(model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path) -> None:
    args = trainer_settings(trl.SFTConfig, tmp_path, packing=True, max_length=64)
    trainer = trl.SFTTrainer(model, args, train_dataset=conversations(False), processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() == 2 and "attention_mask" not in batch
    trains(trainer)


def test_the_loss_of_sft_is_the_models_own(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path
) -> None:
    args = trainer_settings(trl.SFTConfig, tmp_path, gradient_checkpointing=False)
    trainer = trl.SFTTrainer(model, args, train_dataset=conversations(), processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    want = DeepseekVLV2ForCausalLM.forward(model, **batch, use_cache=False).loss
    assert torch.allclose(trainer.compute_loss(model, dict(batch)), want, rtol=1e-5)


def test_sft_with_adapters(model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = trl.SFTTrainer(
        model,
        trainer_settings(trl.SFTConfig, tmp_path),
        train_dataset=conversations(),
        processing_class=processor,
        peft_config=peft.LoraConfig(target_modules=["o_proj"], r=2),
    )
    trainer.train()
    assert any(bool(p.any()) for name, p in trainer.model.named_parameters() if "lora_B" in name)


def test_a_limit_that_cuts_an_image_is_named(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path
) -> None:
    args = trainer_settings(trl.SFTConfig, tmp_path, max_length=20)
    trainer = trl.SFTTrainer(model, args, train_dataset=conversations(), processing_class=processor)
    with pytest.raises(ValueError, match="max_length=20 would cut its image: raise max_length"):
        trainer.train()


# ---------------------------------------------------------------- DPOTrainer


def preferences(pictures: bool) -> Any:
    rows = [
        {"prompt": [user(q)], "chosen": [assistant(a)], "rejected": [assistant("no")]}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    return with_pictures(rows) if pictures else datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("pictures", [True, False])
def test_dpo_trains(
    pictures: bool, model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path
) -> None:
    trainer = trl.DPOTrainer(
        model,
        args=trainer_settings(trl.DPOConfig, tmp_path),
        train_dataset=preferences(pictures),
        processing_class=processor,
    )
    assert type(trainer.ref_model) is DeepseekVLV2ForCausalLM
    assert trains(trainer)[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the model is its own reference yet


# ---------------------------------------------------------------- GRPOTrainer


def reward_length(completions: list[Any], **_: Any) -> list[float]:
    said = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(index + len(text)) for index, text in enumerate(said)]


def grpo(model: Any, processor: Any, directory: Path, data: Any, **options: Any) -> Any:
    args = trainer_settings(
        trl.GRPOConfig, directory, num_generations=2, max_completion_length=3, beta=0.01, temperature=2.0, **options
    )
    return trl.GRPOTrainer(model, reward_length, args=args, train_dataset=data, processing_class=processor)


def prompts(pictures: bool) -> Any:
    rows = [{"prompt": [user(q)]} for q in QUESTIONS]
    return with_pictures(rows) if pictures else datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("pictures", [True, False])
def test_grpo_trains(
    pictures: bool, model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path
) -> None:
    trains(grpo(model, processor, tmp_path, prompts(pictures)))


@pytest.mark.parametrize("pictures", [True, False])
def test_grpo_trains_on_several_prompts_at_once(pictures: bool, model: DeepseekVLV2ForCausalLM, tmp_path: Path) -> None:
    processor = DeepseekVLV2Processor.from_pretrained("nano", transformers_defaults=True)
    trains(grpo(model, processor, tmp_path, prompts(pictures), gradient_accumulation_steps=2))


def test_grpo_with_padded_prompts_is_refused_with_what_to_do(
    model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, tmp_path: Path
) -> None:
    trainer = grpo(model, processor, tmp_path, prompts(True), gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="transformers_defaults=True"):
        trainer.train()
