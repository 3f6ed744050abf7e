"""Ask DeepSeek-VL2 about images, from the command line; `deepseek-vl2 ask` and `deepseek-vl2 ground` do more.

Examples:
    python inference.py
    python inference.py --model_path deepseek-ai/deepseek-vl2-tiny --image photo.jpg --prompt "What is this?"
    python inference.py --model_path CHECKPOINT --image a.jpg --image b.jpg --prompt "What differs?" --chunk_size 512
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from deepseek_vl2.cli import ask
from deepseek_vl2.cli.images import open_image
from deepseek_vl2.cli.main import run_guarded
from deepseek_vl2.cli.options import add_generation_arguments, add_model_arguments, load

DEFAULT_IMAGE = Path(__file__).resolve().parent / "images" / "shapes.png"
DEFAULT_PROMPT = "<|grounding|>Describe the image."


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--image", action="append", help="a path or an address; may be given several times")
    parser.add_argument("--prompt", help="the question; <image> marks where an image stands, by default in front")
    parser.add_argument("--output", default="vg.jpg", help="where a drawing of the answer's boxes goes")
    add_model_arguments(parser)
    add_generation_arguments(parser)
    return parser.parse_args(argv)


def run(args: Namespace) -> int:
    """Load, ask, print the answer as it comes, draw its boxes."""
    sources = args.image if args.image is not None or args.prompt is not None else [str(DEFAULT_IMAGE)]
    images = [open_image(source) for source in sources or []]
    if images:
        ask.check_drawing(args.output, images)
    loaded = load(args, tell=print)
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
    args = parse_args(argv)
    return run_guarded("inference.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
