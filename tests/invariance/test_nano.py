"""nano's real answers: judged, and the same whichever way they are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("font_roboto", reason="the fonts of the extra 'synthetic' are not installed")

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.synthetic.samples import Sample, held_out_samples
from deepseek_vl2.synthetic.suite import UNTILED, answer_batch, clean, run_task
from deepseek_vl2.utils.io import load_pretrained_model

TASKS = ("locate", "describe", "count", "attributes", "which_image")
# Scores on the first questions of each task, below those of 300 questions (the package's model card) by twice the
# standard deviation of a score of 24 questions: 0.2 at a half, 0.1 near the ends.
LEAST = {
    "describe": ("f1_with_names", 0.9),
    "read": ("exact", 0.89),
    "read_fine": ("exact", 0.84),
    "absent": ("correct", 0.9),
    "attributes": ("correct", 0.9),
    "locate": ("iou_50", 0.9),
    "locate_all": ("f1", 0.9),
    "count": ("exact", 0.88),
    "which_image": ("correct", 0.9),
}


@pytest.fixture(scope="module")
def nano() -> tuple[DeepseekVLV2Processor, DeepseekVLV2ForCausalLM]:
    _, processor, model = load_pretrained_model("nano", device="cpu", dtype=torch.float32)
    return processor, model


@pytest.fixture(scope="module")
def questions() -> list[Sample]:
    return [sample for task in TASKS for sample in held_out_samples(task, 1)]


@pytest.fixture(scope="module")
def ask(nano: Any, questions: list[Sample]) -> Callable[..., list[str]]:
    processor, model = nano

    def answers(samples: list[Sample] = questions, model: DeepseekVLV2ForCausalLM = model, **options: Any) -> list[str]:
        found = answer_batch(model, processor, samples, max_new_tokens=40, **options)
        return [clean(answer, processor) for answer in found]

    return answers


@pytest.fixture(scope="module")
def together(ask: Callable[..., list[str]]) -> list[str]:
    return ask()


def test_answers_end_by_themselves_and_fit_the_questions(questions: list[Sample], together: list[str]) -> None:
    for sample, answer in zip(questions, together, strict=True):
        task = sample.turns[0].task
        if task in ("locate", "describe"):
            assert "<|det|>[[" in answer or answer.startswith("There is no"), (task, answer)
        elif task == "count":
            assert answer.isdigit(), answer
        else:
            assert answer.endswith("."), answer


def test_alone_as_in_a_batch(ask: Callable[..., list[str]], questions: list[Sample], together: list[str]) -> None:
    assert [ask([sample])[0] for sample in questions] == together


def test_in_chunks_as_whole(ask: Callable[..., list[str]], together: list[str]) -> None:
    assert ask(prefill_chunk_size=64) == together


def test_static_cache_as_dynamic(ask: Callable[..., list[str]], together: list[str]) -> None:
    assert ask(cache_implementation="static", disable_compile=True) == together


def test_bfloat16_answers_as_float32_nearly_always(ask: Callable[..., list[str]], together: list[str]) -> None:
    _, _, rounded = load_pretrained_model("nano", device="cpu", dtype=torch.bfloat16)
    same = sum(a == b for a, b in zip(ask(model=rounded), together, strict=True))
    # The last digit of a coordinate is often a near tie, which rounding to 8 bits may decide otherwise.
    assert same >= len(together) // 2


@pytest.mark.slow
@pytest.mark.parametrize("task", LEAST)
def test_scores_stay_where_the_model_card_has_them(nano: Any, task: str) -> None:
    processor, model = nano
    name, least = LEAST[task]
    assert run_task(model, processor, task, 24, batch_size=12).means[name] >= least


def test_without_tiles_the_answer_is_another(nano: Any) -> None:
    processor, model = nano
    (sample,) = held_out_samples("read_fine", 1)
    kept = processor.process_one(conversations=sample.conversation()[:1], images=sample.images)
    whole = processor.process_one(conversations=sample.conversation()[:1], images=sample.images, cropping=False)
    assert len(whole["input_ids"]) < len(kept["input_ids"])
    (judged,) = run_task(model, processor, next(iter(UNTILED)), 1, max_new_tokens=4).judged
    assert set(judged.scores) == {"exact"}
