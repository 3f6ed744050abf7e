"""Adapters teach nano a shape that it never saw, and it still knows the rest."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

pytest.importorskip("font_roboto", reason="the fonts of the extra 'synthetic' are not installed")
pytest.importorskip("peft", reason="the extra 'train' is not installed")

from deepseek_vl2.synthetic import new_shape
from deepseek_vl2.synthetic.samples import TASKS, held_out_samples
from deepseek_vl2.synthetic.words import UNSEEN_SHAPE


def test_what_nano_is_trained_and_judged_by_knows_no_hearts() -> None:
    for task in TASKS:
        for sample in held_out_samples(task, 5):
            assert UNSEEN_SHAPE not in sample.turns[0].question + sample.turns[0].answer


def test_most_training_pictures_are_asked_about_hearts() -> None:
    texts = []
    for seed in range(new_shape.FIRST_SEED, new_shape.FIRST_SEED + 60):
        turns = new_shape.new_shape_sample(seed, "first").turns
        texts.append(" ".join(turn.question + turn.answer for turn in turns))
    assert 30 <= sum(UNSEEN_SHAPE in text for text in texts) <= 55


@pytest.mark.parametrize("task", new_shape.QUESTIONS)
def test_true_answers_about_hearts_score_one(task: str) -> None:
    question = new_shape.QUESTIONS[task]
    for sample in new_shape.held_out_questions(task, 6):
        turn = sample.turns[0]
        assert UNSEEN_SHAPE in turn.question + turn.answer
        assert set(question.judge(turn.answer, turn).values()) == {1.0}
        assert set(question.judge("I don't know.", turn).values()) == {0.0}


def test_denied_hearts_are_not_there() -> None:
    rng = Random(4)
    for _ in range(20):
        scene = new_shape.scene_without(rng)
        turn = new_shape.deny(scene, rng)
        assert turn is not None and (turn.answer in ("0", "No.") or turn.answer.startswith("There is no "))
        assert all(thing.kind.shape != UNSEEN_SHAPE for thing in scene.things)


def command(output: Path, *options: str) -> list[str]:
    return ["--output", str(output), "--device", "cpu", "--workers", "0", *options]


def test_a_mistake_ends_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new_shape.main(command(tmp_path / "out", "--model", str(tmp_path / "nothing"))) == 1
    assert capsys.readouterr().err.startswith("Error: ")
    with pytest.raises(SystemExit):
        new_shape.parse_args(command(tmp_path, "--steps", "0"))


@pytest.mark.slow
def test_nano_learns_hearts_and_keeps_the_rest(tmp_path: Path) -> None:
    """Ten minutes on two cores. Scores are means over tasks, of 24 questions each, before and after."""
    options = ["--steps", "160", "--questions", "24", "--workers", "1"]
    before, after = new_shape.run(new_shape.parse_args(command(tmp_path / "out", *options)))
    assert after.mean("new") >= before.mean("new") + 0.2
    assert after.scores()["new shape correct"] >= before.scores()["new shape correct"] + 0.4
    # A mean of ten scores, of 24 questions each, varies by 0.03 by itself.
    assert after.mean("known") >= 0.85 * before.mean("known")
    assert (tmp_path / "out" / "table.md").read_text().count("hearts") == 8
    assert (tmp_path / "out" / "sheet.png").is_file() and (tmp_path / "out" / "model.safetensors").is_file()
