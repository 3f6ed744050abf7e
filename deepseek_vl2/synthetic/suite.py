"""Judge answers to the held-out questions, and ask a model all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.utils.grounding import parse_grounding

from .questions import Turn
from .samples import Sample, held_out_samples
from .tasks import UNTILED

FBox = Sequence[float]
Scores = dict[str, float]

# What the packaged model is to reach: the least mean of each score, over held-out questions.
TARGETS: dict[str, Scores] = {
    "locate": {"iou_50": 0.95, "iou_75": 0.80},
    "locate_all": {"f1": 0.90},
    "absent": {"correct": 0.90},
    "describe": {"f1": 0.85},
    "read": {"exact": 0.95},
    "read_fine": {"exact": 0.90},
    "count": {"exact": 0.95},
    "attributes": {"correct": 0.97},
    "which_image": {"correct": 0.95},
}
MAX_NEW_TOKENS = {"describe": 192, "locate_all": 160}


@dataclass
class Judged:
    """One question with the model's answer and its scores, 0 to 1."""

    sample: Sample
    answer: str
    scores: Scores


@dataclass
class TaskResult:
    """All questions of one task."""

    task: str
    judged: list[Judged] = field(default_factory=list)

    @property
    def means(self) -> Scores:
        """Mean of each score."""
        names = self.judged[0].scores if self.judged else {}
        return {name: fmean(item.scores[name] for item in self.judged) for name in names}

    @property
    def missed(self) -> list[str]:
        """Names of the scores below their targets."""
        targets = TARGETS.get(self.task, {})
        return [name for name, value in self.means.items() if value < targets.get(name, 0.0)]


# ---------------------------------------------------------------- judging one answer


