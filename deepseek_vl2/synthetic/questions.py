"""Questions about a scene, with the right answers, in the prompt forms of the released models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from .scene import Kind, Label, Scene, Thing
from .words import COLOURS, PLURALS, SHAPES

Parts = tuple[str | None, str | None, str | None]  # size, colour, shape; None: not said

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_COUNTED = 9
MOST_DESCRIBED = 5
MOST_LISTED = 8
CLEAR_GAP = 0.1  # of the picture: two things count as left and right of each other from here on
CLEAR_ZONE = 0.04  # of the picture: a thing this near to a third is in no clear zone

LOCATE_FORMS = (
    "<|ref|>{}<|/ref|>",
    "<|ref|>{}<|/ref|>.",
    "Locate <|ref|>{}<|/ref|> in the given image.",
    "Where is <|ref|>{}<|/ref|>?",
    "Find <|ref|>{}<|/ref|>.",
)
LOCATE_ALL_FORMS = ("<|ref|>{}<|/ref|>", "Locate <|ref|>{}<|/ref|> in the given image.", "Find <|ref|>{}<|/ref|>.")
DESCRIBE_FORMS = (
    "<|grounding|>Describe the image.",
    "<|grounding|>Describe this image in detail.",
    "<|grounding|>What is in the image?",
    "<|grounding|>Can you describe the content of the image?",
)
READ_FORMS = (
    "What does the text say?",
    "Read the text in the image.",
    "What is written in the image?",
    "What text is shown?",
    "Transcribe the text.",
)
COUNT_FORMS = (
    "How many {} are there?",
    "Count the {}.",
    "How many {} do you see in the image?",
    "How many {} are shown?",
)
LIST_FORMS = ("List the shapes in the image.", "Name all shapes from left to right.", "What shapes are there?")
PAGE_FORMS = ("Transcribe the page.", "Read all lines of the text.", "Write down the whole text.")
LINE_FORMS = ("What does the {} line say?", "Read the {} line.")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


class Turn(NamedTuple):
    """One question and its answer.

    Fields:
        task: what is asked for, a key of `TASKS`.
        question: the user's text, without image tags.
        answer: the assistant's text.
        truth: what an answer is judged by: ``boxes`` (0 to 999, with ``labels`` where things are named), or nothing
            more than the answer's text.
    """

    task: str
    question: str
    answer: str
    truth: dict[str, Any]


def words_of(parts: Parts, plural: bool = False, unnamed: str = "shape") -> str:
    """Return the words of a description: "small red circle", "red shapes"; ``unnamed``: the noun where none is said."""
    size, colour, shape = parts
    noun = shape or unnamed
    noun = PLURALS.get(noun, f"{noun}s") if plural else noun
    return " ".join(word for word in (size, colour, noun) if word)


def fits(kind: Kind, parts: Parts) -> bool:
    """Whether a description is true of a thing."""
    size, colour, shape = parts
    return size in (None, kind.size) and colour in (None, kind.colour) and shape in (None, kind.shape)


def article(noun: str) -> str:
    """Return a noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def descriptions(kind: Kind) -> list[Parts]:
    """Return all descriptions of a thing that say at least its colour or its shape."""
    return [
        (size, colour, shape)
        for size in (None, kind.size)
        for colour in (None, kind.colour)
        for shape in (None, kind.shape)
        if colour or shape
    ]


def unique_description(scene: Scene, thing: Thing, rng: Random, without: int | None = None) -> Parts | None:
    """Return a description that is true of this thing alone; ``without``: one that leaves out that part."""
    unique = [
        parts
        for parts in descriptions(thing.kind)
        if (without is None or parts[without] is None) and sum(fits(other.kind, parts) for other in scene.things) == 1
    ]
    return rng.choice(unique) if unique else None


def pick_unique(scene: Scene, rng: Random, without: int | None = None) -> tuple[Thing, Parts] | None:
    """Return a thing that can be described uniquely, and how."""
    for thing in rng.sample(scene.things, len(scene.things)):
        parts = unique_description(scene, thing, rng, without)
        if parts is not None:
            return thing, parts
    return None


