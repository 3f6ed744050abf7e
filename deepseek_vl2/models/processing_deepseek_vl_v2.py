"""From a conversation and its images to the tensors that the model takes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from .conversation import Conversation, get_conv_template
from .image_loading import check_image_size, read_image, to_rgb
from .messages import (
    CHAT_TEMPLATE,
    CHAT_TOKENS,
    GROUNDING_TOKENS,
    IMAGE_PLACEHOLDER,
    SYSTEM_ROLES,
    Message,
    message_role,
    messages_to_conversation,
)
from .tiling import (
    MAX_TILED_IMAGES,
    Size,
    TileGrid,
    count_image_tokens,
    select_best_resolution,
    tile_grid,
    tokens_per_side,
)
from .views import ByteTiles, Picture, Pictures, are_kept, map_in_threads, stack_tiles

HELD = (ByteTiles, Pictures)


class _OutputWithTiles(BatchFeature):
    """Fields of which the images may be held as bytes: they become the tensor that users see when it is first read.

    Until then copying to a device, pickling and batching handle a quarter of the memory, and the tensor is made on the
    device that the bytes are on by then. Where there is a GPU that scales images, even that waits until they are moved.
    """

    def __init__(self, data: dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__({**(data or {}), **fields})

    @property
    def data(self) -> dict[str, Any]:
        """The fields as a plain dict, the images as a tensor."""
        fields = self.held()
        for name, value in fields.items():
            if isinstance(value, HELD):
                fields[name] = value.numbers()
        return fields

    @data.setter
    def data(self, fields: dict[str, Any]) -> None:
        self.__dict__["data"] = fields

    def held(self) -> dict[str, Any]:
        """Return the fields as they are held, the images perhaps as `ByteTiles` or `Pictures`."""
        return self.__dict__["data"]

    def __getitem__(self, item: str) -> Any:
        if not isinstance(item, str) or isinstance(self.held().get(item), HELD):
            return super().__getitem__(item)
        return self.held()[item]

    def __getattr__(self, item: str) -> Any:
        try:
            return self[item]
        except KeyError:
            raise AttributeError(f"There is no field {item!r}.") from None

    def __setitem__(self, item: str, value: Any) -> None:
        self.held()[item] = value

    def __contains__(self, item: object) -> bool:
        return item in self.held()

    def __iter__(self) -> Iterator[str]:
        return iter(self.held())

    def __copy__(self) -> Any:
        assert self.data is not None  # a shallow copy shares the tensors, so they must be there
        return super().__copy__()

    def __getstate__(self) -> dict[str, Any]:
        fields = self.held().items()
        return {"data": {name: value.tiles() if isinstance(value, Pictures) else value for name, value in fields}}

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """Move the tensors to ``device`` in place, cast the images to ``dtype``, and return self.

        Images that nobody has read yet travel as bytes, and are normalised on ``device``: the same bits. Without a
        dtype they keep float32: the model casts them to its own dtype when it looks at them.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        fields = self.held()
        for name, value in fields.items():
            if isinstance(value, HELD):
                fields[name] = value.to(device, dtype, **kwargs)
            elif isinstance(value, torch.Tensor):
                cast = dtype if value.is_floating_point() else None
                fields[name] = value.to(device=device, dtype=cast, **kwargs)
        return self


class VLChatProcessorOutput(_OutputWithTiles):
    """One processed sample. Fields are read as attributes or as items.

    Fields:
        sft_format (str): the prompt as a person reads it.
        input_ids (LongTensor [T]): token ids, image tokens included.
        target_ids (LongTensor [T]): labels; -100 where no loss is taken.
        images (FloatTensor [tiles, 3, S, S]): normalised tiles, each image's global view first.
        images_seq_mask (BoolTensor [T]): where image tokens stand.
        images_spatial_crop (LongTensor [images, 2]): tiles across and down, for each image.
        num_image_tokens (list[int]): tokens of each image.
    """

    def __len__(self) -> int:
        return len(self["input_ids"])


class BatchCollateOutput(_OutputWithTiles):
    """A batch of samples, padded on the left. Fields are read as attributes or as items.

    Fields:
        sft_format (list[str]): the prompts as a person reads them.
        input_ids (LongTensor [B, T]), labels (LongTensor [B, T]), attention_mask (BoolTensor [B, T]).
        images (FloatTensor [B, tiles, 3, S, S]): rows with fewer tiles end in zeros.
        images_seq_mask (BoolTensor [B, T]): where image tokens stand.
        images_spatial_crop (LongTensor [B, images, 2]): rows with fewer images end in [0, 0].
        seq_lens (list[int]): length of each sample before padding.
    """


