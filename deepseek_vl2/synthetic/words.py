"""What the synthetic pictures are made of: names, colours, sizes and printed words."""

from __future__ import annotations

from random import Random

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (215, 40, 40),
    "orange": (243, 138, 22),
    "yellow": (243, 214, 42),
    "green": (42, 158, 72),
    "blue": (42, 92, 214),
    "purple": (132, 58, 178),
    "pink": (243, 140, 190),
    "brown": (128, 78, 40),
    "black": (24, 24, 26),
    "white": (244, 244, 244),
}
COLOUR_JITTER = 14  # each channel of a drawn colour differs from the table by at most this

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "hexagon", "arrow", "moon")
# Drawn on request only: the packaged model never saw it, so that a fine-tune has something to teach.
UNSEEN_SHAPE = "heart"
PLURALS = {shape: f"{shape}s" for shape in (*SHAPES, UNSEEN_SHAPE)} | {"cross": "crosses"}

# Side of a thing over the shorter side of its picture. The gap keeps "small" and "large" unambiguous.
SIZES: dict[str, tuple[float, float]] = {"small": (0.13, 0.18), "large": (0.27, 0.36)}

CONSONANTS, VOWELS = "bcdfghjkmnprstvwz", "aeiou"
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # neither I nor O: they are 1 and 0 in some fonts
CODE_DIGITS = "23456789"
REAL_WORDS = [
    "apple",
    "bread",
    "coffee",
    "market",
    "station",
    "museum",
    "garden",
    "window",
    "bridge",
    "school",
    "hotel",
    "exit",
    "open",
    "closed",
    "sale",
    "fresh",
    "summer",
    "winter",
    "north",
    "south",
    "east",
    "west",
    "river",
    "mountain",
    "library",
    "kitchen",
    "pepper",
    "sugar",
    "orange",
    "butter",
    "ticket",
    "platform",
    "track",
    "danger",
    "caution",
    "warning",
    "private",
    "parking",
    "office",
    "doctor",
    "pharmacy",
    "bakery",
    "theatre",
    "cinema",
    "music",
    "dance",
    "paper",
    "pencil",
    "camera",
    "travel",
    "airport",
    "harbour",
    "island",
    "forest",
    "desert",
    "castle",
    "tower",
    "village",
    "city",
    "street",
    "avenue",
    "welcome",
    "goodbye",
    "morning",
    "evening",
    "monday",
    "tuesday",
    "friday",
    "sunday",
    "january",
    "march",
    "august",
    "october",
    "happy",
    "quiet",
    "lucky",
    "golden",
    "silver",
]


def jittered(colour: RGB, rng: Random, amount: int = COLOUR_JITTER) -> RGB:
    """Return a colour near ``colour``."""
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def made_up_word(rng: Random, most: int = 12) -> str:
    """Return a pronounceable word of 3 to ``most`` letters that no dictionary has."""
    length = rng.randint(3, most)
    start = rng.randint(0, 1)
    return "".join(rng.choice(VOWELS if (index + start) % 2 else CONSONANTS) for index in range(length))


def printed_word(rng: Random) -> str:
    """Return a word as it is printed: lower case, capitalised or upper case."""
    word = rng.choice(REAL_WORDS) if rng.random() < 0.3 else made_up_word(rng, rng.choice((6, 9, 12)))
    return rng.choice((word, word.capitalize(), word.upper()))


def printed_number(rng: Random) -> str:
    """Return a number, a price, a time or a date, of at most 12 characters."""
    kind = rng.randrange(6)
    if kind == 0:
        return f"{rng.randrange(10 ** rng.randint(1, 4))}.{rng.randrange(100):02d}"
    if kind == 1:
        return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    if kind == 2:
        return f"{rng.randrange(101)}%"
    if kind == 3:
        return f"${rng.randrange(1, 10 ** rng.randint(1, 4))}"
    return str(rng.randrange(10 ** (rng.randint(1, 9) - 1), 10 ** rng.randint(9, 10)))[: rng.randint(1, 10)]


def printed_code(rng: Random, length: int) -> str:
    """Return a code of capital letters and digits."""
    return "".join(rng.choice(CODE_LETTERS + CODE_DIGITS) for _ in range(length))


def printed_text(rng: Random) -> str:
    """Return a word, two short words, a number or a code, of at most 12 characters."""
    kind = rng.random()
    if kind < 0.45:
        return printed_word(rng)
    if kind < 0.55:
        style = rng.choice((str.lower, str.capitalize, str.upper))
        return f"{style(made_up_word(rng, 5))} {style(made_up_word(rng, 6))}"
    if kind < 0.85:
        return printed_number(rng)
    return printed_code(rng, rng.randint(3, 7))
