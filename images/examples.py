"""Write the web demo's pictures: small copies of those in this folder, shipped with the package.

python images/examples.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "deepseek_vl2" / "assets" / "examples"
LONGEST = 768  # two tiles of the model
COPIES = {
    "giraffes.webp": "visual_grounding_1.jpeg",
    "apples.webp": "visual_grounding_2.jpg",
    "kitchen.webp": "grounding_conversation_1.jpeg",
    "window.webp": "incontext_visual_grounding_1.jpeg",
    "desk.webp": "icl_vg_2.jpeg",
    "chart.webp": "vqa_1.jpg",
    "coffee.webp": "multi_image_1.jpeg",
    "cat.webp": "multi_image_2.jpeg",
    "rocket.webp": "multi_image_3.jpeg",
    "receipt.webp": "sample.jpg",
    "table.webp": "table.png",
}


def main() -> None:
    """Write every copy."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name, source in COPIES.items():
        with Image.open(HERE / source) as image:
            copy = image.convert("RGB")
        copy.thumbnail((LONGEST, LONGEST))
        copy.save(OUT / name, quality=80, method=6)


if __name__ == "__main__":
    main()
