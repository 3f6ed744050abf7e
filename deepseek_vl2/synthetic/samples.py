"""Pictures with conversations about them, drawn from seeds: an endless training set, and held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from deepseek_vl2.models.tiling import MAX_TILED_IMAGES

from .drawing import draw_scene
from .questions import (
    FOURTH_WEIGHTS,
    SECOND_WEIGHTS,
    THIRD_WEIGHTS,
    WEIGHTS,
    Builder,
    Turn,
    absent,
    colour_of,
    count,
    describe,
    exists,
    locate,
    locate_all,
    position_of,
    read,
    read_fine,
    relation,
    shape_of,
    size_of,
    which_image,
)
from .scene import TILE, Kind, PictureSize, Scene, random_background, random_kind, random_size
from .words import SHAPES, printed_code, printed_text

# Seeds from here on are never trained on.
HELD_OUT = 1 << 40

# Height of an em in the tiles, in pixels. Fine print is half as high in the global view: no one can read it there.
EM = (15.0, 30.0)
FINE_EM = (10.5, 13.0)
FINE_LENGTH = (3, 7)
SMALL_PICTURE_EM = (15.0, 22.0)
PAGE_EM = (10.5, 22.0)

MOST_THINGS = 7
MOST_CROWD = 12


class Sample(NamedTuple):
    """Pictures, and questions about them with their answers."""

    images: list[Image.Image]
    turns: list[Turn]

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages of the whole conversation, as the processor takes them."""
        messages: list[dict[str, Any]] = []
        for index, turn in enumerate(self.turns):
            tags = "<image>\n" * len(self.images) if index == 0 else ""
            messages.append({"role": "<|User|>", "content": tags + turn.question})
            messages.append({"role": "<|Assistant|>", "content": turn.answer})
        messages[0]["images"] = self.images
        return messages


# ---------------------------------------------------------------- scenes


def new_scene(rng: Random, size: PictureSize = "any") -> Scene:
    """Return an empty scene of random size and background."""
    width, height = random_size(rng, size)
    return Scene(width, height, random_background(rng))


def fill_with_things(scene: Scene, number: int, rng: Random, shapes: Sequence[str] = SHAPES) -> None:
    """Place up to ``number`` things; colours and shapes repeat often enough for questions of several."""
    colours = scene.visible_colours()
    if rng.random() < 0.5:
        colours = rng.sample(colours, min(len(colours), rng.randint(2, 4)))
        shapes = rng.sample(list(shapes), min(len(shapes), rng.randint(2, 4)))
    large = 0.5 if number <= 5 else 0.15
    for _ in range(number):
        scene.add_thing(random_kind(rng, colours, shapes, large), rng)


def fill_with_crowd(scene: Scene, rng: Random, shapes: Sequence[str] = SHAPES) -> None:
    """Place one to nine things of a kind, and a few others."""
    colours = scene.visible_colours()
    main = random_kind(rng, colours, shapes, large=0.0)
    number = rng.randint(1, 9)
    mixed = rng.random() < 0.3  # the same shape in any colour
    for _ in range(number):
        scene.add_thing(Kind(main.shape, rng.choice(colours) if mixed else main.colour, "small"), rng)
    for _ in range(rng.randint(0, min(5, MOST_CROWD - number))):
        scene.add_thing(random_kind(rng, colours, shapes, large=0.05), rng)


def add_words(scene: Scene, number: int, rng: Random, fine: float = 0.5) -> None:
    """Place up to ``number`` printed texts, on plates of different colours where there are several."""
    plates: list[str | None] = list(rng.sample(scene.visible_colours(), number))
    if number == 1 and rng.random() < 0.6:
        plates = [None]
    one_tile = max(scene.width, scene.height) <= TILE
    for plate in plates:
        if one_tile:
            scene.add_label(printed_text(rng)[:6].strip(), rng.uniform(*SMALL_PICTURE_EM), plate, rng)
        elif rng.random() < fine:
            text = printed_code(rng, rng.randint(*FINE_LENGTH)) if rng.random() < 0.6 else printed_text(rng)
            scene.add_label(text, rng.uniform(*FINE_EM), plate, rng, fine=True)
        else:
            scene.add_label(printed_text(rng), rng.uniform(*EM), plate, rng)


def mixed_scene(rng: Random) -> Scene:
    """Return some things and now and then a text."""
    scene = new_scene(rng, "small" if rng.random() < 0.06 else "any")
    if rng.random() < 0.6:
        add_words(scene, 1, rng)
    fill_with_things(scene, rng.randint(2, MOST_THINGS), rng)
    return scene


def crowd_scene(rng: Random) -> Scene:
    """Return a scene to count in."""
    scene = new_scene(rng)
    fill_with_crowd(scene, rng)
    return scene


