"""vLLM's multi-modal processing of a prompt, done by this package's processor.

Written for the interfaces of vLLM 0.24 and of 0.32 to 0.33, which hand over the same things by other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import BaseDummyInputsBuilder
from vllm.multimodal.processing.processor import BaseMultiModalProcessor, BaseProcessingInfo, PromptReplacement

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2Processor
from deepseek_vl2.models.image_loading import read_image
from deepseek_vl2.models.tiling import TileGrid

from .inputs import decode_odd_image, encode_images, is_tiled, largest_resolution, load_processor, tokens_of_image

OPTIONS = ("cropping", "candidate_resolutions")


class ImageParser(MultiModalDataParser):
    """Keeps files as they came where vLLM's decoder would change what they show (16-bit grey, transparency, ...)."""

    def parse_mm_data(self, mm_data: Mapping[str, Any]) -> Any:
        """Return the items of a prompt; see vLLM."""
        images = mm_data.get("image")
        if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
            mm_data = {**mm_data, "image": [_as_it_came(image) for image in images]}
        elif images is not None:
            mm_data = {**mm_data, "image": _as_it_came(images)}
        return super().parse_mm_data(mm_data)


def _as_it_came(image: Any) -> Any:
    data = getattr(image, "original_bytes", None)
    if not isinstance(data, bytes) or (odd := decode_odd_image(data)) is None:
        return image
    return read_image(odd)


def _for_processor(image: Any) -> Any:
    """Return an item as this package's processor takes it."""
    if isinstance(image, torch.Tensor):
        image = image.numpy(force=True)
    if not isinstance(image, np.ndarray):
        return image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"An array must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}.")
    return Image.fromarray(image)


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the processor."""

    def get_hf_config(self) -> DeepseekVLV2Config:
        """Return the model's config.

        Raises:
            TypeError: vLLM read it into another class, so the plugin does not fit this version.
        """
        return self.ctx.get_hf_config(DeepseekVLV2Config)

    def get_hf_processor(self, **kwargs: object) -> DeepseekVLV2Processor:
        """Return the checkpoint's processor; options go to each call."""
        model_config = self.ctx.model_config
        return load_processor(model_config.model, model_config.revision)

    def get_data_parser(self) -> MultiModalDataParser:
        """Return what sorts a prompt's images."""
        return ImageParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return that a prompt may have any number of images."""
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """Return the options of images, by vLLM's scopes."""
        return {"text_kwargs": set(), "images_kwargs": set(OPTIONS)}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the tokens of the largest image."""
        return {"image": self.largest_image()[1]}

    def largest_image(self) -> tuple[tuple[int, int], int]:
        """Return the (width, height) in pixels that takes most tokens, and how many."""
        options = self.tiling_options({}, 1)
        processor = self.get_hf_processor()
        if not options["cropping"]:
            side = processor.image_size
            return (side, side), tokens_of_image(processor, TileGrid(1, 1))
        return largest_resolution(processor, options.get("candidate_resolutions"))

    def tiling_options(self, kwargs: Mapping[str, Any], images: int) -> dict[str, Any]:
        """Return how a prompt's images are cut; always with ``cropping``, on which the tiles' cache key depends.

        Raises:
            ValueError: an option that the processor does not have.
        """
        given = dict(self.ctx.get_merged_mm_kwargs({}))
        given.update(kwargs)
        given.update(given.pop("images_kwargs", None) or {})
        unknown = [name for name, value in given.items() if name not in OPTIONS and value != {}]  # a scope left empty
        if unknown:
            raise ValueError(f"Unknown mm_processor_kwargs: {', '.join(unknown)}; there are {' and '.join(OPTIONS)}.")
        options = {name: given[name] for name in OPTIONS if given.get(name) is not None}
        options.setdefault("cropping", is_tiled(images))
        return options


class DummyInputsBuilder(BaseDummyInputsBuilder):
    """Prompts that vLLM measures memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return the tags of that many images."""
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return that many images of the size that takes most tokens."""
        (width, height), _ = self.info.largest_image()
        return {
            "image": self._get_dummy_images(
                width=width, height=height, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
            )
        }


class MultiModalProcessor(BaseMultiModalProcessor):
    """Expands image tokens and cuts images, for a prompt of any number of images."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Return the ids, tiles and places of a prompt; see vLLM.

        Whether images are tiled depends on how many there are, and goes into the key under which tiles and embeddings
        are cached: one picture alone and the same among three are two things.

        Raises:
            ValueError: image tags and images that differ in number, or an unknown option.
        """
        processor = self.info.get_hf_processor()
        prompt = inputs.prompt
        ids = self.info.get_tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        images = inputs.mm_data_items.get_count("image", strict=False)
        tags = ids.count(processor.image_token_id)
        if tags != images:
            raise ValueError(
                f"The prompt has {tags} {processor.image_token} tags but {images} images were given: "
                "each image needs one tag, in the same order."
            )
        options = self.info.tiling_options(inputs.hf_processor_mm_kwargs, images)
        return super().apply(replace(inputs, prompt=ids, hf_processor_mm_kwargs=options), timing_ctx)

    def _apply_hf_processor_mm_only(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], tokenization_kwargs: Mapping[str, Any]
    ) -> BatchFeature:
        """Cut images; the name in 0.24, where prompts are ids by then."""
        items = mm_items.get("image")
        if not items:
            return BatchFeature()
        if not isinstance(items, ImageProcessorItems):
            raise ValueError("Embeddings of images are not taken as input: give the images.")
        return self._cut(items.get_all(), hf_processor_mm_kwargs)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        """Cut images; the name from 0.32 on."""
        return self._cut(hf_data["images"], hf_kwargs)

    def _cut(self, images: Sequence[Any], options: Mapping[str, Any]) -> BatchFeature:
        encoded = encode_images(
            self.info.get_hf_processor(),
            [_for_processor(image) for image in images],
            options["cropping"],
            options.get("candidate_resolutions"),
        )
        return BatchFeature(
            {
                "tiles": encoded.tiles_VSSC,
                "images_spatial_crop": torch.tensor(encoded.grids),
                "values": encoded.values.repeat(len(encoded.grids), 1, 1),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        crops = hf_inputs.get("images_spatial_crop", torch.empty(0, 2, dtype=torch.long))
        return {
            "tiles": MultiModalFieldConfig.flat_from_sizes("image", 1 + crops.prod(-1)),
            # Read by the host, which would wait for the device.
            "images_spatial_crop": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "values": MultiModalFieldConfig.batched("image"),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor = self.info.get_hf_processor()
        image_id = processor.image_token_id

        def tokens(index: int) -> list[int]:
            across, down = out_mm_kwargs["image"][index]["images_spatial_crop"].data.tolist()
            return [image_id] * tokens_of_image(processor, TileGrid(across, down))

        return [PromptReplacement(modality="image", target=[image_id], replacement=tokens)]
