"""The released architectures learn to tell pictures apart, by heart, through the trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import KINDS, golden_image

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.training.collator import ConversationCollator
from deepseek_vl2.training.trainer import VLTrainer, VLTrainingArguments

QUESTION = "<image>\nWhat is this?"
ANSWERS = {"square.png": "A plain field.", "gray.png": "<|ref|>the box<|/ref|><|det|>[[12, 40, 500, 999]]<|/det|>"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_answers_are_learned_to_the_letter(
    golden_checkpoint: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    model = DeepseekVLV2ForCausalLM.from_pretrained(golden_checkpoint(kind), dtype=torch.float32)
    processor = DeepseekVLV2Processor.from_pretrained(golden_checkpoint(kind))
    data = [
        {
            "conversation": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}],
            "images": [golden_image(name)],
        }
        for name, answer in ANSWERS.items()
    ]
    args = VLTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    # One tile each: the pictures fit into 421 tokens, and the test into a minute.
    collator = ConversationCollator(processor, cropping=False)
    trainer = VLTrainer(model, args, data_collator=collator, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.01
    for name, answer in ANSWERS.items():  # the question is the same: only the picture tells
        inputs = processor(
            conversations=[{"role": "user", "content": QUESTION}], images=[golden_image(name)], cropping=False
        )
        output = model.eval().generate(**inputs, max_new_tokens=40, do_sample=False)
        assert processor.decode(output[0, inputs.input_ids.shape[1] :]).removesuffix("<｜end▁of▁sentence｜>") == answer