def reference(text: str, boxes: Sequence[list[int]]) -> str:
    """Return a grounded phrase, as the model writes it."""
    return f"<|ref|>{text}<|/ref|><|det|>[{', '.join(str(box) for box in boxes)}]<|/det|>"


def boxes_of(scene: Scene, things: Sequence[Thing]) -> list[list[int]]:
    """Return the boxes of things, left to right."""
    return sorted(scene.normalised(thing.box) for thing in things)


# ---------------------------------------------------------------- boxes


def locate(scene: Scene, rng: Random) -> Turn | None:
    """Ask for the one thing that a description names."""
    picked = pick_unique(scene, rng)
    if picked is None:
        return None
    thing, parts = picked
    phrase = f"the {words_of(parts)}"
    boxes = boxes_of(scene, [thing])
    return Turn("locate", rng.choice(LOCATE_FORMS).format(phrase), reference(phrase, boxes), {"boxes": boxes})


def locate_all(scene: Scene, rng: Random) -> Turn | None:
    """Ask for all things of a kind."""
    candidates: list[Parts] = [(None, colour, None) for colour in COLOURS] + [(None, None, shape) for shape in PLURALS]
    candidates += [(None, thing.kind.colour, thing.kind.shape) for thing in scene.things]
    several = [p for p in dict.fromkeys(candidates) if 2 <= sum(fits(thing.kind, p) for thing in scene.things) <= 6]
    if not several:
        return None
    parts = rng.choice(several)
    phrase = f"all {words_of(parts, plural=True)}"
    boxes = boxes_of(scene, [thing for thing in scene.things if fits(thing.kind, parts)])
    return Turn("locate_all", rng.choice(LOCATE_ALL_FORMS).format(phrase), reference(phrase, boxes), {"boxes": boxes})


def missing_description(scene: Scene, rng: Random) -> Parts:
    """Return a description of nothing in the scene; often it differs by one word from something that is there."""
    while True:
        if scene.things and rng.random() < 0.6:
            size, colour = rng.choice(scene.things).kind.size, rng.choice(scene.things).kind.colour
            shape = rng.choice(scene.things).kind.shape
            parts: Parts = (size if rng.random() < 0.4 else None, colour, shape)
        else:
            parts = (None, rng.choice(list(COLOURS)), rng.choice(SHAPES))
        if rng.random() < 0.25:
            parts = (parts[0], None, rng.choice(SHAPES))
        if not any(fits(thing.kind, parts) for thing in scene.things):
            return parts


def absent(scene: Scene, rng: Random) -> Turn | None:
    """Ask for something that is not there."""
    noun = words_of(missing_description(scene, rng))
    return Turn(
        "absent", rng.choice(LOCATE_FORMS).format(f"the {noun}"), f"There is no {noun} in the image.", {"boxes": []}
    )


def describe(scene: Scene, rng: Random) -> Turn | None:
    """Ask for a description with boxes."""
    if not 1 <= len(scene.things) <= MOST_DESCRIBED:
        return None
    things = sorted(scene.things, key=lambda thing: scene.normalised(thing.box))
    labels = [article(words_of((thing.kind.size, thing.kind.colour, thing.kind.shape))) for thing in things]
    boxes = [scene.normalised(thing.box) for thing in things]
    mentions = [reference(label, [box]) for label, box in zip(labels, boxes, strict=True)]
    listed = ", ".join(mentions[:-1]) + " and " + mentions[-1] if len(mentions) > 1 else mentions[0]
    return Turn(
        "describe", rng.choice(DESCRIBE_FORMS), f"The image shows {listed}.", {"boxes": boxes, "labels": labels}
    )


def list_things(scene: Scene, rng: Random) -> Turn | None:
    """Ask for all things by name alone, left to right."""
    if not 1 <= len(scene.things) <= MOST_LISTED:
        return None
    things = sorted(scene.things, key=lambda thing: scene.normalised(thing.box))
    names = [words_of((thing.kind.size, thing.kind.colour, thing.kind.shape)) for thing in things]
    return Turn("list", rng.choice(LIST_FORMS), ", ".join(names), {})


# ---------------------------------------------------------------- words