def words_scene(rng: Random) -> Scene:
    """Return up to four texts and a few things."""
    scene = new_scene(rng)
    add_words(scene, rng.randint(1, 4), rng)
    fill_with_things(scene, rng.randint(0, 3), rng)
    return scene


def page_scene(rng: Random) -> Scene:
    """Return a page of printed lines."""
    scene = new_scene(rng, rng.choices(("any", "small", "strip"), (70, 20, 10))[0])
    one_tile = max(scene.width, scene.height) <= TILE
    em = rng.uniform(*PAGE_EM)
    most = max(3, round((0.8 * scene.width * scene.tile_scale) / (0.62 * em)))  # letters of a line
    lines = []
    for _ in range(rng.randint(1, 3 if one_tile else 7)):
        line = printed_text(rng)
        while rng.random() < 0.7 and len(line) + 4 < most:
            line += " " + printed_text(rng)
        lines.append(line[:most].strip())
    scene.add_page(lines, em, rng)
    return scene


def easy_scene(rng: Random) -> Scene:
    """Return one or two things, or a short text, in a single tile."""
    scene = new_scene(rng, "small")
    if rng.random() < 0.5:
        add_words(scene, 1, rng)
    if not scene.labels or rng.random() < 0.3:
        fill_with_things(scene, rng.randint(1, 2), rng)
    return scene


def scenes_to_compare(rng: Random, number: int = 2) -> list[Scene]:
    """Return two or three scenes. Three are not cut into tiles; of two, most are small, to keep the sequence short."""
    size: PictureSize = "any" if number > MAX_TILED_IMAGES else rng.choices(("small", "strip", "any"), (70, 25, 5))[0]
    scenes = [new_scene(rng, size) for _ in range(number)]
    for scene in scenes:
        fill_with_things(scene, rng.randint(1, 4), rng)
    return scenes


# ---------------------------------------------------------------- conversations

Plans = dict[Callable[[Random], Scene], float]


class Mixture(NamedTuple):
    """What a stage of training draws and asks, each with its share.

    Fields:
        plans: the scenes.
        weights: the questions.
        comparisons: share of the samples that ask about several images.
        compared: questions of such a sample, at most.
        telling_last: answers that tell much of the picture stand last, so that no later answer can be read off them.
    """

    plans: Plans
    weights: dict[Builder, float]
    comparisons: float = 0.1
    compared: int = 5
    telling_last: bool = False


# The words of the first are nano's vocabulary.
MIXTURES: dict[str, Mixture] = {
    "first": Mixture({mixed_scene: 0.45, crowd_scene: 0.13, words_scene: 0.42}, WEIGHTS),
    "second": Mixture(
        {mixed_scene: 0.30, crowd_scene: 0.12, words_scene: 0.20, page_scene: 0.24, easy_scene: 0.14}, SECOND_WEIGHTS
    ),
    "third": Mixture(
        {mixed_scene: 0.42, crowd_scene: 0.22, words_scene: 0.14, page_scene: 0.06, easy_scene: 0.16},
        THIRD_WEIGHTS,
        comparisons=0.2,
        compared=8,
        telling_last=True,
    ),
    "fourth": Mixture(
        {mixed_scene: 0.36, crowd_scene: 0.30, words_scene: 0.20, page_scene: 0.06, easy_scene: 0.08},
        FOURTH_WEIGHTS,
        comparisons=0.08,
        compared=8,
        telling_last=True,
    ),
}
TURNS = (7, 10)
# How much an answer tells of what else is in the picture.
TELLING = {"locate": 1, "read_line": 1, "locate_all": 2, "list": 3, "transcribe": 3, "describe": 4}
# Tasks whose answer could be copied from an earlier turn with the same answer, instead of looking again.
COPIED = ("locate", "locate_all", "describe", "read", "read_fine", "list", "transcribe")


def ask(weights: dict[Builder, float], scene: Scene, number: int, rng: Random) -> list[Turn]:
    """Return up to ``number`` questions about a scene; none whose long answer stands above already."""
    turns: dict[str, Turn] = {}
    for builder in rng.choices(list(weights), list(weights.values()), k=2 * number):
        turn = builder(scene, rng)
        if turn is not None:
            copied = turn.task in COPIED
            turns.setdefault(turn.answer if copied else turn.question, turn)
        if len(turns) == number:
            break
    return list(turns.values())


def plan_sample(seed: int, mixture: str) -> tuple[list[Scene], list[Turn], Random]:
    """Return a sample before it is drawn: its scenes, its turns, and the generator that drawing goes on with."""
    rng = Random(seed)
    mixed = MIXTURES[mixture]
    plans, weights = mixed.plans, mixed.weights
    while True:
        if rng.random() < mixed.comparisons:
            scenes = scenes_to_compare(rng, 2 if rng.random() < 0.85 else 3)
            asked = [which_image(scenes, rng) for _ in range(mixed.compared)]
            turns = list({turn.question: turn for turn in asked if turn is not None}.values())
        else:
            scenes = [rng.choices(list(plans), list(plans.values()))[0](rng)]
            turns = ask(weights, scenes[0], rng.randint(*TURNS), rng)
            if mixed.telling_last:
                turns.sort(key=lambda turn: TELLING.get(turn.task, 0))
        if turns:
            return scenes, turns, rng


