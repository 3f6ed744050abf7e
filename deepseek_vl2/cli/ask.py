"""``deepseek-vl2 ask``: one question about some images."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_vl2.cli.images import open_images, text_from_stdin
from deepseek_vl2.cli.options import (
    Loaded,
    add_generation_arguments,
    add_image_argument,
    add_model_arguments,
    generation_options,
    load,
    loading_line,
    most_tokens,
    note,
    room_for_answer,
)
from deepseek_vl2.cli.stats import Stats

if TYPE_CHECKING:
    from PIL import Image

    from deepseek_vl2.serve.streaming import Answer

DESCRIPTION = "Ask one question about some images; the answer streams to the terminal."
EXAMPLES = """\
examples:
  deepseek-vl2 ask "What is this?" --image photo.jpg
  deepseek-vl2 ask "What differs?" --image before.png after.png --temperature 0.7 --seed 1
  deepseek-vl2 ask "Which is the oldest?" -i *.jpg --stats
  deepseek-vl2 ask "In <image>, where is the thing of <image>?" -i scene.jpg -i thing.jpg
  deepseek-vl2 ask "<|grounding|>What is on the table?" -i https://example.com/table.jpg --output table_boxes.jpg
  echo "Read the text." | deepseek-vl2 ask - --image page.png --json
  cat page.png | deepseek-vl2 ask "Read the text." -i -
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("prompt", help="the question; <image> marks where an image stands; -: read it from the input")
    add_image_argument(parser, "paths or addresses, as many as you like; -: from the standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object: answer, tokens, boxes")
    parser.add_argument("--stats", action="store_true", help="tell tokens and times, on the error stream and in --json")
    parser.add_argument("--output", metavar="FILE", help="draw the answer's boxes on the last image into this file")
    add_model_arguments(parser)
    add_generation_arguments(parser)


def run(args: Namespace) -> int:
    """Ask, and print the answer as it comes."""
    prompt = text_from_stdin().strip() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("The question is empty.")
    with loading_line(args):
        images = open_images(args.image, question_from_stdin=args.prompt == "-")
        if args.output is not None:
            check_drawing(args.output, images)
    loaded = load(args)
    conversation = question(images, prompt, args.system_prompt)
    stats = Stats()
    answer = stream(loaded, conversation, args, show=not args.json, stats=stats)
    if args.json:
        found = report(loaded, prompt, args.image, images, answer)
        print(json.dumps({**found, "stats": stats.to_dict()} if args.stats else found, ensure_ascii=False))
    if args.stats:
        note(str(stats))
    if args.output is not None:
        draw_answer(answer.text, images[-1], args.output)
    return 0


def question(images: list[Image.Image], prompt: str, system_prompt: str) -> list[dict[str, Any]]:
    """Return the conversation of one question."""
    from deepseek_vl2.utils.prompts import question_about

    return with_system(question_about(images, prompt), system_prompt)


def with_system(conversation: list[dict[str, Any]], system_prompt: str) -> list[dict[str, Any]]:
    """Return a conversation with a system message in front, where there is one."""
    return [{"role": "system", "content": system_prompt}, *conversation] if system_prompt else conversation


def stream(
    loaded: Loaded, conversation: list[dict[str, Any]], args: Namespace, show: bool, stats: Stats | None = None
) -> Answer:
    """Generate the answer to a conversation, and print it while it comes; ``stats`` takes its times."""
    from deepseek_vl2.serve.streaming import TextStream

    stats = stats or Stats()
    stats.begin(time.perf_counter())
    inputs = loaded.processor(conversations=conversation).to(loaded.model.device)
    options, room = generation_options(args), room_for_answer(most_tokens(loaded), inputs["input_ids"].shape[1])
    options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
    with TextStream(loaded.model, loaded.tokenizer, inputs, options) as pieces:
        for piece in pieces:
            stats.count(time.perf_counter(), pieces.answer.completion_tokens)
            if show:
                print(piece, end="", flush=True)
    stats.end(time.perf_counter(), pieces.answer)
    if show:
        print(flush=True)
    if pieces.answer.finish_reason == "length":
        why = "--max_new_tokens" if room >= args.max_new_tokens else "the model knows no more"
        note(f"The answer was cut off after {options.max_new_tokens} tokens ({why}).")
    tell_empty(pieces.answer)
    return pieces.answer


def tell_empty(answer: Answer) -> None:
    """Tell that an answer ended before a first word: nothing at all looks like a failure of the program."""
    if answer.finish_reason != "stop" or answer.text.strip():
        return
    reason = "" if answer.stop_word is None else f": it began with {answer.stop_word!r}, which ends answers (--stop)"
    note(f"The model gave an empty answer{reason}.")


def report(
    loaded: Loaded, prompt: str, sources: list[str], images: list[Image.Image], answer: Answer
) -> dict[str, Any]:
    """Return everything about an answer, for ``--json``."""
    from deepseek_vl2.utils.grounding import parse_grounding

    grounding = parse_grounding(answer.text, [image.size for image in images] or None).to_dict()
    return {
        "model": loaded.name,
        "prompt": prompt,
        "images": [
            {"source": source, "width": image.width, "height": image.height}
            for source, image in zip(sources, images, strict=True)
        ],
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "seed": answer.seed,
        "usage": {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens},
        "grounding": {"objects": grounding["objects"], "problems": grounding["problems"]},
    }


def check_drawing(path: str, images: list[Image.Image]) -> None:
    """Raise ``ValueError`` before any work for a drawing that could not be written."""
    from PIL import Image

    if not images:
        raise ValueError("There is no image to draw boxes on: give one with --image.")
    file = Path(path)
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:  # some formats can be read alone
        raise ValueError(f"{path}: use the name of an image file, such as boxes.jpg or boxes.png.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {file.parent} to write {file.name} into.")


def draw_answer(text: str, image: Image.Image, path: str) -> bool:
    """Draw an answer's boxes into a file and say so; return whether there were any."""
    from deepseek_vl2.utils.grounding import draw_boxes, parse_grounding

    objects = [found for found in parse_grounding(text) if found.boxes]
    if not objects:
        note("The answer holds no boxes to draw.")
        return False
    draw_boxes(image, objects).save(path)
    note(f"The boxes are drawn in {path}.")
    return True