def read(scene: Scene, rng: Random) -> Turn | None:
    """Ask what is printed; with several signs, on which."""
    labels = [label for label in scene.labels if not label.fine]
    if not labels:
        return None
    if len(scene.labels) == 1:
        return Turn("read", rng.choice(READ_FORMS), labels[0].text, {})
    return _read_sign(scene, rng.choice(labels), "read", rng)


def read_fine(scene: Scene, rng: Random) -> Turn | None:
    """Ask for words so small that only the tiles show them."""
    labels = [label for label in scene.labels if label.fine]
    if not labels:
        return None
    if len(scene.labels) == 1:
        return Turn("read_fine", rng.choice(READ_FORMS), labels[0].text, {})
    return _read_sign(scene, rng.choice(labels), "read_fine", rng)


def _read_sign(scene: Scene, label: Label, task: str, rng: Random) -> Turn | None:
    if label.plate is None or sum(other.plate == label.plate for other in scene.labels) > 1:
        return None
    forms = ("What is written on the {} sign?", "What does the {} sign say?", "Read the {} sign.")
    return Turn(task, rng.choice(forms).format(label.plate), label.text, {})


def transcribe(scene: Scene, rng: Random) -> Turn | None:
    """Ask for all lines of a page."""
    if not scene.is_page or not scene.labels:
        return None
    return Turn("transcribe", rng.choice(PAGE_FORMS), "\n".join(line.text for line in scene.labels), {})


def read_line(scene: Scene, rng: Random) -> Turn | None:
    """Ask for one line of a page, by its number."""
    if not scene.is_page or len(scene.labels) < 2:
        return None
    number = rng.randrange(min(len(scene.labels), len(ORDINALS)))
    return Turn("read_line", rng.choice(LINE_FORMS).format(ORDINALS[number]), scene.labels[number].text, {})


# ---------------------------------------------------------------- counting and attributes


def count(scene: Scene, rng: Random) -> Turn | None:
    """Ask how many things of a kind there are, 0 to 9."""
    if not scene.things:
        return None
    kind = rng.choice(scene.things).kind
    forms: list[Parts] = [(None, None, None), (None, kind.colour, None), (None, None, kind.shape)]
    forms += [(None, kind.colour, kind.shape)]
    if rng.random() < 0.12:
        forms = [missing_description(scene, rng)]
    parts = rng.choice(forms)
    total = sum(fits(thing.kind, parts) for thing in scene.things)
    if total > MOST_COUNTED:
        return None
    return Turn("count", rng.choice(COUNT_FORMS).format(words_of(parts, plural=True)), str(total), {})


def colour_of(scene: Scene, rng: Random) -> Turn | None:
    """Ask for a colour."""
    picked = pick_unique(scene, rng, without=1)
    if picked is None or (picked[1][2] is None):
        return None
    thing, parts = picked
    forms = ("What color is the {}?", "What colour is the {}?", "Which color does the {} have?")
    return Turn("colour", rng.choice(forms).format(words_of(parts)), f"{thing.kind.colour.capitalize()}.", {})


def shape_of(scene: Scene, rng: Random) -> Turn | None:
    """Ask for a shape."""
    picked = pick_unique(scene, rng, without=2)
    if picked is None:
        return None
    thing, parts = picked
    forms = ("What is the {}?", "What kind of shape is the {}?", "Which shape does the {} have?")
    noun = words_of(parts, unnamed=rng.choice(("object", "thing")))
    return Turn("shape", rng.choice(forms).format(noun), f"{article(thing.kind.shape).capitalize()}.", {})


def size_of(scene: Scene, rng: Random) -> Turn | None:
    """Ask for a size."""
    picked = pick_unique(scene, rng, without=0)
    if picked is None:
        return None
    thing, parts = picked
    forms = ("Is the {} small or large?", "What size is the {}?", "How big is the {}?")
    return Turn("size", rng.choice(forms).format(words_of(parts)), f"{thing.kind.size.capitalize()}.", {})


def zone(value: float) -> int | None:
    """Return which third of the picture a coordinate (0 to 1) lies in, or ``None`` near a border of thirds."""
    if min(abs(value - 1 / 3), abs(value - 2 / 3)) < CLEAR_ZONE:
        return None
    return int(value * 3)


