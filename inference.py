"""Ask DeepSeek-VL2 about images, from the command line; `deepseek-vl2 ask` and `deepseek-vl2 ground` do more.

Examples:
    python inference.py
    python inference.py --model_path deepseek-ai/deepseek-vl2-tiny --image photo.jpg --prompt "What is this?"
    python inference.py --model_path CHECKPOINT --image a.jpg --image b.jpg --prompt "What differs?" --chunk_size 512
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from deepseek_vl2.cli import ask
from deepseek_vl2.cli.images import open_images
from deepseek_vl2.cli.main import build_command_parser, run_program
from deepseek_vl2.cli.options import (
    add_generation_arguments,
    add_image_argument,
    add_model_arguments,
    load,
    loading_line,
)

DEFAULT_IMAGE = Path(__file__).resolve().parent / "images" / "shapes.png"
DEFAULT_PROMPT = "<|grounding|>Describe the image."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the script's options."""
    add_image_argument(parser, "paths or addresses, as many as you like; -: from the standard input")
    parser.add_argument("--prompt", help="the question; <image> marks where an image stands, by default in front")
    parser.add_argument("--output", default="vg.jpg", help="where a drawing of the answer's boxes goes")
    add_model_arguments(parser)
    add_generation_arguments(parser)


def run(args: Namespace) -> int:
    """Load, ask, print the answer as it comes, draw its boxes."""
    sources = args.image if args.image or args.prompt is not None else [str(DEFAULT_IMAGE)]
    with loading_line(args):
        images = open_images(sources)
        if images:
            ask.check_drawing(args.output, images)
    loaded = load(args)
    if loaded.name == "demo":
        args.max_new_tokens = min(args.max_new_tokens, 64)  # noise never ends by itself
    conversation = ask.question(images, args.prompt or DEFAULT_PROMPT, args.system_prompt)
    print(loaded.processor(conversations=conversation)["sft_format"][0], end=" ", flush=True)
    answer = ask.stream(loaded, conversation, args, show=True)
    if images:
        ask.draw_answer(answer.text, images[-1], args.output)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program; a user's mistake ends with one line that says what is wrong."""
    return run_program(build_command_parser(add_arguments, "inference.py", __doc__), argv, run)


if __name__ == "__main__":
    sys.exit(main())
