"""Ask DeepSeek-VL2 about images, from the command line.

Examples:
    python inference.py
    python inference.py --model_path deepseek-ai/deepseek-vl2-tiny --image photo.jpg --prompt "What is this?"
    python inference.py --model_path CHECKPOINT --image a.jpg --image b.jpg --prompt "What differs?" --chunk_size 512
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from transformers import set_seed
from transformers.utils import logging

from deepseek_vl2.serve.app_modules.utils import parse_ref_bbox
from deepseek_vl2.serve.inference import generate
from deepseek_vl2.utils.demo import DEMO_NAME
from deepseek_vl2.utils.io import load_pil_images, load_pretrained_model

DEFAULT_IMAGE = Path(__file__).resolve().parent / "images" / "visual_grounding_1.jpeg"
DEFAULT_PROMPT = "<|ref|>The giraffe at the back.<|/ref|>."
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_path",
        default=DEMO_NAME,
        help="directory or hub id of a checkpoint; default: a small one with random weights, to try the program",
    )
    parser.add_argument("--image", action="append", help="an image file; may be given several times")
    parser.add_argument("--prompt", help="the question; <image> marks where an image stands, by default in front")
    parser.add_argument("--system_prompt", default="", help="put in front of the conversation")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="most tokens of the answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely answer; above: sample")
    parser.add_argument("--top_p", type=float, default=0.9, help="while sampling")
    parser.add_argument("--repetition_penalty", type=float, default=1.1, help="while sampling")
    parser.add_argument("--seed", type=int, default=0, help="while sampling")
    parser.add_argument(
        "--chunk_size", type=int, default=-1, help="prefill this many tokens at a time, to save memory; -1: all at once"
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the best there is")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--output", default="vg.jpg", help="where a drawing of the answer's boxes goes")
    args = parser.parse_args(argv)
    if args.chunk_size < 1 and args.chunk_size != -1:
        parser.error(f"--chunk_size must be positive, or -1 for no chunks, not {args.chunk_size}")
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens must be positive, not {args.max_new_tokens}")
    return args


def build_conversation(images: list[str], prompt: str) -> list[dict[str, object]]:
    """Return one question about some images."""
    if "<image>" not in prompt:
        prompt = "<image>\n" * len(images) + prompt
    return [{"role": "<|User|>", "content": prompt, "images": images}, {"role": "<|Assistant|>", "content": ""}]


def run(args: Namespace) -> None:
    """Load, ask, print the answer as it comes, draw its boxes."""
    images = args.image if args.image is not None or args.prompt is not None else [str(DEFAULT_IMAGE)]
    conversation = build_conversation(images or [], args.prompt or DEFAULT_PROMPT)
    pil_images = load_pil_images(conversation)
    if args.model_path == DEMO_NAME:
        print("The demo checkpoint has random weights: what follows shows that everything runs, and is noise.")
        print("For real answers give a released one: --model_path deepseek-ai/deepseek-vl2-tiny\n")
        args.max_new_tokens = min(args.max_new_tokens, 64)
    tokenizer, processor, model = load_pretrained_model(args.model_path, device=args.device, dtype=DTYPES[args.dtype])
    inputs = processor(conversations=conversation, images=pil_images, system_prompt=args.system_prompt)
    print(inputs["sft_format"][0], end=" ", flush=True)
    set_seed(args.seed)
    answer = ""
    for piece in generate(
        model,
        tokenizer,
        inputs.to(model.device),
        max_gen_len=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        chunk_size=args.chunk_size,
    ):
        print(piece, end="", flush=True)
        answer += piece
    print()
    drawing = parse_ref_bbox(answer, pil_images[-1]) if pil_images else None
    if drawing is None:
        print("The answer holds no boxes to draw.")
    else:
        drawing.save(args.output)
        print(f"The boxes are drawn in {args.output}.")


def main(argv: list[str] | None = None) -> int:
    """Run the program; a user's mistake ends with one line that says what is wrong."""
    args = parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"inference.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