def position_of(scene: Scene, rng: Random) -> Turn | None:
    """Ask in which part of the picture a thing is."""
    picked = pick_unique(scene, rng)
    if picked is None:
        return None
    thing, parts = picked
    across, down = zone(thing.centre[0] / scene.width), zone(thing.centre[1] / scene.height)
    if across is None or down is None:
        return None
    name = " ".join(word for word in (("top", "", "bottom")[down], ("left", "", "right")[across]) if word) or "center"
    forms = ("In which part of the image is the {}?", "Which part of the image shows the {}?")
    answer = "In the center." if name == "center" else f"At the {name}."
    return Turn("position", rng.choice(forms).format(words_of(parts)), answer, {})


def relation(scene: Scene, rng: Random) -> Turn | None:
    """Ask whether one thing is left of, right of, above or below another."""
    first, second = pick_unique(scene, rng), pick_unique(scene, rng)
    if first is None or second is None or first[0] is second[0]:
        return None
    across = (second[0].centre[0] - first[0].centre[0]) / scene.width
    down = (second[0].centre[1] - first[0].centre[1]) / scene.height
    name, gap = rng.choice((("left of", across), ("right of", -across), ("above", down), ("below", -down)))
    if abs(gap) < CLEAR_GAP:
        return None
    question = f"Is the {words_of(first[1])} {name} the {words_of(second[1])}?"
    return Turn("relation", question, "Yes." if gap > 0 else "No.", {})


def exists(scene: Scene, rng: Random) -> Turn | None:
    """Ask whether something is there."""
    if scene.things and rng.random() < 0.5:
        parts, answer = rng.choice(descriptions(rng.choice(scene.things).kind)), "Yes."
    else:
        parts, answer = missing_description(scene, rng), "No."
    noun = article(words_of(parts))
    return Turn(
        "exists", rng.choice(("Is there {}?", "Is there {} in the image?", "Do you see {}?")).format(noun), answer, {}
    )


def which_image(scenes: Sequence[Scene], rng: Random) -> Turn | None:
    """Ask which of several images has something that the others lack."""
    target = rng.randrange(len(scenes))
    others = [thing for index, scene in enumerate(scenes) if index != target for thing in scene.things]
    found = []
    for thing in scenes[target].things:
        found += [p for p in descriptions(thing.kind) if not any(fits(other.kind, p) for other in others)]
    if not found:
        return None
    noun = article(words_of(rng.choice(found)))
    forms = ("Which image shows {}?", "Which image has {}?", "In which image is there {}?")
    return Turn("which_image", rng.choice(forms).format(noun), f"The {ORDINALS[target]} image.", {})


Builder = Callable[[Scene, Random], Turn | None]

# How often each is asked in the mixture "first", relative to the others.
WEIGHTS: dict[Builder, float] = {
    locate: 2.6,
    locate_all: 1.2,
    absent: 1.0,
    describe: 1.2,
    read: 6.0,
    read_fine: 6.0,
    count: 1.3,
    colour_of: 0.7,
    shape_of: 0.7,
    size_of: 0.6,
    position_of: 0.7,
    relation: 0.9,
    exists: 0.7,
}

# "second" adds questions with long answers of names and letters: much to learn from one picture.
SECOND_WEIGHTS: dict[Builder, float] = {**WEIGHTS, list_things: 2.0, transcribe: 12.0, read_line: 4.0}

# "third" asks most for what is learned last: which of several things, and how many.
THIRD_WEIGHTS: dict[Builder, float] = {
    locate: 6.0,
    locate_all: 3.0,
    absent: 0.8,
    describe: 1.0,
    list_things: 0.8,
    read: 3.0,
    read_fine: 4.0,
    transcribe: 4.0,
    read_line: 2.0,
    count: 4.0,
    colour_of: 0.6,
    shape_of: 0.6,
    size_of: 0.6,
    position_of: 2.0,
    relation: 2.5,
    exists: 0.8,
}

# "fourth" asks most for what the third stage leaves: crowds, relations and fine print.
FOURTH_WEIGHTS: dict[Builder, float] = {**THIRD_WEIGHTS, read_fine: 6.0, count: 6.0, relation: 4.0}
