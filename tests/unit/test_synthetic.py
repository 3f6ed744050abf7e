"""The synthetic pictures: what is drawn is what is asked about, and answers are judged as they should be."""

from random import Random

import numpy as np
import pytest

pytest.importorskip("font_roboto", reason="the fonts of the extra 'synthetic' are not installed")

from deepseek_vl2.synthetic import samples, suite
from deepseek_vl2.synthetic.curves import main as draw_log
from deepseek_vl2.synthetic.drawing import draw_scene
from deepseek_vl2.synthetic.evaluate import main as evaluate
from deepseek_vl2.synthetic.nano import nano_config, nano_processor
from deepseek_vl2.synthetic.questions import Turn, count, fits, locate_all, missing_description
from deepseek_vl2.synthetic.scene import Background, Kind, Scene
from deepseek_vl2.synthetic.shapes import outline
from deepseek_vl2.synthetic.sheet import picture_sheet
from deepseek_vl2.synthetic.words import PLURALS, printed_text


@pytest.fixture(scope="module")
def processor():
    return nano_processor()


def plain_scene(shape: str, rng: Random) -> Scene:
    scene = Scene(200, 160, Background("plain", (128, 128, 128), (128, 128, 128), 0.1, True))
    assert scene.add_thing(Kind(shape, "white", "large"), rng)
    return scene


@pytest.mark.parametrize("shape", PLURALS)
def test_boxes_are_tight_around_what_is_drawn(shape):
    for seed in range(4):
        scene = plain_scene(shape, Random(seed))
        pixels = np.asarray(draw_scene(scene, Random(seed)), dtype=float).mean(axis=2)
        # Grain stays within 10 of the background's 128; white lies far above it.
        rows, columns = np.nonzero(pixels > 180)
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        # A pointed tip's last pixel is mostly background: 2.5 pixels of 200.
        assert np.abs(np.array(scene.things[0].box) - seen).max() < 2.5


def test_unknown_shape_is_named():
    with pytest.raises(ValueError, match="'blob'"):
        outline("blob")


@pytest.mark.parametrize("mixture", samples.MIXTURES)
def test_a_seed_gives_the_same_sample_and_another_seed_another(mixture):
    first, again, other = (samples.training_sample(seed, mixture) for seed in (7, 7, 8))
    assert first.turns == again.turns == samples.training_turns(7, mixture) and first.turns != other.turns
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in again.images]


def test_held_out_seeds_are_beyond_the_training_set():
    pictures = samples.SyntheticConversations(10, first=samples.HELD_OUT - 10)
    assert pictures[9]["conversation"]
    with pytest.raises(ValueError, match="Training seeds"):
        samples.SyntheticConversations(11, first=samples.HELD_OUT - 10)
    with pytest.raises(IndexError):
        pictures[10]
    with pytest.raises(ValueError, match="mixture"):
        samples.SyntheticConversations(1, mixture="tenth")


@pytest.mark.parametrize("task", samples.TASKS)
def test_true_answers_score_one_and_those_of_another_picture_do_not(task):
    asked = list(samples.held_out_samples(task, 12))
    for sample in asked:
        assert set(suite.judge(task, sample, sample.turns[0].answer).scores.values()) == {1.0}
        assert set(suite.judge(task, sample, "I don't know.").scores.values()) == {0.0}
    swapped = [suite.judge(task, a, b.turns[0].answer) for a, b in zip(asked, asked[1:] + asked[:1], strict=True)]
    if task == "absent":  # the next question's denial is as good a denial
        return
    assert sum(min(item.scores.values()) for item in swapped) < len(swapped)


def test_unknown_task_is_named():
    sample = samples.held_out_sample("read", 0)
    with pytest.raises(ValueError, match="'reed'"):
        suite.judge("reed", sample, "")
    with pytest.raises(ValueError, match="'reed'"):
        samples.held_out_sample("reed", 0)


def test_questions_agree_with_the_scene():
    rng = Random(1)
    for _ in range(40):
        scene = samples.crowd_scene(rng)
        turn = count(scene, rng)
        assert turn is None or 0 <= int(turn.answer) <= 9
        several = locate_all(scene, rng)
        if several is not None:
            everything = [scene.normalised(thing.box) for thing in scene.things]
            assert all(box in everything for box in several.truth["boxes"])
            assert several.truth["boxes"] == sorted(several.truth["boxes"])


