"""Draw the web demo's pictures for nano: questions that the suite holds out, larger than it draws them.

python images/nano_examples.py
"""

from __future__ import annotations

from pathlib import Path

from shapes import draw_large

from deepseek_vl2.synthetic.samples import held_out_question

OUT = Path(__file__).resolve().parents[1] / "deepseek_vl2" / "assets" / "shapes"
LONGEST = 768
# Which question of which task each is about, and which of its pictures it is.
DRAWN = {
    "five_shapes.webp": ("describe", 41, 0),
    "moons.webp": ("locate", 17, 0),
    "diamonds.webp": ("locate_all", 2, 0),
    "stars.webp": ("count", 5, 0),
    "square.webp": ("attributes", 10, 0),
    "signs.webp": ("read", 14, 0),
    "codes.webp": ("read_fine", 5, 0),
    "red_square.webp": ("which_image", 137, 0),
    "no_red_square.webp": ("which_image", 137, 1),
}


def main() -> None:
    """Draw every picture."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name, (task, index, number) in DRAWN.items():
        picture = draw_large(held_out_question(task, index).scenes[number])
        picture.thumbnail((LONGEST, LONGEST))
        picture.save(OUT / name, quality=90, method=6)


if __name__ == "__main__":
    main()
