"""``deepseek-vl2 chat``: a conversation about images, in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_vl2.cli.ask import check_drawing, draw_answer, tell_empty, with_system
from deepseek_vl2.cli.images import STDIN, clean_path, open_image, split_images
from deepseek_vl2.cli.options import (
    Loaded,
    add_generation_arguments,
    add_image_argument,
    add_model_arguments,
    generation_options,
    is_out_of_memory,
    load,
    loading_line,
    most_tokens,
    note,
    number,
    room_for_answer,
    whole_number,
)
from deepseek_vl2.cli.parser import suggestion
from deepseek_vl2.cli.tab_completion import complete_with_tab

if TYPE_CHECKING:
    from PIL import Image

    from deepseek_vl2.serve.streaming import Answer

DESCRIPTION = "Talk about images. Drop or paste image files into a message, or name them with /image."
EXAMPLES = """\
examples:
  deepseek-vl2 chat
  deepseek-vl2 chat --model deepseek-ai/deepseek-vl2-tiny --image photo.jpg
  printf 'What is this? photo.jpg\\nAnd its colour?\\n' | deepseek-vl2 chat

/help in the conversation lists what can be done in it. Ctrl-C stops an answer, Ctrl-D ends the program.
"""
PROMPT = "\n> "


@dataclass
class Turn:
    """A question, its images and its answer."""

    question: str
    sources: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    answer: str = ""


class Leave(Exception):
    """The user has had enough."""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the command's options."""
    add_image_argument(parser, "for the first question: paths or addresses, as many as you like")
    parser.add_argument("--raw", action="store_true", help="show tags and boxes as the model says them")
    add_model_arguments(parser)
    add_generation_arguments(parser)


def run(args: Namespace) -> int:
    """Load the model and talk until the input ends."""
    if STDIN in args.image:
        raise ValueError("The standard input holds the conversation: name the image's file.")
    with loading_line(args):
        pending = [(source, open_image(source)) for source in args.image]
    chat = Chat(load(args), args, pending)
    interactive = sys.stdin.isatty()
    if interactive:
        note(f"{chat.loaded.name} is ready. Type a question; drop or paste images into it; /help lists the rest.")
        complete_with_tab(chat.commands)  # and editing and history, for input()
    with contextlib.suppress(Leave):
        for line in read_lines(interactive):
            chat.hear(line)
    return 0


def read_lines(interactive: bool) -> Iterator[str]:
    """Yield the user's lines. A line that ends in a backslash goes on in the next one."""
    whole = ""
    while True:
        try:
            line = input("" if not interactive else "... " if whole else PROMPT)
        except EOFError:
            if interactive:
                note("")
            if whole:
                yield whole
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"The standard input is not text in {error.encoding.upper()}.") from error
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\nCtrl-D or /exit ends the conversation.")
            whole = ""
            continue
        if line.endswith("\\") and not line.endswith("\\\\"):
            whole += line[:-1] + "\n"
            continue
        yield whole + line
        whole = ""


