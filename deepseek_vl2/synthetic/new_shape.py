"""Teach a model a shape that it never saw, by low-rank adapters, and measure what it knows before and after.

Examples:
    python -m deepseek_vl2.synthetic.new_shape --output runs/heart
    python -m deepseek_vl2.synthetic.new_shape --output runs/heart --steps 1000 --batch_size 16 --questions 200

nano was trained on ten shapes; hearts are drawn here alone. Of the training pictures 40 % show hearts among known
shapes, 30 % known shapes alone, asked about these and for hearts, and 30 % are those that nano was trained on, so that
nothing is forgotten. OUTPUT then holds the model, adapters merged, in the released layout; `table.md` with the scores
before and after; `sheet.png` with answers about hearts.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.training.collator import ConversationCollator
from deepseek_vl2.training.lora import PARTS, add_lora, merge_lora
from deepseek_vl2.training.trainer import VLTrainer, VLTrainingArguments, save_released
from deepseek_vl2.utils.grounding import parse_grounding
from deepseek_vl2.utils.io import load_pretrained_model, resolve_model_path

from .drawing import draw_scene
from .questions import (
    COUNT_FORMS,
    LOCATE_FORMS,
    WEIGHTS,
    Builder,
    Parts,
    Turn,
    article,
    count,
    describe,
    exists,
    locate,
    read,
    read_fine,
    shape_of,
    words_of,
)
from .samples import HELD_OUT, MIXTURES, Sample, ask, fill_with_things, new_scene, training_sample
from .scene import Kind, Scene
from .sheet import picture_sheet
from .suite import JUDGES, MAX_NEW_TOKENS, Judged, Scores, TaskResult, f1, run_samples, run_task
from .words import UNSEEN_SHAPE

SHOWN, MISSED = 0.4, 0.3  # of the training pictures: with the new shape, and without it but asked for
MOST_NEW, MOST_OTHERS = 2, 5
NEW_TURNS = (4, 6)
MAX_LENGTH = 384  # tokens; longer conversations lose their end
FIRST_SEED = 1 << 38  # of training pictures; below the held-out ones, beyond what nano's own training draws
FIRST_QUESTION = HELD_OUT + (1 << 36)
# Of what is drawn here nothing is printed, so nothing can be read.
ASKED: dict[Builder, float] = {builder: w for builder, w in WEIGHTS.items() if builder not in (read, read_fine)}
# What the model knew before, from the suite.
KNOWN = ("locate", "locate_all", "absent", "describe", "count", "attributes", "read", "which_image")


# ---------------------------------------------------------------- pictures and questions


def scene_with_new(rng: Random) -> Scene:
    """Return a scene of one or two things of the new shape and up to five of known ones."""
    scene = new_scene(rng, "small" if rng.random() < 0.1 else "any")
    colours = scene.visible_colours()
    for _ in range(rng.randint(1, MOST_NEW)):
        scene.add_thing(Kind(UNSEEN_SHAPE, rng.choice(colours), "large" if rng.random() < 0.4 else "small"), rng)
    fill_with_things(scene, rng.randint(0, MOST_OTHERS), rng)
    return scene


def scene_without(rng: Random) -> Scene:
    """Return a scene of known shapes."""
    scene = new_scene(rng)
    fill_with_things(scene, rng.randint(1, MOST_OTHERS + 1), rng)
    return scene


def deny(scene: Scene, rng: Random) -> Turn | None:
    """Ask a scene without the new shape where it is, how often, or whether."""
    colour = rng.choice(scene.things).kind.colour if scene.things and rng.random() < 0.5 else None
    parts: Parts = (None, colour, UNSEEN_SHAPE)
    kind = rng.random()
    if kind < 0.2:
        return Turn("count", rng.choice(COUNT_FORMS).format(words_of(parts, plural=True)), "0", {})
    if kind < 0.5:
        return Turn("exists", f"Is there {article(words_of(parts))} in the image?", "No.", {})
    return deny_place(scene, rng, parts)


def deny_place(scene: Scene, rng: Random, parts: Parts = (None, None, UNSEEN_SHAPE)) -> Turn | None:
    """Ask a scene without the new shape where it is."""
    noun = words_of(parts)
    question = rng.choice(LOCATE_FORMS).format(f"the {noun}")
    return Turn("absent", question, f"There is no {noun} in the image.", {"boxes": []})


def new_shape_sample(seed: int, mixture: str) -> Sample:
    """Return the training sample of a seed; what shows known shapes alone is from one of `MIXTURES`."""
    rng = Random(seed)
    kind = rng.random()
    if kind >= SHOWN + MISSED:
        return training_sample(seed, mixture)
    while True:
        scene = scene_with_new(rng) if kind < SHOWN else scene_without(rng)
        turns = ask(ASKED, scene, rng.randint(*NEW_TURNS), rng)
        if kind >= SHOWN:
            turns[1::3] = [turn for turn in (deny(scene, rng) for _ in turns[1::3]) if turn is not None]
        if turns:
            return Sample([draw_scene(scene, rng)], turns)


class NewShapeConversations(Dataset):
    """Training samples, drawn when they are asked for; items as `SyntheticConversations`'s."""

    def __init__(self, length: int, mixture: str) -> None:
        self.length, self.mixture = length, mixture

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        sample = new_shape_sample(FIRST_SEED + index, self.mixture)
        return {"conversation": sample.conversation(), "images": sample.images}


