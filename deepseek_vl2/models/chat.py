"""One question to the model, and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .answers import ChatAnswer
from .call_inputs import as_image_list
from .image_processing import load_images
from .messages import IMAGE_TOKEN, check_messages


class ChatMixin:
    """`chat` of the whole model."""

    def chat(
        self,
        processor: Any,
        question: str,
        images: Any = None,
        history: Sequence[Mapping[str, Any]] | None = None,
        system_prompt: str = "",
        max_new_tokens: int = 512,
        **options: Any,
    ) -> tuple[ChatAnswer, list[dict[str, Any]]]:
        """Ask one question: ``answer, history = model.chat(processor, "What is this?", images=["photo.jpg"])``.

        Args:
            processor: the model's.
            question: the user's turn. Its ``<image>`` tags say where the pictures stand; without tags they come first.
            images: of this turn: one or a list, each a path, bytes, a data URL, an array or a PIL image.
            history: what an earlier call returned, to go on from there.
            system_prompt: put in front as a system message; of a conversation's first call.
            max_new_tokens: longest answer, in tokens.
            **options: more arguments of ``generate``; greedy unless ``do_sample=True`` is one of them.

        Returns:
            The answer, a string with ``grounding`` (its boxes) that a notebook shows with its picture, and the
            conversation with both turns, for the next call.

        Raises:
            ValueError: tags and images differ in number, or a bad image.
        """
        conversation = [dict(message) for message in check_messages(history or [])]
        if system_prompt:
            if conversation:
                raise ValueError("system_prompt belongs to a conversation's first question.")
            conversation.append({"role": "system", "content": system_prompt})
        shown = load_images(as_image_list(images), background=processor.background)
        tag = getattr(processor, "image_token", IMAGE_TOKEN)
        if shown and tag not in question:
            question = f"{tag}\n" * len(shown) + question
        conversation.append({"role": "user", "content": question, "images": shown})
        inputs = processor(conversations=conversation).to(self.device)  # type: ignore[attr-defined]
        options.setdefault("do_sample", False)
        with torch.no_grad():
            ids = self.generate(**inputs, max_new_tokens=max_new_tokens, **options)  # type: ignore[attr-defined]
        new = ids[0, inputs["input_ids"].shape[1] :].tolist()
        ends = {processor.eos_id, processor.pad_id}
        while new and new[-1] in ends:
            new.pop()
        text = processor.decode(new, skip_special_tokens=False).strip()
        conversation.append({"role": "assistant", "content": text})
        pictures = [image for message in conversation for image in message.get("images") or []]
        return ChatAnswer(text, pictures), conversation
