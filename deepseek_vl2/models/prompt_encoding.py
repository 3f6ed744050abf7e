"""From prompts and turns to token ids, with the places and the grids of their images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from transformers import PreTrainedTokenizerBase

from .conversation import get_conv_template
from .messages import IMAGE_PLACEHOLDER, Message, message_role
from .tiling import Size, TileGrid, count_image_tokens, select_best_resolution, tile_grid


@dataclass
class TokenSequence:
    """A token sequence under construction, with its labels and its images."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image_mask: list[bool] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    grids: list[TileGrid] = field(default_factory=list)
    num_image_tokens: list[int] = field(default_factory=list)

    def add_text(self, ids: list[int], labels: list[int]) -> None:
        """Append text tokens."""
        self.ids += ids
        self.labels += labels
        self.image_mask += [False] * len(ids)

    def add_image(self, image: Image.Image, grid: TileGrid, ids: list[int], ignore_id: int) -> None:
        """Append an image and its tokens, which take no loss."""
        self.ids += ids
        self.labels += [ignore_id] * len(ids)
        self.image_mask += [True] * len(ids)
        self.images.append(image)
        self.grids.append(grid)
        self.num_image_tokens.append(len(ids))

    def drop_last(self, id_: int) -> None:
        """Drop the last token if it is ``id_``."""
        if self.ids and self.ids[-1] == id_:
            del self.ids[-1], self.labels[-1], self.image_mask[-1]


def check_tags(tags: int, images: int, image_token: str) -> None:
    """Raise ``ValueError`` where image tags and images differ in number; both numbers are named."""
    if tags != images:
        raise ValueError(
            f"The prompt has {tags} {image_token} tags but {images} images were given: "
            "each image needs one tag in a user turn, in the same order."
        )


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes the prompts of one call.

    Fields:
        tokenizer: the checkpoint's.
        template: name of the prompt template.
        image_token: the tag that stands for an image.
        image_token_id: the id of each of an image's tokens.
        ignore_id: label where no loss is taken.
        tile_size: side of a tile, in pixels.
        side: tokens along a tile's side.
        cropping: whether images are cut into tiles.
        resolutions: (width, height) pairs that they may be fitted into, in pixels.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    image_token: str
    image_token_id: int
    ignore_id: int
    tile_size: int
    side: int
    cropping: bool
    resolutions: Sequence[Size]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def grid_of(self, image: Image.Image) -> TileGrid:
        """Return how an image is cut into tiles."""
        if not self.cropping:
            return TileGrid(1, 1)
        return tile_grid(select_best_resolution(image.size, self.resolutions), self.tile_size)

    def add_text_with_images(
        self, sequence: TokenSequence, text: str, images: Sequence[Image.Image], masked: bool = False
    ) -> None:
        """Append a text in which each image tag becomes that image's tokens; the pieces between are encoded alone."""
        for index, piece in enumerate(text.split(self.image_token)):
            if index > 0:
                image = images[index - 1]
                grid = self.grid_of(image)
                image_ids = [self.image_token_id] * count_image_tokens(grid, self.side)
                sequence.add_image(image, grid, image_ids, self.ignore_id)
            ids = self.encode_text(piece)
            sequence.add_text(ids, [self.ignore_id] * len(ids) if masked else ids)

    def encode_prompt(
        self, text: str, images: Sequence[Image.Image], bos: bool = True, eos: bool = True
    ) -> TokenSequence:
        """Encode a text with image tags as it is."""
        text = text.replace(IMAGE_PLACEHOLDER, self.image_token)
        check_tags(text.count(self.image_token), len(images), self.image_token)
        sequence = TokenSequence()
        if bos:
            sequence.add_text([self.tokenizer.bos_token_id], [self.tokenizer.bos_token_id])
        self.add_text_with_images(sequence, text, images)
        if eos:
            sequence.add_text([self.tokenizer.eos_token_id], [self.tokenizer.eos_token_id])
        return sequence

    def encode_rendered(self, text: str, images: Sequence[Image.Image]) -> TokenSequence:
        """Encode what the chat template rendered; each answer is encoded on its own, as in a conversation."""
        text = text.replace(IMAGE_PLACEHOLDER, self.image_token).removeprefix(self.tokenizer.bos_token)
        check_tags(text.count(self.image_token), len(images), self.image_token)
        sequence = TokenSequence()
        sequence.add_text([self.tokenizer.bos_token_id], [self.tokenizer.bos_token_id])
        remaining = list(images)
        for piece in re.split(r"(?<=<\|Assistant\|>:)", text):
            tags = piece.count(self.image_token)
            self.add_text_with_images(sequence, piece, remaining[:tags])
            del remaining[:tags]
        return sequence

    def encode_conversation(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image],
        mask_prompt: bool,
        add_generation_prompt: bool = True,
    ) -> TokenSequence:
        """Encode a conversation turn by turn.

        Args:
            messages: with texts as contents.
            images: in the order of their tags.
            mask_prompt: take no loss on system and user turns.
            add_generation_prompt: end a last user turn with the assistant's tag.

        Raises:
            ValueError: tags and images that differ in number, an image tag outside a user turn, an unknown role or a
                system message that is not first.
        """
        conv = get_conv_template(self.template)
        texts = [str(message["content"]).replace(IMAGE_PLACEHOLDER, self.image_token) for message in messages]
        roles = [message_role(message, conv.roles) for message in messages]
        questions: dict[int, str] = {}
        for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
            if role == "system" and index > 0:
                raise ValueError(f"A system message must come first, but one is message {index + 1} of {len(roles)}.")
            if role == "user":
                question = self._render_question(text, first=index == 0)
                if index == len(roles) - 1 and not add_generation_prompt:
                    question = question.removesuffix(f"{conv.roles[1]}:")
                questions[index] = question
            elif self.image_token in text:
                raise ValueError(f"There must be no {self.image_token} in a message of role {role}: {text!r}.")
        check_tags(sum(q.count(self.image_token) for q in questions.values()), len(images), self.image_token)

        sequence = TokenSequence()
        sequence.add_text([self.tokenizer.bos_token_id], [self.tokenizer.bos_token_id])
        remaining = list(images)
        for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
            if role == "user":
                tags = questions[index].count(self.image_token)
                self.add_text_with_images(sequence, questions[index], remaining[:tags], masked=mask_prompt)
                del remaining[:tags]
            else:
                ids = self.encode_text(text.strip()) + [self.tokenizer.eos_token_id] * (role == "assistant")
                masked = role == "system" and mask_prompt
                sequence.add_text(ids, [self.ignore_id] * len(ids) if masked else ids)
        return sequence

    def _render_question(self, text: str, first: bool) -> str:
        """Return a user turn with the assistant's tag behind it; the template's own system message goes before it."""
        conv = get_conv_template(self.template)
        if not first:
            conv.set_system_message("")
        conv.append_message(conv.roles[0], text.strip())
        conv.append_message(conv.roles[1], "")
        return conv.get_prompt()
