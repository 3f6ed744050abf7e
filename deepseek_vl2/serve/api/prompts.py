"""From a request's messages to the prompt that the engine takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
from PIL import Image

from deepseek_vl2.engine.prompts import prompt_of
from deepseek_vl2.engine.request import Prompt
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

from .errors import ApiError
from .images import decode_images, read_image_file
from .schemas import ChatRequest, ImagePart
from .settings import ImageLimits

ROLES = {"developer": "system"}


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
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        processor: DeepseekVLV2Processor,
        max_length: int,
        longest_token: int,
        limits: ImageLimits,
        threads: int,
    ) -> None:
        self.model = model
        self.processor = processor
        self.max_length = max_length
        self.most_bytes = max_length * longest_token
        self.limits = limits
        self.limiter = anyio.CapacityLimiter(threads)

    async def build(self, request: ChatRequest) -> PreparedPrompt:
        """Return the prompt of a request.

        Raises:
            ApiError: the messages or their images cannot be used, or are too long.
        """
        self._check_text(request)
        images = self._images(request)
        files = [(place, await read_image_file(part.image_url.url, place, self.limits)) for place, part in images]
        details = {part.image_url.detail or "auto" for _, part in images}
        if "low" in details and len(details) > 1:
            raise ApiError(400, "detail must be 'low' for all images of a request or for none.", "messages")
        cropping = False if "low" in details else None
        return await anyio.to_thread.run_sync(self._process, request, files, cropping, limiter=self.limiter)

    def _check_text(self, request: ChatRequest) -> None:
        """Refuse a text that cannot fit before work goes into it."""
        texts = [part.text for message in request.messages for part in message.parts if not isinstance(part, ImagePart)]
        size = sum(map(len, texts))
        if size > self.most_bytes:
            raise self.too_long(f"The messages have {size:,} characters, which is more than")

    def too_long(self, what: str) -> ApiError:
        """Return the error for a prompt that does not fit."""
        message = f"{what} the {self.max_length} tokens of prompt and answer together that this server allows."
        return ApiError(400, message, "messages", "context_length_exceeded")

    def _images(self, request: ChatRequest) -> list[tuple[str, ImagePart]]:
        found = [
            (f"messages.{i}.content.{j}.image_url", part)
            for i, message in enumerate(request.messages)
            for j, part in enumerate(message.parts)
            if isinstance(part, ImagePart)
        ]
        if len(found) > self.limits.max_images:
            message = f"The request has {len(found)} images; {self.limits.max_images} are allowed."
            raise ApiError(400, message, "messages", "too_many_images")
        return found

    def _process(self, request: ChatRequest, files: list[tuple[str, bytes]], cropping: bool | None) -> PreparedPrompt:
        images = decode_images(files, self.limits)
        sizes = [image.size for image in images]
        remaining = iter(images)
        conversation = [
            {
                "role": ROLES.get(message.role, message.role),
                "content": [self._part(part, remaining) for part in message.parts],
            }
            for message in request.messages
        ]
        if conversation[-1]["role"] == "system":
            raise ApiError(400, "The last message must be a user's, or an assistant's to go on with.", "messages")
        try:
            inputs = self.processor.process_one(
                conversations=conversation, cropping=cropping, max_pixels=self.limits.max_pixels
            )
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from error
        return PreparedPrompt(prompt_of(self.model, inputs), sizes)

    @staticmethod
    def _part(part: Any, images: Any) -> dict[str, str | Image.Image]:
        if isinstance(part, ImagePart):
            return {"type": "image", "image": next(images)}
        return {"type": "text", "text": part.text}
