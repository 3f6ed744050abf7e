"""From a conversation and its images to the tensors that the model takes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from types import EllipsisType
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image

from .answers import GroundingProcessor
from .batch import BatchCollateOutput, VLChatProcessorOutput, collate
from .call_inputs import ImageOptions, as_image_list, as_list, distribute_images
from .call_options import BatchOptions, take_groups
from .image_modes import Background, check_background
from .image_processing import ImageTransform, load_images, make_tiles
from .image_processor import SETTINGS, DeepseekVLV2ImageProcessor
from .messages import SYSTEM_ROLES, Message, check_messages, is_low_conversation
from .processing_templates import ChatTemplateProcessor
from .prompt_encoding import PromptEncoder, TokenSequence
from .standard_batch import StandardBatch, collate_standard
from .tiling import MAX_TILED_IMAGES, TileGrid, select_best_resolution, tokens_per_side
from .turns import print_turns

__all__ = [
    "BatchCollateOutput",
    "DeepseekVLV2Processor",
    "ImageTransform",
    "StandardBatch",
    "VLChatProcessorOutput",
    "select_best_resolution",
]


class DeepseekVLV2Processor(ChatTemplateProcessor, GroundingProcessor):
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
        background: the colour under transparent pixels; ``None`` drops their alpha, as the original package does.
        transformers_defaults: texts and chat templates are neither padded nor made tensors unless that is asked for, as
            transformers' processors do; TRL's GRPOTrainer relies on it.

    Raises:
        ValueError: an unknown prompt template, resolutions that are not whole tiles, a background that is no colour, or
            a tokenizer that loses spaces.

    Source: ``processing_deepseek_vl_v2.py`` of the original package.
    """

    attributes = ["tokenizer"]

    # ---------------------------------------------------------------- images

    @property
    def image_processor(self) -> DeepseekVLV2ImageProcessor:
        """What turns images alone into ``pixel_values`` and ``image_sizes``."""
        return DeepseekVLV2ImageProcessor(**{name: getattr(self, name) for name in SETTINGS})

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
        sample = self._encoder(cropping).encode_prompt(
            conversation, load_images(images, background=self.background), bos=bos, eos=eos
        )
        tiles = list(self._make_tiles(sample).numbers()) if sample.images else []
        return sample.ids, tiles, sample.image_mask, [list(grid) for grid in sample.grids], sample.num_image_tokens

    def format_messages_v2(
        self, messages: Sequence[Message], pil_images: Sequence[Image.Image], systems: Any = None
    ) -> tuple[list[int], list[int], list[torch.Tensor], list[bool], list[list[int]], list[int]]:
        """Tokenize a conversation; the original package's name for it.

        Returns ids, labels, tiles, the mask of image tokens, [across, down] and the token count of each image.
        """
        cropping = len(pil_images) <= MAX_TILED_IMAGES
        loaded = load_images(pil_images, background=self.background)
        turns = self._walk(self._flatten(messages))
        sample = self._encoder(cropping).encode_turns(turns, loaded, self.mask_prompt)
        tiles = list(self._make_tiles(sample).numbers()) if sample.images else []
        grids = [list(grid) for grid in sample.grids]
        return sample.ids, sample.labels, tiles, sample.image_mask, grids, sample.num_image_tokens

    # ---------------------------------------------------------------- samples and batches

    def _encoder(self, cropping: bool, candidate_resolutions: Sequence[Sequence[int]] | None = None) -> PromptEncoder:
        """Return what encodes the prompts of one call."""
        resolutions = self.candidate_resolutions
        if candidate_resolutions is not None:
            resolutions = [(int(width), int(height)) for width, height in candidate_resolutions]
            self._check_resolutions(resolutions)
        return PromptEncoder(
            self.tokenizer,
            image_token=self.image_token,
            literals=self._literals,
            image_token_id=self.image_token_id,
            ignore_id=self.ignore_id,
            tile_size=self.image_size,
            side=tokens_per_side(self.image_size, self.patch_size, self.downsample_ratio),
            cropping=cropping,
            resolutions=resolutions,
        )

    def _read_images(
        self, images: Sequence[Any] | None, options: ImageOptions
    ) -> tuple[list[Image.Image], PromptEncoder]:
        """Return the images of a sample, and what encodes its prompt."""
        background = self.background if options.background is ... else check_background(options.background)
        loaded = load_images(images, options.max_pixels, background)
        cropping = len(loaded) <= MAX_TILED_IMAGES if options.cropping is None else options.cropping
        return loaded, self._encoder(cropping, options.candidate_resolutions)

    def _make_tiles(self, sample: TokenSequence) -> Any:
        return make_tiles(sample.images, sample.grids, self.image_size, self.image_transform)

    def _finish(self, sample: TokenSequence, sft_format: str) -> VLChatProcessorOutput:
        # NumPy reads lists several times as fast as PyTorch.
        input_ids, target_ids = (torch.from_numpy(np.array(ids, np.int64)) for ids in (sample.ids, sample.labels))
        grids = sample.grids or [TileGrid(0, 0)]
        return VLChatProcessorOutput(
            sft_format=sft_format,
            input_ids=input_ids,
            target_ids=target_ids,
            images=self._make_tiles(sample),
            images_seq_mask=torch.from_numpy(np.array(sample.image_mask, np.bool_)),
            images_spatial_crop=torch.tensor(grids, dtype=torch.long),
            num_image_tokens=sample.num_image_tokens,
        )

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
        background: Background | EllipsisType = ...,
        mask_prompt: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
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
            background: the colour under transparent pixels, ``None`` to drop their alpha; by default the processor's.
            mask_prompt: take no loss on the system and user turns of a conversation; by default the processor's own.
            add_generation_prompt, continue_final_message: how a conversation ends, see `apply_chat_template`.

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
        if not isinstance(system_prompt, str):
            raise ValueError(f"system_prompt must be a text, got {type(system_prompt).__name__}.")
        if conversations is not None and is_low_conversation(conversations) and cropping is None:
            cropping = False
        options = ImageOptions(cropping, candidate_resolutions, max_pixels, background)
        loaded, encoder = self._read_images(images, options)
        if conversations is not None:
            turns = self._walk(
                self._with_system_prompt(conversations, system_prompt), add_generation_prompt, continue_final_message
            )
            mask_prompt = self.mask_prompt if mask_prompt is None else mask_prompt
            sample = encoder.encode_turns(turns, loaded, mask_prompt)
            printed = turns[1:] if system_prompt else turns
            sft_format = system_prompt.strip() + print_turns(printed, self.sft_format, self.tokenizer.eos_token)
        else:
            assert prompt is not None
            if apply_sft_format:
                sft_format = self.format_prompts(prompt, self.sft_format, system_prompt)
            else:
                sft_format = system_prompt.strip() + prompt
            sample = encoder.encode_prompt(sft_format, loaded)
        if inference_mode:
            sample.drop_last(self.eos_id)
        return self._finish(sample, sft_format)

    @staticmethod
    def _with_system_prompt(conversations: Sequence[Message], system_prompt: str) -> Sequence[Message]:
        if not conversations:
            raise ValueError("The conversation has no messages.")
        if not system_prompt:
            return conversations
        if conversations[0].get("role") in SYSTEM_ROLES:
            raise ValueError("Give system_prompt or a system message in the conversation, not both.")
        return [{"role": "system", "content": system_prompt}, *conversations]

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        images: Sequence[Any] | Image.Image | None = None,
        text: str | None = None,
        *,
        force_batchify: Literal[False],
        **kwargs: Any,
    ) -> VLChatProcessorOutput: ...

    @overload
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
        background: Background | EllipsisType = ...,
        padding: bool | str | None = None,
        padding_side: str | None = None,
        truncation: bool | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> BatchCollateOutput: ...

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
        background: Background | EllipsisType = ...,
        padding: bool | str | None = None,
        padding_side: str | None = None,
        truncation: bool | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Process a prompt, a conversation, or a list of either.

        Args:
            images: images in the order of their tags; for a list of samples, a list for each or all in one flat list.
            text: what the chat template rendered; bos is added when it is missing, unless ``add_special_tokens`` is
                False: then nothing is added, and no end token left out.
            prompt: a text, or a list of texts; see `process_one`.
            conversations: a conversation (a list of messages), or a list of conversations.
            force_batchify: return a batch of one, rather than a bare sample, for a single input.
            padding, padding_side, truncation, max_length, pad_to_multiple_of, return_tensors: see `BatchOptions`.
            apply_sft_format, inference_mode, system_prompt, cropping, candidate_resolutions, max_pixels, background:
                see `process_one`.
            **kwargs: ``text_kwargs``, ``images_kwargs`` and ``common_kwargs`` hold keywords of the above; what else is
                not known, a warning names.

        Returns:
            For ``text`` a `StandardBatch`, under transformers' names; for the original's ``prompt`` and
            ``conversations`` a `BatchCollateOutput`; and a `VLChatProcessorOutput` for a single input without
            ``force_batchify``.

        Raises:
            ValueError, FileNotFoundError: see `process_one`.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "images", "text", "kwargs")}
        groups = take_groups(kwargs)
        if groups:
            return self(images, text, **{**given, **kwargs, **groups})
        unknown = [name for name, value in kwargs.items() if value is not None]
        if unknown:
            # transformers' pipelines hand their own options to every processor.
            warnings.warn(f"The processor does not know, and ignores: {', '.join(unknown)}.", stacklevel=2)
        batching = BatchOptions.of({field.name: given[field.name] for field in fields(BatchOptions)})
        if sum(source is not None for source in (text, prompt, conversations)) != 1:
            raise ValueError("Give exactly one of text, prompt and conversations.")
        if add_special_tokens is not None and text is None:
            raise ValueError("add_special_tokens belongs to text: prompts and conversations always begin with bos.")
        options = ImageOptions(cropping, candidate_resolutions, max_pixels, background)
        images = as_image_list(images)
        sources, single = as_list(text, prompt, conversations)
        if conversations is not None and any(source is None for source in sources):
            check_messages(conversations)
        samples = []
        distributed = distribute_images(images, sources, single, self.sft_format, self.image_token)
        for source, source_images in zip(sources, distributed, strict=True):
            if text is not None:
                bare = add_special_tokens is False
                samples.append(self._process_rendered(source, source_images, options, inference_mode, bare))
                continue
            kind: dict[str, Any] = {"prompt": source} if prompt is not None else {"conversations": source}
            samples.append(
                self.process_one(
                    **kind,
                    images=source_images,
                    apply_sft_format=apply_sft_format,
                    inference_mode=inference_mode,
                    system_prompt=system_prompt,
                    **vars(options),
                )
            )
        return self._hand_over(samples, batching, single and not force_batchify, standard=text is not None)

    def _hand_over(
        self,
        samples: Sequence[VLChatProcessorOutput],
        options: BatchOptions,
        bare: bool = False,
        standard: bool = False,
    ) -> Any:
        """Return samples as a batch, or one as it is, cut and padded as asked for."""
        limit = options.limit(self.tokenizer)
        options.cut(samples, limit)
        if bare:
            return options.hand_over(samples[0])
        ragged = standard and options.is_ragged(self.transformers_defaults)
        length = None if ragged else options.padded_length([len(sample) for sample in samples], limit)
        ids, left = (self.pad_id, self.ignore_id), options.is_left(self.tokenizer)
        if not standard:
            return options.hand_over(collate(samples, *ids, left, length))
        asked = options.return_tensors is not None or self.transformers_defaults
        dtype = torch.long if asked else torch.bool
        sizes = (self.image_token_id, self.image_size)
        return options.hand_over(collate_standard(samples, *ids, *sizes, left, length, dtype))

    def _process_rendered(
        self,
        text: str,
        images: Sequence[Any] | None,
        options: ImageOptions,
        inference_mode: bool = True,
        bare: bool = False,
    ) -> VLChatProcessorOutput:
        loaded, encoder = self._read_images(images, options)
        return self._finish(encoder.encode_rendered(text, loaded, inference_mode and not bare, bos=not bare), text)

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
        return collate(sample_list, self.pad_id, self.ignore_id, left=padding == "left")
