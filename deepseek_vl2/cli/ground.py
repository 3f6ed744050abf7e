"""``deepseek-vl2 ground``: find things in an image."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from deepseek_vl2.cli.ask import check_drawing, stream, with_system
from deepseek_vl2.cli.images import STDIN, clean_path, open_image, open_images
from deepseek_vl2.cli.options import add_generation_arguments, add_model_arguments, load, loading_line, note

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = "Find things in an image: writes a drawing with boxes, and the boxes as JSON."
EXAMPLES = """\
examples:
  deepseek-vl2 ground photo.jpg "the giraffe at the back"
  deepseek-vl2 ground photo.jpg "watermelon slices" --all --output slices.png --boxes slices.json
  deepseek-vl2 ground kitchen.jpg "I want to throw out the trash now, what should I do?" --chat
  deepseek-vl2 ground shelf.jpg --example mug.jpg --example_box 120,300,420,640
  deepseek-vl2 ground photo.jpg dogs --all --coco

Boxes are [left, top, right, bottom], 0 to 999 over the width and the height of the image, and in its pixels.
"""


def box(text: str) -> tuple[int, int, int, int]:
    """Convert an option that is a box: four numbers from 0 to 999."""
    try:
        left, top, right, bottom = (int(part) for part in text.strip("[]() ").split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not left,top,right,bottom") from None
    if not (0 <= left < right <= 999 and 0 <= top < bottom <= 999):
        raise ArgumentTypeError(f"{text!r} must have 0 <= left < right <= 999 and 0 <= top < bottom <= 999")
    return left, top, right, bottom


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("image", help="a path or an address; -: from the standard input")
    parser.add_argument("thing", nargs="?", help="what to find; with --chat, the question")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--all", action="store_true", help="find all things of that kind, not one")
    kind.add_argument("--chat", action="store_true", help="ask a question; the answer locates what it names")
    kind.add_argument("--example", metavar="IMAGE", help="find what is like the marked thing in this image")
    parser.add_argument("--example_box", type=box, metavar="L,T,R,B", help="where it is in there, 0 to 999")
    parser.add_argument("--output", metavar="FILE", help="the drawing; default: the image's name with _boxes.jpg")
    parser.add_argument("--boxes", metavar="FILE", help="the boxes; default: the image's name with _boxes.json")
    parser.add_argument("--coco", action="store_true", help="write the boxes in the layout of COCO's annotations")
    add_model_arguments(parser)
    add_generation_arguments(parser)


def run(args: Namespace) -> int:
    """Ask, then write drawing and boxes."""
    stem = default_stem(args.image)
    drawing, boxes = args.output or f"{stem}_boxes.jpg", args.boxes or f"{stem}_boxes.json"
    with loading_line(args):
        from deepseek_vl2.utils.grounding import draw_boxes, parse_grounding

        (image,) = open_images([args.image])
        conversation = with_system(build_conversation(args, image), args.system_prompt)
        check_drawing(drawing, [image])
        check_directory(boxes)
    answer = stream(load(args), conversation, args, show=True)
    sizes = [shown.size for turn in conversation for shown in turn.get("images") or []]
    found = parse_grounding(answer.text, sizes)
    content: dict[str, Any] = found.to_dict()
    if args.coco:
        from deepseek_vl2.utils.grounding import to_coco

        content = to_coco([(found, Path(args.image).name, image.size)])
    Path(boxes).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    for problem in found.problems:
        note(f"Characters {problem.span[0]} to {problem.span[1]} of the answer: {problem.message}.")
    count = sum(len(thing.boxes) for thing in found)
    if count:
        draw_boxes(image, found).save(drawing)
        note(f"{count} {'box' if count == 1 else 'boxes'}: drawn in {drawing}, listed in {boxes}.")
    else:
        note(f"The answer holds no boxes; {boxes} says so, and there is no drawing.")
    return 0


def build_conversation(args: Namespace, image: Image.Image) -> list[dict[str, Any]]:
    """Return the conversation for one of the four ways to ask.

    Raises:
        ValueError: options that do not go together, or a thing that holds tags.
    """
    from deepseek_vl2.utils import prompts

    if args.example is None:
        if args.example_box is not None:
            raise ValueError("--example_box needs --example, the image that it marks.")
        if args.thing is None:
            raise ValueError('Say what to find: deepseek-vl2 ground photo.jpg "the giraffe at the back".')
        if args.chat:
            return prompts.grounded_chat([image], args.thing)
        return prompts.locate_all(image, args.thing) if args.all else prompts.locate(image, args.thing)
    question = {} if args.thing is None else {"question": args.thing}
    return prompts.in_context(open_image(args.example), image, args.example_box, **question)


def default_stem(source: str) -> str:
    """Return the name, without its ending, that the results of an image get, in the working directory."""
    path = clean_path(source)
    if path == STDIN or path.startswith("data:"):
        return "image"
    return Path(urlsplit(path).path if path.startswith(("http://", "https://")) else path).stem or "image"


def check_directory(path: str) -> None:
    """Raise ``FileNotFoundError`` when a file has no directory to be written into."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"There is no directory {Path(path).parent} to write {Path(path).name} into.")