class Question(NamedTuple):
    """A kind of held-out question about the new shape."""

    scene: Callable[[Random], Scene]
    builder: Builder
    judge: Callable[[str, Turn], Scores]
    most_tokens: int = 48


def judge_new_names(answer: str, turn: Turn) -> Scores:
    """Score a description by the boxes that it calls the new shape."""
    truth = zip(turn.truth["labels"], turn.truth["boxes"], strict=True)
    true = [box for label, box in truth if UNSEEN_SHAPE in label]
    found = [box for item in parse_grounding(answer) if UNSEEN_SHAPE in item.label for box in item.boxes]
    return {"f1": f1(found, true)}


QUESTIONS: dict[str, Question] = {
    "locate": Question(scene_with_new, locate, JUDGES["locate"]),
    "shape": Question(scene_with_new, shape_of, JUDGES["attributes"]),
    "describe": Question(scene_with_new, describe, judge_new_names, MAX_NEW_TOKENS["describe"]),
    "count": Question(scene_with_new, count, JUDGES["count"]),
    "exists": Question(scene_with_new, exists, JUDGES["attributes"]),
    "absent": Question(scene_without, deny_place, JUDGES["absent"]),
}


def held_out_questions(task: str, number: int) -> Iterator[Sample]:
    """Return the first ``number`` questions of one of `QUESTIONS`, about pictures that no training seed drew."""
    question = QUESTIONS[task]
    for index in range(number):
        rng = Random(FIRST_QUESTION + 1_000_003 * list(QUESTIONS).index(task) + index)
        while True:
            scene = question.scene(rng)
            turn = question.builder(scene, rng)
            if turn is not None and UNSEEN_SHAPE in turn.question + turn.answer:
                yield Sample([draw_scene(scene, rng)], [turn])
                break


# ---------------------------------------------------------------- measuring


class Knowledge(NamedTuple):
    """Results of the questions about the new shape, and of the suite's tasks."""

    new: list[TaskResult]
    known: list[TaskResult]

    def scores(self) -> dict[str, float]:
        """Return all mean scores, by "new" or "known", task and score."""
        named = [("new", result) for result in self.new] + [("known", result) for result in self.known]
        return {f"{kind} {r.task} {name}": value for kind, r in named for name, value in r.means.items()}

    def mean(self, kind: str) -> float:
        """Return the mean of the scores of "new" or "known" tasks."""
        values = [value for name, value in self.scores().items() if name.startswith(kind)]
        return sum(values) / len(values)


def measure(model: DeepseekVLV2ForCausalLM, processor: DeepseekVLV2Processor, number: int, rows: int) -> Knowledge:
    """Ask a model ``number`` questions of each kind, ``rows`` at a time."""
    new = []
    for task, question in QUESTIONS.items():

        def judge(task: str, sample: Sample, answer: str, question: Question = question) -> Judged:
            return Judged(sample, answer, question.judge(answer, sample.turns[0]))

        samples, most = held_out_questions(task, number), question.most_tokens
        new.append(run_samples(model, processor, task, samples, rows, judge, max_new_tokens=most))
    return Knowledge(new, [run_task(model, processor, task, number, rows) for task in KNOWN])


