"""From prompts and turns to token ids, with the places and the grids of their images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image
from transformers import PreTrainedTokenizerBase

from .messages import ESCAPE, IMAGE_PLACEHOLDER, escaped
from .tiling import Size, TileGrid, count_image_tokens, select_best_resolution, tile_grid
from .turns import Turn


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


def literal_ids(tokenizer: PreTrainedTokenizerBase, image_token: str) -> dict[str, list[int]]:
    """Return the ids of image tags that are text, by how they are written: see `escape_tags`."""
    literals = {}
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    for tag in (image_token, IMAGE_PLACEHOLDER):
        ids = tokenizer.encode(tag, add_special_tokens=False, split_special_tokens=True)
        if image_id in ids:  # a tag that the tokenizer does not hold to be special is never split
            ids = [id_ for part in (tag[:1], tag[1:]) for id_ in tokenizer.encode(part, add_special_tokens=False)]
        literals[escaped(tag)] = ids
    return literals


def encode_with_literals(tokenizer: PreTrainedTokenizerBase, text: str, literals: Mapping[str, list[int]]) -> list[int]:
    """Return the ids of a text, without bos and eos, in which escaped tags get the ids of their letters.

    Raises:
        ValueError: it holds half a character.
    """
    try:
        return _encode_with_literals(tokenizer, text, literals)
    except TypeError as error:
        half = re.search("[\ud800-\udfff]", text)
        if half is None:
            raise
        raise ValueError(
            f"A text holds U+{ord(half[0]):04X}, half of a character (a lone surrogate): read it with errors='replace'."
        ) from error


def _encode_with_literals(
    tokenizer: PreTrainedTokenizerBase, text: str, literals: Mapping[str, list[int]]
) -> list[int]:
    if ESCAPE not in text:
        return tokenizer.encode(text, add_special_tokens=False)
    pieces = re.split("(" + "|".join(map(re.escape, literals)) + ")", text)
    encoded = (literals.get(p) or tokenizer.encode(p, add_special_tokens=False) for p in pieces if p)
    return [id_ for ids in encoded for id_ in ids]


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes the prompts of one call.

    Fields:
        tokenizer: the checkpoint's.
        image_token: the tag that stands for an image.
        literals: ids of the tags that are text, by how they are written.
        image_token_id: the id of each of an image's tokens.
        ignore_id: label where no loss is taken.
        tile_size: side of a tile, in pixels.
        side: tokens along a tile's side.
        cropping: whether images are cut into tiles.
        resolutions: (width, height) pairs that they may be fitted into, in pixels.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token: str
    literals: Mapping[str, list[int]]
    image_token_id: int
    ignore_id: int
    tile_size: int
    side: int
    cropping: bool
    resolutions: Sequence[Size]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos; see `encode_with_literals`."""
        return encode_with_literals(self.tokenizer, text, self.literals)

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

    def encode_rendered(
        self, text: str, images: Sequence[Image.Image], inference_mode: bool = True, bos: bool = True
    ) -> TokenSequence:
        """Encode what the chat template rendered, or what was printed; each answer is encoded on its own.

        A printed answer has a space in front, which is not tokenized. Where the last one is printed, its end token is
        dropped in inference, as it is of the conversation.

        Args:
            text: with or without bos.
            images: in the order of their tags.
            inference_mode: drop that end token.
            bos: add one where the text has none.
        """
        text = text.replace(IMAGE_PLACEHOLDER, self.image_token)
        bos = bos or text.startswith(self.tokenizer.bos_token)
        text = text.removeprefix(self.tokenizer.bos_token)
        check_tags(text.count(self.image_token), len(images), self.image_token)
        sequence = TokenSequence()
        if bos:
            sequence.add_text([self.tokenizer.bos_token_id], [self.tokenizer.bos_token_id])
        remaining = list(images)
        printed = False
        for index, piece in enumerate(re.split(r"(?<=<\|Assistant\|>:)", text)):
            printed = index > 0 and piece.startswith(" ")
            tags = piece.count(self.image_token)
            self.add_text_with_images(sequence, piece[1:] if printed else piece, remaining[:tags])
            del remaining[:tags]
        if printed and inference_mode:
            sequence.drop_last(self.tokenizer.eos_token_id)
        return sequence

    def encode_turns(self, turns: Sequence[Turn], images: Sequence[Image.Image], mask_prompt: bool) -> TokenSequence:
        """Encode a conversation turn by turn.

        Args:
            turns: what `walk_turns` returned.
            images: in the order of their tags.
            mask_prompt: take no loss on system and user turns.

        Raises:
            ValueError: tags and images that differ in number.
        """
        check_tags(sum(turn.count_tags(self.image_token) for turn in turns), len(images), self.image_token)
        sequence = TokenSequence()
        sequence.add_text([self.tokenizer.bos_token_id], [self.tokenizer.bos_token_id])
        remaining = list(images)
        for turn in turns:
            if turn.role == "user":
                tags = turn.count_tags(self.image_token)
                self.add_text_with_images(sequence, turn.text, remaining[:tags], masked=mask_prompt)
                del remaining[:tags]
            else:
                ids = self.encode_text(turn.text) + [self.tokenizer.eos_token_id] * (turn.role == "assistant")
                masked = turn.role == "system" and mask_prompt
                sequence.add_text(ids, [self.ignore_id] * len(ids) if masked else ids)
        return sequence