def iou(a: FBox, b: FBox) -> float:
    """Return the area that two boxes share over the area that they cover."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, across) * max(0.0, down)
    covered = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / covered if covered > 0 else 0.0


def matched(found: Sequence[FBox], true: Sequence[FBox], least: float = 0.5) -> int:
    """Return how many found boxes pair up with true ones, each used once, best overlaps first."""
    pairs = sorted(((iou(f, t), i, j) for i, f in enumerate(found) for j, t in enumerate(true)), reverse=True)
    used_found: set[int] = set()
    used_true: set[int] = set()
    for overlap, i, j in pairs:
        if overlap >= least and i not in used_found and j not in used_true:
            used_found.add(i)
            used_true.add(j)
    return len(used_found)


def f1(found: Sequence[FBox], true: Sequence[FBox]) -> float:
    """Return the harmonic mean of precision and recall of boxes, at an IoU of 0.5."""
    if not found and not true:
        return 1.0
    return 2 * matched(found, true) / (len(found) + len(true))


def found_boxes(answer: str) -> list[FBox]:
    """Return all boxes of an answer, 0 to 999."""
    return [box for found in parse_grounding(answer) for box in found.boxes]


def plain_words(text: str) -> str:
    """Return a text in lower case without punctuation at its ends."""
    return re.sub(r"\s+", " ", text).strip(" .!\"'").lower()


def says(answer: str, truth: str) -> bool:
    """Whether an answer is the true one, or a sentence that contains its words; "a circle" is said by "circle"."""
    said, true = plain_words(answer), plain_words(truth)
    key = re.sub(r"^(an?|the|at the|in the) ", "", true)
    return re.search(rf"\b{re.escape(key)}\b", said) is not None and len(said) <= 8 * max(8, len(true))


def _judge_locate(answer: str, turn: Turn) -> Scores:
    found, true = found_boxes(answer), turn.truth["boxes"][0]
    overlap = iou(found[0], true) if len(found) == 1 else 0.0
    return {"iou_50": float(overlap >= 0.5), "iou_75": float(overlap >= 0.75)}


def _judge_boxes(answer: str, turn: Turn) -> Scores:
    return {"f1": f1(found_boxes(answer), turn.truth["boxes"])}


def _judge_describe(answer: str, turn: Turn) -> Scores:
    named = [(found.label, box) for found in parse_grounding(answer) for box in found.boxes]
    true = list(zip(turn.truth["labels"], turn.truth["boxes"], strict=True))
    right = sum(
        matched([box for name, box in named if name == label], [box for name, box in true if name == label])
        for label in {label for label, _ in true}
    )
    with_names = 2 * right / (len(named) + len(true)) if named or true else 1.0
    return {"f1": f1([box for _, box in named], turn.truth["boxes"]), "f1_with_names": with_names}


def _judge_absent(answer: str, turn: Turn) -> Scores:
    denies = re.search(r"\b(no|not|none|cannot|can't|isn't)\b", answer.lower()) is not None
    return {"correct": float(denies and not found_boxes(answer))}


def _judge_exact(answer: str, turn: Turn) -> Scores:
    return {"exact": float(answer.strip() == turn.answer)}


def _judge_count(answer: str, turn: Turn) -> Scores:
    numbers = re.findall(r"\d+", answer)
    return {"exact": float(numbers[:1] == [turn.answer])}


def _judge_saying(answer: str, turn: Turn) -> Scores:
    return {"correct": float(says(answer, turn.answer))}


JUDGES: dict[str, Callable[[str, Turn], Scores]] = {
    "locate": _judge_locate,
    "locate_all": _judge_boxes,
    "absent": _judge_absent,
    "describe": _judge_describe,
    "read": _judge_exact,
    "read_fine": _judge_exact,
    "count": _judge_count,
    "attributes": _judge_saying,
    "which_image": _judge_saying,
}


def judge(task: str, sample: Sample, answer: str) -> Judged:
    """Return an answer with its scores.

    Raises:
        ValueError: an unknown task.
    """
    name = UNTILED.get(task, task)
    if name not in JUDGES:
        raise ValueError(f"Unknown task {task!r}: expected one of {', '.join(JUDGES)}.")
    return Judged(sample, answer, JUDGES[name](answer, sample.turns[0]))


# ---------------------------------------------------------------- asking a model


def _batches(samples: Iterable[Sample], size: int) -> Iterable[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def answer_batch(
    model: DeepseekVLV2ForCausalLM,
    processor: DeepseekVLV2Processor,
    samples: Sequence[Sample],
    cropping: bool | None = None,
    **generate: Any,
) -> list[str]:
    """Return a model's greedy answers to the first questions of some samples, asked in one batch.

    Args:
        model: in evaluation mode.
        processor: its processor.
        samples: pictures and questions.
        cropping: cut the pictures into tiles; by default as the processor decides.
        **generate: more arguments of ``generate``, such as ``max_new_tokens`` or ``prefill_chunk_size``.
    """
    prepared = []
    for sample in samples:
        messages = sample.conversation()[:1]
        prepared.append(processor.process_one(conversations=messages, images=sample.images, cropping=cropping))
    inputs = processor.batchify(prepared).to(model.device)
    with torch.inference_mode():
        outputs = model.generate(**inputs, do_sample=False, **generate)
    new = outputs[:, inputs["input_ids"].shape[1] :]
    return [processor.tokenizer.decode(row, skip_special_tokens=False) for row in new.tolist()]


def clean(answer: str, processor: DeepseekVLV2Processor) -> str:
    """Return an answer up to its end token, with the grounding tags kept."""
    tokenizer = processor.tokenizer
    answer = answer.split(tokenizer.eos_token)[0]
    return answer.replace(tokenizer.pad_token or "", "") if tokenizer.pad_token else answer


def run_samples(
    model: DeepseekVLV2ForCausalLM,
    processor: DeepseekVLV2Processor,
    task: str,
    samples: Iterable[Sample],
    batch_size: int = 16,
    judged_by: Callable[[str, Sample, str], Judged] = judge,
    **options: Any,
) -> TaskResult:
    """Ask a model the first questions of some samples; ``options`` are `answer_batch`'s."""
    result = TaskResult(task)
    for batch in _batches(samples, batch_size):
        answers = answer_batch(model, processor, batch, **options)
        result.judged += [judged_by(task, s, clean(a, processor)) for s, a in zip(batch, answers, strict=True)]
    return result


def run_task(
    model: DeepseekVLV2ForCausalLM,
    processor: DeepseekVLV2Processor,
    task: str,
    number: int,
    batch_size: int = 16,
    **generate: Any,
) -> TaskResult:
    """Ask a model the first ``number`` held-out questions of a task, or of one in `UNTILED`.

    Raises:
        ValueError: an unknown task.
    """
    source, cropping = UNTILED.get(task, task), False if task in UNTILED else None
    options = {"max_new_tokens": MAX_NEW_TOKENS.get(task, 48), "cropping": cropping, **generate}
    return run_samples(model, processor, task, held_out_samples(source, number), batch_size, **options)


# ---------------------------------------------------------------- reports


def table(results: Sequence[TaskResult]) -> str:
    """Return the results as a Markdown table."""
    rows = ["| task | questions | score | reached | target |", "|---|---|---|---|---|"]
    for result in results:
        for name, value in result.means.items():
            target = TARGETS.get(result.task, {}).get(name)
            wanted = "" if target is None else f"{100 * target:.0f} %" + ("" if value >= target else " (missed)")
            rows.append(f"| {result.task} | {len(result.judged)} | {name} | {100 * value:.1f} % | {wanted} |")
    return "\n".join(rows) + "\n"


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Return pictures in one row."""
    gap = 6
    field = Image.new("RGB", (sum(i.width + gap for i in images) - gap, max(i.height for i in images)), "white")
    x = 0
    for image in images:
        field.paste(image, (x, 0))
        x += image.width + gap
    return field