class ImageTransform:
    """Turn RGB images into normalised tensors: value / 255, minus ``mean``, over ``std``.

    Args:
        mean: mean of each channel, 0 to 1.
        std: standard deviation of each channel.
        normalize: when false, only divide by 255.
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
    ) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.normalize = normalize

    @property
    def background(self) -> tuple[int, ...]:
        """Colour, 0 to 255, that pads an image to its resolution."""
        return tuple(int(value * 255) for value in self.mean)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return one RGB image as a float tensor of shape [3, H, W]."""
        return self.batch([image])[0]

    def batch(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return RGB images of one size as a float tensor of shape [N, 3, H, W]."""
        # A table of 256 values, channel by channel: the same bits as arithmetic on each pixel.
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return ByteTiles(pixels, self.values_of_bytes(), (len(images),)).numbers()

    def values_of_bytes(self) -> torch.Tensor:
        """Return what each byte of each channel becomes, [3, 256]."""
        values = torch.arange(256, dtype=torch.float32).repeat(3, 1).div_(255)
        if self.normalize:
            values.sub_(torch.tensor(self.mean)[:, None]).div_(torch.tensor(self.std)[:, None])
        return values


class _Sample:
    """A token sequence under construction, with its labels and its images."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.image_mask: list[bool] = []
        self.images: list[Image.Image] = []
        self.grids: list[TileGrid] = []
        self.num_image_tokens: list[int] = []

    def add_text(self, ids: list[int], labels: list[int]) -> None:
        self.ids += ids
        self.labels += labels
        self.image_mask += [False] * len(ids)

    def add_image(self, image: Image.Image, grid: TileGrid, ids: list[int], ignore_id: int) -> None:
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


class DeepseekVLV2Processor(ProcessorMixin):
    """Tokenizer, tiling and prompt format of DeepSeek-VL2 in one callable.

    Args:
        tokenizer: the checkpoint's tokenizer, as ``PreTrainedTokenizerFast``.
        candidate_resolutions: (width, height) pairs, in pixels; the first one's width is the tile size.
        patch_size: side of a patch, in pixels.
        downsample_ratio: side of the square of patches that become one token.
        image_mean, image_std: normalisation of each channel, 0 to 1.
        normalize: whether to normalise at all.
        image_token: the tag that stands for an image in a prompt.
        pad_token: added as the padding token when the tokenizer has none.
        add_special_token: kept for old configs; special tokens are placed by the prompt format.
        sft_format: name of the prompt template ("deepseek", "deepseekv2", "plain", "alignment").
        mask_prompt: take no loss on system and user turns.
        ignore_id: label where no loss is taken.
        chat_template: a Jinja template instead of the one that equals the "deepseek" prompt format.

    Raises:
        ValueError: an unknown prompt template, resolutions that are not whole tiles, or a tokenizer that loses spaces.

    Source: ``processing_deepseek_vl_v2.py`` of the original package.
    """

    attributes = ["tokenizer"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        candidate_resolutions: Sequence[Sequence[int]] = ((384, 384),),
        patch_size: int = 14,
        downsample_ratio: int = 2,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
        image_token: str = "<image>",
        pad_token: str = "<｜▁pad▁｜>",
        add_special_token: bool = False,
        sft_format: str = "deepseek",
        mask_prompt: bool = True,
        ignore_id: int = -100,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        get_conv_template(sft_format)  # an unknown name is an error here, not at the first call
        self.candidate_resolutions = [(int(width), int(height)) for width, height in candidate_resolutions]
        self.image_size = self.candidate_resolutions[0][0]
        self._check_resolutions(self.candidate_resolutions)
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.normalize = normalize
        self.image_transform = ImageTransform(mean=image_mean, std=image_std, normalize=normalize)
        self.image_token = image_token
        self.pad_token = pad_token
        self.add_special_token = add_special_token
        self.sft_format = sft_format
        self.mask_prompt = mask_prompt
        self.ignore_id = ignore_id
        self._prepare_tokenizer(tokenizer)
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        tokenizer.chat_template = self.chat_template

    # ---------------------------------------------------------------- tokenizer

    def _check_resolutions(self, resolutions: Sequence[Size]) -> None:
        for resolution in resolutions:
            tile_grid(resolution, self.image_size)

    def _prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add the tokens that the prompts need and the tokenizer lacks, and check that it keeps spaces."""
        probe = "Two words,  two spaces: 12 34."
        if tokenizer.decode(tokenizer.encode(probe, add_special_tokens=False)) != probe:
            raise ValueError(
                f"This {type(tokenizer).__name__} loses spaces. The tokenizers of DeepSeek-VL2 are byte-level: load "
                "them with transformers.PreTrainedTokenizerFast, or use DeepseekVLV2Processor.from_pretrained."
            )
        # The position of a sample's last token must not depend on the batch: generation continues from there.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": self.pad_token})
        vocabulary = tokenizer.get_vocab()
        missing = [t for t in (self.image_token, *GROUNDING_TOKENS, *CHAT_TOKENS) if t not in vocabulary]
        if missing:
            tokenizer.add_tokens(missing, special_tokens=True)
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(self.image_token))

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[PreTrainedTokenizerBase]:
        # The released tokenizer_config.json names LlamaTokenizerFast; transformers 5 then drops the byte-level
        # pre-tokenizer that tokenizer.json asks for, and spaces vanish.
        for name in ("trust_remote_code", "_from_auto", "processor_class", "code_revision"):
            kwargs.pop(name, None)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer.init_kwargs.pop("auto_map", None)
        return [tokenizer]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a tokenizer and the content of processor_config.json.

        A chat template that never writes this model's role tags belongs to another model (one release ships such a
        stray file) and is left out.
        """
        template = processor_dict.get("chat_template")
        if template is not None and not (isinstance(template, str) and "<|User|>" in template):
            processor_dict = {name: value for name, value in processor_dict.items() if name != "chat_template"}
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @property
    def bos_id(self) -> int:
        """Id of the token that opens every sequence."""
        return self.tokenizer.bos_token_id

    @property
    def eos_id(self) -> int:
        """Id of the token that ends an answer."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.tokenizer.pad_token_id

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        return ["input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop"]

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Return the ids of a text, with bos in front and eos behind where asked for."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Any, **kwargs: Any) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(t, **kwargs)

    # ---------------------------------------------------------------- prompts as text

    def new_chat_template(self) -> Conversation:
        """Return a fresh copy of this processor's prompt template."""
        return get_conv_template(self.sft_format)

    def format_messages(
        self,
        conversations: Sequence[Message],
        sft_format: str = "deepseek",
        system_prompt: str = "",
    ) -> str:
        """Return a conversation as a person reads it.

        A conversation that ends with the user's turn is shown with the assistant's tag that asks for the answer.
        """
        conv = get_conv_template(sft_format)
        for message in conversations:
            conv.append_message(message["role"], str(message["content"]).strip())
        if conversations and message_role(conversations[-1], conv.roles) == "user":
            conv.append_message(conv.roles[1], "")
        return (system_prompt.strip() + conv.get_prompt()).strip()

    def format_prompts(self, prompts: str, sft_format: str = "deepseek", system_prompt: str = "") -> str:
        """Return a bare prompt wrapped as one user turn."""
        conv = get_conv_template(sft_format)
        conv.append_message(conv.roles[0], prompts.strip())
        conv.append_message(conv.roles[1], "")
        return (system_prompt.strip() + conv.get_prompt()).strip()

    # ---------------------------------------------------------------- images

    def _tiles(self, sample: _Sample) -> ByteTiles | Pictures:
        """Return each image's global view followed by its local tiles; one tile of zeros where there is no image."""
        side, values = self.image_size, self.image_transform.values_of_bytes()
        if not sample.images:
            return ByteTiles(torch.zeros(1, side, side, 3, dtype=torch.uint8), values, (0,))
        kept = are_kept(sample.images)
        sources: Sequence[Any] = [np.asarray(image) for image in sample.images] if kept else sample.images
        views = tuple(Picture(source, grid) for source, grid in zip(sources, sample.grids, strict=True))
        pictures = Pictures((views,), side, self.image_transform.background, values)
        return pictures if kept else pictures.tiles()

    def _add_text_with_images(
        self,
        sample: _Sample,
        text: str,
        images: Sequence[Image.Image],
        cropping: bool,
        resolutions: Sequence[Size],
        masked: bool = False,
    ) -> None:
        """Append a text in which each image tag becomes that image's tokens; the pieces between are encoded alone."""
        pieces = text.split(self.image_token)
        side = tokens_per_side(self.image_size, self.patch_size, self.downsample_ratio)
        for index, piece in enumerate(pieces):
            if index > 0:
                image = images[index - 1]
                grid = TileGrid(1, 1)
                if cropping:
                    grid = tile_grid(select_best_resolution(image.size, resolutions), self.image_size)
                image_ids = [self.image_token_id] * count_image_tokens(grid, side)
                sample.add_image(image, grid, image_ids, self.ignore_id)
            ids = self.encode(piece, bos=False)
            sample.add_text(ids, [self.ignore_id] * len(ids) if masked else ids)

    def tokenize_with_images(
        self,
        conversation: str,
        images: Sequence[Image.Image],
        bos: bool = True,
        eos: bool = True,
        cropping: bool = True,
    ) -> tuple[list[int], list[torch.Tensor], list[bool], list[list[int]], list[int]]:
        """Tokenize one text with image tags.

        Returns ids, tiles ([3, S, S] each), the mask of image tokens, [across, down] and the token count of each image.
        Raises ``ValueError`` when tags and images differ in number.
        """
        sample = self._encode_prompt(conversation, images, cropping, self.candidate_resolutions, bos=bos, eos=eos)
        tiles = list(self._tiles(sample).numbers()) if sample.images else []
        return sample.ids, tiles, sample.image_mask, [list(grid) for grid in sample.grids], sample.num_image_tokens

    def _check_tags(self, tags: int, images: int) -> None:
        if tags != images:
            raise ValueError(
                f"The prompt has {tags} {self.image_token} tags but {images} images were given: "
                "each image needs one tag in a user turn, in the same order."
            )

    # ---------------------------------------------------------------- prompts as tokens

    def _encode_prompt(
        self,
        text: str,
        images: Sequence[Image.Image],
        cropping: bool,
        resolutions: Sequence[Size],
        bos: bool = True,
        eos: bool = True,
    ) -> _Sample:
        text = text.replace(IMAGE_PLACEHOLDER, self.image_token)
        self._check_tags(text.count(self.image_token), len(images))
        sample = _Sample()
        if bos:
            sample.add_text([self.bos_id], [self.bos_id])
        self._add_text_with_images(sample, text, images, cropping, resolutions)
        if eos:
            sample.add_text([self.eos_id], [self.eos_id])
        return sample

    def _encode_rendered(
        self, text: str, images: Sequence[Image.Image], cropping: bool, resolutions: Sequence[Size]
    ) -> _Sample:
        """Encode what the chat template rendered; each answer is encoded on its own, as in a conversation."""
        text = text.replace(IMAGE_PLACEHOLDER, self.image_token).removeprefix(self.tokenizer.bos_token)
        self._check_tags(text.count(self.image_token), len(images))
        sample = _Sample()
        sample.add_text([self.bos_id], [self.bos_id])
        remaining = list(images)
        for piece in re.split(r"(?<=<\|Assistant\|>:)", text):
            tags = piece.count(self.image_token)
            self._add_text_with_images(sample, piece, remaining[:tags], cropping, resolutions)
            del remaining[:tags]
        return sample

    def _encode_conversation(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image],
        cropping: bool,
        resolutions: Sequence[Size],
        add_generation_prompt: bool = True,
        mask_prompt: bool | None = None,
    ) -> _Sample:
        mask_prompt = self.mask_prompt if mask_prompt is None else mask_prompt
        conv = self.new_chat_template()
        template_system = conv.system_message
        texts = [str(message["content"]).replace(IMAGE_PLACEHOLDER, self.image_token) for message in messages]
        roles = [message_role(message, conv.roles) for message in messages]
        questions: dict[int, str] = {}
        for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
            if role == "system" and index > 0:
                raise ValueError(f"A system message must come first, but one is message {index + 1} of {len(roles)}.")
            if role != "user":
                if self.image_token in text:
                    raise ValueError(f"There must be no {self.image_token} in a message of role {role}: {text!r}.")
                continue
            conv.reset_message()
            conv.set_system_message(template_system if index == 0 else "")
            conv.append_message(conv.roles[0], text.strip())
            conv.append_message(conv.roles[1], "")
            questions[index] = conv.get_prompt()
            if index == len(roles) - 1 and not add_generation_prompt:
                questions[index] = questions[index].removesuffix(f"{conv.roles[1]}:")
        self._check_tags(sum(q.count(self.image_token) for q in questions.values()), len(images))

        sample = _Sample()
        sample.add_text([self.bos_id], [self.bos_id])
        remaining = list(images)
        for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
            if role == "user":
                tags = questions[index].count(self.image_token)
                self._add_text_with_images(
                    sample, questions[index], remaining[:tags], cropping, resolutions, masked=mask_prompt
                )
                del remaining[:tags]
            else:
                ids = self.encode(text.strip(), bos=False, eos=role == "assistant")
                masked = role == "system" and mask_prompt
                sample.add_text(ids, [self.ignore_id] * len(ids) if masked else ids)
        return sample

    def format_messages_v2(
        self, messages: Sequence[Message], pil_images: Sequence[Image.Image], systems: Any = None
    ) -> tuple[list[int], list[int], list[torch.Tensor], list[bool], list[list[int]], list[int]]:
        """Tokenize a conversation; the original package's name for it.

        Returns ids, labels, tiles, the mask of image tokens, [across, down] and the token count of each image.
        """
        cropping = len(pil_images) <= MAX_TILED_IMAGES
        sample = self._encode_conversation(messages, pil_images, cropping, self.candidate_resolutions)
        tiles = list(self._tiles(sample).numbers()) if sample.images else []
        grids = [list(grid) for grid in sample.grids]
        return sample.ids, sample.labels, tiles, sample.image_mask, grids, sample.num_image_tokens

    # ---------------------------------------------------------------- samples and batches

    def _finish(self, sample: _Sample, sft_format: str) -> VLChatProcessorOutput:
        input_ids = torch.tensor(sample.ids, dtype=torch.long)
        target_ids = torch.tensor(sample.labels, dtype=torch.long)
        target_ids[input_ids == self.image_token_id] = self.ignore_id
        grids = sample.grids or [TileGrid(0, 0)]
        return VLChatProcessorOutput(
            sft_format=sft_format,
            input_ids=input_ids,
            target_ids=target_ids,
            images=self._tiles(sample),
            images_seq_mask=torch.tensor(sample.image_mask, dtype=torch.bool),
            images_spatial_crop=torch.tensor(grids, dtype=torch.long),
            num_image_tokens=sample.num_image_tokens,
        )

    def _load_images(self, images: Iterable[Any] | None, max_pixels: int | None) -> list[Image.Image]:
        limit: dict[str, int] = {} if max_pixels is None else {"max_pixels": max_pixels}
        sources = list(images or [])
        if not any(isinstance(source, Image.Image) for source in sources):
            return map_in_threads(lambda source: read_image(source, **limit), sources)
        # A PIL image may stand in several places, and is not to be decoded in two threads at once.
        loaded = []
        for index, source in enumerate(sources):
            if isinstance(source, Image.Image):
                check_image_size(source, f"Image {index + 1}", **limit)
                loaded.append(to_rgb(source, f"Image {index + 1}"))
            else:
                loaded.append(read_image(source, **limit))
        return loaded

    def process_one(
        self,
        prompt: str | None = None,
        conversations: Sequence[Message] | None = None,
        images: Sequence[Any] | None = None,
        apply_sft_format: bool = False,
        inference_mode: bool = True,
        system_prompt: str = "",
        cropping: bool | None = None,
        candidate_resolutions: Sequence[Sequence[int]] | None = None,
        max_pixels: int | None = None,
        mask_prompt: bool | None = None,
        **kwargs: Any,
    ) -> VLChatProcessorOutput:
        """Process one prompt or one conversation.

        Args:
            prompt: a text with image tags, tokenized as it is.
            conversations: messages, each with ``role``, ``content`` and, in user turns, optionally ``images``.
            images: PIL images, paths, bytes or data URLs, in the order of their tags. When left out, the images that
                the messages name are loaded.
            apply_sft_format: wrap ``prompt`` as one user turn first.
            inference_mode: drop the last eos, so that the model goes on.
            system_prompt: put in front as a system message.
            cropping: cut images into tiles; by default while there are at most two images.
            candidate_resolutions: (width, height) pairs, in pixels, instead of the processor's own.
            max_pixels: refuse larger images.
            mask_prompt: take no loss on the system and user turns of a conversation; by default the processor's own.

        Raises:
            ValueError: prompt and conversations both given or neither; tags and images that differ in number;
                an image tag outside a user turn; an unknown role; a system message that is not first; a bad image.
            FileNotFoundError: an image file that is not there.
        """
        if kwargs:
            raise TypeError(f"Unknown arguments: {', '.join(kwargs)}.")
        if (prompt is None) == (conversations is None):
            raise ValueError("Give either prompt or conversations, not both and not neither.")
        if conversations is not None:
            conversations = self.messages_to_conversation(conversations)
        if conversations is not None and images is None:
            images = [image for message in conversations for image in message.get("images") or []]
        loaded = self._load_images(images, max_pixels)
        cropping = len(loaded) <= MAX_TILED_IMAGES if cropping is None else cropping
        resolutions = self._resolutions(candidate_resolutions)
        if conversations is not None:
            conversations = self._with_system_prompt(conversations, system_prompt)
            sample = self._encode_conversation(conversations, loaded, cropping, resolutions, mask_prompt=mask_prompt)
            skip = 1 if system_prompt else 0
            sft_format = self.format_messages(conversations[skip:], self.sft_format, system_prompt)
        else:
            assert prompt is not None
            if apply_sft_format:
                sft_format = self.format_prompts(prompt, self.sft_format, system_prompt)
            else:
                sft_format = system_prompt.strip() + prompt
            sample = self._encode_prompt(sft_format, loaded, cropping, resolutions)
        if inference_mode:
            sample.drop_last(self.eos_id)
        return self._finish(sample, sft_format)

    def _resolutions(self, candidate_resolutions: Sequence[Sequence[int]] | None) -> Sequence[Size]:
        if candidate_resolutions is None:
            return self.candidate_resolutions
        resolutions = [(int(width), int(height)) for width, height in candidate_resolutions]
        self._check_resolutions(resolutions)
        return resolutions

    @staticmethod
    def _with_system_prompt(conversations: Sequence[Message], system_prompt: str) -> Sequence[Message]:
        if not conversations:
            raise ValueError("The conversation has no messages.")
        if not system_prompt:
            return conversations
        if conversations[0]["role"] in SYSTEM_ROLES:
            raise ValueError("Give system_prompt or a system message in the conversation, not both.")
        return [{"role": "system", "content": system_prompt}, *conversations]

    def __call__(
        self,
        images: Sequence[Any] | Image.Image | None = None,
        text: str | Sequence[str] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        conversations: Sequence[Any] | None = None,
        apply_sft_format: bool = False,
        force_batchify: bool = True,
        inference_mode: bool = True,
        system_prompt: str = "",
        cropping: bool | None = None,
        candidate_resolutions: Sequence[Sequence[int]] | None = None,
        max_pixels: int | None = None,
        padding: bool | str = True,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> Any:
        """Process a prompt, a conversation, or a list of either.

        Args:
            images: images in the order of their tags; for a list of samples, a list for each or all in one flat list.
            text: what the chat template rendered; bos is added when it is missing.
            prompt: a text, or a list of texts; see `process_one`.
            conversations: a conversation (a list of messages), or a list of conversations.
            force_batchify: return a batch of one, rather than a bare sample, for a single input.
            padding: "left" or "right"; True means left.
            return_tensors: only "pt".
            apply_sft_format, inference_mode, system_prompt, cropping, candidate_resolutions, max_pixels:
                see `process_one`.
            **kwargs: not known here; a warning names them.

        Returns:
            `BatchCollateOutput`, or `VLChatProcessorOutput` for a single input without ``force_batchify``.

        Raises:
            ValueError, FileNotFoundError: see `process_one`.
        """
        if kwargs:
            # transformers' pipelines hand their own options to every processor.
            warnings.warn(f"The processor does not know, and ignores: {', '.join(kwargs)}.", stacklevel=2)
        if return_tensors != "pt":
            raise ValueError(f"Only return_tensors='pt' is supported, got {return_tensors!r}.")
        if sum(source is not None for source in (text, prompt, conversations)) != 1:
            raise ValueError("Give exactly one of text, prompt and conversations.")
        tiling: dict[str, Any] = {
            "cropping": cropping,
            "candidate_resolutions": candidate_resolutions,
            "max_pixels": max_pixels,
        }
        if isinstance(images, (Image.Image, str, bytes)):
            images = [images]
        sources, single = self._as_list(text, prompt, conversations)
        samples = []
        for source, source_images in zip(sources, self._distribute(images, sources, single), strict=True):
            if text is not None:
                samples.append(self._process_rendered(source, source_images, **tiling))
                continue
            kind: dict[str, Any] = {"prompt": source} if prompt is not None else {"conversations": source}
            samples.append(
                self.process_one(
                    **kind,
                    images=source_images,
                    apply_sft_format=apply_sft_format,
                    inference_mode=inference_mode,
                    system_prompt=system_prompt,
                    **tiling,
                )
            )
        if single and not force_batchify:
            return samples[0]
        return self.batchify(samples, padding="right" if padding == "right" else "left")

    def _process_rendered(
        self,
        text: str,
        images: Sequence[Any] | None,
        cropping: bool | None,
        candidate_resolutions: Sequence[Sequence[int]] | None,
        max_pixels: int | None,
    ) -> VLChatProcessorOutput:
        loaded = self._load_images(images, max_pixels)
        cropping = len(loaded) <= MAX_TILED_IMAGES if cropping is None else cropping
        sample = self._encode_rendered(text, loaded, cropping, self._resolutions(candidate_resolutions))
        return self._finish(sample, text)

    @staticmethod
    def _as_list(text: Any, prompt: Any, conversations: Any) -> tuple[list[Any], bool]:
        """Return the inputs as a list, and whether there was a single one."""
        if conversations is not None:
            single = not conversations or isinstance(conversations[0], Mapping)
            return ([conversations] if single else list(conversations)), single
        source = prompt if text is None else text
        return ([source], True) if isinstance(source, str) else (list(source), False)

    def _distribute(self, images: Any, sources: list[Any], single: bool) -> list[Sequence[Any] | None]:
        """Give each input its images."""
        if images is None:
            return [None] * len(sources)
        images = list(images)
        nested = bool(images) and all(item is None or isinstance(item, (list, tuple)) for item in images)
        if single:
            return [list(images[0] or []) if nested else images]
        if nested:
            if len(images) != len(sources):
                raise ValueError(f"{len(images)} lists of images were given for {len(sources)} inputs.")
            return [list(item or []) for item in images]
        counts = [self._count_tags(source) for source in sources]
        self._check_tags(sum(counts), len(images))
        starts = [sum(counts[:index]) for index in range(len(counts))]
        return [images[start : start + count] for start, count in zip(starts, counts, strict=True)]

    def _count_tags(self, source: Any) -> int:
        conversation = [] if isinstance(source, str) else self.messages_to_conversation(source)
        texts = [source] if isinstance(source, str) else [message["content"] for message in conversation]
        return sum(t.replace(IMAGE_PLACEHOLDER, self.image_token).count(self.image_token) for t in texts)

    def batchify(
        self, sample_list: Sequence[VLChatProcessorOutput], padding: Literal["left", "right"] = "left"
    ) -> BatchCollateOutput:
        """Pad samples to one length and stack them; the tiles of a single sample are shared with it, not copied.

        Images that nobody has read yet stay bytes.

        Args:
            sample_list: what `process_one` returned.
            padding: side of the padding tokens; generation needs "left".

        Raises:
            ValueError: there are no samples.
        """
        if not sample_list:
            raise ValueError("There are no samples to batch.")

        def stack(name: str, value: float, left: bool = False) -> torch.Tensor:
            rows = [sample[name] for sample in sample_list]
            out = rows[0].new_full((len(rows), max(len(row) for row in rows), *rows[0].shape[1:]), value)
            for index, row in enumerate(rows):
                start = out.shape[1] - len(row) if left else 0
                out[index, start : start + len(row)] = row
            return out

        images: Any = stack_tiles([sample.held()["images"] for sample in sample_list])
        if images is None:
            images = sample_list[0]["images"][None] if len(sample_list) == 1 else stack("images", 0)
        left = padding == "left"
        lengths = [len(sample["input_ids"]) for sample in sample_list]
        positions = torch.arange(max(lengths)).expand(len(lengths), -1)
        lengths_column = torch.tensor(lengths)[:, None]
        attention_mask = positions >= max(lengths) - lengths_column if left else positions < lengths_column
        return BatchCollateOutput(
            sft_format=[sample["sft_format"] for sample in sample_list],
            input_ids=stack("input_ids", self.pad_id, left),
            labels=stack("target_ids", self.ignore_id, left),
            attention_mask=attention_mask,
            images=images,
            images_seq_mask=stack("images_seq_mask", False, left),
            images_spatial_crop=stack("images_spatial_crop", 0),
            seq_lens=lengths,
        )

    # ---------------------------------------------------------------- OpenAI-style messages

    def messages_to_conversation(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Turn messages with OpenAI-style content parts into a conversation with image tags.

        An image part is a dict of type "image" with its source under ``image``, ``path``, ``url`` or ``base64``, or of
        type "image_url" with ``image_url`` (a string or ``{"url": ...}``).

        Raises:
            ValueError: a part of unknown type, or an image part without a source.
        """
        return messages_to_conversation(messages, self.image_token)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages as a prompt, or process them into tensors.

        Args:
            conversation: messages with OpenAI-style or plain content, or a list of such conversations.
            chat_template: another Jinja template.
            add_generation_prompt: end where the model goes on: with the assistant's tag after a user turn, without eos
                after an assistant turn.
            continue_final_message: leave the last assistant turn open, for the model to go on.
            tokenize: return tensors rather than text.
            return_dict: return all tensors rather than ``input_ids`` alone.
            processor_kwargs: ``cropping``, ``candidate_resolutions`` and ``max_pixels`` of `process_one`; they may
                also be given directly. Other names reach the template.

        Returns:
            The text (a list of texts for several conversations), `BatchCollateOutput`, or ``input_ids`` [B, T].

        Raises:
            ValueError: see `process_one`; the default template accepts the same conversations.
        """
        single = not conversation or isinstance(conversation[0], Mapping)
        batch = [conversation] if single else list(conversation)
        options = {**(processor_kwargs or {}), **kwargs}
        tiling: dict[str, Any] = {
            name: options.pop(name, None) for name in ("cropping", "candidate_resolutions", "max_pixels")
        }
        for name in ("padding", "return_tensors", "truncation", "tools", "documents", "load_audio_from_video"):
            options.pop(name, None)
        custom = chat_template is not None or self.chat_template != CHAT_TEMPLATE
        if not tokenize or custom:
            settings = {
                "chat_template": chat_template or self.chat_template,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                **options,
            }
            rendered = [self._render(messages, settings) for messages in batch]
            if not tokenize:
                return rendered[0] if single else rendered
        samples = []
        for index, messages in enumerate(batch):
            turns = self.messages_to_conversation(messages)
            images = [image for turn in turns for image in turn["images"]]
            if custom:
                samples.append(self._process_rendered(rendered[index], images, **tiling))
            else:
                samples.append(
                    self._process_messages(turns, images, add_generation_prompt, continue_final_message, **tiling)
                )
        out = self.batchify(samples)
        return out if return_dict else out["input_ids"]

    def _render(self, messages: Sequence[Message], settings: dict[str, Any]) -> str:
        try:
            return self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **settings)
        except TemplateError as error:
            raise ValueError(f"The chat template refuses the conversation: {error}") from error

    def _process_messages(
        self,
        turns: Sequence[Message],
        images: Sequence[Any],
        add_generation_prompt: bool,
        continue_final_message: bool,
        cropping: bool | None,
        candidate_resolutions: Sequence[Sequence[int]] | None,
        max_pixels: int | None,
    ) -> VLChatProcessorOutput:
        if not turns:
            raise ValueError("The conversation has no messages.")
        loaded = self._load_images(images, max_pixels)
        cropping = len(loaded) <= MAX_TILED_IMAGES if cropping is None else cropping
        sample = self._encode_conversation(
            turns, loaded, cropping, self._resolutions(candidate_resolutions), add_generation_prompt
        )
        answering = message_role(turns[-1], self.new_chat_template().roles) == "assistant"
        unfinished = add_generation_prompt or continue_final_message or not str(turns[-1]["content"]).strip()
        if answering and unfinished:
            sample.drop_last(self.eos_id)
        return self._finish(sample, self.format_messages(turns, self.sft_format))