def comparison(before: Knowledge, after: Knowledge) -> str:
    """Return the scores before and after as a Markdown table."""
    lines = ["| about | task | score | questions | before | after |", "|---|---|---|---|---|---|"]
    for about, olds, news in ((f"{UNSEEN_SHAPE}s", before.new, after.new), ("the rest", before.known, after.known)):
        for old, new in zip(olds, news, strict=True):
            for name, value in old.means.items():
                cells = f"{len(old.judged)} | {100 * value:.1f} % | {100 * new.means[name]:.1f} %"
                lines.append(f"| {about} | {old.task} | {name} | {cells} |")
    for about, kind in ((f"{UNSEEN_SHAPE}s", "new"), ("the rest", "known")):
        lines.append(f"| {about} | mean | | | {100 * before.mean(kind):.1f} % | {100 * after.mean(kind):.1f} % |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the command


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(prog="new_shape", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for the model, the table and the sheet")
    parser.add_argument("--model", default="nano", help="nano, or a checkpoint of its kind (default: nano)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures a step (default: 8)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="highest learning rate (default: 0.001)")
    parser.add_argument("--lora_rank", type=int, default=16, help="rank of the adapters (default: 16)")
    parser.add_argument(
        "--lora_parts", nargs="+", choices=PARTS, default=list(PARTS), help="what gets adapters (default: everything)"
    )
    parser.add_argument("--mixture", choices=MIXTURES, default="second", help="of known pictures (default: second)")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions of each task (default: 100)")
    parser.add_argument("--rows", type=int, default=16, help="questions answered at once (default: 16)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters and the order (default: 0)")
    parser.add_argument("--device", help="cuda or cpu; default: the best there is")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "questions", "rows", "lora_rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, not {getattr(args, name)}")
    return args


def train(args: Namespace) -> None:
    """Train adapters, merge them and save the model."""
    source = resolve_model_path(args.model)
    processor = DeepseekVLV2Processor.from_pretrained(source)
    torch.manual_seed(args.seed)
    model = DeepseekVLV2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapted = add_lora(model, rank=args.lora_rank, parts=tuple(args.lora_parts))
    settings = VLTrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=min(20, args.steps // 4),
        lr_scheduler_type="cosine",
        vision_lr_factor=1.0,
        weight_decay=0.0,
        routing_bias_rate=0.0,
        use_cpu=args.device == "cpu",
        bf16=args.device != "cpu" and torch.cuda.is_available(),
        dataloader_num_workers=args.workers,
        dataloader_pin_memory=False,
        logging_steps=20,
        disable_tqdm=not sys.stderr.isatty(),
        save_strategy="no",
        seed=args.seed,
        report_to="none",
    )
    collator = ConversationCollator(processor, max_length=MAX_LENGTH, overlong="cut")
    pictures = NewShapeConversations(args.steps * args.batch_size, args.mixture)
    VLTrainer(adapted, settings, collator, processing_class=processor, train_dataset=pictures).train()
    save_released(merge_lora(adapted), processor, args.output, "bfloat16")


def run(args: Namespace) -> tuple[Knowledge, Knowledge]:
    """Measure, train, measure what was saved; returns what the model knew before and after."""
    start = time.perf_counter()
    found: list[Knowledge] = []
    for source in (args.model, str(args.output)):
        if found:
            train(args)
            sys.stderr.write(f"trained ({time.perf_counter() - start:.0f} s)\n")
        _, processor, model = load_pretrained_model(source, device=args.device, dtype=torch.float32)
        found.append(measure(model, processor, args.questions, args.rows))
        sys.stderr.write(f"measured {source} ({time.perf_counter() - start:.0f} s)\n")
    before, after = found
    (args.output / "table.md").write_text(comparison(before, after), encoding="utf-8")
    picture_sheet(after.new).save(args.output / "sheet.png", optimize=True)
    sys.stdout.write(f"\n{comparison(before, after)}\nWritten: the model, table.md and sheet.png in {args.output}\n")
    return before, after


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 for a user's mistake."""
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