def training_sample(seed: int, mixture: str = "first") -> Sample:
    """Return the sample of a seed, below `HELD_OUT`, in one of `MIXTURES`."""
    scenes, turns, rng = plan_sample(seed, mixture)
    return Sample([draw_scene(scene, rng) for scene in scenes], turns)


def training_turns(seed: int, mixture: str = "first") -> list[Turn]:
    """Return the questions and answers of a training sample, without its pictures, whose drawing takes time."""
    return plan_sample(seed, mixture)[1]


class SyntheticConversations(Dataset):
    """The training samples of seeds ``first`` to ``first + length - 1``; picklable, any order, nothing is stored.

    Items are ``{"conversation": messages, "images": [PIL images]}``.
    """

    def __init__(self, length: int, first: int = 0, mixture: str = "first") -> None:
        if mixture not in MIXTURES:
            raise ValueError(f"Unknown mixture {mixture!r}: expected one of {', '.join(MIXTURES)}.")
        if first < 0 or first + length > HELD_OUT:
            raise ValueError(
                f"Training seeds lie from 0 to {HELD_OUT - 1}: {first} to {first + length - 1} were asked."
            )
        self.length, self.first, self.mixture = length, first, mixture

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        sample = training_sample(self.first + index, self.mixture)
        return {"conversation": sample.conversation(), "images": sample.images}


# ---------------------------------------------------------------- held-out questions


def _things_scene(rng: Random) -> Scene:
    scene = new_scene(rng)
    fill_with_things(scene, rng.randint(2, MOST_THINGS), rng)
    return scene


def _few_things_scene(rng: Random) -> Scene:
    scene = new_scene(rng)
    fill_with_things(scene, rng.randint(1, 5), rng)
    return scene


def _plain_words_scene(rng: Random) -> Scene:
    scene = new_scene(rng)
    add_words(scene, rng.randint(1, 2), rng, fine=0.0)
    fill_with_things(scene, rng.randint(0, 3), rng)
    return scene


def _fine_words_scene(rng: Random) -> Scene:
    scene = new_scene(rng)
    add_words(scene, rng.randint(1, 2), rng, fine=1.0)
    fill_with_things(scene, rng.randint(0, 3), rng)
    return scene


# What each task of the suite is asked about, and how.
TASKS: dict[str, tuple[Callable[[Random], Scene], tuple[Builder, ...]]] = {
    "locate": (_things_scene, (locate,)),
    "locate_all": (_things_scene, (locate_all,)),
    "absent": (_things_scene, (absent,)),
    "describe": (_few_things_scene, (describe,)),
    "read": (_plain_words_scene, (read,)),
    "read_fine": (_fine_words_scene, (read_fine,)),
    "count": (crowd_scene, (count,)),
    "attributes": (_things_scene, (colour_of, shape_of, size_of, position_of, relation, exists)),
    "which_image": (_things_scene, (locate,)),  # drawn two at a time: see `held_out_sample`
}


class Asked(NamedTuple):
    """A question about scenes that are not drawn yet.

    Fields:
        scenes: what the pictures show.
        turn: the question and its answer.
        rng: what the pictures' grain is drawn with.
    """

    scenes: list[Scene]
    turn: Turn
    rng: Random


def held_out_question(task: str, index: int) -> Asked:
    """Return question ``index`` of a task of the suite, before its pictures are drawn.

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}: expected one of {', '.join(TASKS)}.")
    rng = Random(HELD_OUT + 1_000_003 * list(TASKS).index(task) + index)
    make_scene, builders = TASKS[task]
    while True:
        if task == "which_image":
            scenes = scenes_to_compare(rng)
            turn = which_image(scenes, rng)
        else:
            scenes = [make_scene(rng)]
            turn = rng.choice(builders)(scenes[0], rng)
        if turn is not None:
            return Asked(scenes, turn, rng)


def held_out_sample(task: str, index: int) -> Sample:
    """Return question ``index`` of a task of the suite: one turn about a picture that no training seed drew.

    Raises:
        ValueError: an unknown task.
    """
    scenes, turn, rng = held_out_question(task, index)
    return Sample([draw_scene(scene, rng) for scene in scenes], [turn])


def held_out_samples(task: str, number: int) -> Iterator[Sample]:
    """Return the first ``number`` questions of a task of the suite."""
    return (held_out_sample(task, index) for index in range(number))
