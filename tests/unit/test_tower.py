"""The vision tower's own training: labels lie where things are drawn, and a few steps lower the loss."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest
import torch
from transformers import get_scheduler

pytest.importorskip("font_roboto", reason="the fonts of the extra 'synthetic' are not installed")

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.synthetic import train
from deepseek_vl2.synthetic.nano import OFFSETS, nano_processor, new_nano
from deepseek_vl2.synthetic.samples import (
    HELD_OUT,
    new_scene,
    page_scene,
    training_sample,
    training_turns,
    words_scene,
)
from deepseek_vl2.synthetic.scene import TILE, Kind
from deepseek_vl2.synthetic.tower import (
    COLOUR_NAMES,
    IGNORED,
    NONE,
    SIGN,
    SYMBOLS,
    LabelledTiles,
    TileLabels,
    TilePool,
    check_seeds,
    collate_tiles,
    letter_centres,
    tile_labels,
    views_of,
)
from deepseek_vl2.synthetic.words import COLOURS, SHAPES


@pytest.fixture(scope="module")
def processor():
    return nano_processor()


def labels_of(scene):
    centres = [letter_centres(label) for label in scene.labels]
    return [tile_labels(scene, view, centres) for view in views_of((scene.width, scene.height))]


def test_views_are_the_processors_tiles(processor):
    for seed in range(30):
        for image in training_sample(seed).images:
            shown = processor.process_one(
                conversations=[{"role": "user", "content": "<image>", "images": [image]}], images=[image]
            )
            tiles = len(shown["images"])
            # a picture of one tile shows the global view twice
            assert len(views_of(image.size)) == (1 if shown["images_spatial_crop"].tolist() == [[1, 1]] else tiles)


def test_drawn_tiles_are_what_the_processor_makes(processor):
    samples = LabelledTiles(20, 700, processor)
    for index in range(20):
        tiles = samples[index]["tiles"]
        assert tiles.shape[1:] == (TILE, TILE, 3)
        assert len(tiles) == len(samples[index]["shapes"])


def test_a_thing_is_named_where_it_is_drawn(processor):
    rng = Random(5)
    for _ in range(20):
        scene = new_scene(rng)
        if "red" not in scene.visible_colours() or not scene.add_thing(Kind("square", "red", "large"), rng):
            continue
        whole = labels_of(scene)[0]
        named = whole.shapes == 1 + SHAPES.index("square")
        assert named.any()
        assert (whole.colours[named] == COLOUR_NAMES.index("red")).all()
        assert (whole.colours[~named] == IGNORED).all()
        x, y = (value / side for value, side in zip(scene.things[0].centre, (scene.width, scene.height), strict=True))
        left, top, right, bottom = whole.boxes[named][0]
        view = views_of((scene.width, scene.height))[0]
        middle = (view.scale_x * x * scene.width + view.left, view.scale_y * y * scene.height + view.top)
        assert (left + right) / 2 * TILE == pytest.approx(middle[0], abs=0.5)
        assert (top + bottom) / 2 * TILE == pytest.approx(middle[1], abs=0.5)


def test_every_letter_is_asked_for_once_in_the_tiles():
    for seed in range(12):
        scene = page_scene(Random(seed))
        views = labels_of(scene)
        tiles = views[1:] or views
        text = sorted("".join(label.text for label in scene.labels))
        shown = np.concatenate([tile.letters.ravel() for tile in tiles])
        read = sorted(SYMBOLS[symbol - 1] for symbol in shown if symbol > NONE)
        # the letters of two lines may share a token's place, narrow ones beyond the fifth are left out
        assert len(text) - len(read) <= 0.05 * len(text) + 1
        assert set(read) <= set(text)


def test_fine_print_is_not_asked_for_in_the_global_view():
    scene = next(s for s in map(words_scene, map(Random, range(100))) if any(label.fine for label in s.labels))
    assert (labels_of(scene)[0].letters == IGNORED).any()
    assert any((tile.letters > NONE).any() for tile in labels_of(scene)[1:])


def test_signs_have_the_colour_of_their_plate():
    scene = next(s for s in map(words_scene, map(Random, range(100))) if any(label.plate for label in s.labels))
    whole = labels_of(scene)[0]
    plates = {label.plate for label in scene.labels if label.plate}
    assert {COLOUR_NAMES[c] for c in whole.colours[whole.shapes == SIGN]} <= plates <= set(COLOURS)


def test_pool_keeps_the_newest():
    pool = TilePool(5, torch.device("cpu"))
    for start in (0, 3, 6):
        pool.add({"tiles": torch.arange(start, start + 3)})
    assert pool.filled == 3  # a batch that does not fit at the end starts anew at the front
    assert set(pool.sample(50)["tiles"].tolist()) == {6, 7, 8}


def test_heads_start_at_their_neighbours(processor):
    tower = new_nano(processor).vision
    tiles = torch.zeros(1, 3, TILE, TILE)  # positions are all that differs
    attention = tower.blocks[0].attn
    with torch.inference_mode():
        hidden = tower.blocks[0].norm1(tower._pos_embed(tower.patch_embed(tiles)))
        q, k, _ = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT)[0].view(attention.num_heads, 12, 12, 12, 12)
    for head in range(attention.num_heads):
        across, down = OFFSETS[head]
        found = divmod(int(scores[head, 6, 5].argmax()), 12)
        assert found == (6 + down, 5 + across)


def test_a_few_steps_lower_the_loss(tmp_path, monkeypatch, processor):
    monkeypatch.setattr(train, "nano_processor", lambda: processor)  # making it takes seconds
    monkeypatch.setattr(train, "LOGGING_STEPS", 4)
    monkeypatch.setattr(train, "PICTURES_A_STEP", 2)
    arguments = ["--part", "tower", "--steps", "8", "--batch_size", "2", "--workers", "0", "--warmup_steps", "1"]
    assert train.main(["--output", str(tmp_path), *arguments, "--schedule", "stable"]) == 0
    first, last = (json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"]
    assert set(TileLabels._fields) <= set(last)
    assert DeepseekVLV2ForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_the_recipe_goes_from_stage_to_stage(tmp_path, monkeypatch):
    stages = []
    monkeypatch.setattr(train, "train", stages.append)
    assert train.main(["--recipe", "--output", str(tmp_path), "--workers", "3"]) == 0
    tower, language, pointing, settling, finishing = stages
    assert (tower.part, tower.init, tower.workers) == ("tower", None, 3)
    assert (language.part, language.init, language.mixture) == ("all", str(tower.output), "second")
    assert (pointing.init, pointing.mixture, pointing.schedule) == (str(language.output), "third", "level")
    assert (settling.init, settling.loss_weighting) == (str(pointing.output), "sqrt")
    assert (finishing.init, finishing.mixture, finishing.schedule) == (str(settling.output), "fourth", "cosine")
    assert {stage.output.parent for stage in stages} == {tmp_path}


def test_the_level_schedule_stays_where_the_warm_up_ends(tmp_path):
    args = train.parse_args(["--output", str(tmp_path), "--schedule", "level"])
    name, options = train.schedule(args).values()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    course = get_scheduler(name, optimizer, 4, 20, options)
    rates = []
    for _ in range(20):
        rates.append(course.get_last_lr()[0])
        optimizer.step()
        course.step()
    assert rates == [0.0, 0.25, 0.5, 0.75] + 16 * [1.0]


def test_mistakes_are_told(tmp_path, capsys):
    with pytest.raises(ValueError, match="Training seeds"):
        check_seeds(HELD_OUT, 1)
    assert train.main(["--output", str(tmp_path), "--part", "tower", "--resume"]) == 1
    assert "nothing to resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--recipe", "--output", str(tmp_path), "--steps", "3"])
    assert "--steps" in capsys.readouterr().err


def test_the_third_mixture_tells_last():
    for seed in range(40):
        tasks = [turn.task for turn in training_turns(seed, "third")]
        if "describe" in tasks:
            assert tasks[-1] == "describe"
        if "locate" in tasks:
            assert not {"count", "colour", "exists"} & set(tasks[tasks.index("locate") :])


def test_batches_join_the_tiles_of_pictures(processor):
    samples = LabelledTiles(4, 0, processor)
    batch = collate_tiles([samples[0], samples[1]])
    assert len(batch["tiles"]) == len(samples[0]["tiles"]) + len(samples[1]["tiles"])
    with pytest.raises(IndexError):
        samples[4]
