"""From a request's messages to the prompt that the engine takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
from PIL import Image

from deepseek_vl2.engine.launching import Launching
from deepseek_vl2.engine.prompts import content_key, prompt_of
from deepseek_vl2.engine.request import Prompt
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

from .decode_process import Decoders
from .endings import Ending
from .errors import ApiError
from .images import decode_images, fetch_image, read_data_urls
from .schemas import ImagePart, TextPart
from .settings import ImageLimits
from .turns import Turn

DEFAULT_ENDING = Ending()
CLOSED = Ending(add_generation_prompt=False)


@dataclass
class PreparedPrompt:
    """A prompt, and the sizes (width, height) in pixels of the images it shows."""

    prompt: Prompt
    image_sizes: list[tuple[int, int]]


class PromptBuilder:
    """Prepares prompts, a few at a time, without holding up the event loop.

    Args:
        model: the model.
        processor: its processor.
        max_length: tokens that a prompt may have at most.
        longest_token: bytes of the tokenizer's longest token.
        limits: limits of images.
        threads: prompts prepared at the same time.
        launching: of the engine, which goes first.
        hashed: whether the engine asks prompts for their hashes, which are made here: its own thread has more to do.
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        processor: DeepseekVLV2Processor,
        max_length: int,
        longest_token: int,
        limits: ImageLimits,
        threads: int,
        launching: Launching,
        hashed: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.max_length = max_length
        self.most_bytes = max_length * longest_token
        self.limits = limits
        self.limiter = anyio.CapacityLimiter(threads)
        self.launching = launching
        self.hashed = hashed
        self.decoders = Decoders()

    async def build(
        self, turns: Sequence[Turn], field: str = "messages", ending: Ending = DEFAULT_ENDING
    ) -> PreparedPrompt:
        """Return the prompt of a conversation.

        Args:
            turns: the conversation.
            field: the field of the request that holds it, for errors.
            ending: where it ends.

        Raises:
            ApiError: the turns or their images cannot be used, or are too long.
        """
        parts = [part for turn in turns for part in turn.parts]
        self.check_size(sum(len(part.text) for part in parts if isinstance(part, TextPart)), field)
        images = [part for part in parts if isinstance(part, ImagePart)]
        if len(images) > self.limits.max_images:
            message = f"The request has {len(images)} images; {self.limits.max_images} are allowed."
            raise ApiError(400, message, field, "too_many_images")
        files = [(part.place, await fetch_image(part.url, part.place, self.limits)) for part in images]
        details = {part.detail for part in images}
        if "low" in details and len(details) > 1:
            raise ApiError(400, "detail must be 'low' for all images of a request or for none.", field)
        cropping = False if "low" in details else None
        return await anyio.to_thread.run_sync(
            self._process, turns, files, cropping, field, ending, limiter=self.limiter
        )

    def encode_text(self, text: str, bos: bool, field: str = "prompt") -> list[int]:
        """Return the tokens of a text that stands for itself.

        Raises:
            ApiError: it names an image, which only a conversation can show.
        """
        ids = self.processor.encode(text, bos=bos)
        if self.processor.image_token_id in ids:
            raise ApiError(400, f"{field} has {self.processor.image_token} but no image: chat shows images.", field)
        return ids

    def check_size(self, size: int, field: str) -> None:
        """Refuse a text that cannot fit before work goes into it."""
        if size > self.most_bytes:
            raise self.too_long(f"The {field} has {size:,} characters, which is more than", field)

    def too_long(self, what: str, field: str = "messages") -> ApiError:
        """Return the error for a prompt that does not fit."""
        message = f"{what} the {self.max_length} tokens of prompt and answer together that this server allows."
        return ApiError(400, message, field, "context_length_exceeded")

    def _process(
        self,
        turns: Sequence[Turn],
        files: list[tuple[str, bytes | str]],
        cropping: bool | None,
        field: str,
        ending: Ending,
    ) -> PreparedPrompt:
        self.launching.wait()
        read = read_data_urls(files, self.limits)
        images = decode_images(read, self.limits, self.decoders)
        sizes = [image.size for image in images]
        remaining = iter(images)
        conversation = [
            {"role": turn.role, "content": [self._part(part, remaining) for part in turn.parts]} for turn in turns
        ]
        self.launching.wait()
        try:
            inputs = self.processor.process_one(
                conversations=conversation,
                cropping=cropping,
                max_pixels=self.limits.max_pixels,
                inference_mode=ending != CLOSED,  # where the last message is to be ended, so is an answer
                add_generation_prompt=ending.add_generation_prompt,
                continue_final_message=ending.continue_final_message,
            )
        except ValueError as error:
            raise ApiError(400, str(error), field) from error
        self.launching.wait()
        # Of a file: it has fewer bytes than its pixels.
        keys = [content_key("file", (len(data),), data) for _, data in read]
        prompt = prompt_of(self.model, inputs, keys=keys)
        if self.hashed:
            prompt.hashes()
        return PreparedPrompt(prompt, sizes)

    @staticmethod
    def _part(part: Any, images: Any) -> dict[str, str | Image.Image]:
        if isinstance(part, ImagePart):
            return {"type": "image", "image": next(images)}
        return {"type": "text", "text": part.text}