class Chat:
    """A conversation, and what a user can do in it."""

    def __init__(self, loaded: Loaded, args: Namespace, pending: list[tuple[str, Image.Image]]) -> None:
        self.loaded = loaded
        self.args = args
        self.pending = pending  # images for the next question
        self.turns: list[Turn] = []
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/image": (self.add_image, "FILE", "add an image, a path or an address, to the next question"),
            "/clear": (self.clear, "", "begin a new conversation"),
            "/undo": (self.undo, "", "take the last question and its answer back"),
            "/retry": (self.retry, "", "ask the last question again"),
            "/boxes": (self.draw, "FILE", "draw the last answer's boxes into an image file"),
            "/save": (self.save, "FILE", "write the conversation: .json for messages, else Markdown"),
            "/system": (self.set_system, "TEXT", "put a text in front of the conversation"),
            "/temperature": (self.set_temperature, "NUMBER", "0: the likeliest answer; above: sample"),
            "/top_p": (self.set_top_p, "NUMBER", "sample among the tokens that hold this probability"),
            "/seed": (self.set_seed, "NUMBER", "of the next answers' random numbers; without one: another each time"),
            "/max_new_tokens": (self.set_max_new_tokens, "NUMBER", "most tokens of an answer"),
            "/stats": (self.tell_stats, "", "tokens read and written, and what was not computed again"),
            "/help": (self.help, "", "this list"),
            "/exit": (self.leave, "", "end"),
        }

    def hear(self, line: str) -> None:
        """Do what a line says. A mistake in it is told, and the conversation goes on."""
        line = line.strip()
        if not line:
            return
        name, _, rest = line.partition(" ")
        name = {"/quit": "/exit", "/?": "/help"}.get(name.replace("-", "_"), name.replace("-", "_"))
        try:
            if name in self.commands:
                self.commands[name][0](rest.strip())
            elif line.startswith("/") and not split_images(line)[0] and "/" not in name[1:]:
                note(f"There is no command {name}: /help lists them.{suggestion(name, self.commands)}")
            else:
                self.ask(line)
        except (ValueError, OSError, ArgumentTypeError) as error:
            note(str(error))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            note(f"{error} /undo, /clear, fewer images or --chunk_size 512 need less.")

    # ---------------------------------------------------------------- talking

    def ask(self, line: str) -> None:
        """Answer a message; images that it names are taken out of its text and shown to the model."""
        sources, text = split_images(line)
        images = [*self.pending, *((source, open_image(source)) for source in sources)]
        if not text:
            self.pending = images
            self.tell_pending()
            return
        tags = text.count("<image>")
        if tags not in (0, len(images)):
            raise ValueError(f"The message has {tags} <image> tags for {len(images)} images: leave the tags out.")
        turn = Turn(text, [source for source, _ in images], [image for _, image in images])
        self.answer(turn)
        self.pending = []

    def answer(self, turn: Turn) -> None:
        """Generate and show the answer to a new turn; Ctrl-C stops it and keeps what was said."""
        from deepseek_vl2.serve.streaming import TextStream

        inputs = self.loaded.processor(conversations=self.messages([*self.turns, turn]))
        self.warn_of_length(inputs["input_ids"].shape[1])
        stream = TextStream(self.loaded.model, self.loaded.tokenizer, inputs, generation_options(self.args))
        self.turns.append(turn)
        try:
            with stream:
                for shown in self.shown_pieces(stream):
                    print(shown, end="", flush=True)
        except KeyboardInterrupt:
            note("\n(stopped)")
        except BaseException:
            self.turns.pop()
            raise
        turn.answer = stream.answer.text
        print(flush=True)
        self.tell_rest(stream.answer)

    def shown_pieces(self, stream: Iterator[str]) -> Iterator[str]:
        """Yield what is shown of an answer: without tags and numbers, unless asked for."""
        from deepseek_vl2.utils.grounding import plain_text

        text = shown = ""
        for piece in stream:
            if self.args.raw:
                yield piece
                continue
            text += piece
            plain = plain_text(text)
            yield plain[len(shown) :]
            shown = plain

    def messages(self, turns: list[Turn]) -> list[dict[str, Any]]:
        """Return turns as the processor takes them."""
        from deepseek_vl2.models.messages import CHAT_TOKENS
        from deepseek_vl2.utils.prompts import question_about

        conversation: list[dict[str, Any]] = []
        for turn in turns:
            conversation += question_about(turn.images, turn.question)
            conversation.append({"role": CHAT_TOKENS[1], "content": turn.answer})
        return with_system(conversation, self.args.system_prompt)

    def warn_of_length(self, prompt_tokens: int) -> None:
        """Tell when prompt and answer may be longer than what the model was made for.

        Raises:
            ValueError: the prompt alone is.
        """
        longest = most_tokens(self.loaded)
        if room_for_answer(longest, prompt_tokens) < self.args.max_new_tokens:
            note(f"The conversation takes {prompt_tokens} of {longest} tokens: answers may suffer. /clear begins anew.")

    def tell_rest(self, answer: Answer) -> None:
        """Tell what an answer's text does not show: its boxes, that it was cut off, or that it has none."""
        from deepseek_vl2.utils.grounding import parse_grounding, plain_text

        found = [] if self.args.raw else [thing for thing in parse_grounding(answer.text) if thing.boxes]
        for thing in found:
            note(f"  {thing.label or '(no label)'}: {', '.join(str(list(box)) for box in thing.boxes)}")
        if found:
            note("/boxes FILE draws them.")
        elif answer.text.strip() and not plain_text(answer.text).strip() and not self.args.raw:
            note(f"The answer holds tags alone: {answer.text}")
        tell_empty(answer)
        if answer.finish_reason == "length":
            note(f"The answer was cut off after {self.args.max_new_tokens} tokens: /max_new_tokens allows more.")

    def tell_pending(self) -> None:
        """Tell how many images wait for a question."""
        names = ", ".join(Path(source).name[:60] for source, _ in self.pending)
        note(f"For the next question: {names}.")

    # ---------------------------------------------------------------- commands

    def add_image(self, text: str) -> None:
        """``/image``"""
        if not text:
            raise ValueError("Name an image: /image photo.jpg")
        source = clean_path(text)
        self.pending.append((source, open_image(source)))
        self.tell_pending()

    def clear(self, text: str) -> None:
        """``/clear``"""
        self.turns, self.pending = [], []
        note("A new conversation.")

    def last_turn(self) -> Turn:
        """Return the last turn, or raise ``ValueError``."""
        if not self.turns:
            raise ValueError("Nothing has been asked yet.")
        return self.turns[-1]

    def undo(self, text: str) -> None:
        """``/undo``"""
        turn = self.last_turn()
        self.turns.pop()
        note(f"Taken back: {turn.question}")

    def retry(self, text: str) -> None:
        """``/retry``: with a seed, the next one, so that the answer can differ and be had again."""
        turn = self.last_turn()
        if self.args.temperature == 0:
            note("Without sampling the answer is the same: /temperature 0.7 makes it vary.")
        elif self.args.seed is not None:
            self.args.seed += 1
            note(f"With seed {self.args.seed}.")
        self.turns.pop()
        try:
            self.answer(dataclasses.replace(turn, answer=""))
        except BaseException:
            self.turns.append(turn)
            raise

    def draw(self, text: str) -> None:
        """``/boxes``"""
        turn = self.last_turn()
        image = next((turn.images[-1] for turn in reversed(self.turns) if turn.images), None)
        path = clean_path(text) if text else "boxes.jpg"
        check_drawing(path, [] if image is None else [image])
        assert image is not None
        draw_answer(turn.answer, image, path)

    def save(self, text: str) -> None:
        """``/save``"""
        if not text:
            raise ValueError("Name a file: /save conversation.md")
        path = Path(clean_path(text))
        write = self.as_json if path.suffix.lower() == ".json" else self.as_markdown
        path.write_text(write(), encoding="utf-8")
        note(f"Written: {path}.")

    def as_json(self) -> str:
        """Return the conversation as messages, images by their sources."""
        messages = with_system([], self.args.system_prompt)
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question, "images": turn.sources})
            messages.append({"role": "assistant", "content": turn.answer})
        content = {"model": self.loaded.name, "messages": messages}
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    def as_markdown(self) -> str:
        """Return the conversation as Markdown."""
        parts = [f"# {self.loaded.name}"]
        for turn in self.turns:
            parts += [f"![](<{source}>)" for source in turn.sources]
            parts += [f"**{turn.question}**", turn.answer]
        return "\n\n".join(parts) + "\n"

    def set_system(self, text: str) -> None:
        """``/system``"""
        self.args.system_prompt = text
        note("Set." if text else "There is no system prompt now.")

    def set_temperature(self, text: str) -> None:
        """``/temperature``"""
        self.args.temperature = number(0)(text)

    def set_top_p(self, text: str) -> None:
        """``/top_p``"""
        self.args.top_p = number(0, 1, above=True)(text)

    def set_seed(self, text: str) -> None:
        """``/seed``"""
        self.args.seed = whole_number(-(2**63))(text) if text else None

    def set_max_new_tokens(self, text: str) -> None:
        """``/max_new_tokens``"""
        self.args.max_new_tokens = whole_number(1)(text)

    def tell_stats(self, text: str) -> None:
        """``/stats``"""
        from deepseek_vl2.engine.holder import engine_of

        engine = engine_of(self.loaded.model)
        prefixes, stats = engine.scheduler.prefixes, engine.stats
        note(f"{stats.prompt_tokens} tokens read, {prefixes.tokens_saved} reused, {stats.generated_tokens} written.")
        note(f"{engine.images.misses} images encoded, {engine.images.hits} taken from the cache.")

    def help(self, text: str) -> None:
        """``/help``"""
        for name, (_, argument, meaning) in self.commands.items():
            note(f"  {name + ' ' + argument:24}{meaning}")
        note("Image files in a message are shown to the model; a line that ends in \\ goes on in the next one.")

    def leave(self, text: str) -> None:
        """``/exit``"""
        raise Leave
