"""Write the picture of the first command, and the same with what nano finds in it.

python images/shapes.py
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from deepseek_vl2.synthetic.drawing import draw_background, draw_label, draw_thing
from deepseek_vl2.synthetic.samples import held_out_question
from deepseek_vl2.synthetic.scene import Scene
from deepseek_vl2.utils.grounding import draw_boxes, parse_grounding
from deepseek_vl2.utils.io import load_pretrained_model

HERE = Path(__file__).resolve().parent
PICTURE, FOUND = HERE / "shapes.png", HERE / "shapes_found.png"
NUMBER = 41  # of the held-out pictures of the task
SCALE = 4  # the suite's picture has 217 x 229 pixels
OVERSAMPLING = 4
QUESTION = "<image>\n<|grounding|>Describe the image."
CORNER = 28  # radius, so that the picture sits well on light and dark pages


def draw_large(scene: Scene) -> Image.Image:
    """Return the picture of a scene, larger than the suite draws it and without a camera's noise."""
    scale = SCALE * OVERSAMPLING
    canvas = draw_background(scene.background, (scene.width * scale, scene.height * scale), Random(0))
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        draw_thing(draw, thing, scale)
    for label in scene.labels:
        draw_label(draw, label, scale)
    return canvas.reduce(OVERSAMPLING)


def with_round_corners(picture: Image.Image) -> Image.Image:
    """Return a picture whose corners are transparent."""
    mask = Image.new("L", (picture.width * OVERSAMPLING, picture.height * OVERSAMPLING), 0)
    field = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(field, CORNER * OVERSAMPLING, fill=255)
    rounded = picture.copy()
    rounded.putalpha(mask.reduce(OVERSAMPLING))
    return rounded


def main() -> None:
    """Draw, ask nano, and draw its answer."""
    picture = draw_large(held_out_question("describe", NUMBER).scenes[0])
    tokenizer, processor, model = load_pretrained_model("nano", device="cpu")
    inputs = processor(conversations=[{"role": "user", "content": QUESTION, "images": [picture]}])
    output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    picture.save(PICTURE, optimize=True)
    with_round_corners(draw_boxes(picture, parse_grounding(answer))).save(FOUND, optimize=True)


if __name__ == "__main__":
    main()