def test_absent_things_are_absent():
    rng = Random(2)
    for _ in range(40):
        scene = samples.mixed_scene(rng)
        parts = missing_description(scene, rng)
        assert not any(fits(thing.kind, parts) for thing in scene.things)


def test_fine_print_is_legible_in_the_tiles_and_not_in_the_global_view():
    heights = []
    for index in range(20):
        scene = samples.TASKS["read_fine"][0](Random(index))
        for label in scene.labels:
            in_tiles = label.em * scene.tile_scale
            in_global = label.em * 96 / max(scene.width, scene.height)
            heights.append((in_tiles, in_global))
    # Rounding to whole pixels of the font moves an em by up to half a pixel of the picture, 0.67 of the tiles.
    assert min(h for h, _ in heights) > 9.8
    assert all(in_global < 0.7 * in_tiles for in_tiles, in_global in heights)


def test_printed_texts_keep_to_twelve_characters():
    rng = Random(3)
    texts = [printed_text(rng) for _ in range(2000)]
    assert max(map(len, texts)) <= 12 and min(map(len, texts)) >= 1
    assert all(text == text.strip() for text in texts)


def test_tokenizer_spells_out_and_returns_every_answer(processor):
    tokenizer = processor.tokenizer
    for seed in range(40):
        for turn in samples.training_turns(seed, "second"):
            for text in (turn.question, turn.answer):
                assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer.tokenize(" circle")) == 1
    assert tokenizer.tokenize("412") == ["4", "1", "2"]


def test_nano_is_the_hardest_of_the_family_in_small(processor):
    config = nano_config(processor)
    language = config.language_config
    assert language.use_mla and language.topk_method == "noaux_tc" and language.scoring_func == "sigmoid"
    assert language.n_routed_experts > language.num_experts_per_tok and language.n_shared_experts
    assert config.vision_config.image_size == 96 == processor.image_size
    assert language.vocab_size >= len(processor.tokenizer)


def test_iou_and_matching():
    assert suite.iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert suite.iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert suite.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert suite.iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0
    # One found box cannot stand for two true ones.
    assert suite.f1([(0, 0, 10, 10)], [(0, 0, 10, 10), (0, 0, 10, 9)]) == pytest.approx(2 / 3)
    assert suite.f1([], []) == 1


def test_saying_needs_the_right_word():
    assert suite.says("It is a red circle.", "A circle.")
    assert suite.says("red", "Red.")
    assert not suite.says("A semicircle.", "A circle.")
    assert not suite.says("word " * 40 + "circle", "A circle.")


def test_judged_answers_make_a_table_and_a_sheet():
    results = []
    for task in ("locate", "which_image", "count"):
        sample = samples.held_out_sample(task, 0)
        results.append(suite.TaskResult(task, [suite.judge(task, sample, sample.turns[0].answer)]))
    results.append(suite.TaskResult("read", [suite.judge("read", samples.held_out_sample("read", 0), "no idea")]))
    table = suite.table(results)
    assert "| locate | 1 | iou_50 | 100.0 % | 95 % |" in table and "95 % (missed)" in table
    assert results[-1].missed == ["exact"] and not results[0].missed
    assert picture_sheet(results).size[0] > 300


def test_judged_turn_without_truth_boxes_is_not_drawn():
    sample = samples.Sample(samples.held_out_sample("read", 0).images, [Turn("read", "q", "a", {})])
    picture_sheet([suite.TaskResult("read", [suite.judge("read", sample, "")])])


def test_evaluate_tells_mistakes_in_a_line(capsys, tmp_path):
    assert evaluate(["--model", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("evaluate: error: ")
    with pytest.raises(SystemExit) as refused:
        evaluate(["--number", "0"])
    assert refused.value.code == 2


def test_curves_of_a_log(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "loss": 4.0, "load_max": 2.0}\n{"step": 2, "loss": 0.5}\n{"step": 2, "train_loss": 1}\n'
    )
    assert draw_log([str(log), "--output", str(tmp_path / "c.svg")]) == 0
    drawn = (tmp_path / "c.svg").read_text()
    assert drawn.count("<polyline") == 2 and "busiest expert" in drawn and "0 to 2" in drawn
    log.write_text("not JSON\n")
    assert draw_log([str(log), "--output", str(tmp_path / "c.svg")]) == 1
    assert "line 1" in capsys.readouterr().err
